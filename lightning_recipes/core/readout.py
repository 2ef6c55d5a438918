"""The readout of anybody's network: its last linear layer, what goes into that on samples, and what it is to give."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Literal

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_recipes.core.distributed import all_sum, rank_and_world
from lightning_recipes.core.errors import RecipeError, speaking_for
from lightning_recipes.core.evaluation import ONE_OUTPUT, apart, as_a_step_gets_it
from lightning_recipes.core.features import Taps, head_input
from lightning_recipes.core.head_fit import where_to_fit
from lightning_recipes.core.probe import Samples, encode, samples_of
from lightning_recipes.core.spectrum import WIDEST, Spectrum, Sums, spectrum
from lightning_recipes.core.step import Replay, check_observable, observe
from lightning_recipes.core.tangents import KEPT, LastLayers

FEATURES = "features"
HALF = (torch.bfloat16, torch.float16)

Kind = Literal["squares", "classes", "other"]


def kind_of(seen: Replay) -> Kind:
    """What the observed loss is to a theory of squared errors: the mean of squares, one of class labels, or another."""
    if seen.call.classifies or seen.call.name in ONE_OUTPUT:
        return "classes"
    mean = seen.call.name == "mse_loss" and seen.call.options.get("reduction", "mean") == "mean"
    return "squares" if mean else "other"


def numbers_of(seen: Replay) -> Tensor:
    """The targets as numbers that a linear readout can be fitted to, ``[n, k]``; class labels as one-hot vectors.

    Raises:
        RecipeError: for several labels a sample.
    """
    targets, n = seen.targets, len(seen.targets)
    if seen.call.classifies and not targets.is_floating_point():
        if seen.logits.dim() != 2 or targets.dim() != 1:
            raise RecipeError(
                f"needs one label a sample; the loss got logits {tuple(seen.logits.shape)} and targets"
                f" {tuple(targets.shape)}"
            )
        return F.one_hot(targets.clamp_min(0), seen.logits.shape[1]).float()
    return targets.reshape(n, -1).float()


class Tally:
    """What is counted of a probe as it passes, batch by batch, besides features and targets.

    Args:
        kind: of the loss.
        device: one that has fp64.
    """

    def __init__(self, kind: Kind, device: torch.device) -> None:
        self.kind = kind
        self._squares = torch.zeros(2, dtype=torch.float64, device=device)  # of residuals, and their number
        self._bad: list[Tensor] = []

    def add(self, x: Tensor, y: Tensor, seen: Replay) -> None:
        """Count in a batch: the readout's inputs ``[b, p]``, its targets ``[b, k]`` and what the loss got."""
        self._bad.append(~x.isfinite().all())
        if self.kind == "squares":
            off = (seen.logits.detach().reshape(y.shape) - y).double().square()
            self._squares[0] += off.sum()
            self._squares[1] += off.numel()

    def over_ranks(self) -> Tallied:
        """The same on all of them, but for the first bad batch."""
        first_bad = next((number for number, each in enumerate(self._bad) if bool(each)), None)
        anywhere = bool(all_sum(torch.tensor(float(first_bad is not None), device=self._squares.device)))
        off, count = all_sum(self._squares).tolist()
        return Tallied(off / count if count else None, first_bad, anywhere)


@dataclass(frozen=True)
class Tallied:
    """What a :class:`Tally` came to.

    Attributes:
        error: mean of the squares of the module's own residuals; None where its loss is not that mean.
        first_bad: this rank's first batch with features that are not finite.
        anywhere_bad: whether any rank has one.
    """

    error: float | None
    first_bad: int | None
    anywhere_bad: bool

    def check(self) -> None:
        """Raise RecipeError for features that are not finite."""
        if self.anywhere_bad:
            where = "of another rank" if self.first_bad is None else f"{self.first_bad} of the probe"
            raise RecipeError(f"the readout's inputs are not finite; the first such batch is {where}")


@dataclass(frozen=True)
class Reading:
    """Inputs and targets of a readout on samples, on every rank the same.

    Attributes:
        sums: of them, where there are more samples than features.
        x, y: they themselves elsewhere, ``[n, p]`` and ``[n, k]``.
        smallest: of the targets.
        tallied: what else there was to count.
        tangents: of the last layers, as ``LastLayers.take`` gives them.
    """

    sums: Sums | None
    x: Tensor | None
    y: Tensor | None
    smallest: float
    tallied: Tallied
    tangents: dict[str, Tensor] = field(default_factory=dict)

    def spectrum(self, centred: bool) -> Spectrum:
        """Their spectrum.

        Raises:
            RecipeError: for features that are not finite.
        """
        self.tallied.check()
        return spectrum(self.x, self.y, centred) if self.sums is None else self.sums.spectrum(centred)

    def means(self) -> tuple[Tensor, Tensor]:
        """Of inputs ``[p]`` and targets ``[k]``, in fp64."""
        if self.sums is None:
            return self.x.double().mean(0), self.y.double().mean(0)
        return self.sums.x / self.sums.count, self.sums.y / self.sums.count


