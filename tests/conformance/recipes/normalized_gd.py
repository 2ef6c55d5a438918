"""NormalizedGD: its card in the conformance tests."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import LBFGS, Adam, RMSprop

from lightning_recipes.callbacks import PSKD, LangevinMixture, Mixup, NormalizedGD
from lightning_recipes.core.recipe import StepRecipe
from tests.conformance.misuse import (
    SAM,
    Hidden,
    Misuse,
    Regression,
    TwoLosses,
    X,
    Y,
    argument,
    frozen,
    sees_no_loss,
    stepped_by,
)
from tests.conformance.table import Row
from tests.stock import Classifier, loader


def _loose(**arguments: Any) -> NormalizedGD:
    """With mini-batches: the rows train on those."""
    return NormalizedGD(require_full_batch=False, **arguments)


ROWS = [
    Row("normalized_gd", lambda: [_loose()]),
    Row("normalized_gd_stopping", lambda: [_loose(stop_when_separated=True, max_beta=1.02)]),
]
MEMBERS = {"NormalizedGD": _loose}
REFUSED = {
    ("BANG", "NormalizedGD"): "its step length assumes hard labels",
    ("Mixup", "NormalizedGD"): "its step length assumes hard labels",
    ("CutMix", "NormalizedGD"): "its step length assumes hard labels",
    ("GLAD", "NormalizedGD"): "its factor assumes the plain gradient",
    ("ClassWeights", "NormalizedGD"): "its factor is that of a mean over all samples alike",
}
AUTOMATIC = ["NormalizedGD"]
OTHER = {"NormalizedGD": {"max_beta": 100.0}}


class Weighs(StepRecipe):
    """Stands for a recipe that weights samples."""

    def loss_weights(self, step: Any) -> Tensor:
        return torch.ones(4)


def _with(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Classifier]:
    class Own(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return loss(self(batch[0]), batch[1])

    return Own


def _hot(y: Tensor) -> Tensor:
    return F.one_hot(y, 3).float()


class Named(Classifier):
    """A criterion of its own that is not the mean of logistic losses."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.own(self(batch[0]), batch[1])

    def own(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets, reduction="sum")


def misuses() -> list[Misuse]:
    ngd = functools.partial(Misuse, "NormalizedGD")
    in_step = functools.partial(ngd, callbacks=lambda: [_loose()], in_step=True)
    full = lambda: [NormalizedGD()]  # noqa: E731
    return [
        argument(NormalizedGD, "max_beta must be above 1 and finite; got 1", max_beta=1),
        argument(NormalizedGD, "max_beta must be above 1 and finite; got inf", max_beta=math.inf),
        ngd(
            "mini-batches",
            r"require_full_batch needs .*; there are 16 training samples in 4 batches of 4 on 1 rank\(s\), drawn by"
            " SequentialSampler, and accumulate_grad_batches is 1: give every .*require_full_batch=False to take",
            full,
        ),
        ngd(
            "accumulation over more than there is",
            "16 training samples in 4 batches of 4 .* accumulate_grad_batches is 5",
            full,
            trainer={"accumulate_grad_batches": 5},
        ),
        ngd(
            "a last batch that is smaller",
            "16 training samples in 3 batches of 6 .* in equal batches",
            full,
            data=lambda: loader(X, Y, size=6),
            trainer={"accumulate_grad_batches": 3},
        ),
        ngd("Adam", "has no effect under Adam, which takes a common factor", full, stepped_by(Adam)),
        ngd("RMSprop", "has no effect under RMSprop, .*use torch.optim.SGD", full, stepped_by(RMSprop)),
        ngd("LBFGS", "LBFGS calls its closure several times for one; use another", full, stepped_by(LBFGS)),
        in_step(
            "a user's optimizer that calls its closure repeatedly",
            "SAM calls its closure several times for one; use another optimizer",
            module=stepped_by(lambda parameters: SAM(parameters, lr=0.1)),
        ),
        in_step("a loss that is not seen", "no loss was seen .* name any other with criterion=", module=Hidden),
        in_step("two losses to choose from", "2 losses .*choose with criterion=INDEX", module=TwoLosses),
        in_step(
            "a regression",
            r"needs a cross-entropy of logits, .*; the observed loss is mse_loss of \(4, 3\) with targets \(4, 3\)",
            module=Regression,
        ),
        in_step(
            "soft targets",
            r"assumes hard labels, and the targets are probabilities; it is cross_entropy of \(4, 3\)",
            module=_with(lambda z, y: F.cross_entropy(z, _hot(y))),
        ),
        in_step(
            "a loss that smooths labels",
            r"the loss smooths labels by 0\.1, .*; use hard labels",
            module=_with(lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1)),
        ),
        in_step(
            "class weights",
            "the loss has weight=, and the factor is that of a plain mean",
            module=_with(lambda z, y: F.cross_entropy(z, y, torch.ones(3))),
        ),
        in_step(
            "a sum",
            "the loss has reduction='sum', and the factor is that of a mean",
            module=_with(lambda z, y: F.cross_entropy(z, y, reduction="sum")),
        ),
        in_step(
            "labels between 0 and 1",
            r"needs labels that are 0 or 1; among the targets are \[0\.0, 0\.5\]",
            module=_with(lambda z, y: F.binary_cross_entropy_with_logits(z, _hot(y) / 2)),
        ),
        in_step(
            "labels 0 and 1 for -1 and 1",
            r"needs labels that are -1 or 1; among the targets are \[0\.0, 1\.0\]",
            module=_with(lambda z, y: F.soft_margin_loss(z, _hot(y))),
        ),
        in_step(
            "a named criterion of another kind",
            r"own is not the mean of logistic losses of its logits and labels, .*: it gave \d\S*, and they \d",
            callbacks=lambda: [_loose(criterion="own")],
            module=Named,
        ),
        in_step(
            "a recipe that weights samples",
            "a recipe weights the samples of the loss; the factor is that of a mean",
            callbacks=lambda: [_loose(), Weighs()],
        ),
        in_step("a module with everything frozen", "what needs no gradient: is everything frozen", module=frozen()),
        ngd(
            "a recipe that softens labels",
            "PSKD and NormalizedGD cannot share a Trainer: its step length assumes hard labels",
            lambda: [PSKD(), NormalizedGD()],
        ),
        ngd(
            "mixing",
            "Mixup and NormalizedGD cannot share a Trainer: its step length assumes hard labels",
            lambda: [Mixup(), NormalizedGD()],
        ),
        ngd(
            "a recipe that changes the gradient",
            "NormalizedGD and LangevinMixture cannot share a Trainer: its factor assumes the plain gradient",
            lambda: [NormalizedGD(), LangevinMixture()],
        ),
    ]


def cannot_attach(row: Row) -> list[Misuse]:
    return [sees_no_loss(row)]
