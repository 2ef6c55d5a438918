"""Sums, means and decisions over ranks. Everything here is the identity in a single process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lightning_recipes.core.errors import RecipeError

T = TypeVar("T")


def shards(trainer: pl.Trainer) -> bool:
    """Whether each process holds only a part of every weight."""
    return type(trainer.strategy) is ModelParallelStrategy


def check_strategy(trainer: pl.Trainer, *, sharded: bool = False) -> None:
    """Refuse every strategy that no test covers.

    Args:
        sharded: whether what asks works where each process holds only a part of every weight.

    Raises:
        RecipeError: names the strategy and those that work.
    """
    name = type(trainer.strategy).__name__
    if type(trainer.strategy) in (SingleDeviceStrategy, DDPStrategy):
        return
    whole = "Use strategy='auto' on one device or strategy='ddp'"
    if not shards(trainer):
        instead = ", or ModelParallelStrategy with fully_shard in the module's configure_model" if sharded else ""
        raise RecipeError(f"recipes run on one device or under DDP; Trainer(strategy=...) is {name}. {whole}{instead}.")
    if not sharded:
        raise RecipeError(
            "it needs whole weights or gradients, on one device or under DDP, and under Trainer(strategy=...)"
            f" {name} each process holds a part of them. {whole}."
        )
    parts = trainer.strategy.device_mesh["tensor_parallel"].size()
    if parts > 1:
        raise RecipeError(
            f"ModelParallelStrategy splits layers over {parts} processes that train on the same batch"
            " (tensor_parallel_size), and recipes deal samples and random numbers to every process. Use"
            f" data_parallel_size={parts * trainer.strategy.device_mesh['data_parallel'].size()} and"
            " tensor_parallel_size=1, with fully_shard in the module's configure_model, or strategy='ddp'."
        )


def check_whole(module: nn.Module, what: str) -> None:
    """Refuse a module whose weights are sharded.

    Args:
        what: that needs them whole.

    Raises:
        RecipeError: names the first weight that is not.
    """
    sharded = next((name for name, p in module.named_parameters() if isinstance(p, DTensor)), None)
    if sharded is not None:
        raise RecipeError(
            f"{what} needs whole weights, and each process holds only a part of {sharded}. Use strategy='auto' on one"
            " device or strategy='ddp'."
        )


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor; all of it where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def from_own_part(part: Tensor, like: Tensor) -> Tensor:
    """The tensor that has this part here and is spread over the processes as `like` is."""
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


def active() -> bool:
    """Whether more than one process takes part."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if active() else (0, 1)


def check_same_checkpoint(checkpoint: Mapping[str, Any], failed: Exception | None = None) -> None:
    """Refuse a run whose processes do not begin at the same place; all of them call this together.

    ``ckpt_path="last"`` is looked up by every process for itself, and one on a machine that does not see the folder
    would begin from the start while the others go on.

    Args:
        checkpoint: that this process has read; empty for none.
        failed: why it could not.

    Raises:
        RecipeError: on every rank; says which one found what.
    """
    if not active():
        return
    found: list[str] = [""] * dist.get_world_size()
    mine = f"one of epoch {checkpoint.get('epoch')}, step {checkpoint.get('global_step')}" if checkpoint else "none"
    if failed is not None and not isinstance(failed, FileNotFoundError):
        mine = "one that it cannot read"
    dist.all_gather_object(found, mine)
    other = next((rank for rank, what in enumerate(found) if what != found[0]), None)
    if other is not None:
        raise RecipeError(
            f"the processes do not resume from the same checkpoint: rank 0 found {found[0]} and rank {other}"
            f" {found[other]}. Its folder (ckpt_path, ModelCheckpoint's dirpath) must be on a disk that all machines"
            " see, under the same path; or copy the checkpoint to all of them"
        ) from failed


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
