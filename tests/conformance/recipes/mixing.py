"""Mixup and CutMix: their card in the conformance tests."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_recipes.callbacks import AAER, GLAD, CutMix, Mixup
from tests.conformance.misuse import (
    Embeds,
    Hidden,
    Misuse,
    MultiLabel,
    Regression,
    Segmentation,
    TwoLosses,
    X,
    Y,
    argument,
    frozen,
    sees_no_loss,
    with_net,
)
from tests.conformance.table import Row, small_vit
from tests.stock import Classifier, loader, mlp

# Partners from all ranks: only so are two ranks one process.
ROWS = [
    Row("mixup", lambda: [Mixup(0.4, across_ranks=True)], lambda: [Mixup(0.0)], couples=True),
    Row("cutmix", lambda: [CutMix(across_ranks=True)], lambda: [CutMix(prob=0.0)], couples=True),
    Row("mixup+aaer", lambda: [Mixup(0.4, across_ranks=True), AAER(0.1)], network=small_vit, couples=True),
    Row("cutmix+glad", lambda: [CutMix(prob=0.8, across_ranks=True), GLAD(rank=None)], couples=True),
]
MEMBERS = {
    "Mixup": lambda: Mixup(0.4, across_ranks=True),
    "CutMix": lambda: CutMix(prob=0.7, across_ranks=True),
}
REFUSED = {("Mixup", "CutMix"): "both mix the batch and soften its labels"}
OTHER = {"Mixup": {"alpha": 0.75}, "CutMix": {"prob": 0.25}}

IMAGES = X.reshape(-1, 1, 2, 3)


class Probabilities(Classifier):
    """Targets that are soft already."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), F.one_hot(batch[1], 3).float())


class OfNumbers(Classifier):
    """A criterion of its own, which takes class indices."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.own(self(batch[0]), batch[1])

    def own(self, logits: Tensor, targets: Tensor) -> Tensor:
        return -logits.log_softmax(1).gather(1, targets[:, None]).mean()


def of_both(recipe: Callable[..., Any]) -> list[Misuse]:
    name = recipe.__name__
    in_step = functools.partial(Misuse, name, in_step=True, data=lambda: loader(IMAGES, Y))
    mixed = lambda: [recipe(prob=1.0)]  # noqa: E731
    flat = lambda kind: with_net(lambda: nn.Sequential(nn.Flatten(), *mlp()), kind)  # noqa: E731
    return [
        argument(recipe, r"prob must be in \[0, 1\]; got 1\.5", prob=1.5),
        argument(recipe, r"prob must be in \[0, 1\]; got -0\.5", prob=-0.5),
        in_step(
            "soft targets",
            r"softens class indices; the targets are prob.* \(4, 3\) already",
            mixed,
            flat(Probabilities),
        ),
        in_step(
            "several labels a sample", r"_with_logits got targets \(4, 3\) .*several labels", mixed, flat(MultiLabel)
        ),
        in_step("a segmentation", r"got targets \(4, 1\) for \(4, 3, 1\): .*segmentation", mixed, flat(Segmentation)),
        in_step(
            "a regression", r"mse_loss got targets \(4, 3\) .*regression are not supported", mixed, flat(Regression)
        ),
        in_step("a loss that is not seen", r"no loss was seen .* name any other with criterion=", mixed, flat(Hidden)),
        in_step("two losses to choose from", r"2 losses .*choose with criterion=INDEX", mixed, flat(TwoLosses)),
        in_step(
            "a criterion that takes class indices only",
            "criterion='own' takes class indices and a recipe made the targets soft",
            lambda: [recipe(prob=1.0, criterion="own")],
            flat(OfNumbers),
        ),
        Misuse(
            name,
            "batches of 1",
            "needs at least 2 samples to mix; the batch has 1",
            mixed,
            flat(Classifier),
            lambda: loader(IMAGES, Y, size=1),
            in_step=True,
        ),
        in_step(
            "a module with everything frozen", r"what needs no gradient: is everything frozen\?", mixed, frozen_flat
        ),
        Misuse(
            name,
            "the attack before it",
            rf"{name} must stand before AAER in Trainer\(callbacks=\[\.\.\.\]\): the attack must start from the mixed",
            lambda: [AAER(0.1), recipe()],
        ),
    ]


def frozen_flat() -> Classifier:
    module = frozen()()
    module.net.insert(0, nn.Flatten())
    return module


def misuses() -> list[Misuse]:
    in_step = functools.partial(Misuse, in_step=True)
    return [
        *of_both(Mixup),
        *of_both(CutMix),
        argument(Mixup, "from_epoch must be at least 0; got -1", from_epoch=-1),
        argument(Mixup, "alpha must be at least 0 and finite; got -1", alpha=-1),
        argument(CutMix, "alpha must be positive and finite; got 0", alpha=0),
        in_step(
            "Mixup",
            "integer inputs",
            "averages inputs; the batch's input is torch.int64, not floating point",
            lambda: [Mixup()],
            Embeds,
            lambda: loader((X > 0.5).long(), Y),
        ),
        in_step(
            "CutMix",
            "inputs that are no images",
            r"pastes boxes into images \[n, channels, height, width\]; the batch's input has shape \(4, 6\)",
            lambda: [CutMix()],
        ),
    ]


def cannot_attach(row: Row) -> list[Misuse]:
    return [sees_no_loss(row)] if "aaer" not in row.name else []
