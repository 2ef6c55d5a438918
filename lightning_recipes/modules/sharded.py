"""FSDP2 for the stock modules: under ModelParallelStrategy each process holds a part of every weight."""

from __future__ import annotations

from collections.abc import Iterator

from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn


def shard(module: LightningModule, network: nn.Module) -> None:
    """Shard a network over the processes, its blocks one by one; to be called in ``configure_model``.

    Does nothing under any other strategy, without a Trainer, and where it is sharded already.

    Args:
        module: whose ``device_mesh`` Lightning has set.
        network: that holds the weights.

    Raises:
        ValueError: for ``tensor_parallel_size`` above 1: the network is sharded, not split.
    """
    strategy = None if module._trainer is None else module._trainer.strategy
    if not isinstance(strategy, ModelParallelStrategy):
        return
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if isinstance(network, FSDPModule):
        return
    mesh = module.device_mesh["data_parallel"]
    if (parts := module.device_mesh["tensor_parallel"].size()) > 1:
        raise ValueError(
            f"tensor_parallel_size={parts}: {type(module).__name__} shards its weights and splits no layer; give"
            f" ModelParallelStrategy data_parallel_size={parts * mesh.size()} and tensor_parallel_size=1"
        )
    for part in (*_blocks(network), network):
        fully_shard(part, mesh=mesh)


def _blocks(part: nn.Module) -> Iterator[nn.Module]:
    """The entries of the outermost sequences and lists that have parameters."""
    for child in part.children():
        if isinstance(part, nn.Sequential | nn.ModuleList) and not isinstance(child, nn.ModuleList | nn.ModuleDict):
            if any(True for _ in child.parameters()):
                yield child
        else:
            yield from _blocks(child)
