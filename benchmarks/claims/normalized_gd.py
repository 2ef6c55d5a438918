"""NormalizedGD on real data: updates until every training digit is told right, against plain gradient descent.

Deterministic, in fp64, full batches: there is nothing for a seed to decide. At large steps, where both are nearly batch
perceptrons, rounding moves the counts of balanced pairs by some updates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.claims.findings import Finding, Metrics, Results
from benchmarks.claims.training import digits
from lightning_recipes.callbacks import NormalizedGD
from lightning_recipes.callbacks.regularization.normalized_gd import margins, normalized_logistic_gd

RECIPE = "NormalizedGD"
CLAIM = "On unbalanced classes normalised steps tell all samples right after fewer updates than gradient descent."
PAIRS, FEW, STEPS, TEN = ((3, 8), (1, 8), (4, 9)), 5, (1.0, 10.0, 100.0), 400
SETTING = (
    "scikit-learn digits, linear without bias from 0, fp64, full batches; pairs 3 and 8, 1 and 8, 4 and 9, whole or"
    f" with {FEW} of the first class; all ten classes: the first {TEN} digits; without: plain gradient descent"
)
SEEDS = 1
ARMS: Mapping[str, Mapping[str, Any]] = {"without": {"normalized": False}, "normalised": {"normalized": True}}
MOST = 5000


def pair(first: int, second: int, few: bool) -> tuple[Tensor, Tensor]:
    """Digits of two classes ``[n, 64]`` in fp64, and whether they are of the first one."""
    x, y = digits()[0].flatten(1).double(), digits()[1]
    one, other = (y == first).nonzero().flatten(), (y == second).nonzero().flatten()
    kept = torch.cat([one[:FEW] if few else one, other])
    return x[kept], (y[kept] == first).long()


class Linear(pl.LightningModule):
    """A linear classifier as anybody writes it; it knows of no recipe."""

    def __init__(self, outputs: int, lr: float) -> None:
        super().__init__()
        self.layer, self.lr = nn.Linear(64, outputs, bias=False, dtype=torch.float64), lr
        nn.init.zeros_(self.layer.weight)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        z = self.layer(x)
        return F.cross_entropy(z, y) if z.shape[1] > 1 else F.binary_cross_entropy_with_logits(z[:, 0], y.double())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def with_recipe(x: Tensor, y: Tensor, outputs: int, gamma: float) -> int:
    """Updates that a stock module takes until the recipe ends its fit."""
    recipe = NormalizedGD(stop_when_separated=True)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        precision="64-true",
        max_epochs=MOST,
        callbacks=[recipe],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Linear(outputs, gamma), DataLoader(TensorDataset(x, y), len(x)))
    return recipe.updates


def by_descent(x: Tensor, y: Tensor, outputs: int, gamma: float) -> int:
    """Updates of plain gradient descent."""
    if outputs == 1:
        return normalized_logistic_gd(x, 2 * y - 1, gamma, MOST, normalized=False)[1] or MOST
    theta, hot = x.new_zeros(outputs, x.shape[1]), F.one_hot(y, outputs)
    for updates in range(MOST):
        z = x @ theta.T
        if (margins(z, y) > 0).all():
            return updates
        theta = theta - gamma * (z.softmax(1) - hot).T @ x / len(x)
    return MOST


def run(seed: int, normalized: bool) -> Metrics:
    """Count updates in every setting.

    Args:
        seed: decides nothing.
        normalized: with the recipe, or by plain descent.

    Returns:
        by 'pair, kind, gamma' the number of updates.
    """
    count = with_recipe if normalized else by_descent
    sets = {f"{a} and {b}, {kind}": (*pair(a, b, kind == "few"), 1) for a, b in PAIRS for kind in ("whole", "few")}
    sets["ten classes"] = digits()[0].flatten(1).double()[:TEN], digits()[1][:TEN], 10
    return {f"{name}, {gamma:g}": float(count(*data, gamma)) for name, data in sets.items() for gamma in STEPS}


def check(results: Results) -> list[Finding]:
    """Unbalanced pairs at every step size and balanced ones at the smallest: fewer updates for each of the pairs."""
    with_it, without = results["normalised"][0], results["without"][0]

    def fewer(claim: str, metric: str, kind: str, gamma: float) -> Finding:
        keys = [f"{a} and {b}, {kind}, {gamma:g}" for a, b in PAIRS] if kind else [f"ten classes, {gamma:g}"]
        least = min(without[key] - with_it[key] for key in keys)
        sums = ([sum(each[key] for key in keys)] for each in (with_it, without))
        return Finding(claim, f"updates{metric}, gamma {gamma:g}", *sums, least - 1)

    unbalanced = "Unbalanced: all samples right after fewer updates, for each of three pairs"
    findings = [fewer(unbalanced, " of three pairs together", "few", gamma) for gamma in STEPS]
    findings.append(
        fewer(
            "Balanced, with the smallest steps: after fewer updates, for each of three pairs",
            " of three pairs together",
            "whole",
            STEPS[0],
        )
    )
    ten = "Ten classes by cross-entropy (ours, not the paper's): after fewer updates"
    return findings + [fewer(ten, "", "", gamma) for gamma in STEPS]
