"""One run of a comparison, in a process of its own: ``fit`` as the command line does it, then the evaluation.

``python -m lightning_recipes.compare.run FOLDER`` reads what :func:`prepare` put there. The result is whole or not
there; a run whose result is there is not done again, and of two processes with one folder the second waits.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import psutil
import torch
import yaml
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader, IterableDataset

from lightning_recipes.catalog import PROG
from lightning_recipes.compare.plan import Run
from lightning_recipes.core.artefacts import Artefact, Content, write_text
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.loader import when_made
from lightning_recipes.core.random import generator, key
from lightning_recipes.trainer_cli import RecipeCLI

RECORDED_EPOCHS, RECORDED_INDICES = 3, 256
"""So many of the first indices of so many epochs are kept, to say whether two runs saw the same data in one order."""
CAP = 10
"""A step that takes more than so many times the median (a checkpoint, another program) counts as so many."""


# -- the folder ------------------------------------------------------------------------------------------------------


def prepare(run: Run) -> None:
    """Write what the process of a run reads: ``run.json``, and ``config.yaml`` for ``fit --config`` by hand too."""
    run.folder.mkdir(parents=True, exist_ok=True)
    config = _within(run.config, run.folder.resolve())
    write_text(run.folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    # the key is made of what is read here: JSON keeps whole numbers and others apart
    write_text(run.folder / "run.json", json.dumps({"name": run.name, "seed": run.seed, "made_from": run.made_from}))


def _within(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The config with everything that a run writes in its own folder; runs side by side would mix it up."""
    trainer = {**config["trainer"], "default_root_dir": str(folder)}
    callbacks = [_moved(each, "dirpath", folder) for each in trainer.get("callbacks") or []]
    saves = any("Checkpoint" in str(each.get("class_path", "")) for each in callbacks)
    if not saves and trainer.get("enable_checkpointing") is None:
        trainer["enable_checkpointing"] = False  # nobody would look at one a run, and they are large
    trainer["callbacks"] = callbacks or None
    logger = trainer.get("logger")
    if isinstance(logger, list):
        trainer["logger"] = [_moved(each, "save_dir", folder) for each in logger]
    elif isinstance(logger, Mapping):
        trainer["logger"] = _moved(logger, "save_dir", folder)
    return {**config, "trainer": trainer}


def _moved(part: Any, name: str, folder: Path) -> Any:
    """A callback's or logger's config with the folder that it names, seen from the run's own."""
    where = (part.get("init_args") or {}).get(name) if isinstance(part, Mapping) else None
    if not isinstance(where, str) or "://" in where:
        return part
    return {**part, "init_args": {**part["init_args"], name: str(folder / where)}}


# -- the data order --------------------------------------------------------------------------------------------------


class SameOrder:
    """Has every loader hand out its samples in an order that only the seed and the epoch decide, and keeps its start.

    A stock shuffling loader draws its order from the global random state, which every recipe moves in another way.
    Samplers with an epoch or a generator of their own (the data modules' here, a ``DistributedSampler``) are left as
    they are, and so is what a recipe itself does to the data.

    Args:
        seed: of the run.

    Attributes:
        started: the first indices of the first epochs, `RECORDED_INDICES` of `RECORDED_EPOCHS` at most.
    """

    def __init__(self, seed: int) -> None:
        self.seed, self.started = seed, []
        self._loop: Any = None

    def install(self, trainer: pl.Trainer, undo: ExitStack) -> None:
        """Take hold of every training loader of the fit."""
        self._loop = trainer.fit_loop
        when_made(self._loop, self._take_hold, undo)

    def _take_hold(self, loaders: CombinedLoader) -> None:
        for loader in loaders.flattened:
            if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
                continue
            if loader.generator is None:  # gives workers their seeds
                loader.generator = generator(self.seed, "workers")
            batches = loader.batch_sampler
            inner = loader.sampler if batches is None else getattr(batches, "sampler", None)
            sampler = batches if inner is None else inner
            if "_handed_out_by" not in vars(type(sampler)):
                self._watch(sampler)

    def _watch(self, sampler: Any) -> None:
        """Give one sampler its order, and keep what it hands out."""
        stock, order = type(sampler), self
        draws = "generator" in vars(sampler) and sampler.generator is None and not hasattr(sampler, "set_epoch")
        if draws:
            sampler.generator = torch.Generator()

        def handed_out(self: Any) -> Iterator[Any]:
            if draws:
                self.generator.manual_seed(order.epoch_seed())
            kept: list[int] | None = None
            if len(order.started) < RECORDED_EPOCHS:
                order.started.append(kept := [])
            for index in stock.__iter__(self):
                if kept is not None and len(kept) < RECORDED_INDICES:
                    with contextlib.suppress(TypeError, ValueError):  # anything else that a sampler may hand out
                        kept.extend(map(int, index) if isinstance(index, list | tuple) else [int(index)])
                yield index

        sampler.__class__ = type(stock.__name__, (stock,), {"__iter__": handed_out, "_handed_out_by": order})

    def epoch_seed(self) -> int:
        """A number for the epoch under way."""
        return key(self.seed, "data order", self._loop.epoch_progress.current.processed) & (2**63 - 1)


