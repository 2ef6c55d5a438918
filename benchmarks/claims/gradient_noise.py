"""GradientNoise on real data: networks that begin at zero, where only the last bias ever gets a gradient.

Twenty layers, the paper's depth, do not begin to train within 100 epochs of digits at any eta; they need MNIST.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch.optim import SGD

from benchmarks.claims.findings import Finding, Metrics, Results
from benchmarks.claims.training import Batches, accuracy, digits, fit, seeded
from lightning_recipes.callbacks import GradientNoise
from lightning_recipes.modules import MLP

RECIPE = "GradientNoise"
CLAIM = "With annealed noise on its gradients a badly initialised network begins to train; a good one gains nothing."
TRAIN, EPOCHS, BATCH, WIDTH = 1297, 60, 32, 50
SETTING = (
    f"{TRAIN} digits for training and 500 for the test, hidden ReLU layers of {WIDTH}, SGD 0.1, batch {BATCH}, clipping"
    f" at 10, {EPOCHS} epochs"
)
SEEDS = 2
ARMS: Mapping[str, Mapping[str, Any]] = {
    "3 layers, no noise": {"layers": 3, "eta": 0.0},
    "3 layers": {"layers": 3, "eta": 0.01},
    "6 layers, no noise": {"layers": 6, "eta": 0.0},
    "6 layers": {"layers": 6, "eta": 0.3},
    "He, no noise": {"layers": 5, "eta": 0.0, "init": "he"},
    "He": {"layers": 5, "eta": 0.01, "init": "he"},
}


def run(seed: int, layers: int, eta: float, init: str = "zeros") -> Metrics:
    """Train once.

    Args:
        seed: of split, weights, order and noise.
        layers: hidden ones.
        eta: of GradientNoise; 0 is without.
        init: of MLP.

    Returns:
        ``accuracy`` on the test digits.
    """
    with seeded(seed):
        x, y = digits()
        train, test = torch.randperm(len(x)).split([TRAIN, len(x) - TRAIN])
        net = MLP(10, size=8, width=WIDTH, depth=layers, init=init)
        noise = [GradientNoise(eta, seed=seed)] if eta else []
        batches = Batches(x[train], y[train], BATCH, seed)
        fit(net, batches, EPOCHS, partial(SGD, lr=0.1), callbacks=noise, gradient_clip_val=10.0)
        return {"accuracy": accuracy(net, x[test], y[test])}


def check(results: Results) -> list[Finding]:
    """The bounds hold in every seed; of the control, on average."""

    def of(arm: str) -> list[float]:
        return [each["accuracy"] for each in results[arm]]

    findings = []
    if "3 layers" in results:
        with_3, without_3 = of("3 layers"), of("3 layers, no noise")
        findings.append(
            Finding(
                "From zero, 3 hidden layers train with eta 0.01: in every seed above 0.9 with and below 0.15 without",
                "test accuracy, 3 layers from zero",
                with_3,
                without_3,
                min(min(with_3) - 0.9, 0.15 - max(without_3)),
            )
        )
    if "6 layers" in results:
        findings.append(
            Finding(
                "From zero, 6 hidden layers train with eta 0.3: above 0.9 in every seed",
                "test accuracy, 6 layers from zero",
                of("6 layers"),
                of("6 layers, no noise"),
                min(of("6 layers")) - 0.9,
            )
        )
    if "He" in results:
        with_he, without_he = of("He"), of("He, no noise")
        gain = sum(with_he) / len(with_he) - sum(without_he) / len(without_he)
        findings.append(
            Finding(
                "Control: 5 hidden layers that begin well (He) do not gain as much as a point (eta 0.01)",
                "test accuracy, 5 layers after He",
                with_he,
                without_he,
                0.01 - gain,
            )
        )
    return findings