class Readout:
    """Reads what goes into the last linear layer. A part of a fit (``plan.install(readout)``).

    Args:
        owner: the recipe that asks, for messages.
        trainer, module: the user's.
        head: dotted path of the layer; None finds it.
        criterion: which loss of the module's training step to observe.
        tangents: whether the kernel of the last layers' gradients is wanted too.

    Attributes:
        path, layer: of the layer, as it was before any surgery.
        kind: of the loss, once looked at; `outputs`, k, `width`, p; `half`, whether features have half precision, and
            `learnt`, whether parameters that train are behind them.
        last: the last layers, once looked at; None where their kernel is not wanted.

    Raises:
        RecipeError: when there is no linear layer, and under manual optimization.
    """

    def __init__(
        self,
        owner: object,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        head: str | None = None,
        criterion: str | int | None = None,
        tangents: bool = False,
    ) -> None:
        check_observable(module, owner)
        self.owner, self.trainer, self.module, self.criterion = owner, trainer, module, criterion
        self.path, self.layer = head_input(module, head or "auto")
        self.kind: Kind = "other"
        self.call = ""
        self.outputs = self.width = 0
        self.half = self.learnt = False
        self.tangents = tangents
        self.last: LastLayers | None = None
        self._taps: Taps | None = None

    def install(self, undo: ExitStack) -> None:
        """Tap the layer for the length of a fit; under the same name where surgery has put another in its place."""
        with speaking_for(self.owner):
            if self.path not in dict(self.module.named_modules()):
                self.path, self.layer = head_input(self.module)
            self._taps = Taps(self.module, {FEATURES: (self.path, "input")})
        self._taps.install(undo)

    def look(self, samples: Samples) -> None:
        """Run the network on a few of these samples and see what kind of readout there is. All ranks together.

        Raises:
            RecipeError: for a loss that cannot be seen, features that are not one vector a sample, and sizes of which
                no spectrum can be made.
        """
        few = samples_of(samples.loader, chosen=range(min(2 * rank_and_world()[1], len(samples.loader.dataset))))
        with apart(self.trainer, type(self.owner).__name__, "try", full_precision=True):
            for number, (batch, _) in enumerate(few):
                seen = observe(
                    self.trainer, self.module, as_a_step_gets_it(self.trainer, batch), number, self.criterion
                )
                x = self._taps[FEATURES]
                if x.dim() != 2 or len(x) != len(seen.targets):
                    raise RecipeError(
                        f"needs one feature vector a sample; {self.path} got {tuple(x.shape)} for"
                        f" {len(seen.targets)} samples: name another with head="
                    )
                self.kind, self.call, self.outputs = kind_of(seen), seen.call.name, numbers_of(seen).shape[1]
                self.width, self.half, self.learnt = x.shape[1], x.dtype in HALF, x.requires_grad
        self._taps.values.clear()
        if samples.total < 4 * self.outputs:
            raise RecipeError(
                f"{samples.total} samples say nothing of {self.outputs} outputs; it needs {4 * self.outputs} at least"
            )
        if min(self.width, samples.total) > WIDEST:
            raise RecipeError(
                f"the readout {self.path} has {self.width} inputs, and {WIDEST} are the most for {samples.total}"
                " samples; name another or take fewer samples"
            )
        if self.tangents:
            self._look_back(few, samples.total)

    def _look_back(self, few: Samples, total: int) -> None:
        """Find the last layers in a pass of its own: it is eager, and the others see what training runs."""
        batch, _ = next(iter(few))
        last = LastLayers(self.module, self.path)
        with apart(self.trainer, type(self.owner).__name__, "try", full_precision=True):
            batch = as_a_step_gets_it(self.trainer, batch)
            last.find(lambda: observe(self.trainer, self.module, batch, 0, self.criterion))
        self._taps.values.clear()
        if total * last.size > KEPT:
            raise RecipeError(
                f"kernel='ntk' keeps {last.size} numbers a sample of {' and '.join(last.names)}, and {total} samples"
                f" are too many for that; take {KEPT // last.size} at most with probe_size="
            )
        self.last = last

    def read(self, samples: Samples, keep: bool = False) -> Reading:
        """Inputs and targets on samples, silently, in eval mode and in full precision. All ranks together.

        Args:
            keep: them, also where there are more samples than features.
        """
        device = where_to_fit(self.module)
        summed = samples.total >= self.width and not keep and not self.tangents
        sums = Sums(self.width, self.outputs, device) if summed else None
        tally = Tally(self.kind, device)

        def run(batch: object, number: int) -> Tensor:
            seen = observe(self.trainer, self.module, batch, number, self.criterion)
            y, x = numbers_of(seen), self._taps[FEATURES].detach()
            if sums is not None:
                sums.add(x, y)
            tally.add(x, y, seen)
            return y

        def features() -> dict[str, Tensor]:
            if sums is not None:
                return {}
            return {FEATURES: self._taps[FEATURES], **(self.last.take() if self.last else {})}

        with self.last.watched() if self.last else nullcontext():
            kept = encode(self.trainer, self.module, features, samples, run=run, full_precision=True)
        self._taps.values.clear()
        least, tallied = float(kept.targets.min()), tally.over_ranks()
        if sums is not None:
            return Reading(sums.over_ranks(), None, None, least, tallied)
        x = kept.features.pop(FEATURES)
        return Reading(None, x, kept.targets, least, tallied, kept.features)

    def tangent_kernel(self, reading: Reading) -> Tensor:
        """The kernel of the last layers' gradients on the samples of a reading, ``[n, n]`` in fp64."""
        return self.last.kernel(reading.x, reading.tangents, where_to_fit(self.module))
