"""What a module, as it stands, makes of the data that a fit holds, without leaving a trace in the fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_recipes.core.batch import get_input
from lightning_recipes.core.distributed import active, broadcast_
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.labels import labels_in
from lightning_recipes.core.random import forked, key
from lightning_recipes.core.silence import gradients_allowed, modes_kept, silent
from lightning_recipes.core.step import Replay, observe, rest_of_arguments, stock_step

ONE_OUTPUT = ("binary_cross_entropy_with_logits", "binary_cross_entropy", "soft_margin_loss")
"""Losses of one output that tells two classes apart."""
ENDLESS = 200
"""Batches that are read of training data without a length."""


@dataclass(frozen=True)
class Loader:
    """One loader of a fit.

    Attributes:
        batches: makes the batches, as the loader gives them.
        limit: how many of them the Trainer takes.
        index: of the loader among its kind.
    """

    batches: Iterable[Any]
    limit: float
    index: int = 0


def validation_loaders(trainer: pl.Trainer) -> list[Loader]:
    """The validation loaders of a fit, all of them; made if the fit has not validated yet. Empty without any."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    if loop._combined_loader is None:
        stage = trainer.state.stage
        trainer.validating = True
        try:
            loop.setup_data()
        finally:
            trainer.state.stage = stage
    if loop._combined_loader is None:
        return []
    limits = loop._max_batches
    return [Loader(each, limits[i], i) for i, each in enumerate(loop._combined_loader.flattened)]


def has_validation(trainer: pl.Trainer) -> bool:
    """Whether a fit has anything to validate on, before its loaders are made."""
    source = trainer.fit_loop.epoch_loop.val_loop._data_source
    return bool(source.is_defined()) and trainer.limit_val_batches != 0


def training_loader(trainer: pl.Trainer) -> Loader:
    """The training data of a fit, once through."""
    combined = trainer.fit_loop._combined_loader
    alone = len(combined.flattened) == 1
    batches = combined.flattened[0] if alone else (triple[0] for triple in combined)
    limit = trainer.num_training_batches
    return Loader(batches, limit if limit != float("inf") else ENDLESS)


def on_device(trainer: pl.Trainer, loader: Loader) -> Iterator[Any]:
    """The batches of a loader as a step of this fit gets them."""
    for number, batch in enumerate(loader.batches):
        if number >= loader.limit:
            return
        yield as_a_step_gets_it(trainer, batch, loader.index)


