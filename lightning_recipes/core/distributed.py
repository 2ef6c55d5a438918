"""Sums, means and decisions over ranks. Everything here is the identity in a single process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lightning_recipes.core.errors import RecipeError

T = TypeVar("T")


def check_strategy(trainer: pl.Trainer) -> None:
    """Refuse every strategy that no test covers.

    Raises:
        RecipeError: names the strategy and those that work.
    """
    if type(trainer.strategy) not in (SingleDeviceStrategy, DDPStrategy):
        raise RecipeError(
            f"recipes run on one device or under DDP; Trainer(strategy=...) is {type(trainer.strategy).__name__}."
            " Use strategy='auto' on one device or strategy='ddp'."
        )


def active() -> bool:
    """Whether more than one process takes part."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if active() else (0, 1)


def all_sum(value: Tensor) -> Tensor:
    """Sum of a detached tensor over ranks; the input is left alone."""
    if not active():
        return value
    value = value.detach().clone()
    dist.all_reduce(value)
    return value


def all_mean_(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its mean over ranks, in one message a dtype."""
    if not active():
        return
    world = dist.get_world_size()
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        group = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.reshape(-1) for t in group])
        dist.all_reduce(flat)
        flat /= world
        torch._foreach_copy_(group, [part.view_as(t) for part, t in zip(flat.split([t.numel() for t in group]), group)])


def from_rank_zero(value: T, trainer: pl.Trainer) -> T:
    """A plain value that rank 0 decided, on every rank."""
    return trainer.strategy.broadcast(value) if active() else value


def decided_on_rank_zero(decide: Callable[[], T], trainer: pl.Trainer | None) -> T:
    """What `decide` returns on rank 0, on every rank; the others do not call it.

    Raises:
        RecipeError: on every rank, when it raised one on rank 0.
    """
    if not active():
        return decide()
    decided: T | None = None
    refused: RecipeError | None = None
    if dist.get_rank() == 0:
        try:
            decided = decide()
        except RecipeError as error:
            refused = error
    decided, refusal = trainer.strategy.broadcast((decided, None if refused is None else str(refused)))
    if refusal is not None:
        raise refused or RecipeError(refusal)
    return decided


def broadcast_(tensors: Sequence[Tensor], trainer: pl.Trainer | None) -> None:
    """Replace the values of each tensor by those of rank 0."""
    if not active():
        return
    with torch.no_grad():
        for tensor in tensors:
            there = tensor.detach().to(trainer.strategy.root_device).contiguous()  # NCCL knows no CPU
            dist.broadcast(there, 0)
            tensor.copy_(there)


def stateful_comm_hook(trainer: pl.Trainer) -> bool:
    """Whether DDP's communication hook keeps state that a rebuilt wrapper would lose."""
    return getattr(trainer.strategy, "_ddp_comm_state", None) is not None


def rebuild_ddp(trainer: pl.Trainer) -> None:
    """Wrap the module anew, so that the reducer holds exactly what now requires a gradient.

    Lightning's own two steps (`configure_ddp`), on all ranks at the same optimizer-step boundary. Nothing happens
    outside DDP.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, DDPStrategy) or not isinstance(strategy.model, DistributedDataParallel):
        return
    strategy.model = trainer.lightning_module
    strategy.configure_ddp()