# -- the measurement -------------------------------------------------------------------------------------------------


class Measure(pl.Callback):
    """Looks on: what is logged when, how long steps take, how much memory and how many parameters train.

    Args:
        folder: of the run, which gets ``progress.json``; None to write nothing.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.curve: list[dict[str, float]] = []
        self.intervals: list[float] = []  # seconds
        self.trainable = self.parameters = self.peak = self.before = 0
        self.seconds = self.started = self.load = 0.0
        self._began = self._last = self._told = 0.0
        self._whole = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._device = trainer.strategy.root_device
        self.before = _memory_now(self._device)
        _reset_peak(self._device)
        self.started, self._began = time.time(), time.perf_counter()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        sizes = [(p.numel(), p.requires_grad) for p in pl_module.parameters()]
        self.parameters = max(self.parameters, sum(n for n, _ in sizes))
        self.trainable = max(self.trainable, sum(n for n, trains in sizes if trains))
        self._whole = False

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._whole = False

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if self._whole:  # from the end of one batch to that of the next, with its data, hooks and logging
            self.intervals.append(now - self._last)
        self._last, self._whole = now, True
        if now - self._told > 0.5:
            self._told = now
            self._tell(trainer, batch_idx)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._note(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._note(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds = time.perf_counter() - self._began
        self.load = psutil.getloadavg()[0]  # of the last minute
        self.peak = _peak(self._device)

    def _note(self, trainer: pl.Trainer) -> None:
        place = {"step": trainer.global_step, "epoch": trainer.current_epoch + 1}
        place["seconds"] = time.perf_counter() - self._began
        point = {**place, **_floats(trainer.callback_metrics)}
        if self.curve and self.curve[-1]["step"] == point["step"]:
            self.curve[-1] = {**point, **place, "epoch": self.curve[-1]["epoch"]}  # the epoch is counted on at its end
        else:
            self.curve.append(point)

    def _tell(self, trainer: pl.Trainer, batch_idx: int) -> None:
        if self.folder is None or not trainer.is_global_zero:
            return
        done = {"step": trainer.global_step, "epoch": trainer.current_epoch, "share": share_done(trainer, batch_idx)}
        with contextlib.suppress(OSError):  # a full disk says so where it matters
            write_text(self.folder / "progress.json", json.dumps(done))

    def step_seconds(self) -> float:
        """Mean of a training step; 0 where there were no two in a row."""
        found = torch.tensor(self.intervals, dtype=torch.double)
        found = found[min(5, len(found) // 4) :]  # warming up
        return found.clamp(max=CAP * found.median()).mean().item() if len(found) else 0.0


def share_done(trainer: pl.Trainer, batch_idx: int) -> float | None:
    """How much of a fit is done, 0 to 1; None where only a clock ends it."""
    shares = []
    if (trainer.max_epochs or -1) > 0:
        epoch = (batch_idx + 1) / trainer.num_training_batches if trainer.num_training_batches else 1
        shares.append((trainer.current_epoch + min(epoch, 1)) / trainer.max_epochs)
    if trainer.max_steps > 0:
        shares.append(trainer.global_step / trainer.max_steps)
    return min(max(shares), 1.0) if shares else None


def _floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _memory_now(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR.exists():
        with contextlib.suppress(OSError):
            _CLEAR.write_text("5")  # Linux: the peak begins anew


def _peak(device: torch.device) -> int:
    """Bytes: allocated on a GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


