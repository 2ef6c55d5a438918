"""SLCA and ForgettingMonitor: their card in the conformance tests."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_recipes.callbacks import GLAD, SLCA, ForgettingMonitor, LogitAdjustment
from lightning_recipes.datamodules import ClassIncrementalDataModule, DigitsDataModule
from tests.conformance.misuse import (
    HiddenLoss,
    Misuse,
    MultiLabel,
    Regression,
    Segmentation,
    X,
    Y,
    argument,
    finds_no_layers,
    frozen,
    with_net,
)
from tests.conformance.table import Row, digits, small_vit
from tests.stock import Classifier, loader, mlp

HALVES = [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


def two_tasks(samples: int) -> TensorDataset:
    """So many digits of each half of the classes, in their order."""
    data = load_digits()
    labels = torch.tensor(data.target)
    chosen = torch.cat([torch.isin(labels, torch.tensor(half)).nonzero().flatten()[:samples] for half in HALVES])
    chosen = chosen.sort().values
    return TensorDataset(torch.tensor(data.images, dtype=torch.float32)[chosen, None] / 16, labels[chosen])


def _slca(**arguments: Any) -> SLCA:
    """Small steps on well-conditioned covariances: the head's first rows are so small that normalised logits blow the
    rounding of two ranks up by orders of magnitude."""
    small = {"ca_epochs": 2, "ca_lr": 5e-4, "cov_eps": 1e-2, "samples_per_class": 8}
    return SLCA(**{"tasks": HALVES, "epochs_per_task": None, **small, **arguments})


def _monitor() -> ForgettingMonitor:
    return ForgettingMonitor(HALVES)


DATA = {"SLCA": two_tasks}
ROWS = [
    Row("slca", lambda: [_slca()], lambda: [SLCA(1, backbone_lr_scale=1.0)], data=two_tasks),
    Row(
        "slca_diag",
        lambda: [_slca(covariance="diag", backbone_lr_scale=0.0, restore_head=False)],
        network=small_vit,
        optimizer="adamw",
        data=two_tasks,
    ),
    Row(
        "forgetting+slca_low_rank",
        lambda: [_monitor(), _slca(covariance="low_rank", covariance_rank=2, reset_optimizer=False)],
        optimizer="filter",
        data=two_tasks,
    ),
    Row("forgetting", lambda: [_monitor()], monitors=True),
]
MEMBERS = {"SLCA": _slca, "ForgettingMonitor": _monitor}
AUTOMATIC = ["SLCA"]
OTHER = {"SLCA": {"mean_shrink": 0.25}, "ForgettingMonitor": {"forward": "network"}}


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.out_proj = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(self.dense(x).tanh())


class TwoLayerHead(nn.Module):
    """A head as Hugging Face has it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.classifier = nn.Linear(6, 5), TwoLayers()

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.body(x))


class Smooths(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1], label_smoothing=0.1)


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(zip(X, Y))


