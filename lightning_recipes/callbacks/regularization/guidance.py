"""Guidance: a network that does not train well is pulled, layer by layer, towards the representations of another one.

Subramaniam, Mayo, Conwell, Poggio, Katz, Cheung, Barbu, "Training the Untrainable: Introducing Inductive Bias via
Representational Alignment", NeurIPS 2025 (https://arxiv.org/abs/2410.20035; code
https://github.com/vsubramaniam851/untrainable-networks, commit e8368d4, from which the algorithm is read).

The guide G is frozen, in eval mode, of any architecture, trained or not: an untrained one passes on its architecture's
bias alone. Of a batch of n samples, with target map T_j and guide map G_i flattened to [n, p] and [n, q]:

    maps   outputs of all layers of certain types in order of execution; each network's last, the logits, is left out
    j(i) = min(round(i (L_T - 1) / (L_G - 1)), L_T - 1),  0 if L_G = 1;  a target map keeps the last guide map it gets
    loss = task loss + alpha * sum over kept j of (1 - CKA(T_j, G_i))

with linear CKA in fp32 (:mod:`lightning_recipes.core.similarity`, where its bias in small batches stands). It is a sum:
it grows with the number of pairs. Guiding may stop after some optimizer steps (`guide_steps`; the paper's 300 is 301 in
its code, which counts from 0 and includes the bound).

Where the official code differs: it runs the target twice a step, once for the loss and once for the maps, so that batch
norm statistics move twice and two dropout masks are drawn (``second_forward=True``); it finds the batch's axis of a map
by its length in every step, and loses a map of which another axis happens to be as long (64 channels in batches of 64),
where here two dry runs of different sizes tell them apart. A map whose variance over samples is below 1e-6 of its size
has no CKA and is left out of the sum, as long as it is so.

Costs one forward of the guide and Gram matrices of n^2 (p + q) multiplications a pair, twice that for the target's in
the backward pass. CKA is not a sum over samples: it is that of a rank's micro-batch, or with ``gather=True`` of all
ranks' together; k accumulated micro-batches are not one batch of k times the size.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_recipes.core import features, select
from lightning_recipes.core.batch import describe, get_input
from lightning_recipes.core.companion import Companion
from lightning_recipes.core.diagnostics import History, where_to_draw
from lightning_recipes.core.distributed import rank_and_world
from lightning_recipes.core.dry_run import SAMPLES, FewSamples, eager_and_silent, first_tensor
from lightning_recipes.core.errors import RecipeError, check_argument, speaking_for
from lightning_recipes.core.features import Map, Taps, maps_in_order
from lightning_recipes.core.gather import gather
from lightning_recipes.core.labels import labels_in
from lightning_recipes.core.prepare import Plan
from lightning_recipes.core.recipe import Paper, StepRecipe
from lightning_recipes.core.similarity import cka, cka_of_unrelated, gram
from lightning_recipes.core.step import Step

LAYERS = (
    nn.Conv2d,
    nn.Linear,
    nn.AdaptiveAvgPool2d,
    nn.LSTM,
    nn.RNN,
    nn.TransformerDecoderLayer,
    nn.LayerNorm,
    nn.MultiheadAttention,
)
"""Types whose outputs are maps under 'auto': these classes and no subclass."""
FEWEST, FEW = 4, 32  # samples: below the first CKA says nothing, below the second little


def layer_pairs(guides: int, targets: int) -> dict[int, int]:
    """Which guide map each guided target map goes with.

    Args:
        guides, targets: numbers of maps L_G and L_T, 1 or more.

    Returns:
        guide map by target map, in the target's order.
    """
    found = {}
    for i in range(guides):
        place = round(i * (targets - 1) / (guides - 1)) if guides > 1 else 0  # half to even
        found[min(place, targets - 1)] = i
    return found


def alignment(scores: Tensor, vary: Tensor) -> Tensor:
    """Sum of 1 - CKA over the pairs whose maps vary; both ``[pairs]``."""
    return torch.where(vary, 1 - scores, 0.0).sum()


def noise(u: Tensor, like: Tensor, vocabulary: int = 0) -> Tensor:
    """What a guide sees that shall share no samples with the target.

    Args:
        u: uniform in [0, 1), of the shape of `like`.
        like: the input; the noise is clip(N(0, 1) + 0.1 N(0, 1), 0, 1), or for token ids random ones.
        vocabulary: number of token ids.
    """
    if not like.is_floating_point():
        return (u * vocabulary).long().clamp_max(vocabulary - 1)
    normal = math.sqrt(2) * torch.erfinv(2 * u - 1)
    return (math.sqrt(1.01) * normal).clamp(0, 1).to(like.dtype)


class Guidance(StepRecipe):
    """Pull the layers of a network towards those of a frozen guide, by CKA on every batch.

    Logs ``guidance/loss`` (alpha times the sum), the mean CKA ``guidance/cka_mean`` and ``guidance/active``; in the
    steps whose values go to the loggers also ``guidance/cka_k`` of every pair k in the target's order (0 for one that
    is left out) and how many are left out, ``guidance/left_out``. At the start the pairs are logged as text (and stand
    in `pairs`), at the end of a fit CKA over training is drawn, by epoch.

    Give batches of 32 samples or more, better 128: in small ones any two wide maps look alike. The target should
    normalise its activations: CKA does not see that they shrink towards 0, where its gradient drowns the task's.

    Args:
        guide: a module, which is used with the weights that it has; what makes one, as 'package.module:Class'; or a
            name in ``timm.list_models()``. Checkpoints of the run hold its weights only where it is a module without
            `guide_checkpoint`; else it is built again on a resume, and compared by a hash.
        pretrained: of a timm name, whether its published weights are loaded; False for an untrained guide.
        guide_checkpoint: a .safetensors, .pt, .pth or .ckpt file with the guide's weights.
        guide_args: what the class or timm's model is built with.
        alpha: weight of the sum; 0 switches the recipe off.
        guide_steps: guide in the first so many optimizer steps; None in all.
        target_layers: 'auto' for the outputs of all layers of the types in `LAYERS` but the last, which is taken for
            the logits; 'blocks' for those of the network's blocks; or names of parts, `*` for any one name between
            dots. Pairs go by the order of execution. A layer that is called more than once counts at its first call,
            with the output of its last; one that runs without gradients has no map.
        guide_layers: the same for the guide.
        metric: 'cka', or 'cka_debiased' without the bias of small batches.
        gather: compare the samples of all ranks together, as one process on the global batch would; ranks must have
            batches of one size.
        guide_input: 'data', or 'noise' in the shape of the data (token ids for ids): the guide then shares no samples
            with the target.
        guide_transform: what the batch's input goes through before the guide: another shape, another normalisation.
        second_forward: take the maps from a second pass of the module's step, as the official code does.
        seed: of an untrained guide's weights, and of the noise.
        draw: save the picture in the run's log folder (needs the `plots` extra).

    Raises:
        RecipeError: for bad arguments; before training, for a guide that cannot be built, loaded or run on the batch,
            shares parameters with the module or is not the one of the run that is resumed, for layers that are not
            there or give no map, and for batches below 4 samples or whose axis is not the first; in a step for a layer
            that is no longer called.
    """

    paper = Paper(
        "Training the Untrainable: Introducing Inductive Bias via Representational Alignment",
        "V. Subramaniam, D. Mayo, C. Conwell, T. Poggio, B. Katz, B. Cheung, A. Barbu",
        2025,
        "https://arxiv.org/abs/2410.20035",
        "https://github.com/vsubramaniam851/untrainable-networks",
    )
    does = "Pulls a network's layers towards those of a frozen guide of another architecture, trained or not."
    use_when = "A network overfits or does not train (too deep, no skips, fully connected) and another kind would."
    costs = "One forward of the guide a step, and n^2 (p + q) multiplications a pair of layers for Gram matrices."
    couples_samples = True
    free_on_resume = frozenset({"guide_checkpoint", "draw"})

    def __init__(
        self,
        guide: nn.Module | str,
        pretrained: bool = True,
        guide_checkpoint: str | None = None,
        guide_args: dict[str, Any] | None = None,
        alpha: float = 1.0,
        guide_steps: int | None = None,
        target_layers: Sequence[str] | Literal["auto", "blocks"] = "auto",
        guide_layers: Sequence[str] | Literal["auto", "blocks"] = "auto",
        metric: Literal["cka", "cka_debiased"] = "cka",
        gather: bool = False,
        guide_input: Literal["data", "noise"] = "data",
        guide_transform: Callable | None = None,
        second_forward: bool = False,
        seed: int = 0,
        draw: bool = True,
    ) -> None:
        super().__init__()
        named = isinstance(guide, str) and bool(guide)
        kinds = "a module, 'package.module:Class' or a timm name"
        check_argument(named or isinstance(guide, nn.Module), self, "guide", guide, kinds)
        check_argument(guide_args is None or named, self, "guide_args", guide_args, "None when guide is a module")
        check_argument(alpha >= 0, self, "alpha", alpha, "at least 0")
        check_argument(guide_steps is None or guide_steps >= 1, self, "guide_steps", guide_steps, "None or at least 1")
        for name, layers in (("target_layers", target_layers), ("guide_layers", guide_layers)):
            words = layers in ("auto", "blocks") if isinstance(layers, str) else len(layers) > 0
            check_argument(words, self, name, layers, "'auto', 'blocks' or a list of names")
        check_argument(metric in ("cka", "cka_debiased"), self, "metric", metric, "'cka' or 'cka_debiased'")
        check_argument(guide_input in ("data", "noise"), self, "guide_input", guide_input, "'data' or 'noise'")
        fits = guide_transform is None or callable(guide_transform)
        check_argument(fits, self, "guide_transform", guide_transform, "None or a function of the batch's input")
        self.guide, self.pretrained, self.guide_checkpoint, self.guide_args = (
            guide,
            pretrained,
            guide_checkpoint,
            guide_args,
        )
        self.alpha, self.guide_steps, self.metric, self.gather = alpha, guide_steps, metric, gather
        self.target_layers, self.guide_layers = target_layers, guide_layers
        self.guide_input, self.guide_transform = guide_input, guide_transform
        self.second_forward, self.seed, self.draw = second_forward, seed, draw
        self._companion: Companion | None = None
        self._samples: FewSamples | None = None
        self._pairs: list[tuple[Map, Map]] = []
        self._taps: Taps
        self._guide_taps: Taps
        self._on = self._checked = self._takes_mask = False
        self._vocabulary = 0
        self._begin()

    def _begin(self) -> None:
        self._history, self._sums, self._passes = History(), None, 0

    @property
    def neutral(self) -> bool:
        return self.alpha == 0

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Names of the guide's and the target's map of every pair, in the target's order; empty before a fit."""
        return [(guide.name, target.name) for guide, target in self._pairs]

    # -- before training ---------------------------------------------------------------------------------------------

    def declare(self, plan: Plan) -> None:
        super().declare(plan)
        if not plan.fitting:
            return
        if plan.section is None:
            self._begin()
        self._companion = Companion(self.guide, self.pretrained, self.guide_checkpoint, self.guide_args, self.seed)
        stored = ((plan.section or {}).get("state") or {}).get("guide")
        self._companion.build(plan.trainer, stored)
        self._companion.check_apart(plan.module)
        self._module, self._checked = plan.module, False
        if plan.module.automatic_optimization:  # else it is refused when all have declared
            self._samples = self._few_samples(plan.module)
            plan.install(self)

    def _few_samples(self, module: pl.LightningModule) -> FewSamples:
        samples = FewSamples(module)
        if samples.is_example:
            return samples
        values = samples.first()
        x, labels = first_tensor(values), labels_in(values)
        many = len(labels) if isinstance(labels, Tensor) and labels.dim() else samples.count
        if x is not None and x.dim() > 1 and many != len(x) and many == x.shape[1]:
            raise RecipeError(
                f"the batch's axis must come first; the input is {list(x.shape)} and the labels {list(labels.shape)}"
            )
        together = samples.count * (rank_and_world()[1] if self.gather else 1)
        if together < FEWEST:
            raise RecipeError(
                f"CKA compares the samples of a batch and needs {FEWEST} of them, better {FEW}; the training data give"
                f" batches of {together}"
            )
        return samples

    def install(self, undo: ExitStack) -> None:
        """Find the pairs, in a network that has all its surgery, and listen for the length of the fit."""
        module, companion = self._module, self._companion
        with speaking_for(self):
            undo.enter_context(companion.held())
            with eager_and_silent(module):
                self._find_pairs(module, companion)
            points = {target.path: (target.path, "output") for _, target in self._pairs}
            self._taps = Taps(module, points, training=True)
            points = {guide.path: (guide.path, "output") for guide, _ in self._pairs}
            self._guide_taps = Taps(companion.network, points)
            self._taps.install(undo)
            self._guide_taps.install(undo)
        undo.callback(self._let_go)
        self._on, self._samples = True, None

    def _let_go(self) -> None:
        if self._on:
            self._on = False
            self._taps.close()
            self._guide_taps.close()
            self._companion.to(torch.device("cpu"))

    def _find_pairs(self, module: pl.LightningModule, companion: Companion) -> None:
        samples, network = self._samples, companion.network
        paths = _paths(module, self.target_layers, "target_layers")

        def run(count: int) -> None:
            with torch.enable_grad():
                samples.run(samples.first(count))

        maps = maps_in_order(module, paths, run, SAMPLES, training=True)
        targets = _checked(maps, paths, self.target_layers, "target_layers", type(module).__name__)
        embedding = next((part for part in network.modules() if isinstance(part, nn.Embedding)), None)
        self._vocabulary = 0 if embedding is None else embedding.num_embeddings
        self._takes_mask = "attention_mask" in inspect.signature(network.forward).parameters
        paths = _paths(network, self.guide_layers, "guide_layers")

        def guide(count: int) -> None:
            values = samples.first(count)
            x, mask = (first_tensor(values), None) if samples.is_example else _input_of(values)
            self._ask(torch.zeros_like(x) if self.guide_input == "noise" else x, mask)

        maps = maps_in_order(network, paths, guide, SAMPLES)
        guides = _checked(maps, paths, self.guide_layers, "guide_layers", f"the guide {type(network).__name__}")
        pairs = layer_pairs(len(guides), len(targets))
        self._pairs = [(guides[i], targets[j]) for j, i in sorted(pairs.items())]
        table = ", ".join(f"{guide} -> {target}" for guide, target in self.pairs)
        found = f"{len(guides)} maps of the guide on {len(targets)} of {type(module).__name__}"
        rank_zero_info(f"Guidance: {found}: {table}")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if self._on:
            self._companion.to(pl_module.device)

    # -- the step ----------------------------------------------------------------------------------------------------

    def extra_loss(self, step: Step) -> Mapping[str, Tensor]:
        """alpha times the sum of 1 - CKA over the pairs, while guiding."""
        guiding = self.guide_steps is None or step.trainer.global_step < self.guide_steps
        if not guiding:
            self._let_go()
            step.log(self, {"active": 0.0})
            return {}
        with speaking_for(self):
            seen = self._taps.take()
            if self.second_forward:
                with step.second_pass(track_statistics=True):
                    seen = self._taps.take()
            x, mask = _input_of(step.batch)
            self._check(step, x)
            if self.guide_input == "noise":
                x, mask = noise(step.uniform(self, self.seed, "noise", x), x, self._vocabulary), None
            self._ask(x, mask)
            guided = self._guide_taps.take()
            # A map's tensor lives no longer than its pair needs it.
            grams = [(self._gram(guide.of(guided)), self._gram(target.of(seen))) for guide, target in self._pairs]
        count = len(grams[0][1].matrix)
        if any(len(guide.matrix) != count for guide, _ in grams):
            raise RecipeError(
                f"Guidance: the guide gives {len(grams[0][0].matrix)} samples for the batch's {count}; guide_transform"
                " must keep their number"
            )
        if count < FEWEST:  # the short end of an epoch
            step.log(self, {"active": 0.0})
            return {}
        debiased = self.metric == "cka_debiased"
        scores = torch.stack([cka(target, guide, debiased) for guide, target in grams])
        vary = torch.stack([guide.varies & target.varies for guide, target in grams])
        self._note(step, scores.detach(), vary)
        return {"loss": self.alpha * alignment(scores, vary)}

    def _gram(self, value: Tensor) -> Any:
        return gram(gather(value) if self.gather else value)

    def _ask(self, x: Tensor, mask: Tensor | None) -> None:
        """Run the guide; its taps keep what it makes."""
        given = list(x.shape)
        if self.guide_transform is not None:
            x = self.guide_transform(x)
        try:
            self._companion(x, **({"attention_mask": mask} if mask is not None and self._takes_mask else {}))
        except Exception as error:
            got = f"guide_transform makes {describe(x)} of it" if self.guide_transform is not None else describe(x)
            raise RecipeError(
                f"the guide {self._companion.describe()}, failed on the batch's input {given} ({got};"
                f" {type(error).__name__}: {' '.join(str(error).split())}); bring the input into its shape with"
                " guide_transform"
            ) from error

    def _check(self, step: Step, x: Tensor) -> None:
        """Once a fit, in its first step."""
        if self._checked:
            return
        ranks = rank_and_world()[1] if self.gather else 1
        if len(x) * ranks < FEWEST:
            raise RecipeError(f"CKA compares the samples of a batch and needs {FEWEST} of them; got {len(x) * ranks}")
        if len(x) * ranks < FEW and self.metric == "cka":
            rank_zero_warn(
                f"Guidance compares the {len(x) * ranks} samples of a batch: CKA of unrelated maps of 1000 features is"
                f" {cka_of_unrelated(len(x) * ranks, 1000, 1000):.2f} there, and says little. Use batches of {FEW} or"
                " more, gather=True over ranks, or metric='cka_debiased'"
            )
        self._checked = True

    def _note(self, step: Step, scores: Tensor, vary: Tensor) -> None:
        shown = torch.where(vary, scores, 0.0)
        mean = shown.sum() / vary.sum().clamp_min(1)
        step.log(self, {"cka_mean": mean, "active": 1.0})
        if step.trainer._logger_connector.should_update_logs:  # each logged value takes the CPU some time
            step.log(self, {f"cka_{k}": value for k, value in enumerate(shown.unbind())})
            step.log(self, {"left_out": (~vary).sum().float()})
        if rank_and_world()[0] == 0:  # one rank's figures, so that all of them are in a checkpoint
            self._sums = shown if self._sums is None else self._sums.to(shown.device) + shown
            self._passes += 1

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if self._on:  # a step that was left out, or activations that were computed again for the backward pass
            self._taps.values.clear()

    # -- the picture -------------------------------------------------------------------------------------------------

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._passes:
            means = (self._sums / self._passes).tolist()
            names = (f"{guide} -> {target}" for guide, target in self.pairs)
            self._history.add(trainer.global_step, dict(zip(names, means)))
            self._sums, self._passes = None, 0

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        folder = where_to_draw(trainer)
        if self.draw and self._history.steps and trainer.is_global_zero and folder is not None:
            self._history.draw(folder / "guidance.png", "Alignment with the guide, by epoch", "CKA")

    def state(self) -> dict[str, Any]:
        return {
            "guide": None if self._companion is None else self._companion.state(),
            "history": self._history.state(),
            "sums": None if self._sums is None else self._sums.cpu(),
            "passes": self._passes,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        if rank_and_world()[0] == 0:
            self._history.load(state["history"])
            self._sums, self._passes = state["sums"], state["passes"]


def _paths(module: nn.Module, wanted: Sequence[str] | str, argument: str) -> list[str]:
    if wanted == "auto":
        return select.parts_of_types(module, LAYERS)
    return features.blocks(module) if wanted == "blocks" else select.parts_named(module, wanted, argument)


def _checked(maps: list[Map], paths: list[str], wanted: Sequence[str] | str, argument: str, where: str) -> list[Map]:
    """The maps to use: of 'auto' without the last."""
    if wanted == "auto":
        if len(maps) < 3:
            kinds = ", ".join(kind.__name__ for kind in LAYERS)
            raise RecipeError(
                f"{where} has {len(maps)} maps for {argument}='auto' (outputs of {kinds}, that train here), and the"
                " last one is taken for the logits: too few to guide by; name layers"
            )
        return maps[:-1]
    silent = [path for path in paths if path not in {each.path for each in maps}]
    if silent:
        raise RecipeError(
            f"{argument}: {silent[0]!r} of {where} gives no map: it is not called, runs without gradients, or gives no"
            " floating-point tensor with one axis for the batch"
        )
    return maps


def _input_of(batch: Any) -> tuple[Tensor, Tensor | None]:
    """The batch's input, and the mask of token ids."""
    if hasattr(batch, "keys") and isinstance(batch.get("input_ids"), Tensor):
        return batch["input_ids"], batch.get("attention_mask")
    return get_input(batch), None
