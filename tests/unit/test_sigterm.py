"""A SIGTERM that one of two ranks gets, wherever it is then."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, OnExceptionCheckpoint
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_recipes.callbacks import ExactResume
from lightning_recipes.core.patch import Patch
from tests.conformance.lives import ended
from tests.conformance.table import ConvNet, Lively, differing, first_digits
from tests.stock import in_two_ranks, quiet

PLACES = {  # the hook, in which of its calls, and the batches that are done when the run stops
    "in mid-step": ("on_before_backward", 3, 3),
    "before the optimizer step": ("on_before_optimizer_step", 3, 6),
    "in the validation": ("on_validation_start", 1, 7),  # the next epoch has begun and has seen no batch
}


class Told(Callback):
    """Gets a SIGTERM."""

    def __init__(self, hook: str, call: int) -> None:
        self.hook, self.left = hook, call

    def _maybe(self, hook: str) -> None:
        if hook == self.hook:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGTERM)

    def on_before_backward(self, *args: Any) -> None:
        self._maybe("on_before_backward")

    def on_train_batch_end(self, *args: Any) -> None:
        self._maybe("on_train_batch_end")

    def on_before_optimizer_step(self, *args: Any) -> None:
        self._maybe("on_before_optimizer_step")

    def on_validation_start(self, *args: Any) -> None:
        self._maybe("on_validation_start")


def _fit(callbacks: list[Callback], ckpt: Path | None = None, stopped: Callable[[pl.Trainer], None] | None = None):
    pl.seed_everything(0 if ckpt is None else 5, verbose=False)
    module = Lively(ConvNet(), "sgd")
    trainer = quiet(
        callbacks=[ExactResume(), *callbacks],
        max_epochs=2,
        devices=2,
        strategy="ddp",
        plugins=LightningEnvironment(),
        accumulate_grad_batches=2,
        enable_checkpointing=any(isinstance(each, OnExceptionCheckpoint) for each in callbacks),
    )
    data = first_digits(112)
    loaders = (torch.utils.data.DataLoader(data, 8, shuffle=True), torch.utils.data.DataLoader(data, 32))
    if stopped is None:
        trainer.fit(module, *loaders, ckpt_path=ckpt)
        return ended(module, trainer)
    with pytest.raises(SIGTERMException) as stop:
        trainer.fit(module, *loaders)
    assert stop.value.code == (None if trainer.local_rank else 143)  # a launcher would kill rank 0 if rank 1 failed
    stopped(trainer)
    assert not any(isinstance(each, Patch) for each in vars(trainer._signal_connector).values())
    assert not any(isinstance(each, Patch) for each in vars(trainer.fit_loop.epoch_loop).values())
    return None


def _told(rank: int, folder: Path) -> None:
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("error", message=".*will not be exact")
    whole = _fit([])
    for number, (place, (hook, call, batches)) in enumerate(PLACES.items()):
        found = []

        def stopped(trainer: pl.Trainer, found: list[int] = found) -> None:
            found.append(trainer.fit_loop.epoch_loop.batch_progress.total.completed)

        whom = number % 2
        keep = folder / str(number)
        callbacks = [*[Told(hook, call)] * (rank == whom), OnExceptionCheckpoint(keep)]
        _fit(callbacks, stopped=stopped)
        assert found == [batches], (place, rank, found)
        resumed = _fit([OnExceptionCheckpoint(folder / "none")], keep / "on_exception.ckpt")
        assert differing(whole, resumed) == [], (place, rank, differing(whole, resumed))
    # in the very last batch there is nothing left to stop
    last = _fit([Told("on_train_batch_end", 14), OnExceptionCheckpoint(folder / "last")])
    assert differing(whole["weights"], last["weights"]) == differing(whole["random"], last["random"]) == []
    (folder / f"done{rank}").touch()


@pytest.mark.ddp
def test_one_rank_that_is_told_to_stop_stops_all_after_the_same_batch_and_the_resume_is_exact(tmp_path: Path) -> None:
    in_two_ranks(_told, tmp_path)
    assert {path.name for path in tmp_path.glob("done*")} == {"done0", "done1"}