def misuses() -> list[Misuse]:
    at = functools.partial(SLCA, [[0, 1], [2]], None)
    two = {"max_epochs": 2}
    bad = functools.partial(Misuse, "SLCA", trainer=two)
    in_step = functools.partial(bad, in_step=True)
    single = lambda: loader(X[:4], Y[:4])  # noqa: E731
    image = lambda: nn.Sequential(nn.Unflatten(1, (6, 1, 1)), nn.Conv2d(6, 3, 1), nn.Flatten())  # noqa: E731
    return [
        argument(SLCA, "tasks must be None, a number of at least 1, or the classes of each task; got 0", tasks=0),
        argument(SLCA, r"tasks must be None, .*; got \[\]", tasks=[]),
        argument(SLCA, "epochs_per_task must be at least 1, .*; got 0", epochs_per_task=0),
        argument(SLCA, r"epochs_per_task must be at least 1, .*; got \[2, 0\]", epochs_per_task=[2, 0]),
        argument(SLCA, "backbone_lr_scale must be at least 0; got -1", backbone_lr_scale=-1),
        argument(SLCA, "ca_epochs must be at least 0; got -1", ca_epochs=-1),
        argument(SLCA, "ca_lr must be positive; got 0", ca_lr=0),
        argument(SLCA, "ca_momentum must be at least 0 and below 1; got 1", ca_momentum=1),
        argument(SLCA, "ca_weight_decay must be at least 0; got -1", ca_weight_decay=-1),
        argument(SLCA, "samples_per_class must be at least 1; got 0", samples_per_class=0),
        argument(SLCA, "logit_norm must be None or positive; got 0", logit_norm=0),
        argument(SLCA, r"mean_shrink must be between 0 and 1; got 1\.5", mean_shrink=1.5),
        argument(SLCA, "cov_eps must be at least 0; got -1", cov_eps=-1),
        argument(SLCA, "covariance must be 'full', 'low_rank' or 'diag'; got 'tied'", covariance="tied"),
        argument(SLCA, "covariance_rank must be at least 1; got 0", covariance_rank=0),
        bad("no tasks", "tasks is None and the Trainer's data module has no tasks; give tasks", lambda: [SLCA()]),
        bad(
            "tasks that overlap",
            "class 1 stands in them twice; tasks must not overlap",
            lambda: [SLCA([[0, 1], [1, 2]])],
        ),
        bad("a class in no task", "class 2 is in no task; there are 3 classes", lambda: [SLCA([[0], [1]])]),
        bad(
            "more classes than the head has",
            "there is no class 3; the classes are 0 to 2",
            lambda: [SLCA([[0, 1], [2, 3]])],
        ),
        bad("more tasks than classes", "tasks=4: must be from 1 to the number of classes, 3", lambda: [SLCA(4)]),
        bad(
            "a head that is no linear layer",
            r"the head 'net\.1' is a Conv2d and must be one linear layer on the features; name it with head=, one of",
            lambda: [at()],
            with_net(image),
        ),
        bad(
            "a head of two layers",
            r"the head 'net\.classifier' is a TwoLayers and must be .* one of .*'net\.classifier\.out_proj'",
            lambda: [at()],
            with_net(TwoLayerHead),
        ),
        bad(
            "a head that is not there",
            r"head='fc' is no part of Classifier; its parts are \['net",
            lambda: [at(head="fc")],
        ),
        bad("a frozen head", r"the head 'net\.4' is frozen; it must train", lambda: [at()], frozen(4)),
        bad(
            "adapters on the head",
            r"another recipe put adapters on the head 'net\.4'; leave it out there",
            lambda: [GLAD(rank=1, target_modules=["4"], train_fully=["2"]), at()],
        ),
        bad(
            "a class with one sample",
            "class 1 has 1 training samples and needs at least 2",
            lambda: [at()],
            data=single,
        ),
        bad(
            "max_epochs that is not the sum of the tasks' epochs",
            r"the phases take 6 epochs \(task 0 3, task 1 3\) and Trainer\(max_epochs=...\) is 2; set max_epochs=6",
            lambda: [SLCA([[0, 1], [2]], 3)],
        ),
        bad(
            "fewer epochs than tasks",
            "max_epochs=2 cannot be shared out over 3 tasks",
            lambda: [SLCA(3, None)],
        ),
        bad(
            "a length too few", "epochs_per_task has 2 lengths for 3 tasks; give one a task", lambda: [SLCA(3, [1, 1])]
        ),
        bad(
            "data that are not read by index",
            "the classes of a DataLoader of Stream cannot be shown one after the other; give a plain DataLoader",
            lambda: [at()],
            data=lambda: DataLoader(Stream(), 4),
        ),
        bad(
            "several labels a sample",
            r"labels of the training set must be class indices, one a sample; got float32 of shape \(16, 3\)",
            lambda: [at()],
            MultiLabel,
            lambda: loader(X, F.one_hot(Y, 3).float()),
        ),
        bad(
            "tasks that are not the data module's",
            r"tasks=\[\[0, 1\], \[2\]\] and the data module's tasks are .*; leave tasks out",
            lambda: [at()],
            data=_three_digits,
        ),
        bad(
            "a head that is too small for the data module",
            r"the data module has a class 9 and the head 'net\.4' has 3 outputs; give the network one for every class",
            lambda: [SLCA()],
            data=lambda: ClassIncrementalDataModule(DigitsDataModule(), tasks=2),
        ),
        bad(
            "LogitAdjustment after it",
            r"LogitAdjustment must stand before SLCA in Trainer\(callbacks=\[\.\.\.\]\): logits are adjusted first",
            lambda: [at(), LogitAdjustment()],
        ),
        in_step(
            "a regression",
            r"needs a classification loss of logits \[n, 3\]; the observed one \(mse_loss\)",
            lambda: [at()],
            Regression,
        ),
        in_step(
            "a segmentation",
            r"needs a classification loss of logits \[n, 3\]; .* got \(4, 3, 1\)",
            lambda: [at()],
            Segmentation,
        ),
        in_step(
            "smoothed labels",
            r"the loss smooths labels \(label_smoothing=0\.1\) over all classes",
            lambda: [at()],
            Smooths,
        ),
        *of_forgetting(),
    ]


