"""LogitAdjustment on real data: a new head on a pre-trained network, tuned on a long tail of digits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.claims.backdoor_adjustment import HELD_OUT, TAIL, member, split
from benchmarks.claims.findings import Finding, Metrics, Results, column, compare
from benchmarks.claims.training import digits

RECIPE = "LogitAdjustment"
CLAIM = "With the log prior in the training loss rare classes are found more often, and all classes together too."
RARE = 5
SETTING = (
    f"MLP pre-trained on digits, six classes more than the others, head alone tuned on {sum(TAIL)} other digits,"
    f" {', '.join(map(str, TAIL))} a class in random order; accuracy on {10 * HELD_OUT} held-out digits, {HELD_OUT} a"
    " class; without: tau=0"
)
SEEDS = 5
ARMS: dict[str, dict[str, Any]] = {"without": {"tau": 0.0}, "tau 1": {"tau": 1.0}}


def by_frequency(seed: int, tau: float) -> Tensor:
    """Accuracy within each class, from the most to the least frequent one, ``[10]``."""
    _, held_out, order = split(seed)
    x, y = digits()
    net = member(seed, seed % 3, 0, tau=tau)
    with torch.no_grad():
        right = net(x.flatten(1)[held_out]).argmax(1) == y[held_out]
    return torch.stack([right[y[held_out] == c].float().mean() for c in order.tolist()])


def run(seed: int, tau: float) -> Metrics:
    """Tune once.

    Args:
        seed: of split, tail, weights and order.
        tau: of LogitAdjustment.

    Returns:
        ``accuracy`` over all classes alike, and over the ``rare`` five.
    """
    accuracy = by_frequency(seed, tau)
    return {"accuracy": float(accuracy.mean()), "rare": float(accuracy[-RARE:].mean())}


def check(results: Results) -> list[Finding]:
    """Five points in the rare half of the classes, one point over all."""
    return [
        compare(
            f"The {RARE} rarest classes gain at least 5 points",
            f"accuracy in the {RARE} rarest classes",
            *column(results, "tau 1", "rare"),
            lambda w, wo: w - wo - 0.05,
        ),
        compare(
            "All classes together gain at least 1 point",
            "balanced accuracy",
            *column(results, "tau 1", "accuracy"),
            lambda w, wo: w - wo - 0.01,
        ),
    ]
