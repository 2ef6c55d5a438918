"""The training that the claims share: a stock LightningModule, digits in memory, a plain Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from scipy.ndimage import rotate
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import Adam, Optimizer


class StockClassifier(pl.LightningModule):
    """Cross-entropy on the logits of a network, as anybody writes it; it knows of no recipe.

    Args:
        net: inputs to logits ``[n, classes]``.
        optimizer: makes the optimizer from the parameters.
        schedule: makes a schedule from the optimizer and the number of all steps, stepped after every batch.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        schedule: Callable[[Optimizer, int], Any] | None = None,
    ) -> None:
        super().__init__()
        self.net, self._optimizer, self._schedule = net, optimizer, schedule

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self._optimizer(self.parameters())
        if self._schedule is None:
            return optimizer
        schedule = self._schedule(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Batches:
    """Batches of tensors in memory, shuffled anew every epoch; a DataLoader would take longer than these networks.

    Args:
        x, y: inputs ``[n, ...]`` and labels ``[n]``.
        size: of a batch; the last one of an epoch may be smaller.
        seed: of the order.
        draws: batches an epoch, each drawn on its own from all of x; None goes once through x.
    """

    def __init__(self, x: Tensor, y: Tensor, size: int, seed: int, draws: int | None = None) -> None:
        self.x, self.y, self.size, self.draws = x, y, size, draws
        self._order = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return -(-len(self.x) // self.size) if self.draws is None else self.draws

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.draws is None:
            order = torch.randperm(len(self.x), generator=self._order)
        else:
            order = torch.randint(len(self.x), (self.draws * self.size,), generator=self._order)
        for chosen in order.split(self.size):
            yield self.x[chosen], self.y[chosen]


class LastEpoch(pl.Callback):
    """Keeps what is logged under some names in the steps of the last epoch.

    Args:
        names: of logged quantities, with the recipe's prefix.
    """

    def __init__(self, *names: str) -> None:
        self._values: dict[str, list[float]] = {name: [] for name in names}

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.current_epoch == trainer.max_epochs - 1:
            for name, values in self._values.items():
                values.append(float(trainer.callback_metrics[name]))

    def mean(self, name: str) -> float:
        """Mean over the steps of the last epoch."""
        return sum(self._values[name]) / len(self._values[name])


def fit(
    net: nn.Module,
    batches: Batches,
    epochs: int,
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    schedule: Callable[[Optimizer, int], Any] | None = None,
    callbacks: Sequence[pl.Callback] = (),
    **settings: Any,
) -> pl.Trainer:
    """Train a network in place and leave it in eval mode; returns the Trainer that did it. Further settings are its."""
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    net.train()  # Lightning would leave a network in eval mode as it is
    trainer.fit(StockClassifier(net, optimizer, schedule), batches)
    net.eval()
    return trainer


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """One seed for everything inside and one thread, whose sums come in one order; both end as they began."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


@cache
def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 digits in [0, 1], ``[1797, 1, 8, 8]``, and their labels."""
    data = load_digits()
    return torch.from_numpy(data.images).float()[:, None] / 16, torch.from_numpy(data.target).long()


@cache
def turned(degrees: float) -> Tensor:
    """All :func:`digits` turned counter-clockwise, as flat vectors ``[1797, 64]`` for an MLP."""
    images = digits()[0].numpy()
    return torch.from_numpy(rotate(images, degrees, axes=(3, 2), reshape=False, order=1)).flatten(1)


def mlp() -> nn.Sequential:
    """64-128-128-10 with ReLU; its linear layers are '0', '2' and '4'."""
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share classified correctly."""
    return float((net(x).argmax(1) == y).float().mean())


@cache
def pretrained(seed: int, count: int) -> tuple[nn.Sequential, Tensor, Tensor]:
    """An :func:`mlp` trained on upright digits, the start of an adaptation. Copy it before you train it.

    Args:
        seed: of the split, the weights and the order.
        count: of digits to train on.

    Returns:
        the network, the indices of those digits, and the indices of the others.
    """
    with seeded(seed):
        x, y = turned(0), digits()[1]
        source, others = torch.randperm(len(x)).split([count, len(x) - count])
        net = mlp()
        fit(net, Batches(x[source], y[source], 64, seed), 30, partial(Adam, lr=1e-3))
        return net, source, others