def _three_digits() -> ClassIncrementalDataModule:
    return ClassIncrementalDataModule(DigitsDataModule(), tasks=[[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]])


def of_forgetting() -> list[Misuse]:
    monitor = functools.partial(Misuse, "ForgettingMonitor")
    sanity = {"num_sanity_val_steps": 1}
    check = functools.partial(monitor, validation=lambda: loader(X, Y), trainer=sanity)
    at = functools.partial(ForgettingMonitor, [[0, 1], [2]])
    return [
        argument(ForgettingMonitor, "tasks must be None, a number of at least 1, or .*; got 0", tasks=0),
        argument(ForgettingMonitor, "forward must be 'forward' or the name of a part; got ''", tasks=2, forward=""),
        monitor(
            "no tasks",
            "tasks is None and the Trainer's data module has no tasks; give tasks, or a ClassIncrementalDataModule",
            lambda: [ForgettingMonitor()],
        ),
        monitor("tasks that overlap", "class 1 stands in them twice", lambda: [ForgettingMonitor([[0, 1], [1, 2]])]),
        monitor(
            "a part that is not there",
            "forward must be 'forward' or the name of .*; got 'fc'",
            lambda: [at(forward="fc")],
        ),
        check(
            "a part that gives no logits",
            r"'net\.0' gave logits \(4, 2\) for 4 samples of 3 classes",
            lambda: [at(forward="net.0")],
            with_net(lambda: mlp(width=2)),
        ),
        check(
            "a part that is not called",
            "'unused' gave nothing for 4 samples of 3 classes",
            lambda: [at(forward="unused")],
            WithUnused,
        ),
        monitor(
            "labels that are no class indices",
            r"needs class indices \[n\] in every batch; found torch\.float32 \(4, 3\)",
            lambda: [at()],
            MultiLabel,
            lambda: loader(X, F.one_hot(Y, 3).float()),
        ),
    ]


class WithUnused(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(1, 1)


def cannot_attach(row: Row) -> list[Misuse]:
    """SLCA needs a head, and a loss that it can see; the monitor takes any module that gives logits."""
    if row.monitors:
        return []
    hidden = Misuse(
        "SLCA",
        f"{row.name} on a loss that cannot be seen",
        r"no loss was seen .* name any other with criterion=",
        row.recipes,
        lambda: HiddenLoss(row.network()),
        lambda: digits(data=two_tasks),
        trainer={"max_epochs": 2},
        in_step=True,
    )
    return [hidden] if "+" in row.name else [finds_no_layers(row), hidden]
