"""When a network fits its training set, and when it generalises: grokking seen in anybody's training.

Xu, Wang, Frei, Vardi, Hu, "Benign Overfitting and Grokking in ReLU Networks for XOR Cluster Data", 2024
(https://arxiv.org/abs/2310.02541; no official code). On such data a two-layer ReLU network fits all training labels,
the flipped ones too, after one step and tests at chance; some steps later it tests near the optimum and still fits
them. With accuracy A on a fixed probe of training and of validation samples, in eval mode, at optimizer step t:

    fit_step = the first t with A_train >= fit_threshold      gen_step = the first t with A_val >= gen_threshold
    delay = gen_step - fit_step            phase: 0 unfitted, 1 fitted and not generalised, 2 both

Two quantities show why. *Linear share* (ours, not the paper's): with x' = 2c - x the reflection of x about c,

    odd = (f(x) - f(x')) / 2,   even = (f(x) + f(x')) / 2,   share = mean odd^2 / (mean odd^2 + mean even^2)

For a two-layer ReLU network without biases and c = 0 the odd part is exactly the linear function a^T W x / 2, so a
share near 1 is a network that is still linear. *Alignment*: for every row w of the first layer the largest
|cos(w, mu_k)| over given directions mu_k, on average over rows.

Costs two forward passes over the probe a measurement, three with the linear share. On the default schedule that is four
measurements for every factor of ten in steps.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_recipes.core import random
from lightning_recipes.core.batch import get_input, with_input
from lightning_recipes.core.diagnostics import Monitor
from lightning_recipes.core.distributed import all_sum, rank_and_world
from lightning_recipes.core.errors import RecipeError, check_argument
from lightning_recipes.core.evaluation import (
    Decision,
    apart,
    as_a_step_gets_it,
    decide,
    validation_loaders,
)
from lightning_recipes.core.features import part_of
from lightning_recipes.core.labels import has_sample_values, sample_values
from lightning_recipes.core.prepare import Plan
from lightning_recipes.core.probe import Samples, encode, samples_at_hand, samples_of, some_of
from lightning_recipes.core.recipe import Paper

# -- the maths -------------------------------------------------------------------------------------------------------


def odd_and_even(f: Tensor, mirrored: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over samples of the squares of the odd and of the even part of f.

    Several logits are taken less their mean, which a softmax does not see.

    Args:
        f: logits of x ``[n, outputs]``.
        mirrored: logits of the reflections of x.

    Returns:
        two scalars in fp64.
    """
    f, mirrored = f.double(), mirrored.double()
    if f.shape[1] > 1:
        f, mirrored = f - f.mean(1, keepdim=True), mirrored - mirrored.mean(1, keepdim=True)
    return ((f - mirrored) / 2).square().sum(), ((f + mirrored) / 2).square().sum()


def share(odd: float, even: float) -> float:
    """odd / (odd + even); nan for a network that is 0 everywhere."""
    return odd / (odd + even) if odd + even > 0 else math.nan


def alignment(rows: Tensor, directions: Tensor) -> Tensor:
    """max_k |cos(row, direction_k)| of every row; 0 for rows or directions that are 0.

    Args:
        rows: ``[m, p]``.
        directions: ``[K, p]``.

    Returns:
        ``[m]`` in fp64.
    """
    rows, directions = (nn.functional.normalize(each.double(), dim=1) for each in (rows, directions))
    return (rows @ directions.T).abs().amax(1)


def class_centroids(x: Tensor, labels: Tensor) -> Tensor:
    """Mean of each class that is there: ``[K, p]``."""
    return torch.stack([x[labels == c].mean(0) for c in labels.unique()])


def k_means(x: Tensor, k: int, draws: torch.Generator, rounds: int = 100) -> Tensor:
    """Centroids by Lloyd's rounds, from a start that is drawn by distance (k-means++).

    Args:
        x: ``[n, p]`` with n at least k.
        rounds: at most so many.

    Returns:
        ``[k, p]``.
    """
    chosen = [int(torch.randint(len(x), (1,), generator=draws))]
    while len(chosen) < k:
        distance = torch.cdist(x, x[chosen]).amin(1).square()
        distance = distance if distance.sum() > 0 else torch.ones_like(distance)
        chosen.append(int(torch.multinomial(distance, 1, generator=draws)))
    centroids, before = x[chosen], None
    for _ in range(rounds):
        nearest = torch.cdist(x, centroids).argmin(1)
        if before is not None and torch.equal(nearest, before):
            break
        before = nearest
        members = nn.functional.one_hot(nearest, k).to(x)
        counts = members.sum(0)[:, None]
        centroids = torch.where(counts > 0, members.T @ x / counts.clamp_min(1), centroids)
    return centroids


