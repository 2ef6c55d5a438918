"""GroupMask: its card in the conformance tests. (The stream itself: tests/unit/test_scole.py.)"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_recipes.callbacks import GroupMask, LogitAdjustment
from tests.conformance.misuse import Misuse, Regression, TwoLosses, X, argument, sees_no_loss
from tests.conformance.table import Row, small_vit
from tests.stock import Classifier, loader


def few_at_a_time(samples: int) -> TensorDataset:
    """So many digits, class by class, so that no batch has all classes."""
    data = load_digits()
    order = torch.tensor(data.target[:samples]).argsort(stable=True)
    x = torch.tensor(data.images, dtype=torch.float32)[order, None] / 16
    return TensorDataset(x, torch.tensor(data.target)[order])


def _adjusted() -> list[Any]:
    return [LogitAdjustment([float(n) for n in range(1, 11)]), GroupMask()]


DATA = {"GroupMask": few_at_a_time}
ROWS = [
    Row("group_mask", lambda: [GroupMask()], lambda: [GroupMask("all")], data=few_at_a_time, couples=True),
    Row(
        "logit_adjustment+group_mask",
        _adjusted,
        network=small_vit,
        data=few_at_a_time,
        couples=True,
    ),
]
MEMBERS = {"GroupMask": GroupMask}
REFUSED = {
    ("SLCA", "GroupMask"): "both mask the same logits",
    ("PSKD", "GroupMask"): "its targets have mass on classes that another batch had",
    ("BANG", "GroupMask"): "it smooths labels over all classes",
}
OTHER = {"GroupMask": {"fill": -1e6}}


class Smooths(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1], label_smoothing=0.1)


def misuses() -> list[Misuse]:
    bad = functools.partial(Misuse, "GroupMask")
    in_step = functools.partial(bad, in_step=True)
    ours = lambda: [GroupMask()]  # noqa: E731
    return [
        argument(GroupMask, "scope must be 'batch', 'task' or 'all'; got 'class'", scope="class"),
        argument(GroupMask, "fill must be at most -1e3; got 0", fill=0),
        bad(
            "a task without a stream",
            r"scope='task' needs a data module that deals its classes out in tasks .*; without one take scope='batch'",
            lambda: [GroupMask("task")],
        ),
        bad(
            "LogitAdjustment after it",
            r"LogitAdjustment must stand before GroupMask in .*: logits are adjusted first",
            lambda: [GroupMask(), LogitAdjustment([1.0, 2.0, 3.0])],
        ),
        in_step("a regression", r"needs a classification loss of logits \[n, classes\]", ours, Regression),
        in_step("smoothed labels", r"the loss smooths labels \(label_smoothing=0\.1\) over all classes", ours, Smooths),
        in_step(
            "a label beyond the logits",
            "a label is 3 and the logits have 3 classes",
            ours,
            data=lambda: loader(X[:4], torch.tensor([0, 1, 3, 2])),
        ),
        in_step("two losses", r"computes 2 losses .* choose with criterion=INDEX", ours, TwoLosses),
    ]


def cannot_attach(row: Row) -> list[Misuse]:
    """It needs a loss that it can see, and nothing of the network."""
    return [sees_no_loss(row)]
