"""Bytes that two processes exchange in a training step under DDP, against the least that they have to.

Both train on the CPU over gloo. What DDP reduces is counted by a communication hook, bucket by bucket, and what recipes
send besides (statistics that couple samples, a mean over ranks) where they call ``torch.distributed``. The least is one
gradient of every parameter that is trained in that step. Nothing is timed, so a busy machine does not matter.
"""

from __future__ import annotations

import logging
import os
import socket
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from benchmarks.grown import find
from benchmarks.turns import FORKS, batches_of, build
from lightning_recipes.modules import ImageClassifier

BATCH = 4  # samples a step of each process: bytes do not depend on it, but where samples are coupled
STEPS = 5

# Functions of torch.distributed that send tensors. What counts is the last tensor among their arguments: what goes in.
SENDS = ("all_gather", "all_gather_into_tensor", "all_reduce", "broadcast", "reduce", "reduce_scatter_tensor")


class Count:
    """Bytes of the step under way, and of those before it.

    Attributes:
        gradients: what DDP reduced.
        others: what else was sent.
    """

    def __init__(self) -> None:
        self.gradients = self.others = 0
        self._of_ddp = False

    def bucket(self, size: int, reduce: Callable[[], Any]) -> Any:
        """Reduce a bucket of DDP's."""
        self.gradients += size
        self._of_ddp = True
        try:
            return reduce()
        finally:
            self._of_ddp = False

    def sent(self, tensor: Tensor) -> None:
        """Something goes out."""
        if not self._of_ddp:
            self.others += tensor.nbytes

    def take(self) -> tuple[int, int]:
        """Both, and begin anew."""
        found = self.gradients, self.others
        self.gradients = self.others = 0
        return found


COUNT = Count()
"""Of this process."""


def counted(state, bucket):
    """DDP's own reduction, counted. Without annotations: torch compares them, and cannot read postponed ones."""
    return COUNT.bucket(bucket.buffer().nbytes, lambda: allreduce_hook(None, bucket))


@contextmanager
def counting_others() -> Iterator[None]:
    """Count what is sent by ``torch.distributed`` itself."""

    def watched(send: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            COUNT.sent(tensors[-1])
            return send(*args, **kwargs)

        return call

    patches = [mock.patch.object(dist, name, watched(getattr(dist, name))) for name in SENDS]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def least(parameters: Iterable[nn.Parameter]) -> int:
    """Bytes of one gradient of each that is trained."""
    return sum(p.nbytes for p in parameters if p.requires_grad)


class PerStep(pl.Callback):
    """Takes the count of every step.

    Attributes:
        found: (gradients, others, least) of each. What is trained is looked up before the step and is another at times.
    """

    def __init__(self) -> None:
        self.found: list[tuple[int, int, int]] = []
        self._least = 0

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *rest: Any) -> None:
        COUNT.take()  # what is sent between two steps belongs to none

    def on_after_backward(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._least = least(module.parameters())

    def on_train_batch_end(self, *args: Any) -> None:
        self.found.append((*COUNT.take(), self._least))


def train(callbacks: list[pl.Callback], module: pl.LightningModule, loader: Any, epochs: int, **settings: Any) -> Any:
    """Train as one of two processes; what :class:`PerStep` found."""
    per_step = PerStep()
    configure = DDPStrategy.configure_ddp

    def configure_and_count(strategy: DDPStrategy) -> None:
        configure(strategy)
        strategy.model.register_comm_hook(None, counted)

    # Lightning gives DDP its `ddp_comm_hook` on a GPU only; this is called for every new wrapper.
    hooked = mock.patch.object(DDPStrategy, "configure_ddp", configure_and_count)
    with hooked, counting_others(), tempfile.TemporaryDirectory() as folder:
        pl.Trainer(
            accelerator="cpu",
            devices=2,
            strategy=DDPStrategy(process_group_backend="gloo"),
            plugins=LightningEnvironment(),
            max_epochs=epochs,
            callbacks=[*callbacks, per_step],
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            **settings,
        ).fit(module, *loader)
    return per_step.found


def _rank(rank: int, port: int, name: str, variant: str, pipe: Connection) -> None:
    place = {"LOCAL_RANK": rank, "NODE_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()})
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    case = find(name)
    net = build(case.network)
    module = case.module() if case.module is not None else ImageClassifier(net, optimizer=case.optimizer)
    steps = max(STEPS, -(-case.least // (2 * BATCH)))
    loader = batches_of(case, 2 * steps, BATCH, "cpu")
    validation = [batches_of(case, 2, BATCH, "cpu")] if case.validates else []
    callbacks = {"plain": list, "neutral": case.neutral, "recipe": case.recipes}[variant]()
    pipe.send(train(callbacks, module, [loader, *validation], case.epochs, limit_train_batches=steps))


def steps_of(name: str, variant: str) -> list[tuple[int, int, int]]:
    """(bytes that DDP reduced, other bytes, the least) of every step of a case's fit on two processes, by rank 0.

    Raises:
        RuntimeError: when a process ended early; its traceback stands on stderr.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(2):
        pipe, theirs = FORKS.Pipe()
        ranks.append((FORKS.Process(target=_rank, args=(rank, port, name, variant, theirs)), pipe))
        ranks[-1][0].start()
        theirs.close()
    found: dict[Connection, list[tuple[int, int, int]]] = {}
    try:
        while missing := [pipe for _, pipe in ranks if pipe not in found]:
            for pipe in wait(missing):  # of both: where one fails the other waits for it
                found[pipe] = pipe.recv()
        for process, _ in ranks:
            process.join(20)
    except EOFError:
        raise RuntimeError(f"a process of {name}, {variant} ended early") from None
    finally:
        for process, _ in ranks:
            process.kill()
    return found[ranks[0][1]]


def reduced(name: str, variant: str = "recipe") -> dict[str, Any]:
    """Bytes of a step of one case, the mean over the steps of its last epoch, and how they stand to the least.

    The least is one gradient of what is trained in that step, or as many as the method needs.
    """
    case = find(name)
    found = steps_of(name, variant)
    last = found[-(len(found) // case.epochs) :]
    gradients, others, once = (statistics.fmean(each) for each in zip(*last))
    return {
        "case": name,
        "gradients": gradients,
        "others": others,
        "trained": once,
        "least": once * case.reductions,
        "ratio": (gradients + others) / (once * case.reductions),
        "sends": case.sends,
    }
