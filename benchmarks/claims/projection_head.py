"""Projection head: features before it serve another task better than those behind it.

A network learns to tell odd digits from even ones. A linear probe for the ten digits then shows what its features kept.
Before an MLP head they keep more than behind it, at the same accuracy on odd and even. Behind the fixed head they must
be held against training without a head, and not against what stands before it: on standardised features a diagonal
scaling changes nothing. The MLP head is no gain over training without one here, and nothing says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR

from benchmarks.claims.findings import Finding, Metrics, Results, column, compare
from benchmarks.claims.training import Batches, accuracy, digits, fit, seeded
from lightning_recipes.callbacks import ProjectionHead
from lightning_recipes.core.head_fit import accuracy as correct
from lightning_recipes.core.head_fit import fit_logistic

RECIPE = "ProjectionHead"
CLAIM = "Features before a projection head serve another task better than those behind it."
TRAIN, EPOCHS, BATCH = 1200, 60, 64
SETTING = (
    f"{TRAIN} digits labelled odd or even, encoder 64-128-64 with ReLUs, SGD at 0.1 with momentum 0.9 and a cosine over"
    f" {EPOCHS} epochs of batches of {BATCH}; a linear probe for the 10 digits on standardised features, scored on the"
    " 597 other digits"
)
SEEDS = 5
ARMS: Mapping[str, Mapping[str, Any]] = {
    "without": {"kind": None},
    "mlp": {"kind": "mlp"},
    "fixed": {"kind": "fixed", "kappa": 1.2},
}


def probe(features: Tensor, digit: Tensor, others: Tensor, of_others: Tensor, standardise: bool = True) -> float:
    """Accuracy of a linear probe fitted on features of the training images, on those of the others."""
    head = fit_logistic(features, digit, 10, standardise=standardise, tolerance=1e-6, max_steps=300)
    return float(correct(head, others, of_others).mean())


def run(seed: int, kind: str | None, **arguments: Any) -> Metrics:
    """Train on odd and even, and probe for the digits.

    Args:
        seed: of split, weights, order and head.
        kind: of head; None trains without one.
        **arguments: ProjectionHead's.

    Returns:
        ``pre`` and, with a head, ``post``: accuracy of the probe on z and on u; ``raw_pre`` and ``raw_post``: of the
        MLP head, not standardised; ``coarse``: accuracy on odd and even.
    """
    with seeded(seed):
        images, digit = digits()
        x, coarse = images.flatten(1), digit % 2
        train, test = torch.randperm(len(x)).split([TRAIN, len(x) - TRAIN])
        net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 2))
        recipes = [] if kind is None else [ProjectionHead(kind, seed=seed, **arguments)]
        fit(
            net,
            Batches(x[train], coarse[train], BATCH, seed),
            EPOCHS,
            partial(SGD, lr=0.1, momentum=0.9),
            lambda optimizer, steps: CosineAnnealingLR(optimizer, steps),
            recipes,
        )
        with torch.no_grad():
            z = net[:-1](x)
            u = recipes[0].operation.head(z) if recipes else z
        found = {"coarse": accuracy(net, x[test], coarse[test])}
        for name, features in (("pre", z), ("post", u)) if recipes else (("pre", z),):
            sides = features[train], digit[train], features[test], digit[test]
            found[name] = probe(*sides)
            if kind == "mlp":
                found[f"raw_{name}"] = probe(*sides, standardise=False)
        return found


def check(results: Results) -> list[Finding]:
    """Pre above post by 5 points with the MLP head, standardised or not, at the same coarse accuracy; the fixed head
    above none."""
    mlp = results["mlp"]
    lowest = min(seed["pre"] - seed["post"] for seed in mlp)
    findings = [
        Finding(
            "Before the MLP head features know more of the digits than behind it: at least 5 points in every seed",
            "accuracy of the probe before and behind",
            [seed["pre"] for seed in mlp],
            [seed["post"] for seed in mlp],
            lowest - 0.05,
        ),
        compare(
            "The same without standardising: at least 5 points on average",
            "accuracy of the probe on raw features before and behind",
            [seed["raw_pre"] for seed in mlp],
            [seed["raw_post"] for seed in mlp],
            lambda w, wo: w - wo - 0.05,
        ),
        compare(
            "The task trained on does not show it: odd and even are told apart as well, within 1 point",
            "accuracy on odd and even",
            *column(results, "mlp", "coarse"),
            lambda w, wo: 0.01 - abs(w - wo),
        ),
    ]
    if "fixed" in results:
        findings.append(
            compare(
                "Trained through the fixed head (kappa 1.2) features know more of the digits than without a head",
                "accuracy of the probe",
                *column(results, "fixed", "pre"),
                lambda w, wo: w - wo,
            )
        )
    return findings