def first_reaching(steps: Sequence[int], values: Sequence[float], threshold: float) -> int | None:
    """The first step whose value is at least the threshold."""
    return next((step for step, value in zip(steps, values) if value >= threshold), None)


def phase_of(fitted: bool, generalised: bool) -> int:
    """0 unfitted, 1 fitted and not generalised, 2 both."""
    return 0 if not fitted else 2 if generalised else 1


def rising(steps: Sequence[int], accuracies: Sequence[float], samples: int) -> bool:
    """Whether an accuracy has grown since half as many steps by more than two standard errors of the difference."""
    then = next((a for step, a in zip(reversed(steps), reversed(accuracies)) if 2 * step <= steps[-1]), accuracies[0])
    now = accuracies[-1]
    variance = (then * (1 - then) + now * (1 - now)) / max(samples, 1)
    return now - then > 2 * math.sqrt(variance)


def words(
    steps: Sequence[int],
    values: Mapping[str, Sequence[float]],
    fit_threshold: float,
    gen_threshold: float,
    samples: int,
) -> str:
    """What accuracies on training and validation samples say about a run, and what to do.

    Args:
        steps: optimizer steps that were measured.
        values: `train_acc` and `val_acc` at each, and `noisy_fit` and `linear_share` where they were measured.
        fit_threshold, gen_threshold: what counts as fitted, as generalised.
        samples: that the validation accuracy was measured on.
    """
    train, val, last = values["train_acc"], values["val_acc"], steps[-1]
    fit, gen = first_reaching(steps, train, fit_threshold), first_reaching(steps, val, gen_threshold)
    growing = rising(steps, val, samples)
    go_on = "keep training." if growing else "the validation accuracy no longer grows: stop now."
    if fit is None and gen is None:
        said = (
            f"Not fitted by step {last} (training accuracy {train[-1]:.3f}, validation {val[-1]:.3f}): keep training"
            " before you judge how it generalises."
        )
    elif fit is None:
        said = f"Generalised at step {gen} and not fitted by step {last}, so there is no overfitting: {go_on}"
    elif gen is None:
        advice = "rising): keep training." if growing else (
            "not rising): more steps have not helped so far; more data, smaller first weights or more weight decay may."
        )  # fmt: skip
        said = f"Fitted at step {fit} and not generalised by step {last} (validation accuracy {val[-1]:.3f}, {advice}"
    elif val[-1] < gen_threshold:
        said = f"Fitted at step {fit}, generalised at step {gen}, and back at {val[-1]:.3f} by step {last}: stop early."
    elif gen > fit:
        points = 100 * (val[-1] - val[list(steps).index(fit)])
        said = (
            f"Fitted at step {fit}, generalised at step {gen}: stopping at the fit would have cost {points:.1f} points"
            f" of validation accuracy; {go_on}"
        )
    else:
        said = f"Generalised at step {gen}, no later than fitted (step {fit}), so nothing was delayed: {go_on}"
    if "noisy_fit" in values:
        said += f" {100 * values['noisy_fit'][-1]:.0f} % of the flipped labels are fitted"
        harmless = values["noisy_fit"][-1] >= fit_threshold and val[-1] >= gen_threshold
        said += ", which does no harm: the overfitting is benign." if harmless else "."
    shares = [pair for pair in zip(steps, values.get("linear_share", [])) if pair[0] and not math.isnan(pair[1])]
    if shares:
        (first, then), (step, now) = shares[0], shares[-1]
        said += f" Linear share {then:.2f} at step {first}, {now:.2f} at step {step}."
    return said


# -- the callback ----------------------------------------------------------------------------------------------------


