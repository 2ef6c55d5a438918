"""Linear probes of the features before and behind a projection head: what the head costs, while training runs.

Of the paper of ``ProjectionHead``; the file of that has what z and u are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_recipes.core.diagnostics import History, where_to_draw
from lightning_recipes.core.distributed import decided_on_rank_zero, rank_and_world
from lightning_recipes.core.errors import RecipeError, check_argument, speaking_for
from lightning_recipes.core.features import Taps, head_input
from lightning_recipes.core.head_fit import accuracy, balanced, fit_logistic, where_to_fit, worst_group
from lightning_recipes.core.labels import sample_values
from lightning_recipes.core.prepare import Plan
from lightning_recipes.core.probe import (
    Samples,
    bar,
    encode,
    samples_of,
    some_of,
    training_samples,
    validation_samples,
)
from lightning_recipes.core.recipe import Recipe
from lightning_recipes.core.spectrum import effective_rank
from lightning_recipes.core.step import observe
from lightning_recipes.modules.projection import PAPER, FixedReweighting, path_of_head


class PrePostMonitor(Recipe):
    """Fit linear probes on the features before and behind a projection head, during anybody's training.

    Probes are fitted on the training set and scored on the validation set, both in eval mode and without a trace in the
    run. Logs ``projection/probe_pre`` and ``probe_post`` (accuracy), ``effective_rank_pre`` and ``effective_rank_post``
    (exp of the entropy of the principal variances) and ``feature_ratio``, the second rank over the first: below 1 the
    head weights features more unequally. With groups also ``probe_pre_worst_group`` and ``probe_post_worst_group``.

    What is before and behind: of ProjectionHead's head; of the head that is named; of a module with a method
    ``sides(batch) -> (z, u, labels)``, as ContrastivePretraining has; else only the classifier's input is probed, as
    'pre'.

    Args:
        every_n_epochs: measure in the validation of every n-th training epoch.
        labels: what the probe predicts: None for the module's own targets, the name of an attribute of the data sets
            with one class index a sample, or a function of a batch. The paper's claim needs another task than the one
            trained on.
        standardise: fit on standardised features. That makes z and u of a fixed head the same; False keeps their scale.
        group: the name of an attribute of the data sets, or a function of a batch, with one group index a sample: the
            fit counts all groups alike, and the accuracy of the worst one is logged too.
        max_samples: fit and score on at most so many, drawn once.
        head: 'auto', or the dotted path of the module between z and u.
        criterion: which loss of the module's training step to observe, where it cannot be found.
        l2: of the probe, 1 / C of scikit-learn.
        draw: save a picture in the run's log folder at the end of a fit (needs the `plots` extra).
        seed: of the samples drawn.

    Raises:
        RecipeError: for bad arguments; in setup for a head that is not there; before the first step for training data
            that are not read by index or lack the attribute; in a fit's sanity check, or else in the first validation,
            for such validation data, and for features that are not one vector a sample.
    """

    paper = PAPER
    free_on_resume = frozenset({"labels", "group", "draw"})  # a function is another one in every process
    does = "Probes the features before and behind a projection head for any labels while training runs."
    use_when = "You want to know what features keep beyond the task, and on which side of the head to take them."
    costs = "A forward pass over the training and validation set (or max_samples of each) and two small convex fits."
    log_prefix = "projection"

    def __init__(
        self,
        every_n_epochs: int = 1,
        labels: str | Callable[[Any], Tensor] | None = None,
        standardise: bool = True,
        group: str | Callable[[Any], Tensor] | None = None,
        max_samples: int = 10_000,
        head: str = "auto",
        criterion: str | int | None = None,
        l2: float = 1.0,
        draw: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_argument(every_n_epochs >= 1, self, "every_n_epochs", every_n_epochs, "at least 1")
        for name, value in (("labels", labels), ("group", group)):
            ok = value is None or callable(value) or (isinstance(value, str) and value.isidentifier())
            check_argument(ok, self, name, value, "None, the name of an attribute of the data sets, or a function")
        check_argument(max_samples >= 2, self, "max_samples", max_samples, "at least 2")
        check_argument(bool(head), self, "head", head, "'auto' or the path of a module")
        check_argument(l2 >= 0, self, "l2", l2, "at least 0")
        self.every_n_epochs, self.labels, self.standardise, self.group = every_n_epochs, labels, standardise, group
        self.max_samples, self.head, self.criterion, self.l2 = max_samples, head, criterion, l2
        self.draw, self.seed = draw, seed
        self._history = History()
        self._sides: _Sides | None = None

    def declare(self, plan: Plan) -> None:
        if not plan.fitting:
            return
        if not plan.trainer.enable_validation:
            rank_zero_warn("PrePostMonitor measures in validations, and this fit has none")
            return
        if self.labels is None:
            rank_zero_info(
                "PrePostMonitor probes for the labels trained on; what a head costs shows on another task's (labels=)"
            )
        self._sides = _Sides(self, plan.module)
        plan.install(self._sides)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._sides is not None:
            with speaking_for(self):
                dataset = training_samples(trainer).loader.dataset  # asked for now, that a bad one is no late error
                for name in (self.labels, self.group):
                    if isinstance(name, str):
                        sample_values(dataset, name)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        due = trainer.sanity_checking or trainer.current_epoch % self.every_n_epochs == 0
        if trainer.state.fn != "fit" or self._sides is None or not due:
            return
        with speaking_for(self):
            if trainer.sanity_checking:  # a fit that cannot be measured shall not start
                self._encode(trainer, pl_module, validation_samples(trainer), 2 * rank_and_world()[1])
                return
            train, val = (
                self._encode(trainer, pl_module, samples, self.max_samples)
                for samples in (training_samples(trainer), validation_samples(trainer))
            )
            device = where_to_fit(pl_module)
            values = decided_on_rank_zero(lambda: self._measure(train, val, device), trainer)
        self.log_dict({f"projection/{name}": value for name, value in values.items()}, rank_zero_only=False)
        self._history.add(trainer.global_step, {k: v for k, v in values.items() if k.startswith("probe")})

    def _encode(
        self, trainer: pl.Trainer, module: pl.LightningModule, samples: Samples, most: int
    ) -> dict[str, Tensor]:
        """z, u where there is one, y and the groups of at most so many samples, the same ones on every rank."""
        chosen = some_of(samples.total, most, self.seed, "PrePostMonitor")
        now: dict[str, Tensor] = {}

        def run(batch: Any, number: int) -> Tensor:
            own = self._sides.run(trainer, module, batch, number, self.criterion)
            now.update({name: torch.as_tensor(of(batch)) for name, of in self._asked_for.items() if callable(of)})
            y = now.get("y", own)
            if y is None and not isinstance(self.labels, str):
                raise RecipeError("the batches hold no labels to probe for; give labels=")
            return torch.zeros(len(self._sides.values["z"])) if y is None else y

        def read() -> dict[str, Tensor]:
            return {**self._sides.values, **({"group": now["group"][:, None]} if "group" in now else {})}

        samples = samples_of(samples.loader, chosen=chosen)
        found = encode(trainer, module, read, samples, progress=bar(trainer, "probing"), run=run)
        columns = {"y": found.targets, **found.features}
        for name, of in self._asked_for.items():
            if isinstance(of, str):
                columns[name] = sample_values(samples.loader.dataset, of)[torch.as_tensor(chosen)]
        if columns["y"].dim() == 2 and columns["y"].is_floating_point():
            columns["y"] = columns["y"].argmax(1)  # soft targets
        if "group" in columns:
            columns["group"] = columns["group"].flatten().long()
        return columns

    @property
    def _asked_for(self) -> dict[str, str | Callable[[Any], Tensor] | None]:
        return {"y": self.labels, "group": self.group}

    def _measure(
        self, train: Mapping[str, Tensor], val: Mapping[str, Tensor], device: torch.device
    ) -> dict[str, float]:
        train, val = ({name: value.to(device) for name, value in side.items()} for side in (train, val))
        weights = balanced(train["group"]) if "group" in train else None
        classes = 1 + int(torch.cat([train["y"], val["y"]]).max())
        values: dict[str, Tensor] = {}
        for side, name in (("pre", "z"), ("post", "u")):
            if name not in train:
                continue
            head = fit_logistic(
                train[name],
                train["y"],
                classes,
                l2=self.l2,
                standardise=self.standardise,
                weights=weights,
                tolerance=1e-6,
            )
            right = accuracy(head, val[name], val["y"])
            values[f"probe_{side}"] = right.mean()
            if "group" in val:
                values[f"probe_{side}_worst_group"] = worst_group(right, val["group"])
            values[f"effective_rank_{side}"] = effective_rank(train[name])
        if "u" in train:
            values["feature_ratio"] = values["effective_rank_post"] / values["effective_rank_pre"]
        return {name: float(value) for name, value in values.items()}

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        folder = where_to_draw(trainer)
        if self.draw and self._history.steps and trainer.is_global_zero and folder is not None:
            title = "linear probes before and behind the head"
            self._history.draw(folder / "projection_probes.png", title, "accuracy")

    def state(self) -> dict[str, Any]:
        return {"history": self._history.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._history.load(state["history"])


class _Sides:
    """z and u of a module: what to tap for the one, and what makes the other of it.

    Attributes:
        values: z and, where there is a head, u of the last batch.
    """

    def __init__(self, monitor: PrePostMonitor, module: pl.LightningModule) -> None:
        self.monitor, self.module = monitor, module
        self.values: dict[str, Tensor] = {}
        self._own = monitor.head == "auto" and callable(getattr(module, "sides", None))
        self._taps: Taps | None = None
        self._head: nn.Module | None = None

    def install(self, undo: ExitStack) -> None:
        """Tap z; runs after surgery."""
        if self._own:
            return
        with speaking_for(self.monitor):
            path = self.monitor.head
            if path == "auto":
                path = path_of_head(self.module) or path
            alone = path == "auto"
            path = head_input(self.module)[0] if alone else path
            self._taps = Taps(self.module, {"z": (path, "input")})
        self._head = None if alone else self.module.get_submodule(path)
        if isinstance(self._head, FixedReweighting) and self.monitor.standardise:
            rank_zero_warn(
                "PrePostMonitor: standardising makes z and u of the fixed head the same; use standardise=False to"
                " compare them"
            )
        self._taps.install(undo)

    def run(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, number: int, criterion: str | int | None
    ) -> Tensor | None:
        """Run the module on a batch, keep z and u, and give the batch's own targets, if it has any."""
        if self._own:
            z, u, targets = module.sides(batch)
            self.values = {"z": z, "u": u}
            return targets
        targets = observe(trainer, module, batch, number, criterion).targets
        self.values = {"z": self._taps["z"]}
        if self._head is not None:
            self.values["u"] = self._head(self.values["z"])
        return targets
