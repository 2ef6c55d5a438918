"""Training runs that take single steps in turn, so that a slow moment of the machine hits all of them alike.

Every run has a process of its own, in which it trains as it always would: warm, with its own allocator. After a few
free steps it waits before each batch until it is told to go on, and then says how long it took from there to the next
batch: the whole iteration, with data, hooks and logging. They begin together; from there on one is under way at a time.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, repeat
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import loops
from benchmarks.cases import EPOCH, IMAGE_SIZE, Case, build
from benchmarks.grown import find
from lightning_recipes.modules import ImageClassifier

BY_HAND = ("plain loop", "loop with method")
"""The variants of a case without Lightning; the others are 'plain', 'neutral' and 'recipe'."""

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports to stderr that a CPU is no GPU
# Forked from a process that has imported everything, and has touched neither threads nor a device.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__])


@dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
        batch: batch size.
        steps: timed steps of a run.
        free: steps before them.
        bf16: bf16 autocast.
        compiled: the network compiled at ``torch.compile``'s defaults.
    """

    batch: int = 32
    steps: int = 20
    free: int = 4
    bf16: bool = False
    compiled: bool = False


# -- in the process of a run -----------------------------------------------------------------------------------------


class Turns:
    """Waits for its turn and reports how long the last one took, in seconds."""

    def __init__(self, pipe: Connection, free: int) -> None:
        self.pipe, self.free, self.started = pipe, free, None

    def __call__(self) -> None:
        if self.free > 0:
            self.free -= 1
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if self.started is None:
            gc.disable()  # it collects at any time; here between turns
            gc.freeze()
        self.pipe.send(None if self.started is None else time.perf_counter() - self.started)
        gc.collect(1)
        try:
            self.pipe.recv()
        except EOFError:
            os._exit(1)  # nobody measures any more
        self.started = time.perf_counter()


