"""ClassWeights on real data: a network trained on a long tail of digits from scratch."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.optim import Adam

from benchmarks.claims.backdoor_adjustment import HELD_OUT, OFTEN, TAIL, split
from benchmarks.claims.findings import Finding, Metrics, Results, column, compare
from benchmarks.claims.training import Batches, digits, fit, mlp, seeded
from lightning_recipes.callbacks import ClassWeights

RECIPE = "ClassWeights"
CLAIM = "Classes that weigh more in the loss are found more often."
RARE = 5
SETTING = (
    f"MLP 64-128-128-10 trained from scratch on {sum(TAIL)} digits, {', '.join(map(str, TAIL))} a class in random"
    f" order, Adam 1e-3, batch 32, 150 batches drawn with replacement; accuracy on {10 * HELD_OUT} held-out digits,"
    f" {HELD_OUT} a class; without: equal weights"
)
SEEDS = 5
ARMS: dict[str, dict[str, Any]] = {"without": {"weights": [1.0] * 10}, "inverse": {"weights": "inverse"}}


def run(seed: int, weights: Any) -> Metrics:
    """Train once.

    Args:
        seed: of split, tail, first weights and order.
        weights: of ClassWeights.

    Returns:
        ``accuracy`` over all classes alike, over the ``rare`` five and the ``frequent`` five.
    """
    by_class, held_out, order = split(seed)
    x, y = digits()
    tail = torch.cat([by_class[c][OFTEN : OFTEN + n] for c, n in zip(order.tolist(), TAIL)])
    if weights == "inverse":  # Batches are no data set that could be counted
        counts = torch.bincount(y[tail], minlength=10)
        weights = (counts.sum() / (10 * counts)).tolist()
    with seeded(seed):
        net = mlp()
        batches = Batches(x.flatten(1)[tail], y[tail], 32, seed, draws=150)
        fit(net, batches, 1, partial(Adam, lr=1e-3), callbacks=[ClassWeights(weights)])
    with torch.no_grad():
        right = net(x.flatten(1)[held_out]).argmax(1) == y[held_out]
    accuracy = torch.stack([right[y[held_out] == c].float().mean() for c in order.tolist()])
    return {
        "accuracy": float(accuracy.mean()),
        "rare": float(accuracy[-RARE:].mean()),
        "frequent": float(accuracy[:RARE].mean()),
    }


def check(results: Results) -> list[Finding]:
    """Five points in the rare half of the classes."""
    return [
        compare(
            f"The {RARE} rarest classes gain at least 5 points",
            f"accuracy in the {RARE} rarest classes",
            *column(results, "inverse", "rare"),
            lambda w, wo: w - wo - 0.05,
        ),
    ]
