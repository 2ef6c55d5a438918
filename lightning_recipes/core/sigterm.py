"""A SIGTERM on several ranks: all of them stop, after the same batch. On one or several: the exit code says so.

Lightning's handler broadcasts from within whatever its rank is doing. The other ranks are then in the middle of another
collective, or somewhere else when their own signal comes: they wait for each other without an end, or read each other's
messages. Here the handler only takes note, and at the beginning of a batch, where Lightning asks rank zero anyway, all
ranks are asked whether one of them was told to stop.

The exception with which Lightning ends such a run is a ``SystemExit`` without a code: the process would report success,
and whoever started it (a Kubernetes Job, torchrun, a shell script's next line) would take half a run for a whole one.
"""

from __future__ import annotations

import signal
from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_recipes.core.patch import Patch

EXIT_CODE = 128 + signal.SIGTERM
"""143, what shells and cluster managers report of a process that a SIGTERM has ended."""


def not_a_success(trainer: pl.Trainer, exception: BaseException) -> None:
    """Have the process exit with :data:`EXIT_CODE` if it is a SIGTERM that ends it and nobody catches the exception.

    On each node only the first process: launchers look at that one, and take an exit with a code of any other for a
    crash, upon which they kill the first, perhaps in the middle of what it still has to write.
    """
    if isinstance(exception, SIGTERMException) and exception.code is None and trainer.local_rank == 0:
        exception.code = EXIT_CODE


class StopTogether:
    """Has the ranks of a fit agree on where they stop. For several processes only.

    Args:
        trainer: the user's.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self.trainer = trainer
        self._told = False

    def install(self, undo: ExitStack) -> None:
        """Take the place of Lightning's note of the signal, and of its question; leave the removal with `undo`."""
        undo.callback(Patch(self.trainer._signal_connector, "_sigterm_notifier_fn", self._take_note).restore)
        undo.callback(Patch(self.trainer.fit_loop.epoch_loop, "_broadcast_sigterm_tensor", self._ask_all).restore)

    def _take_note(self, number: int, frame: Any) -> None:
        launcher = self.trainer.strategy.launcher
        if not self._told and launcher is not None:
            launcher.kill(number)  # passes it on to the ranks that this one has started
        self._told = True

    def _ask_all(self) -> None:
        told = torch.tensor([int(self._told)], device=self.trainer.strategy.root_device)
        dist.all_reduce(told, dist.ReduceOp.MAX)
        if told.item():
            self.trainer._signal_connector.received_sigterm = True
            raise SIGTERMException
