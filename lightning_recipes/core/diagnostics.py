"""Measuring in mid-training: when, for how much of the run's work, what was measured, and what it comes to in words.

A monitor is a :class:`Monitor`: it says what a measurement is and what its figures mean. When it measures, what it may
cost, its history in checkpoints, the log, the verdict at the end of a fit and the picture beside it are the same for
all of them. Everything that is decided hangs on counters, never on a clock, so that all ranks and a resumed run decide
alike.
"""

from __future__ import annotations

import math
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_recipes.core.batch import size_of
from lightning_recipes.core.distributed import from_rank_zero, rank_and_world
from lightning_recipes.core.errors import RecipeError, check_argument, speaking_for
from lightning_recipes.core.evaluation import buffers_of_rank_zero
from lightning_recipes.core.prepare import Plan
from lightning_recipes.core.recipe import Recipe
from lightning_recipes.core.step import prefix

NAMED = 5
"""So many of the steps that were left out are named in a verdict, and kept."""
TRAINED = 3
"""Forward passes that training on a sample counts as: its own, and a backward pass, which takes about two."""


def log_values(trainer: pl.Trainer, values: Mapping[str, Any]) -> None:
    """Send values to every logger and to ``trainer.callback_metrics``, also from hooks where ``self.log`` is forbidden.

    Args:
        values: numbers or scalar tensors by their full name.
    """
    scalars = {name: float(value) for name, value in values.items()}
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in scalars.items()})
    for logger in trainer.loggers:
        logger.log_metrics(scalars, step=trainer.global_step)


def log_text(trainer: pl.Trainer, name: str, text: str) -> None:
    """Give a text to every logger that takes one (TensorBoard, Weights & Biases); the others do without."""
    for logger in trainer.loggers:
        experiment = getattr(logger, "experiment", None)
        if callable(getattr(experiment, "add_text", None)):
            experiment.add_text(name, text, trainer.global_step)
        elif callable(getattr(logger, "log_text", None)):
            logger.log_text(key=name, columns=["text"], data=[[text]])


