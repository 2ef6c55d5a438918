"""AdaptiveSmoothing on real data: an accurate and a robust digit classifier, mixed by a constant.

The attack goes through the whole mixture, as RobustAccuracyMonitor finds it. (The trained mixing network takes minutes:
``python -m benchmarks.papers.adaptive_smoothing``.)
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from functools import cache, partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Adam
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.claims.findings import Finding, Metrics, Results, compare
from benchmarks.claims.training import Batches, StockClassifier, digits, mlp, seeded
from lightning_recipes.callbacks import AdaptiveSmoothing, RobustAccuracyMonitor
from lightning_recipes.core.attacks import momentum_pgd
from lightning_recipes.core.random import generator

RECIPE = "AdaptiveSmoothing"
CLAIM = (
    "Mixed with an accurate classifier in probability, a robust one keeps nearly all of its robustness and wins back"
    " most of the clean accuracy that it lacks."
)
EPSILON, STEPS, TEST = 0.2, 50, 500
# By the robust network's own accuracy and margins on digits held out of those that are trained on.
EPOCHS, BATCH, LR = 80, 256, 3e-3
SETTING = (
    f"two MLPs 64-128-128-10 on {1797 - TEST} digits, one trained with PGD-7 at epsilon {EPSILON}; accuracy on the"
    f" other {TEST}, clean and under PGD-{STEPS} through the mixture; without: the robust one alone"
)
SEEDS = 5
ARMS: dict[str, dict[str, Any]] = {
    "without": {"alpha": 1.0},
    "standard": {"alpha": 0.0},
    "alpha .9": {"alpha": 0.9},
    "alpha .8": {"alpha": 0.8},
    "alpha .3": {"alpha": 0.3},
}


class Stock(StockClassifier):
    """Tests by its own forward."""

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("acc", (self(x).argmax(1) == y).float().mean())


class Adversarial(StockClassifier):
    """Trains on its inputs under PGD-7."""

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        start = generator(self.current_epoch, "Adversarial", batch_idx)
        return super().training_step(
            (momentum_pgd(self.net, x, y, EPSILON, 7, EPSILON / 4, generator=start), y), batch_idx
        )


@cache
def split(seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the digits that are trained on, and of those that are tested on."""
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(seed))
    return order[TEST:], order[:TEST]


@cache
def trained(seed: int, robust: bool) -> nn.Sequential:
    """The standard or the robust network. Copy it before you change it."""
    (chosen, _), (x, y) = split(seed), digits()
    with seeded(2 * seed + robust):
        kind = Adversarial if robust else StockClassifier
        module = kind(mlp(), partial(Adam, lr=LR))
        _trainer(max_epochs=EPOCHS).fit(module, Batches(x[chosen].flatten(1), y[chosen], BATCH, seed))
    return module.net.eval()


def _trainer(**settings: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def run(seed: int, alpha: float) -> Metrics:
    """One mixture.

    Args:
        seed: of split, weights and orders.
        alpha: weight of the robust network; 0 and 1 are one network alone.

    Returns:
        ``clean`` and ``attacked``: accuracies.
    """
    x, y = digits()
    where = split(seed)[1]
    recipe = AdaptiveSmoothing(deepcopy(trained(seed, True)), alpha=alpha)
    monitor = RobustAccuracyMonitor(epsilon=EPSILON, steps=STEPS, restarts=1)
    module = Stock(deepcopy(trained(seed, False)), Adam)
    data = DataLoader(TensorDataset(x[where].flatten(1), y[where]), len(where))
    with seeded(seed):
        (values,) = _trainer(callbacks=[recipe, monitor]).test(module, data, verbose=False)
    return {"clean": values["robust_accuracy/clean"], "attacked": values[f"robust_accuracy/pgd-{STEPS}-1"]}


def check(results: Results) -> list[Finding]:
    """The card's bounds."""

    def column(arm: str, metric: str) -> list[float]:
        return [r[metric] for r in results[arm]]

    clean = {arm: sum(column(arm, "clean")) / len(results[arm]) for arm in results}
    gap = clean["standard"] - clean["without"]
    findings = [
        compare(
            "At alpha = .9 the mixture keeps at least 85 % of the robust network's accuracy under attack",
            "accuracy under PGD",
            column("alpha .9", "attacked"),
            column("without", "attacked"),
            lambda w, wo: w - 0.85 * wo,
        ),
        compare(
            "At alpha = .9 the mixture wins back at least 40 % of the clean accuracy that the robust network lacks",
            "clean accuracy",
            column("alpha .9", "clean"),
            column("without", "clean"),
            lambda w, wo: w - wo - 0.4 * gap,
        ),
    ]
    if "alpha .3" in results:
        findings.append(
            compare(
                "At alpha = .3, where nothing can be certified, it keeps less than 20 % of the accuracy under attack",
                "accuracy under PGD",
                column("alpha .3", "attacked"),
                column("without", "attacked"),
                lambda w, wo: 0.2 * wo - w,
            )
        )
    return findings
