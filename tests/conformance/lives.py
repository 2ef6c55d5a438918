"""Runs that are killed: rows of the table and stacks of recipes in processes of their own, and what each ended with.

``python -m tests.conformance.lives FOLDER WHAT ...`` is started by the tests. WHAT is ``rows``, ``stacks``,
``refused``, ``pairs``, or the name of one, as "SLCA + GLAD". It imports everything, then only forks: each life of a run
is a new process with one rank or two, and dies by SIGKILL where it is told to. What a run ends with is saved as
``<row>.<what>.rank<r>.pt``, what a process raised as ``.error``.
"""

from __future__ import annotations

import glob
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import peft  # noqa: F401 - recipes import it when they need it: once here, not in every process
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch.utils.data import DataLoader

from lightning_recipes.callbacks import ExactResume
from lightning_recipes.core.errors import RecipeError

from .recipes import ROWS, pairs, refusal, stacks
from .table import EPOCHS, LIGHTNINGS_OWN, Classifier, Lively, Row, train, weights

TWENTY, WORKERS_TOO = ("exact_resume", "pego+unfreeze+aaer"), "exact_resume"
KILLS, LONG = 20, 30  # how often one run dies, and its epochs
STEP, BATCH = "on_before_optimizer_step", "on_train_batch_end"
VALIDATION, EPOCH = "on_validation_start", "on_train_epoch_end"


# -- for the tests ---------------------------------------------------------------------------------------------------