# -- when, and for how much ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moments:
    """The optimizer steps after which something is measured.

    Attributes:
        every_n_steps: after every so many; None for no such rule.
        geometric: after 0, 1, 2, 3, 5, 10, 20, 30, 50, 100, ..., evenly on a log axis.
    """

    every_n_steps: int | None = None
    geometric: bool = True

    def after(self, step: int) -> int:
        """The first moment later than `step`; -1 for before the start."""
        found = []
        if self.every_n_steps is not None:
            found.append((step // self.every_n_steps + 1) * self.every_n_steps)
        if self.geometric:
            scale = 1
            while 5 * scale <= step:
                scale *= 10
            found.append(0 if step < 0 else next(m * scale for m in (1, 2, 3, 5) if m * scale > step))
        return min(found)

    def passed(self, last: int, now: int) -> bool:
        """Whether a moment lies in (last, now]. A step may count for several: two optimizers under manual
        optimization."""
        return self.after(last) <= now


@dataclass
class Budget:
    """What a monitor may add to a run, as a share of the run's own work, both counted in forward passes of a sample.

    Attributes:
        share: at most so much, as 0.1 for a run that takes a tenth longer; None for no limit.
        trained: samples that were trained on, as rank 0 counts; one of them is `TRAINED` passes.
        looked: samples that the monitor has run the network on.
    """

    share: float | None = None
    trained: int = 0
    looked: int = 0

    def allows(self, passes: int) -> bool:
        """Whether so many passes more are within the share of what has been trained so far."""
        return self.share is None or self.looked + passes <= self.share * TRAINED * self.trained

    @property
    def spent(self) -> float:
        """What the monitor added so far, as a share of the run's own work."""
        return self.looked / max(TRAINED * self.trained, 1)


# -- what was measured -----------------------------------------------------------------------------------------------


class History:
    """What was measured when, for a picture at the end and for checkpoints."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.values: dict[str, list[float]] = {}

    def add(self, step: int, values: Mapping[str, float | Tensor]) -> None:
        """Note the values of one moment; the same names every time."""
        self.steps.append(step)
        for name, value in values.items():
            self.values.setdefault(name, []).append(float(value))

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"steps": list(self.steps), "values": {k: list(v) for k, v in self.values.items()}}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state` gave."""
        self.steps, self.values = list(state["steps"]), {k: list(v) for k, v in state["values"].items()}

    def draw(
        self, path: str | Path, title: str, ylabel: str, log_x: bool = False, names: Collection[str] | None = None
    ) -> Path | None:
        """Draw the values of these names, or all, over the steps; None where matplotlib (the `plots` extra) is not
        installed."""
        drawn = {name: values for name, values in self.values.items() if names is None or name in names}
        curves = {name: (self.steps[-len(values) :], values) for name, values in drawn.items()}
        return draw_curves(path, curves, title, "optimizer step", ylabel, log_x=log_x)


def draw_curves(
    path: str | Path,
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    title: str,
    xlabel: str,
    ylabel: str,
    bands: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
    log_x: bool = False,
    points: Collection[str] = (),
    log_y: bool = False,
) -> Path | None:
    """Draw curves by name, each as (x, y); None where matplotlib (the `plots` extra) is not installed.

    Args:
        bands: around curves of these names, each as (lower, upper): the spread over seeds.
        log_x: a log axis, on which 0 has its place left of 1.
        points: names of those that are points without a line between them.
        log_y: a log axis, for values above 0.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, (x, y) in curves.items():
        if name in points:
            axes.scatter(x, y, s=14, color="black", zorder=3, label=name)
            continue
        (line,) = axes.plot(x, y, marker="o", markersize=3, label=name)
        if bands is not None and name in bands:
            axes.fill_between(x, *bands[name], color=line.get_color(), alpha=0.2, linewidth=0)
    if log_x:
        axes.set_xscale("symlog", linthresh=1)
        axes.xaxis.set_major_formatter("{x:g}")
    if log_y:
        axes.set_yscale("log")
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_title(textwrap.fill(title, 80), fontsize="medium" if len(title) > 60 else "large")
    axes.grid(alpha=0.3)
    axes.legend()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def draw_images(
    path: str | Path, rows: Mapping[str, Sequence[tuple[Tensor, str]]], title: str, most: int = 12
) -> Path | None:
    """Draw images in rows; None where matplotlib (the `plots` extra) is not installed, or where there is no image.

    Args:
        rows: by the row's name, images ``[height, width]`` or ``[channels, height, width]`` of 1 or 3 channels, each
            with a few words to stand above it. Values outside [0, 1] are stretched to it, image by image.
        title: of the whole.
        most: images in a row.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    rows = {name: list(images)[:most] for name, images in rows.items() if images}
    if not rows:
        return None
    across = max(map(len, rows.values()))
    figure = Figure(figsize=(1.1 * across + 1, 1.35 * len(rows) + 0.6), layout="constrained")
    axes = figure.subplots(len(rows), across, squeeze=False)
    for line, (name, images) in zip(axes, rows.items()):
        for place in line:
            place.set(xticks=[], yticks=[], frame_on=False)
        line[0].set_ylabel(name)
        for place, (image, words) in zip(line, images):
            place.imshow(_as_picture(image), cmap="gray", vmin=0, vmax=1)
            place.set_title(words, fontsize=7)
    figure.suptitle(title)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def is_picture(value: Any) -> bool:
    """Whether :func:`draw_images` can draw it."""
    return isinstance(value, Tensor) and (value.dim() == 2 or (value.dim() == 3 and value.shape[0] in (1, 3)))


def _as_picture(image: Tensor) -> Any:
    """An image as matplotlib takes it, in [0, 1]."""
    image = image.detach().float().cpu()
    low, high = image.min(), image.max()
    if low < 0 or high > 1:
        image = (image - low) / (high - low).clamp_min(1e-12)
    if image.dim() == 3:
        image = image[0] if image.shape[0] == 1 else image.permute(1, 2, 0)
    return image.numpy()


def where_to_draw(trainer: pl.Trainer) -> Path | None:
    """The folder of the run's logs; None for a run that logs nowhere, which should leave no files."""
    return Path(trainer.log_dir) if trainer.loggers and trainer.log_dir else None


# -- a monitor -------------------------------------------------------------------------------------------------------


@dataclass
class _Run:
    """One fit of a monitor, as its checkpoints have it.

    Attributes:
        last: the optimizer step up to which moments have been dealt with.
        tried: the last step that was to be measured, whether the budget allowed it or not.
        left_out: how often it did not; `skipped` are the first of those steps, `NAMED` at most.
        passes: of the measurement that was tried last; in no checkpoint.
    """

    history: History = field(default_factory=History)
    budget: Budget = field(default_factory=Budget)
    last: int = -1
    tried: int = -1
    left_out: int = 0
    skipped: list[int] = field(default_factory=list)
    passes: int = 0


class Monitor(Recipe, ABC):
    """A recipe that measures something after chosen optimizer steps, changes nothing, and says at the end what it saw.

    A subclass overrides :meth:`forwards`, :meth:`measure` and :meth:`conclude`, and where it needs to :meth:`begin` and
    :meth:`picture`. What it measures it must measure without a trace (``core.evaluation.apart``, ``core.probe``), and
    must give the same on all ranks.

    It measures before the first step, at its :class:`Moments` and after the last step, as far as its budget allows.
    At the end of a fit the verdict stands in the attribute `verdict`, in the console, in loggers that take texts and
    over the picture in the run's log folder.

    Attributes:
        every_n_steps, geometric_steps: as `Moments` has them.
        budget: as `Budget.share`.
        draw: whether to save the picture (needs the `plots` extra).
        verdict: what the last fit came to, in words; None before its end, or when nothing was measured.
        limits: what is outside of the theory that the figures stand on, in words; part of the verdict.
    """

    free_on_resume = frozenset({"draw"})
    ylabel: ClassVar[str] = ""

    every_n_steps: int | None = None
    geometric_steps: bool = True
    budget: float | None = None
    draw: bool = True
    verdict: str | None = None

    def __init__(self) -> None:
        super().__init__()
        self.limits: list[str] = []
        self._run = _Run()
        self._folder: Path | None = None
        self._begun = False

    def check_moments(self) -> None:
        """Check the arguments that every monitor has; to be called by constructors.

        Raises:
            RecipeError: names the argument.
        """
        every, share = self.every_n_steps, self.budget
        check_argument(every is None or every >= 1, self, "every_n_steps", every, "None or at least 1")
        moments = every is not None or self.geometric_steps
        check_argument(moments, self, "geometric_steps", self.geometric_steps, "true where every_n_steps is not given")
        check_argument(share is None or share > 0, self, "budget", share, "None or a positive share, as 0.1")

    # -- for subclasses ----------------------------------------------------------------------------------------------

    def begin(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Look for everything that cannot be measured, before the first step of a fit.

        Raises:
            RecipeError: for that.
        """

    @abstractmethod
    def forwards(self, trainer: pl.Trainer) -> int:
        """How many samples the next measurement runs the network on, on all ranks together, each run counted."""

    @abstractmethod
    def measure(self, trainer: pl.Trainer, module: pl.LightningModule) -> Mapping[str, float]:
        """Measure, silently; the same names every time, and the same values on every rank.

        Raises:
            RecipeError: where there is nothing to measure, on every rank. It ends a fit at the first measurement only;
                later the values are NaN, and the verdict says why.
        """

    def samples_in(self, batch: Any) -> int:
        """How many samples a training batch of one process has, in the units of :meth:`forwards`."""
        return size_of(batch)

    def derived(self) -> Mapping[str, float]:
        """What follows from the history so far, to be logged beside the last measurement."""
        return {}

    @abstractmethod
    def conclude(self) -> str:
        """What the history comes to, in a sentence or two."""

    def picture(self, path: Path, title: str) -> None:
        """Draw what shows why."""
        self.history.draw(path, title, self.ylabel, log_x=self.geometric_steps)

    @property
    def history(self) -> History:
        """What was measured in this fit."""
        return self._run.history

    @property
    def left_out(self) -> int:
        """How many measurements the budget did not allow in this fit."""
        return self._run.left_out

    @property
    def spent(self) -> float:
        """What the measurements added, in forward passes, as a share of the run's own."""
        return self._run.budget.spent

    def limit(self, what: str) -> None:
        """Say that something seen is outside of the theory; said at once, and again in the verdict."""
        if what not in self.limits:
            self.limits.append(what)
            rank_zero_info(f"{type(self).__name__}: {what}")

    # -- the fit -----------------------------------------------------------------------------------------------------

    def declare(self, plan: Plan) -> None:
        if plan.fitting:
            self._run, self.limits = _Run(budget=Budget(self.budget)), []
            self.verdict, self._begun = None, False
            plan.at_end(lambda: self._report(plan.trainer))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        with speaking_for(self):
            self.begin(trainer, pl_module)
        self._folder = where_to_draw(trainer)  # asks all ranks, so not at the end, which one may come to alone
        self._begun = True
        self._look_if_due(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._run.budget.trained += self.samples_in(batch) * rank_and_world()[1]
        self._look_if_due(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step > self._run.tried:
            self._look(trainer, pl_module)

    def _look_if_due(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        run, now = self._run, trainer.global_step
        due, run.last = Moments(self.every_n_steps, self.geometric_steps).passed(run.last, now), now
        if due:
            self._look(trainer, module)

    def _look(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        run, now = self._run, trainer.global_step
        run.tried = now
        run.passes = passes = self.forwards(trainer)
        if self.budget is not None and not from_rank_zero(run.budget.allows(passes), trainer):
            run.left_out += 1
            run.skipped = [*run.skipped, now][:NAMED]
            return
        with speaking_for(self), buffers_of_rank_zero(trainer):
            try:
                values = self.measure(trainer, module)
            except RecipeError as error:
                if not self.history.steps:
                    raise
                self.limit(f"at step {now} {error}")  # nobody's training is to end for that
                values = dict.fromkeys(self.history.values, math.nan)
        run.budget.looked += passes
        run.history.add(now, values)
        log_values(trainer, {f"{prefix(self)}/{name}": value for name, value in {**values, **self.derived()}.items()})

    def _report(self, trainer: pl.Trainer) -> None:
        """Say what the fit came to, also when it was interrupted. Nothing here waits for another rank."""
        run = self._run
        if not self._begun or not (self.history.steps or run.left_out):
            return
        self._begun = False
        if self.history.steps:
            said = [self.conclude()]
        else:
            share = run.passes / max(TRAINED * run.budget.trained, 1)
            remedy = "give a larger budget, a smaller probe or more steps"
            said = [f"Nothing was measured: one measurement is {share:.2g} of this run's work; {remedy}."]
        said += [f"{limit[0].upper()}{limit[1:]}." for limit in self.limits]
        if run.left_out:
            where = ", ".join(map(str, run.skipped)) + (", ..." if run.left_out > NAMED else "")
            said.append(
                f"{run.left_out} of {run.left_out + len(self.history.steps)} measurements were left out for"
                f" budget={self.budget:g}, at step{'s' * (run.left_out > 1)} {where}."
            )
        self.verdict = " ".join(said)
        if not trainer.is_global_zero:
            return
        rank_zero_info(f"{type(self).__name__}: {self.verdict}")
        log_text(trainer, f"{prefix(self)}/verdict", self.verdict)
        if self.draw and self._folder is not None and self.history.steps:
            self.picture(self._folder / f"{prefix(self)}.png", self.verdict)

    # -- state -------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        run = self._run
        return {
            "history": run.history.state(),
            "last": run.last,
            "tried": run.tried,
            "left_out": run.left_out,
            "trained": run.budget.trained,
            "looked": run.budget.looked,
            "skipped": list(run.skipped),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        run = self._run
        run.history.load(state["history"])
        run.last, run.tried = state["last"], state["tried"]
        run.left_out, run.skipped = state["left_out"], list(state["skipped"])
        run.budget.trained, run.budget.looked = state["trained"], state["looked"]