class GrokkingMonitor(Monitor):
    """Watch when a classifier fits its training set and when it generalises, and say at the end whether to go on.

    Measures accuracy on a fixed probe of training samples, with the labels they are trained on, and of the first
    validation set: `probe_size` of each, drawn once. Logs ``grok/train_acc``, ``val_acc``, ``gap``, ``phase`` (0
    unfitted, 1 fitted and not generalised, 2 both), once they are known ``fit_step``, ``gen_step`` and ``delay``, and
    where it can ``noisy_fit`` (accuracy on flipped labels, where the training set has a ``flip_mask``),
    ``linear_share`` and ``align_mean`` (with ``align_mean_pos`` and ``align_mean_neg`` by the sign of the outgoing
    weight where that is one number). At the end `verdict` says it in words, over a picture in the run's log folder.

    Training samples are read by the data module's ``plain_train_set`` where it has one; with an augmentation in the
    training set itself the training accuracy is that on augmented samples. Works with one logit, labels 0 and 1 or -1
    and 1, as with several. Under manual optimization, where the module's own step cannot be run without training, the
    logits are those of ``forward``.

    Args:
        probe_size: samples of each set to measure on.
        fit_threshold: training accuracy that counts as fitted.
        gen_threshold: validation accuracy that counts as generalised, above chance.
        every_n_steps: measure after every so many optimizer steps too.
        geometric_steps: measure after steps 0, 1, 2, 3, 5, 10, 20, 30, 50, ...
        linear_share: whether to measure it: 'auto' for flat inputs, True or False. Reflects about 0 for a network
            without biases, about the probe's mean otherwise.
        directions: to align the first layer with: ``[K, p]``, the path of a .pt file with that, 'classes' or
            'kmeans:K' for centroids of the training probe; None does not measure it.
        first_layer: dotted path of that layer; None for the first Linear layer of the module.
        stop_after_generalisation: end the fit once it is fitted and generalised.
        budget: add at most this share to the run's work, counted in forward passes, and leave out what is more; None
            for no limit.
        criterion: which loss of the module's training step to observe, where it cannot be found.
        draw: save a picture in the run's log folder at the end of a fit (needs the `plots` extra).

    Raises:
        RecipeError: for bad arguments; before the first step without validation data, for data that are not read by
            index, a loss that cannot be seen or does not classify, a gen_threshold at or below chance, and directions
            of another width than the first layer.
    """

    paper = Paper(
        "Benign Overfitting and Grokking in ReLU Networks for XOR Cluster Data",
        "Z. Xu, Y. Wang, S. Frei, G. Vardi, W. Hu",
        2024,
        "https://arxiv.org/abs/2310.02541",
    )
    does = "Says when a network fits, when it generalises, and whether it is worth training on."
    use_when = "A network has fitted its training set and you wonder whether to stop."
    costs = "Two or three forward passes over 1,024 samples, four times for every factor of ten in steps."
    log_prefix = "grok"
    ylabel = "accuracy, share"
    free_on_resume = frozenset({"draw", "directions"})  # a tensor: two of them are not simply equal or not

    def __init__(
        self,
        probe_size: int = 1024,
        fit_threshold: float = 0.99,
        gen_threshold: float = 0.9,
        every_n_steps: int | None = None,
        geometric_steps: bool = True,
        linear_share: bool | str = "auto",
        directions: str | Tensor | None = None,
        first_layer: str | None = None,
        stop_after_generalisation: bool = False,
        budget: float | None = None,
        criterion: str | int | None = None,
        draw: bool = True,
    ) -> None:
        super().__init__()
        self.probe_size, self.fit_threshold, self.gen_threshold = probe_size, fit_threshold, gen_threshold
        self.every_n_steps, self.geometric_steps, self.linear_share = every_n_steps, geometric_steps, linear_share
        self.directions, self.first_layer = directions, first_layer
        self.stop_after_generalisation = stop_after_generalisation
        self.budget, self.criterion, self.draw = budget, criterion, draw
        self.check_moments()
        check_argument(probe_size >= 1, self, "probe_size", probe_size, "at least 1")
        for name, value in (("fit_threshold", fit_threshold), ("gen_threshold", gen_threshold)):
            check_argument(0 < value <= 1, self, name, value, "in (0, 1]")
        ok = isinstance(linear_share, bool) or linear_share == "auto"
        check_argument(ok, self, "linear_share", linear_share, "'auto', True or False")
        if isinstance(directions, str):
            known = directions.endswith(".pt") or re.fullmatch(r"classes|kmeans:[1-9]\d*", directions)
            check_argument(known, self, "directions", directions, "'classes', 'kmeans:K', or the path of a .pt file")
        self._along: Tensor | None = None  # the directions, once they are known
        self._samples = 0  # of the validation probe
        self._shares = self._biased = False  # whether to measure the linear share; about the probe's mean or 0

    # -- before the first step -----------------------------------------------------------------------------------------

    def declare(self, plan: Plan) -> None:
        super().declare(plan)
        if not plan.fitting:
            return
        if not plan.trainer.enable_validation:
            raise RecipeError("GrokkingMonitor needs validation data to see generalisation")
        self._along = None
        if isinstance(self.directions, Tensor):
            self._along = self.directions
        elif self.directions is not None and self.directions.endswith(".pt"):
            self._along = _read(self.directions)
        if self._along is not None:
            self._check_directions(plan.module, self._along)

    def begin(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        train, val = self._training_probe(trainer), self._validation_probe(trainer)
        self._samples = val.total
        for samples in (train, val):
            with apart(trainer, "GrokkingMonitor", "try"):
                few = range(min(2 * rank_and_world()[1], len(samples.loader.dataset)))
                for batch, _ in samples_of(samples.loader, chosen=few):
                    batch = as_a_step_gets_it(trainer, batch)
                    self._check_classes(decide(trainer, batch, 0, self.criterion))
                    self._see_inputs(module, batch)
        plain = getattr(trainer.datamodule, "plain_train_set", None) is not None
        if not plain and _has_transform(train.loader.dataset):
            self.limit(
                "training samples are read with the training set's transform; where it is random the training accuracy"
                " is that of augmented samples (a data module with plain_train_set gives them without)"
            )
        if self._along is None and isinstance(self.directions, str):
            self._along = self._centroids(trainer, module, train)
            self._check_directions(module, self._along)
        if self.stop_after_generalisation and self._phase == 2:  # decided before the checkpoint that this goes on from
            trainer.should_stop = True

    def _check_classes(self, decision: Decision) -> None:
        if self.gen_threshold <= 1 / decision.classes:
            raise RecipeError(
                f"gen_threshold={self.gen_threshold:g} is at or below chance for {decision.classes} classes"
            )

    def _see_inputs(self, module: pl.LightningModule, batch: Any) -> None:
        """Decide whether there is a linear share, and say where its theory ends."""
        x = _input(batch)
        flat = x is not None and x.dim() == 2
        if self.linear_share is True and x is None:
            raise RecipeError("linear_share=True reflects inputs; the batch has no input tensor of floating point")
        self._shares = x is not None and (self.linear_share is True or (self.linear_share == "auto" and flat))
        if not self._shares:
            if self.linear_share == "auto":
                self.limit("the inputs are not flat vectors, so the linear share is left out (linear_share=True asks)")
            return
        layers = [part for part in module.modules() if next(part.parameters(recurse=False), None) is not None]
        two = len(layers) == 2 and all(isinstance(layer, nn.Linear) for layer in layers)
        self._biased = any(name.rpartition(".")[2] == "bias" for name, _ in module.named_parameters())
        beyond = {
            "biases": self._biased,
            f"{len(layers)} parts with parameters": not two,
            "inputs that are not flat": not flat,
        }
        if any(beyond.values()):
            self.limit(
                "the linear share is exact for two linear layers without biases and a ReLU between them; this network"
                f" has {' and '.join(what for what, there in beyond.items() if there)}, so its odd part need not be"
                " linear"
            )

    def _check_directions(self, module: pl.LightningModule, directions: Tensor) -> None:
        layer = self._first_layer(module)
        if directions.dim() != 2 or layer.weight.shape[1] != directions.shape[1]:
            raise RecipeError(
                f"directions must be (K, p) with p={layer.weight.shape[1]}, the first layer's"
                f" in_features; got {tuple(directions.shape)}"
            )

    def _first_layer(self, module: pl.LightningModule) -> nn.Module:
        if self.first_layer is not None:
            layer = part_of(module, self.first_layer)
            if getattr(getattr(layer, "weight", None), "dim", lambda: 0)() != 2:
                raise RecipeError(
                    f"first_layer={self.first_layer!r} is a {type(layer).__name__} without a weight of rows"
                )
            return layer
        linear = [part for part in module.modules() if isinstance(part, nn.Linear)]
        if not linear:
            raise RecipeError("there is no Linear layer to align with directions; name first_layer")
        return linear[0]

    def _centroids(self, trainer: pl.Trainer, module: pl.LightningModule, probe: Samples) -> Tensor:
        now: dict[str, Tensor] = {}

        def run(batch: Any, number: int) -> Tensor:
            now["x"] = get_input(batch).flatten(1)
            return decide(trainer, batch, number, self.criterion).labels

        found = encode(trainer, module, lambda: now, probe, run=run, full_precision=True)
        x = found.features["x"]
        if self.directions == "classes":
            return class_centroids(x, found.targets)
        k = int(self.directions.removeprefix("kmeans:"))
        if k > len(x):
            raise RecipeError(f"directions={self.directions!r} of a probe of {len(x)} samples")
        return k_means(x, k, random.generator("GrokkingMonitor", "k-means"))

    # -- measuring -----------------------------------------------------------------------------------------------------

    def _training_probe(self, trainer: pl.Trainer) -> Samples:
        samples = samples_at_hand(trainer)
        return samples_of(samples.loader, chosen=some_of(samples.total, self.probe_size, "GrokkingMonitor"))

    def _validation_probe(self, trainer: pl.Trainer) -> Samples:
        with random.forked(trainer.lightning_module.device):
            loaders = validation_loaders(trainer)
        if not loaders:
            raise RecipeError("GrokkingMonitor needs validation data to see generalisation")
        loader = loaders[0].batches
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            raise RecipeError(
                f"needs the validation data as a DataLoader over a data set read by index; got {type(loader).__name__}"
            )
        return samples_of(loader, chosen=some_of(len(loader.dataset), self.probe_size, "GrokkingMonitor"))

    def forwards(self, trainer: pl.Trainer) -> int:
        train, val = self._training_probe(trainer), self._validation_probe(trainer)
        return train.total + val.total * (2 if self._shares else 1)

    def measure(self, trainer: pl.Trainer, module: pl.LightningModule) -> Mapping[str, float]:
        train, val = self._training_probe(trainer), self._validation_probe(trainer)
        dataset = train.loader.dataset
        flipped = sample_values(dataset, "flip_mask").bool() if has_sample_values(dataset, "flip_mask") else None
        # right and all of the training probe, of its flipped labels, of the validation probe; odd and even squares
        sums = torch.zeros(8, dtype=torch.float64, device=module.device)
        with apart(trainer, "GrokkingMonitor", "train"):
            for number, (batch, share_of_it) in enumerate(train):
                right = decide(trainer, as_a_step_gets_it(trainer, batch), number, self.criterion).correct.double()
                sums[0] += right.sum()
                sums[1] += len(right)
                if flipped is not None:
                    noisy = flipped[torch.as_tensor(share_of_it)].to(right)
                    sums[2] += right @ noisy
                    sums[3] += noisy.sum()
        center = self._mean_input(trainer, val) if self._shares and self._biased else 0.0
        with apart(trainer, "GrokkingMonitor", "val"):
            for number, (batch, _) in enumerate(val):
                batch = as_a_step_gets_it(trainer, batch)
                seen = decide(trainer, batch, number, self.criterion)
                sums[4] += seen.correct.sum()
                sums[5] += len(seen.correct)
                if self._shares:
                    mirrored = with_input(batch, 2 * center - get_input(batch))
                    odd, even = odd_and_even(seen.logits, decide(trainer, mirrored, number, self.criterion).logits)
                    sums[6] += odd
                    sums[7] += even
        right, train_n, noisy_right, noisy_n, val_right, val_n, odd, even = all_sum(sums).tolist()
        values = {"train_acc": right / train_n, "val_acc": val_right / val_n}
        if noisy_n:
            values["noisy_fit"] = noisy_right / noisy_n
        if self._shares:
            values["linear_share"] = share(odd, even)
        if self._along is not None:
            values |= self._alignment(module)
        return values

    def _mean_input(self, trainer: pl.Trainer, samples: Samples) -> Tensor:
        """Mean of the probe's inputs, over all ranks."""
        total, count = None, 0
        with apart(trainer, "GrokkingMonitor", "mean"):
            for batch, share_of_it in samples:
                x = get_input(as_a_step_gets_it(trainer, batch))
                total = x.double().sum(0) if total is None else total + x.double().sum(0)
                count += len(share_of_it)
                dtype = x.dtype
        return (all_sum(total) / all_sum(total.new_tensor(count))).to(dtype)

    def _alignment(self, module: pl.LightningModule) -> dict[str, float]:
        layer = self._first_layer(module)
        cosines = alignment(layer.weight.detach(), self._along.to(layer.weight.device))
        values = {"align_mean": float(cosines.mean())}
        linear = [part for part in module.modules() if isinstance(part, nn.Linear) and part is not layer]
        outgoing = next((part for part in linear if part.weight.shape == (1, len(cosines))), None)
        if outgoing is not None:
            positive = outgoing.weight.detach()[0] > 0
            values["align_mean_pos"] = float(cosines[positive].mean())
            values["align_mean_neg"] = float(cosines[~positive].mean())
        return values

    # -- what it comes to ----------------------------------------------------------------------------------------------

    @property
    def fit_step(self) -> int | None:
        """The first measured step that was fitted."""
        return first_reaching(self.history.steps, self.history.values.get("train_acc", []), self.fit_threshold)

    @property
    def gen_step(self) -> int | None:
        """The first measured step that was generalised."""
        return first_reaching(self.history.steps, self.history.values.get("val_acc", []), self.gen_threshold)

    @property
    def _phase(self) -> int:
        return phase_of(self.fit_step is not None, self.gen_step is not None)

    def derived(self) -> Mapping[str, float]:
        fit, gen = self.fit_step, self.gen_step
        values = {"fit_step": fit, "gen_step": gen, "delay": None if fit is None or gen is None else gen - fit}
        known = {name: value for name, value in values.items() if value is not None}
        train, val = (self.history.values[name][-1] for name in ("train_acc", "val_acc"))
        return {"gap": train - val, "phase": self._phase, **known}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self.stop_after_generalisation and self._phase == 2:
            trainer.should_stop = True

    def state(self) -> dict[str, Any]:
        # those of the data at hand when the fit began, which a later phase may not have any more
        centroids = isinstance(self.directions, str) and not self.directions.endswith(".pt")
        return {**super().state(), "centroids": self._along if centroids else None}

    def load_state(self, state: Mapping[str, Any]) -> None:
        super().load_state(state)
        if state["centroids"] is not None:
            self._along = state["centroids"]

    def picture(self, path: Path, title: str) -> None:
        names = ("train_acc", "val_acc", "noisy_fit", "linear_share", "align_mean")
        self.history.draw(path, title, self.ylabel, log_x=self.geometric_steps, names=names)

    def conclude(self) -> str:
        return words(self.history.steps, self.history.values, self.fit_threshold, self.gen_threshold, self._samples)


def _input(batch: Any) -> Tensor | None:
    """The floating-point input of a batch, where there is one."""
    try:
        x = get_input(batch)
    except RecipeError:
        return None
    return x if x.is_floating_point() else None


def _has_transform(dataset: Any) -> bool:
    """Whether a data set, or what it is a subset of, changes its samples as they are read."""
    while dataset is not None:
        if getattr(dataset, "transform", None) is not None:
            return True
        dataset = getattr(dataset, "dataset", None)
    return False


def _read(path: str) -> Tensor:
    full = os.path.abspath(os.path.expandvars(os.path.expanduser(path)))
    if not os.path.isfile(full):
        raise RecipeError(f"directions={path!r}: no such file (looked for {full})")
    value = torch.load(full, map_location="cpu", weights_only=True)
    if not isinstance(value, Tensor):
        raise RecipeError(f"directions={path!r} holds a {type(value).__name__} and no tensor (K, p)")
    return value
