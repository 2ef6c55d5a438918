"""The monitor of the Bayes error: its card in the conformance tests. (The data module has tests of its own.)"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_recipes.callbacks import BayesErrorMonitor
from tests.conformance.misuse import Misuse, X, Y, argument, sees_no_loss, with_net
from tests.conformance.table import Row
from tests.stock import Classifier, loader

ROWS = [
    Row("bayes_error", lambda: [BayesErrorMonitor()], monitors=True),
    Row("bayes_error_val", lambda: [BayesErrorMonitor(samples="val", max_samples=20)], monitors=True),
]
MEMBERS = {"BayesErrorMonitor": lambda: BayesErrorMonitor(max_samples=20)}
OTHER = {"BayesErrorMonitor": {"sigma": 0.5}}


class Soft(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0]), batch[1])


class Rows:
    """Batches that are no DataLoader."""

    def __iter__(self) -> Any:
        return iter(loader(X, Y))


class FlatBatch(nn.Module):
    """Has a part that makes one vector of the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.flat, self.body, self.head = nn.Flatten(0), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.flat(x)
        return self.head(self.body(x))


def misuses() -> list[Misuse]:
    monitor = functools.partial(
        Misuse, "BayesErrorMonitor", validation=lambda: loader(X, Y), trainer={"num_sanity_val_steps": 1}
    )
    return [
        argument(BayesErrorMonitor, "layer must be None or the path of a part; got ''", layer=""),
        argument(BayesErrorMonitor, "every_n_epochs must be at least 1; got 0", every_n_epochs=0),
        argument(BayesErrorMonitor, "sigma must be positive; got 0", sigma=0),
        argument(BayesErrorMonitor, "max_samples must be at least 2; got 1", max_samples=1),
        argument(BayesErrorMonitor, "samples must be 'train' or 'val'; got 'test'", samples="test"),
        argument(BayesErrorMonitor, "kernel must be 'rbf' or 'sigmoid'; got 'linear'", kernel="linear"),
        monitor(
            "a layer that is not there",
            r"'net\.9' is no part of Classifier",
            lambda: [BayesErrorMonitor(layer="net.9")],
        ),
        monitor(
            "features that are no vectors",
            r"one feature vector a sample; features is \(12,\) for 2 samples",
            lambda: [BayesErrorMonitor(layer="net.flat")],
            with_net(FlatBatch),
        ),
        monitor(
            "targets that are no classes",
            r"needs classes as targets; the observed loss got float32 \[2, 3, 1\]",
            lambda: [BayesErrorMonitor()],
            with_net(lambda: nn.Sequential(nn.Linear(6, 3), nn.Unflatten(1, (3, 1))), Soft),
            lambda: loader(X, torch.rand(len(X), 3, 1)),
            validation=lambda: loader(X, torch.rand(len(X), 3, 1)),
        ),
        monitor(
            "training data that are not read by index",
            "needs the training data as one DataLoader over a data set read by index; got Rows",
            lambda: [BayesErrorMonitor()],
            data=Rows,
        ),
        monitor(
            "validation data that are not read by index",
            "needs the validation data as a DataLoader over a data set read by index; got Rows",
            lambda: [BayesErrorMonitor(samples="val")],
            validation=Rows,
        ),
    ]


def cannot_attach(row: Row) -> list[Misuse]:
    return [sees_no_loss(row, in_validation=True)]
