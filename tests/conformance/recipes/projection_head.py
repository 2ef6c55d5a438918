"""Projection head and the monitor of both its sides: their card in the conformance tests."""

from __future__ import annotations

import functools
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_recipes.callbacks import PrePostMonitor, ProjectionHead
from lightning_recipes.callbacks.finetuning.projection_head import discard_head
from tests.conformance.misuse import (
    Misuse,
    X,
    Y,
    argument,
    finds_no_layers,
    saved,
    sees_no_loss,
    with_net,
)
from tests.conformance.table import Row
from tests.stock import Classifier, loader


def _take_out(module: LightningModule) -> None:
    discard_head(module)


ROWS = [
    Row("projection_head", lambda: [ProjectionHead(hidden=12, out=8, discard="fit_end")]),
    Row(
        "projection_fixed",
        lambda: [ProjectionHead("fixed", kappa=1.2, discard="fit_end")],
        lambda: [ProjectionHead("fixed", kappa=1.0, discard="fit_end")],
    ),
    Row("projection_kept", lambda: [ProjectionHead("identity")], optimizer="adamw", keeps=_take_out),
    Row("projection+pre_post", lambda: [ProjectionHead("mlp2", discard="fit_end"), PrePostMonitor(max_samples=40)]),
    Row("pre_post", lambda: [PrePostMonitor(standardise=False)], monitors=True),
]
MEMBERS = {
    # Without the refit, which on such similar features blows up what rounding leaves of them; the rows have it.
    "ProjectionHead": lambda: ProjectionHead(hidden=8, discard="fit_end", refit="none"),
    "PrePostMonitor": lambda: PrePostMonitor(max_samples=20),
}
REFUSED = {("ProjectionHead", "SLCA"): "both own the head"}
SURGERY = ["ProjectionHead"]
OTHER = {"ProjectionHead": {"kappa": 1.5}, "PrePostMonitor": {"l2": 0.5}}


class Tokens(nn.Module):
    """A classifier of every token, and their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[:, None]).mean(1)


class Tied(nn.Module):
    """Two parts with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 3), nn.Linear(6, 3)
        self.body.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(self.body(x), self.body.weight.mT))


