"""Phases: one plan cuts one ``Trainer.fit`` into stages of so many epochs, each with a fresh start if asked.

Which phase an epoch belongs to is computed from the epoch's number alone, so that a resumed run is in the right one
before weights, optimizers and data are set up. At a boundary, before the first hook of the next epoch, the training
and validation data are asked for anew (Lightning fixes the number of batches when it sets up a loader), and optimizers
and schedulers are configured anew; ``configure_optimizers`` then finds the length of its phase in
``trainer.max_epochs`` and ``trainer.estimated_stepping_batches``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl

from lightning_recipes.core.errors import RecipeError, check_argument
from lightning_recipes.core.patch import Patch


@dataclass(frozen=True)
class Phase:
    """One stage of a fit.

    Attributes:
        name: for messages.
        epochs: its length.
        optimizers: makes its optimizers, in any form that ``configure_optimizers`` may return; None asks the module.
    """

    name: str
    epochs: int
    optimizers: Callable[[], Any] | None = None

    def __post_init__(self) -> None:
        check_argument(self.epochs >= 1, self, "epochs", self.epochs, f"at least 1 for {self.name}")


@dataclass(frozen=True)
class PhasePlan:
    """All stages of a fit, which must fill it.

    Attributes:
        phases: in their order.
        enter: called with the index of a phase before its data and optimizers are set up: for the one that the fit
            begins or resumes in, and at every boundary.
        reset_optimizers: configure optimizers and schedulers anew at every boundary.
        reload_data: ask for the training and validation data anew at every boundary.
    """

    phases: Sequence[Phase]
    enter: Callable[[int], None] = lambda index: None
    reset_optimizers: bool = True
    reload_data: bool = True

    @property
    def ends(self) -> list[int]:
        """The first epoch after each phase."""
        return list(itertools.accumulate(phase.epochs for phase in self.phases))

    def at(self, epoch: int) -> int:
        """Index of the phase that an epoch belongs to; epochs after the end count to the last one."""
        return min(sum(end <= epoch for end in self.ends), len(self.phases) - 1)


class Phases:
    """A plan at work in a fit.

    Args:
        trainer, module: the user's.
        plan: what to do when.
        checkpoint: what the fit resumes from; empty for a new fit.
        configure: configures optimizers and schedulers anew, at a boundary.

    Raises:
        RecipeError: when the phases do not fill the fit.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        plan: PhasePlan,
        checkpoint: Mapping[str, Any],
        configure: Callable[[], None],
    ) -> None:
        self.trainer, self.module, self.plan, self._configure_anew = trainer, module, plan, configure
        total = plan.ends[-1]
        if trainer.max_epochs != total:
            listed = ", ".join(f"{phase.name} {phase.epochs}" for phase in plan.phases[:6])
            more = ", ..." if len(plan.phases) > 6 else ""
            raise RecipeError(
                f"the phases take {total} epochs ({listed}{more}) and Trainer(max_epochs=...) is {trainer.max_epochs};"
                f" set max_epochs={total} or other lengths"
            )
        progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_progress", {}).get("current", {})
        self.index = plan.at(max(progress.get("ready", 0) - 1, 0))  # of the epoch that was last begun

    @property
    def phase(self) -> Phase:
        """The one that is under way."""
        return self.plan.phases[self.index]

    def install(self, undo: ExitStack) -> None:
        """Enter the first phase, or the resumed one, and watch for boundaries; leave the removal with `undo`."""
        self.plan.enter(self.index)
        begin = Patch(self.trainer.fit_loop, "on_advance_start", lambda: self._begin_epoch(begin))
        undo.callback(begin.restore)
        configure = Patch(self.module, "configure_optimizers", lambda: self._configure(configure))
        undo.callback(configure.restore)

    def _begin_epoch(self, begin: Patch) -> None:
        fit = self.trainer.fit_loop
        index = self.plan.at(fit.epoch_progress.current.processed)
        if index != self.index:
            self.index = index
            self.plan.enter(index)
            if self.plan.reload_data:
                fit._combined_loader = fit.epoch_loop.val_loop._combined_loader = None
                fit.setup_data()
            if self.plan.reset_optimizers:
                self._configure_anew()
        begin.original()

    def _configure(self, configure: Patch) -> Any:
        """The module's own method, or the phase's, in a fit that is as long as they will be in use."""
        fit = self.trainer.fit_loop
        whole = fit.max_epochs
        if self.plan.reset_optimizers:
            fit.max_epochs = self.phase.epochs
        try:
            own = configure.original()  # also where the phase brings its own: an error is to come now, not in mid-fit
            return own if self.phase.optimizers is None else self.phase.optimizers()
        finally:
            fit.max_epochs = whole
