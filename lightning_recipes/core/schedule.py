"""When things happen and how strongly: milestones in epochs or steps, and values that move with training.

All of it is a pure function of the Trainer's counters (:class:`Plateau` also of a metric), so a resumed run finds
itself where the uninterrupted one was. The classes can be written in YAML by ``class_path`` and ``init_args``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import lightning.pytorch as pl

from lightning_recipes.core.errors import RecipeError, check_argument


def horizon(trainer: pl.Trainer, unit: Literal["epoch", "step"], why: str, after: int = 0) -> int:
    """How many epochs or optimizer steps the fit has, after so many epochs.

    Raises:
        RecipeError: when there is no finite number.
    """
    if unit == "epoch":
        if trainer.max_epochs is None or trainer.max_epochs < 0:
            raise RecipeError(
                f"{why} needs Trainer(max_epochs=...); it is {trainer.max_epochs}. Set it, or give whole epochs (int)"
            )
        return trainer.max_epochs - after
    steps = trainer.estimated_stepping_batches
    if math.isinf(steps):
        raise RecipeError(f"{why} needs Trainer(max_steps=...) or max_epochs with a dataloader that has a length")
    return int(steps) if not after else int(steps) // trainer.max_epochs * (trainer.max_epochs - after)


@dataclass
class EveryN:
    """The next one every `n` epochs or optimizer steps, the first at 0.

    Args:
        n: the distance.
        unit: 'epoch' or 'step'.
    """

    n: int
    unit: Literal["epoch", "step"] = "epoch"

    def __post_init__(self) -> None:
        check_argument(self.n >= 1, self, "n", self.n, "at least 1")
        check_argument(self.unit in ("epoch", "step"), self, "unit", self.unit, "'epoch' or 'step'")

    def times(self, count: int, trainer: pl.Trainer, after: int = 0) -> list[int]:
        """When each of `count` things happens."""
        return [i * self.n for i in range(count)]


@dataclass
class At:
    """At given times.

    Args:
        times: non-decreasing; an int is an epoch or step, a float in [0, 1] a fraction of the fit (rounded down),
            infinity never.
        unit: 'epoch' or 'step'.
    """

    at: Sequence[int | float]
    unit: Literal["epoch", "step"] = "epoch"

    def __post_init__(self) -> None:
        check_argument(self.unit in ("epoch", "step"), self, "unit", self.unit, "'epoch' or 'step'")
        for time in self.at:
            ok = time >= 0 and (isinstance(time, int) or time <= 1 or math.isinf(time))
            check_argument(ok, self, "at", time, "epochs or steps (int), fractions in [0, 1] (float) or inf")

    def times(self, count: int, trainer: pl.Trainer, after: int = 0) -> list[float]:
        """When each of `count` things happens, counted from the end of epoch `after` on.

        Raises:
            RecipeError: when the times decrease, or there are not `count` of them.
        """
        if len(self.at) != count:
            raise RecipeError(f"at has {len(self.at)} times for {count} groups; give one time a group")
        fractions = [t for t in self.at if isinstance(t, float) and not math.isinf(t)]
        total = (
            horizon(trainer, self.unit, f"at={list(self.at)} in fractions of the fit", after) if any(fractions) else 0
        )
        times = [t if isinstance(t, int) or math.isinf(t) else math.floor(t * total) for t in self.at]
        if times != sorted(times):
            raise RecipeError(f"at must not decrease; got {list(self.at)}, which is {times}")
        return times


@dataclass
class Plateau:
    """The next one when a logged metric has stopped improving.

    Args:
        monitor: name of a logged metric.
        patience: checks without improvement before the next one.
        mode: 'min' or 'max'.
        min_delta: what counts as an improvement.
    """

    monitor: str = "val/loss"
    patience: int = 2
    mode: Literal["min", "max"] = "min"
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        check_argument(self.mode in ("min", "max"), self, "mode", self.mode, "'min' or 'max'")
        check_argument(self.patience >= 1, self, "patience", self.patience, "at least 1")
        self.best, self.waited = math.inf, 0

    def stalled(self, value: float) -> bool:
        """Take the metric's newest value; whether it has been without improvement for `patience` checks."""
        value = value if self.mode == "min" else -value
        if value < self.best - self.min_delta:
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        if self.waited < self.patience:
            return False
        self.best, self.waited = math.inf, 0
        return True


def linear(position: float, start: float, end: float) -> float:
    """From start to end as position goes from 0 to 1; held outside."""
    return start + (end - start) * min(max(position, 0.0), 1.0)


def cosine(position: float, start: float, end: float) -> float:
    """Half a cosine from start to end as position goes from 0 to 1; held outside."""
    return end + (start - end) * (1 + math.cos(math.pi * min(max(position, 0.0), 1.0))) / 2


def exponential(position: float, start: float, end: float) -> float:
    """Geometric from start to end (both positive) as position goes from 0 to 1; held outside."""
    return start * (end / start) ** min(max(position, 0.0), 1.0)


def geometric(first: float, last: float, count: int) -> list[float]:
    """`count` rates from first to last with a constant ratio."""
    return [exponential(i / max(count - 1, 1), first, last) for i in range(count)]