# -- the run ---------------------------------------------------------------------------------------------------------


class RunCLI(RecipeCLI):
    """``fit``, looked on at."""

    def __init__(self, args: list[str], measure: Measure, order: SameOrder) -> None:
        self.measure, self.order, self.undo = measure, order, ExitStack()
        super().__init__(args)

    def before_fit(self) -> None:
        self.trainer.callbacks.append(self.measure)
        self.order.install(self.trainer, self.undo)


def train(folder: Path, seed: int) -> Content:
    """Fit and evaluate.

    Returns:
        plain values: ``metrics``, the last value of everything that was logged, those of the evaluation after the fit
        before those of the fit; ``curve``, all of them at every validation; ``step_seconds``, ``fit_seconds``,
        ``peak_memory`` and ``memory_before`` in bytes, ``trainable`` and ``parameters``; ``order``; ``notes``;
        ``started``, seconds since 1970, and ``load``, how many programs wanted to run on the machine at the end.
    """
    measure, order = Measure(folder), SameOrder(seed)
    cli = RunCLI(["fit", "--config", str(folder / "config.yaml")], measure, order)
    trainer, notes = cli.trainer, []
    metrics = _floats(trainer.callback_metrics)
    if trainer.enable_validation and is_overridden("validation_step", cli.model):
        metrics.update(_evaluated(cli, "validate"))
    has_test = [each for each in (cli.datamodule, cli.model) if each and is_overridden("test_dataloader", each)]
    if has_test and is_overridden("test_step", cli.model):
        try:
            metrics.update(_evaluated(cli, "test"))
        except Exception as error:  # a test set without labels is no reason to lose a training
            notes.append(f"the test failed: {type(error).__name__}: {error}")
    device = trainer.strategy.root_device
    return {
        "metrics": metrics,
        "curve": measure.curve,
        "step_seconds": measure.step_seconds(),
        "fit_seconds": measure.seconds,
        "started": measure.started,
        "load": measure.load,
        "steps": trainer.fit_loop.epoch_loop.global_step,
        "peak_memory": measure.peak,
        "memory_before": measure.before,
        "trainable": measure.trainable,
        "parameters": measure.parameters,
        "order": order.started,
        "notes": notes,
        "machine": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "host": platform.node(),
            "threads": torch.get_num_threads(),
            "cores": psutil.cpu_count(),
            "torch": str(torch.__version__),
            "lightning": str(pl.__version__),
            "python": platform.python_version(),
        },
    }


def _evaluated(cli: RunCLI, how: str) -> dict[str, float]:
    """What an evaluation of the weights that the fit left logs."""
    getattr(cli.trainer, how)(cli.model, datamodule=cli.datamodule, verbose=False)
    return _floats(cli.trainer.callback_metrics)


def execute(folder: Path) -> None:
    """The run whose folder it is, unless its result is there."""
    spec = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    if int(os.environ.get("LOCAL_RANK", 0)) or int(os.environ.get("NODE_RANK", 0)):
        train(folder, spec["seed"])  # a further rank: the first one keeps the result, and holds its lock
        return
    Artefact(folder, "result", spec["made_from"]).get(lambda _: train(folder, spec["seed"]))


def _end_with_parent() -> None:
    """End when whoever started this process ends, however it does: its end of the standard input closes then."""

    def wait() -> None:
        with contextlib.suppress(OSError):
            os.read(0, 1)  # not sys.stdin, whose lock this thread would hold at the end of the process
        os.killpg(os.getpgid(0), signal.SIGKILL)  # further ranks too; nothing is lost but this run

    threading.Thread(target=wait, daemon=True).start()


def main(args: list[str]) -> int:
    """Run one."""
    if "--with-parent" in args and "LOCAL_RANK" not in os.environ:
        _end_with_parent()
    try:
        execute(Path(args[0]))
    except RecipeError as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