def as_a_step_gets_it(trainer: pl.Trainer, batch: Any, index: int = 0) -> Any:
    """A batch of a loader in the fit's precision and on its device, by way of the module's transfer hooks."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=index)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=index)


@contextmanager
def where_it_trained(trainer: pl.Trainer) -> Iterator[None]:
    """The module on the device of the fit, from which Lightning has taken it before ``on_fit_end``."""
    module = trainer.lightning_module
    device = module.device
    module.to(trainer.strategy.root_device)
    try:
        yield
    finally:
        module.to(device)


@contextmanager
def apart(trainer: pl.Trainer, *stream: int | str, full_precision: bool = False) -> Iterator[None]:
    """Eval mode, gradients allowed, the fit's precision unless told otherwise; what is drawn hangs on `stream` alone,
    and modes and the random state end as they began.
    """
    module = trainer.lightning_module
    with (
        gradients_allowed(),
        modes_kept(module, training=False),
        forked(module.device, key(*stream)),
        nullcontext() if full_precision else trainer.precision_plugin.forward_context(),
    ):
        yield


@contextmanager
def buffers_of_rank_zero(trainer: pl.Trainer) -> Iterator[None]:
    """Inside, all ranks have the buffers that rank 0 has, and that a checkpoint keeps: running statistics are otherwise
    each rank's own, and those of the others are lost in a resume. To be entered by all ranks, with no graph alive.
    """
    buffers = [b for b in trainer.lightning_module.buffers() if b.is_floating_point()] if active() else []
    own = [buffer.detach().clone() for buffer in buffers]
    broadcast_(buffers, trainer)
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, own):
                buffer.copy_(value)


def classified(replay: Replay) -> bool:
    """Whether what a step computed is a classification: a loss of logits ``[n, classes]`` for ``[n]`` labels."""
    return replay.call.classifies and replay.logits.dim() == 2 and len(replay.targets) == len(replay.logits)


@dataclass(frozen=True)
class Decision:
    """What a classifier of any kind makes of a batch.

    Attributes:
        logits: fp32 ``[n, classes]``; ``[n, 1]`` where one output tells two classes apart by its sign.
        labels: int64 ``[n]``, 0 and 1 there.
    """

    logits: Tensor
    labels: Tensor

    @property
    def classes(self) -> int:
        """How many there are."""
        return max(self.logits.shape[1], 2)

    @property
    def correct(self) -> Tensor:
        """Whether each sample is told right: bool ``[n]``."""
        single = self.logits.shape[1] == 1
        return (self.logits[:, 0] > 0 if single else self.logits.argmax(1)) == self.labels


def decide(trainer: pl.Trainer, batch: Any, number: int, criterion: str | int | None = None) -> Decision:
    """Have the module classify a batch, silently; to be called within :func:`apart`.

    Logits and labels are those that the observed loss of the module's own step gets. Under manual optimization the step
    would train, so there they are what ``forward`` makes of the batch's input, and the labels beside it.

    Args:
        batch: as a step gets it.
        number: its index.
        criterion: which loss of the step to observe.

    Raises:
        RecipeError: for what is no classification into two or more classes, one label a sample.
    """
    module = trainer.lightning_module
    if module.automatic_optimization:
        seen = observe(trainer, module, batch, number, criterion)
        logits, targets, name = seen.logits.detach(), seen.targets, seen.call.name
        named, of_classes = not seen.call.is_function, seen.call.classifies
    else:
        with silent(module), torch.no_grad():
            logits, targets, name = module(get_input(batch)), labels_in(batch), "forward"
        named = of_classes = True
    if not isinstance(logits, Tensor) or not isinstance(targets, Tensor):
        raise RecipeError(f"needs logits and labels; got {type(logits).__name__} and {type(targets).__name__}")
    n = len(targets)
    if (named or name in ONE_OUTPUT) and n and logits.numel() == targets.numel() == n:  # 0 and 1, or -1 and 1
        z = logits.float().reshape(n, 1)
        return Decision(z - 0.5 if name == "binary_cross_entropy" else z, (targets.reshape(n) > 0.5).long())
    if not of_classes or logits.dim() != 2 or len(logits) != n or targets.dim() > 2:
        raise RecipeError(
            "needs a classification loss, of logits [n, classes], or of one logit a sample; the observed one"
            f" ({name}) got {tuple(logits.shape)} and targets {tuple(targets.shape)}"
        )
    return Decision(logits.float(), targets.argmax(1) if targets.dim() == 2 else targets.long())


@dataclass(frozen=True)
class Outcome:
    """What a classifier made of this rank's samples of one loader, in order.

    Attributes:
        correct: bool ``[n]``.
        confidence: the largest probability of each, fp32 ``[n]``.
    """

    correct: Tensor
    confidence: Tensor


def outcomes(
    trainer: pl.Trainer,
    loaders: Iterable[Loader],
    criterion: str | int | None = None,
    advance: Callable[[], None] = lambda: None,
) -> list[Outcome]:
    """Have the module's own step classify every loader, silently and in eval mode.

    Args:
        trainer: in a fit.
        loaders: of batches with labels.
        criterion: which loss of the step to read logits and labels from.
        advance: called after every batch.

    Raises:
        RecipeError: for a step that does not classify.
    """
    found = []
    for loader in loaders:
        correct, confidence = [], []
        with apart(trainer, "outcomes", loader.index):
            for number, batch in enumerate(on_device(trainer, loader)):
                seen = observe(trainer, trainer.lightning_module, batch, number, criterion)
                if not classified(seen):
                    raise RecipeError(
                        f"accuracy needs a classification loss of logits [n, classes]; the observed one got"
                        f" {tuple(seen.logits.shape)} and targets {tuple(seen.targets.shape)}"
                    )
                logits = seen.logits.detach().float()
                labels = seen.targets.argmax(1) if seen.targets.is_floating_point() else seen.targets
                correct.append(logits.argmax(1) == labels)
                confidence.append(logits.softmax(1).amax(1))
                advance()
        nothing = torch.zeros(0, device=trainer.lightning_module.device)
        found.append(Outcome(torch.cat([nothing.bool(), *correct]), torch.cat([nothing, *confidence])))
    return found


def pass_through(trainer: pl.Trainer, batch: Any, number: int) -> None:
    """Run the module's own step on a batch for what it does to batch-norm statistics; nothing is logged."""
    module = trainer.lightning_module
    with torch.no_grad(), silent(module, track_statistics=True):
        stock_step(module)(batch, *rest_of_arguments(module, number))