class StepTurns(pl.Callback):
    """One turn a training step."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def on_train_batch_start(self, *args: Any) -> None:
        self.turns()


class EpochTurns(StepTurns):
    """One turn an epoch, with its validation."""

    def on_train_batch_start(self, *args: Any) -> None:
        pass

    def on_train_epoch_start(self, *args: Any) -> None:
        self.turns()


class PredictionTurns(StepTurns):
    """One turn a batch that is predicted."""

    def on_predict_batch_start(self, *args: Any) -> None:
        self.turns()


class Holdings(pl.Callback):
    """What a fit holds and takes beside its steps. To stand last among the callbacks.

    Attributes:
        found: ``before``, seconds from the beginning of the fit to the first step; ``after``, from the last step to its
            end; ``held``, bytes of all tensors after the last step; ``checkpoint``, bytes of one written then.
    """

    def __init__(self) -> None:
        self.began, self.found = 0.0, {}

    def on_train_batch_start(self, *args: Any) -> None:
        self.found.setdefault("before", time.perf_counter() - self.began)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, out: Any, batch: Any, i: int) -> None:
        if trainer.current_epoch < trainer.max_epochs - 1 or i < trainer.num_training_batches - 1:
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "last.ckpt"
            trainer.save_checkpoint(path)
            self.found["checkpoint"] = path.stat().st_size
        self.found["held"] = held_bytes()
        self.last = time.perf_counter()

    def end(self) -> dict[str, float]:
        """What was found, at the end of the fit."""
        return {**self.found, "after": time.perf_counter() - self.last}


class SaveTurns(Checkpoint):
    """After the second batch, writes a checkpoint a turn, over the last one.

    Attributes:
        size: of the last one, in bytes.
    """

    def __init__(self, turns: Turns, times: int) -> None:
        self.turns, self.times, self.size = turns, times, 0

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, out: Any, batch: Any, i: int) -> None:
        if i != 1 or trainer.current_epoch > 0:
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "last.ckpt"
            for _ in range(self.times):
                self.turns()
                trainer.save_checkpoint(path)
            self.turns()
            self.size = path.stat().st_size


class Calls(pl.Callback):
    """Counts the function calls of every training step, Python's and those into C. To stand last among the callbacks.

    A count is the same however busy the machine is: what does something for every parameter shows at once.

    Attributes:
        found: of each step, up to the beginning of the next one.
    """

    def __init__(self) -> None:
        self.found: list[int] = []
        self._count = 0

    def on_train_batch_start(self, *args: Any) -> None:
        if sys.getprofile() is not None:
            sys.setprofile(None)
            self.found.append(self._count)
        self._count = 0
        sys.setprofile(self._event)

    def on_train_epoch_end(self, *args: Any) -> None:
        sys.setprofile(None)  # what comes between two epochs is no step's

    def _event(self, frame: Any, event: str, argument: Any) -> None:
        self._count += event in ("call", "c_call")


Task = Literal["steps", "saves", "memory", "holds", "calls"]


def run(name: str, variant: str, task: Task, settings: Settings, pipe: Connection) -> None:
    """Train one variant of a case; the target of a process.

    Says at its end, for the task 'saves', the size of a checkpoint, and for 'memory' the peak, both in bytes; for
    'holds' what :class:`Holdings` found, for 'calls' the median of :class:`Calls`. The task 'steps' times whatever is a
    turn of the case.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    case = find(name)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net = build(case.network, device.type) if case.module is None else case.module()
    if settings.compiled:
        net.compile()
    rounds = settings.free + settings.steps + 1 if task in ("steps", "calls") else 3
    steps, epochs, earlier = rounds, case.epochs, 0
    if task == "steps" and case.turn == "step":
        earlier = (case.epochs - 1) * steps  # steps of the epochs before the timed one
    if case.turn == "epoch":
        steps, epochs = EPOCH, rounds if task == "steps" else 1
    turns = Turns(pipe, earlier + settings.free)
    loader = batches_of(case, steps, settings.batch, device.type, variant)
    saves, holdings, calls = SaveTurns(turns, settings.free + settings.steps), Holdings(), Calls()

    def train() -> None:
        if variant in BY_HAND:
            amp = partial(torch.autocast, device.type, torch.bfloat16) if settings.bf16 else nullcontext
            batches = BeforeEach(loader, device, turns if task == "steps" else None)
            if variant == "plain loop":
                every = chain.from_iterable(repeat(batches, case.epochs))
                loops.plain(net.to(device), every, amp, optimizer=case.optimizer)
            else:
                case.loop(net.to(device), batches, amp)
            return
        callbacks = {"plain": list, "neutral": case.neutral, "recipe": case.recipes}[variant]()
        clock = {"step": StepTurns, "epoch": EpochTurns, "prediction": PredictionTurns}[case.turn]
        clocks = {"steps": [clock(turns)], "saves": [saves], "memory": []}.get(task, [])
        clocks += {"holds": [holdings], "calls": [calls]}.get(task, [])
        trainer = pl.Trainer(
            max_epochs=epochs,
            limit_train_batches=1.0 if case.samples is None else steps,
            limit_val_batches=1.0 if case.samples is None else EPOCH,
            num_sanity_val_steps=0,
            callbacks=[*callbacks, *clocks],
            accelerator=device.type,
            devices=1,
            precision="bf16-mixed" if settings.bf16 else "32-true",
            logger=False,
            enable_checkpointing=task == "saves",
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        module = ImageClassifier(net, optimizer=case.optimizer) if case.module is None else net
        if case.turn == "prediction":
            trainer.predict(module, loader, return_predictions=False)
            return
        validation = DataLoader(loader.dataset, settings.batch) if case.validates else None
        holdings.began = time.perf_counter()
        trainer.fit(module, loader, validation)

    if task == "memory":
        pipe.send(peak_bytes(net, train))
    elif task == "holds":
        train()
        pipe.send(holdings.end())
    elif task == "calls":
        train()
        pipe.send(statistics.median(calls.found))
    else:
        train()
        pipe.send(saves.size)


def batches_of(case: Case, steps: int, size: int, device: str, variant: str = "recipe") -> DataLoader:
    """A case's training data, or what it predicts on: random images unless it brings its own."""
    if case.loader is not None:
        return case.loader(steps, size, variant)
    channels, edge = case.image or (3, IMAGE_SIZE[device])
    images = torch.rand(case.samples or steps * size, channels, edge, edge)
    data = TensorDataset(images, torch.randint(10, (len(images),)))
    start = "fork" if case.num_workers else None  # not this process's own way, which would import everything again
    return DataLoader(data, size, num_workers=case.num_workers, multiprocessing_context=start)


def held_bytes() -> int:
    """Bytes of all tensors that this process holds, each storage counted once."""
    gc.collect()
    found = {}
    for held in gc.get_objects():
        if issubclass(type(held), torch.Tensor) and held.layout is torch.strided and held.device.type != "meta":
            with suppress(RuntimeError):  # a compiler's stand-in, which has no memory
                storage = held.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    found.pop(0, None)  # so have those that say they begin nowhere
    return sum(found.values())


class BeforeEach:
    """The batches on the device, one a turn; in every epoch anew."""

    def __init__(self, batches: DataLoader, device: torch.device, turns: Callable[[], None] | None) -> None:
        self.batches, self.device, self.turns = batches, device, turns

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        for batch in self.batches:
            if self.turns is not None:
                self.turns()
            yield tuple(part.to(self.device, non_blocking=True) for part in batch)


def peak_bytes(net: nn.Module, job: Callable[[], None]) -> int:
    """The most bytes that tensors held while `job` ran, the network's weights among them.

    Exact on both kinds of device, other than a resident set, which holds what the allocator keeps and the interpreter:
    the CUDA allocator's own count, or on a CPU the sum over every allocation and release, which the profiler sees.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        job()
        return torch.cuda.max_memory_allocated()
    weights = [*net.parameters(), *net.buffers()]
    live = peak = sum(t.untyped_storage().nbytes() for t in weights)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        job()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


# -- in the process that measures ------------------------------------------------------------------------------------


class Run:
    """A training run in a process of its own."""

    def __init__(self, name: str, variant: str, task: Task, settings: Settings) -> None:
        self.name = f"{name}, {variant}"
        self.pipe, theirs = FORKS.Pipe()
        self.process = FORKS.Process(target=run, args=(name, variant, task, settings, theirs))
        self.process.start()
        theirs.close()

    def turn(self) -> float:
        """Let it take one turn; its seconds."""
        self.pipe.send(None)
        return self.hear()

    def hear(self) -> Any:
        """What it says next.

        Raises:
            RuntimeError: when it ended instead; its traceback stands on stderr.
        """
        try:
            return self.pipe.recv()
        except EOFError:
            raise RuntimeError(f"the run of {self.name} ended early") from None

    def end(self) -> Any:
        """Let it run to its end; what it says then."""
        self.pipe.send(None)
        said = self.hear()
        self.process.join()
        return said


def block(
    name: str, variants: Sequence[str], task: Task, settings: Settings, seed: int
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """All variants of a case, each in a fresh process, in turns.

    Returns:
        the seconds of every turn by variant, the i-th of all close together; and what the runs said at their end.
    """
    return side_by_side({variant: (name, variant) for variant in variants}, task, settings, seed)


def side_by_side(
    those: Mapping[str, tuple[str, str]], task: Task, settings: Settings, seed: int
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """As :func:`block`, of any runs, each a case and a variant of it."""
    runs: dict[str, Run] = {}
    first, labels = seed % len(those), list(those)
    order, shuffle = [*labels[first:], *labels[:first]], random.Random(seed)
    try:
        for label in order:
            runs[label] = Run(*those[label], task, settings)
        for each in runs.values():
            each.hear()  # it has done its free steps and waits
        seconds: dict[str, list[float]] = {label: [] for label in labels}
        for _ in range(settings.steps):
            last = order[-1]
            shuffle.shuffle(order)
            if order[0] == last:  # nobody steps twice in a row, with its weights still in the caches
                order.reverse()
            for label in order:
                seconds[label].append(runs[label].turn())
        return seconds, {label: each.end() for label, each in runs.items()}
    finally:
        for each in runs.values():
            each.process.kill()


def peak(name: str, variant: str, settings: Settings) -> int:
    """Peak bytes of a few steps of one variant, in a fresh process."""
    return Run(name, variant, "memory", settings).end()


def calls(name: str, variant: str, settings: Settings) -> float:
    """Function calls of a training step of one variant (:class:`Calls`), the median."""
    return Run(name, variant, "calls", settings).end()


def holds(name: str, variant: str, settings: Settings) -> dict[str, float]:
    """What a fit of one variant holds and takes beside its steps (:class:`Holdings`), in a fresh process."""
    return Run(name, variant, "holds", settings).end()