def launch(folder: Path, *wanted: str) -> Path:
    """All lives of what is wanted, from one new process; return the folder."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "tests.conformance.lives", str(folder), *wanted]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, run.stderr[-4000:]
    return folder


def end_of(folder: Path, row: Row, what: str, rank: int = 0) -> dict[str, Any]:
    """What one life ended with.

    Raises:
        AssertionError: it ended with an error.
    """
    for error in folder.glob(f"{glob.escape(row.name)}.{what}.rank*.error"):
        raise AssertionError(error.read_text()[-4000:])
    return torch.load(folder / f"{row.name}.{what}.rank{rank}.pt", weights_only=True)


# -- processes -------------------------------------------------------------------------------------------------------


def process(run: Callable[[int], None], folder: Path, name: str, ranks: int = 1) -> list[int]:
    """Run in new processes, one a rank; return their exit statuses, a negative one for a signal.

    When one of several ranks dies the others are killed too, as a launcher does. What they raise because a rank was
    killed is no error of theirs and is not kept.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = {}
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            if ranks > 1:
                place = {"LOCAL_RANK": rank, "NODE_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                os.environ.update({key: str(value) for key, value in place.items()})
            try:
                run(rank)
            except BaseException:
                (folder / f"{name}.rank{rank}.error").write_text(traceback.format_exc())
                os._exit(1)
            os._exit(0)
        children[child] = rank
    statuses, over, killed = [0] * ranks, False, False
    while children:
        ended = [os.wait()]
        if ended[0][1] and not over:  # it may have ended of another's death, which takes its time to be seen
            time.sleep(0.2)
            others = [os.waitpid(child, os.WNOHANG) for child in children if child != ended[0][0]]
            ended += [each for each in others if each[0]]
        for child, status in ended:
            statuses[children.pop(child)] = os.waitstatus_to_exitcode(status)
        if any(status for _, status in ended) and not over:
            over, killed = True, -signal.SIGKILL in statuses  # by its own hand: ours comes now
            for child in children:
                os.kill(child, signal.SIGKILL)
    for rank in range(ranks if killed else 0):
        (folder / f"{name}.rank{rank}.error").unlink(missing_ok=True)
    return statuses


class SaveAndDie(Checkpoint):
    """Kills this process after a batch, having saved after that one and the one before it: also within a window.

    Args:
        path: of the checkpoint, written anew each time.
        die: after so many batches of the whole run, counted from 1; None never.
        at: the hook to die in; None where another rank dies.
    """

    def __init__(self, path: Path, die: int | None, at: str | None) -> None:
        self.path, self.die, self.at = path, die, at

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if self.die is not None and self._batches(trainer) >= self.die - 1:
            trainer.save_checkpoint(self.path)
        self._maybe_die(trainer, BATCH)

    def on_before_optimizer_step(self, trainer: pl.Trainer, *args: Any) -> None:
        self._maybe_die(trainer, STEP)

    def on_validation_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self._maybe_die(trainer, VALIDATION)

    def on_train_epoch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._maybe_die(trainer, EPOCH)

    def _maybe_die(self, trainer: pl.Trainer, hook: str) -> None:
        if self.die is not None and self._batches(trainer) >= self.die and hook == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def _batches(self, trainer: pl.Trainer) -> int:
        return trainer.fit_loop.epoch_loop.batch_progress.total.ready


class Tell(Callback):
    """Writes a byte for every batch."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        os.write(self.pipe, b".")


# -- runs ------------------------------------------------------------------------------------------------------------


def lively(
    row: Row,
    callbacks: list[Callback],
    ckpt: Path | None = None,
    ranks: int = 1,
    epochs: int = 3,
    workers: int = 0,
    exact: bool = True,
) -> tuple[pl.LightningModule, pl.Trainer]:
    """A run on shuffled data, with windows of two batches of which the last is short, and a validation an epoch."""
    pl.seed_everything(0 if ckpt is None else time.time_ns() % 2**32, verbose=False)  # a later life has its own seed
    module = Lively(row.network(), row.optimizer) if row.module is None else row.module()
    if exact and not any(isinstance(each, ExactResume) for each in callbacks):
        callbacks = [ExactResume(), *callbacks]
    settings = {**row.trainer, **(_two() if ranks == 2 else {})}
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(each, Checkpoint) for each in callbacks),
        accumulate_grad_batches=2,
        callbacks=callbacks,
        **settings,
    )
    if row.datamodule is None:
        dataset = row.data(56 * ranks)
        data = DataLoader(dataset, 8, shuffle=True, num_workers=workers), DataLoader(dataset, 32)
    else:
        data = (row.datamodule(),)
    trainer.fit(module, *data, ckpt_path=ckpt if ckpt is None else str(ckpt))
    return module, trainer


def _two() -> dict[str, Any]:
    return {"devices": 2, "strategy": "ddp", "plugins": LightningEnvironment()}


def ended(module: pl.LightningModule, trainer: pl.Trainer) -> dict[str, Any]:
    """All that a run ends with."""
    return {
        "weights": weights(module),
        "seen": getattr(module, "seen", None),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "callbacks": {
            each.state_key: each.state_dict()
            for each in trainer.callbacks
            if not isinstance(each, (Checkpoint, ExactResume))
        },
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "random": [
            torch.get_rng_state(),
            torch.tensor(random.getstate()[1]),
            torch.from_numpy(np.random.get_state()[1]),
        ],
        "steps": trainer.global_step,
    }


def uninterrupted(
    row: Row, folder: Path, ranks: int = 1, epochs: int = 3, workers: int = 0, what: str = "whole"
) -> None:
    """The run that nothing happens to."""

    def run(rank: int) -> None:
        result = ended(*lively(row, row.recipes(), None, ranks, epochs, workers))
        torch.save(result, folder / f"{row.name}.{what}{ranks}.rank{rank}.pt")

    process(run, folder, f"{row.name}.{what}{ranks}", ranks)


def killed(
    row: Row, folder: Path, deaths: list[tuple[int, str]], ranks: int = 1, epochs: int = 3, workers: int = 0
) -> None:
    """The same run, killed and continued as often as there are `deaths`: after so many batches, in that hook."""
    path = folder / f"{row.name}.{ranks}.ckpt"
    for life, death in enumerate([*deaths, (None, None)]):
        ckpt = path if life else None

        def run(rank: int, death: Any = death, ckpt: Path | None = ckpt) -> None:
            die, at = death  # with two ranks the second, and the first in the middle of whatever it does then
            at = at if rank == ranks - 1 else None
            result = ended(*lively(row, [*row.recipes(), SaveAndDie(path, die, at)], ckpt, ranks, epochs, workers))
            torch.save(result, folder / f"{row.name}.killed{ranks}.rank{rank}.pt")

        statuses = process(run, folder, f"{row.name}.killed{ranks}", ranks)
        if death[0] is not None and statuses[-1] != -signal.SIGKILL:
            (folder / f"{row.name}.killed{ranks}.rank0.error").write_text(f"was not killed at {death}: {statuses}")
            return
    path.unlink()


def killed_at_random(row: Row, folder: Path, kills: int, workers: int) -> None:
    """The same run, killed from outside at moments that it knows nothing of, until it has died so often.

    Its checkpoints are Lightning's own, after every optimizer step. A life is killed a random time after a random
    number of its steps, so that it may die while it reads, trains, validates or writes.
    """
    draw = random.Random(row.name)
    keep, name = folder / f"{row.name}.twenty", f"{row.name}.twenty"
    deaths: list[int] = []
    while len(deaths) < kills:
        ckpt = _latest(keep)
        read, write = os.pipe()

        child = os.fork()
        if child == 0:
            try:
                saves = ModelCheckpoint(keep, "{step}", save_top_k=1, save_last=True, every_n_train_steps=1)
                lively(row, [*row.recipes(), Tell(write), saves], ckpt, 1, LONG, workers)
            except BaseException:
                (folder / f"{name}.rank0.error").write_text(traceback.format_exc())
                os._exit(1)
            os._exit(0)
        os.close(write)
        for _ in range(draw.randint(2, 6)):
            if not os.read(read, 1):
                break
        time.sleep(draw.random() * 0.02)
        os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.wait()[1])
        os.close(read)
        if status != -signal.SIGKILL:
            break  # the run is over, or an error is on file
        deaths.append(_steps(keep))

    def run(rank: int) -> None:
        saves = ModelCheckpoint(keep, "{step}", save_top_k=1, save_last=True, every_n_train_steps=1)
        result = ended(*lively(row, [*row.recipes(), saves], _latest(keep), 1, LONG, workers))
        torch.save({**result, "deaths": deaths}, folder / f"{name}.rank0.pt")

    process(run, folder, name)


def _latest(folder: Path) -> Path | None:
    """The newest checkpoint that is whole: one that a kill left half written has another name."""
    found = sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    return found[-1] if found else None


def _steps(folder: Path) -> int:
    """Optimizer steps that are safe."""
    latest = _latest(folder)
    return torch.load(latest, weights_only=True)["global_step"] if latest else 0


# -- together --------------------------------------------------------------------------------------------------------


def refused(row: Row, folder: Path) -> None:
    """A pair that is to be refused: with what words, and whether the module is as it was."""

    def run(rank: int) -> None:
        torch.manual_seed(0)
        module = Classifier(row.network(), row.optimizer)
        before = weights(module)
        try:
            train(row, module=module, max_epochs=1)
        except RecipeError as error:
            unchanged = all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
            torch.save({"error": str(error), "unchanged": unchanged}, folder / f"{row.name}.refused.rank0.pt")

    process(run, folder, f"{row.name}.refused")


def two_ranks(row: Row, folder: Path, epochs: int = EPOCHS) -> None:
    """The row on two ranks and on one process, on the same global batches."""

    def run(rank: int) -> None:
        module, _ = train(row, rank=rank, world=2, plugins=LightningEnvironment(), max_epochs=epochs)
        torch.save(weights(module), folder / f"{row.name}.two.rank{rank}.pt")

    def one(rank: int) -> None:
        module, _ = train(row, max_epochs=epochs)
        torch.save(weights(module), folder / f"{row.name}.one.rank0.pt")

    process(run, folder, f"{row.name}.two", 2)
    process(one, folder, f"{row.name}.one")


def main(folder: Path, wanted: list[str]) -> None:
    """All lives of what is wanted."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)  # where a Trainer without a logger puts what a recipe saves
    kinds: dict[str, tuple[Callable[[Row, Path], None], list[Row]]] = {
        "rows": (alone, [*ROWS, LIGHTNINGS_OWN]),
        "stacks": (together, stacks()),
        "refused": (refused, [row for row in pairs() if refusal(row)]),
        "pairs": (together, [row for row in pairs() if not refusal(row)]),
    }
    unknown = set(wanted) - {name for kind, (_, rows) in kinds.items() for name in [kind, *(row.name for row in rows)]}
    if unknown:
        raise SystemExit(f"there is no {sorted(unknown)}; rows, stacks, refused, pairs, or the name of one")
    for kind, (run, rows) in kinds.items():
        for row in [row for row in rows if kind in wanted or row.name in wanted]:
            start = time.time()
            run(row, folder)
            print(f"{row.name}: {time.time() - start:.1f} s", flush=True)


def alone(row: Row, folder: Path) -> None:
    """All lives of a row."""
    two_ranks(row, folder)
    if row is LIGHTNINGS_OWN:
        return
    last_step = (BATCH, VALIDATION, EPOCH)
    draw, workers = random.Random(row.name), 2 if row.name == WORKERS_TOO else 0
    uninterrupted(row, folder)
    # in mid-epoch, in or at the end of a window; then after an epoch's last step, at three stages of its end
    killed(row, folder, [(draw.randint(2, 6), BATCH), (14, draw.choice(last_step))])
    uninterrupted(row, folder, ranks=2, workers=workers)
    killed(row, folder, [(draw.randint(9, 13), draw.choice([BATCH, STEP]))], ranks=2, workers=workers)
    if row.name in TWENTY:
        uninterrupted(row, folder, epochs=LONG, workers=workers, what="long")
        killed_at_random(row, folder, KILLS, workers)


def together(row: Row, folder: Path) -> None:
    """All lives of a stack or a pair."""
    two_ranks(row, folder, epochs=2)
    uninterrupted(row, folder, epochs=2)
    steps = end_of(folder, row, "whole1")["steps"]  # and at least as many batches: some stacks leave few
    killed(row, folder, [(min(random.Random(row.name).randint(2, 10), steps), BATCH)], epochs=2)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