class ByHand(Tied):
    """Uses its head's weight without calling it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.head.weight, self.head.bias)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.heads = nn.Linear(6, 5), nn.ModuleDict({"age": nn.Linear(5, 3), "kind": nn.Linear(5, 3)})

    def forward(self, x: Tensor) -> Tensor:
        return self.heads["kind"](self.body(x))


class OneOutput(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.binary_cross_entropy_with_logits(self(batch[0])[:, 0], (batch[1] > 0).float())


class Soft(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0]), batch[1])


class Rows:
    """Batches that are no DataLoader."""

    def __iter__(self) -> Any:
        return iter(loader(X, Y))


def misuses() -> list[Misuse]:
    head = functools.partial(Misuse, "ProjectionHead")
    fit_end = lambda: [ProjectionHead(discard="fit_end")]  # noqa: E731
    monitor = functools.partial(
        Misuse, "PrePostMonitor", validation=lambda: loader(X, Y), trainer={"num_sanity_val_steps": 1}
    )
    kinds = r"'mlp', 'mlp2', 'identity' or 'fixed'"
    ended = saved(Classifier, fit_end, merged=True)
    return [
        argument(ProjectionHead, f"kind must be {kinds}; got 'linear'", kind="linear"),
        argument(ProjectionHead, "classifier must be 'auto' or the path of a linear layer; got ''", classifier=""),
        argument(ProjectionHead, "hidden must be None or at least 1; got 0", hidden=0),
        argument(ProjectionHead, "out must be None or at least 1; got 0", out=0),
        argument(ProjectionHead, "kappa must be positive; got 0", kind="fixed", kappa=0),
        argument(ProjectionHead, "kappa must be positive; got -1.2", kind="fixed", kappa=-1.2),
        argument(ProjectionHead, "discard must be 'never' or 'fit_end'; got 'always'", discard="always"),
        argument(ProjectionHead, "refit must be 'linear_probe' or 'none'; got 'mlp'", refit="mlp"),
        head(
            "an identity head of another width",
            r"hidden=7 with kind='identity': this head keeps the classifier's input width, which is 5; leave",
            lambda: [ProjectionHead("identity", hidden=7)],
        ),
        head(
            "a fixed head of another width",
            "out=7 with kind='fixed': this head keeps the classifier's input width, which is 5; leave out out",
            lambda: [ProjectionHead("fixed", out=7)],
        ),
        head(
            "a kappa that grows beyond fp32",
            r"kappa=1e-12: kappa\^-4 is 1e\+48, beyond fp32; take a larger one",
            lambda: [ProjectionHead("fixed", kappa=1e-12)],
        ),
        head(
            "a classifier that is not there",
            r"'net\.9' is no part of Classifier",
            lambda: [ProjectionHead(classifier="net.9")],
        ),
        head(
            "a classifier that is no linear layer",
            r"the head 'net\.1' is a ReLU and no linear layer; name the linear layer .* one of \['net\.0', 'net\.2',",
            lambda: [ProjectionHead(classifier="net.1")],
        ),
        head(
            "several classifiers",
            r"several classifiers \['net\.heads\.age', 'net\.heads\.kind'\]; name one of them with classifier=",
            lambda: [ProjectionHead()],
            with_net(TwoHeads),
        ),
        head(
            "another width of a tied classifier",
            r"the weight of the classifier net\.head is tied to another part's, so it cannot get the width out=7",
            lambda: [ProjectionHead(out=7)],
            with_net(Tied),
        ),
        head(
            "features that are no vectors",
            r"the classifier net\.head got features \[4, 1, 5\] and needs \[n, p\]; name another layer with",
            lambda: [ProjectionHead()],
            with_net(Tokens),
            in_step=True,
        ),
        head(
            "a classifier that is not called",
            r"the classifier net\.head was not called in the training step, .*; name the layer",
            lambda: [ProjectionHead()],
            with_net(ByHand),
            in_step=True,
        ),
        head(
            "a classifier of one output to be fitted anew",
            r"refit='linear_probe' needs a classifier of at least 2 classes; net has one output",
            fit_end,
            with_net(lambda: nn.Linear(6, 1), OneOutput),
        ),
        head(
            "targets that no classifier can be fitted to",
            r"fits the classifier on class indices \[n\]; the targets are float32 \[4, 3\]: use refit='none'",
            fit_end,
            Soft,
            lambda: loader(X, torch.rand(len(X), 3)),
        ),
        head(
            "a checkpoint written after the head was taken out",
            "the checkpoint was written after the fit ended and holds stock weights; there is no projection head",
            fit_end,
            checkpoint=ended,
        ),
        argument(PrePostMonitor, "every_n_epochs must be at least 1; got 0", every_n_epochs=0),
        argument(PrePostMonitor, "labels must be None, the name of an attribute .*; got 'a b'", labels="a b"),
        argument(PrePostMonitor, "group must be None, the name of an attribute .*; got 3", group=3),
        argument(PrePostMonitor, "max_samples must be at least 2; got 1", max_samples=1),
        argument(PrePostMonitor, "head must be 'auto' or the path of a module; got ''", head=""),
        argument(PrePostMonitor, "l2 must be at least 0; got -1", l2=-1),
        monitor(
            "labels that the data do not have",
            "the data set TensorDataset has no attribute 'fine'",
            lambda: [PrePostMonitor(labels="fine")],
        ),
        monitor(
            "an attribute that is not one number a sample",
            r"the attribute 'tensors' of TensorDataset must be one number a sample, \[16\]; got a tuple",
            lambda: [PrePostMonitor(labels="tensors")],
        ),
        monitor(
            "a head that is not there",
            r"'net\.head' is no part of Classifier",
            lambda: [PrePostMonitor(head="net.head")],
        ),
        monitor(
            "validation data that are not read by index",
            "needs the validation data as a DataLoader over a data set read by index; got Rows",
            lambda: [PrePostMonitor()],
            validation=Rows,
        ),
        monitor(
            "training data that are not read by index",
            "needs the training data as one DataLoader over a data set read by index; got Rows",
            lambda: [PrePostMonitor()],
            data=Rows,
        ),
    ]


def cannot_attach(row: Row) -> list[Misuse]:
    if row.monitors:
        return [sees_no_loss(row, in_validation=True)]
    return [finds_no_layers(row)]
