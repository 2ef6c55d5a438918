"""Training on a stream of recurring tasks, which the claims and the paper's figure share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import TensorDataset

from benchmarks.claims.training import fit, seeded
from lightning_recipes.datamodules import SCoLeDataModule

CLIP = 10.0


class Accuracies(pl.Callback):
    """Accuracy of every class after some tasks of a stream, with the network as it then is.

    Args:
        x, y: what it is measured on.
        after: numbers of tasks.
    """

    def __init__(self, x: Tensor, y: Tensor, after: Collection[int]) -> None:
        self.x, self.y, self.after = x, y, set(after)
        self.by_class: dict[int, Tensor] = {}
        """By number of tasks, ``[classes]``."""

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch + 1 in self.after:
            right = (pl_module(self.x).argmax(1) == self.y).double()
            self.by_class[trainer.current_epoch + 1] = torch.stack([right[self.y == c].mean() for c in self.y.unique()])


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between them, on flattened images."""
    layers = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers[:-1])


def through(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    after: Collection[int],
    seed: int,
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    recipes: Sequence[pl.Callback] = (),
    batch_size: int = 32,
    **stream: Any,
) -> tuple[dict[int, Tensor], SCoLeDataModule]:
    """Train an MLP of 256 hidden units through a stream of tasks of one epoch.

    Args:
        train, test: images and labels.
        after: numbers of tasks to measure at; the largest is the length of the stream.
        seed: of first weights, tasks and order.
        optimizer: makes it from the parameters.
        recipes: callbacks.
        batch_size: samples a step.
        **stream: further arguments of SCoLeDataModule.

    Returns:
        the accuracy of each class on the test images by number of tasks, and the stream.
    """
    with seeded(seed):
        net, length = mlp(train[0][0].numel(), 256, int(train[1].max()) + 1), max(after)
        measured = Accuracies(*test, after)
        data = SCoLeDataModule(
            (TensorDataset(*train), TensorDataset(*test)), length, batch_size=batch_size, seed=seed, **stream
        )
        fit(net, data, length, optimizer, None, [*recipes, measured], gradient_clip_val=CLIP, limit_val_batches=0)
        return measured.by_class, data
