"""Modules and data as an outsider would write them, and a Trainer that makes no noise and leaves no files."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.multiprocessing
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


def quiet(**kwargs: Any) -> Trainer:
    """A Trainer of one epoch on the CPU."""
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(**{**settings, **kwargs})


def in_two_ranks(run: Callable[..., None], *args: Any) -> None:
    """Call ``run(rank, *args)`` in two new processes that find each other; what one raises is raised here.

    Not forks of this one: neither autograd nor CUDA works in a fork of a process that has compiled or used a GPU.
    """
    multiprocessing.set_forkserver_preload([__name__])  # imports once what every rank needs
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(_as_rank, (port, run, args), nprocs=2, start_method="forkserver")


def _as_rank(rank: int, port: int, run: Callable[..., None], args: tuple[Any, ...]) -> None:
    place = {"LOCAL_RANK": rank, "NODE_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    run(rank, *args)


def samples(count: int = 16, features: int = 6, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs in [0, 1] and labels, with all classes among them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, features, generator=generator), torch.arange(count) % classes


def loader(*tensors: Tensor, size: int = 4) -> DataLoader:
    """Batches in order."""
    return DataLoader(TensorDataset(*tensors), batch_size=size)


def mlp(features: int = 6, classes: int = 3, width: int = 5, seed: int = 0) -> nn.Sequential:
    """Linear 0, ReLU 1, Linear 2, ReLU 3, Linear 4."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(features, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes)
    )


class Classifier(LightningModule):
    """Cross-entropy of a network; plain SGD unless told otherwise.

    Args:
        net: inputs to logits.
        optimizer: parameters to optimizer, or to whatever ``configure_optimizers`` may return.
    """

    def __init__(self, net: nn.Module | None = None, optimizer: Callable[[Iterable[Any]], Any] | None = None) -> None:
        super().__init__()
        self.net = mlp() if net is None else net
        self.make_optimizer = optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val/loss", F.cross_entropy(self(x), y))

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


def weights(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Bitwise equality of two state dicts."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Watch(pl.Callback):
    """Calls a function at a hook of the Trainer: ``Watch(on_train_batch_end=lambda trainer, module, *rest: ...)``."""

    def __init__(self, **hooks: Callable[..., None]) -> None:
        for name, hook in hooks.items():
            setattr(self, name, hook)
