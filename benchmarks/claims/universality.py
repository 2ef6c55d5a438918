"""LangevinMixture on real data: digits of which three labels in ten are drawn at random, an MLP with 45 times as many
parameters as samples.

Log-loss is measured on test labels with the same noise, which an honest forecaster must allow for; accuracy on the
clean ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader

from benchmarks.claims.findings import Finding, Metrics, Results, compare
from benchmarks.claims.training import Batches, digits, fit, seeded
from lightning_recipes.callbacks import LangevinMixture

RECIPE = "LangevinMixture"
CLAIM = "On noisy labels a mixture of posterior samples predicts better than the SGD iterate of the same network."
TRAIN, STEPS, BATCH, WIDTH, NOISE = 300, 6000, 100, 200, 0.3
SETTING = (
    f"{TRAIN} digits of which {NOISE:.0%} have a random label, {1797 - TRAIN} to test on; MLP 64-{WIDTH}-10, SGD 0.05,"
    f" batch {BATCH}, {STEPS} steps; prior std 0.2, 30 samples"
)
SEEDS = 3
ARMS: Mapping[str, Mapping[str, Any]] = {
    "without": {},
    "T 1": {"temperature": 1.0},
    "clean, without": {"noise": 0.0},
    "clean, T 1, wide prior": {"temperature": 1.0, "prior_std": 1.0, "noise": 0.0},
}
SHORT: Mapping[str, Mapping[str, Any]] = {
    "without": {"steps": 3000, "lr": 0.1},
    "T 1": {"temperature": 1.0, "steps": 3000, "lr": 0.1},
}
"""Arms for a test that may not take long: half as many steps of twice the length."""


def noisy(labels: Tensor, share: float) -> Tensor:
    """Each label with that probability drawn anew among the ten."""
    drawn = torch.randint(10, labels.shape)
    return torch.where(torch.rand(len(labels)) < share, drawn, labels)


def run(
    seed: int,
    temperature: float = 0.0,
    prior_std: float = 0.2,
    noise: float = NOISE,
    steps: int = STEPS,
    lr: float = 0.05,
) -> Metrics:
    """Train once.

    Args:
        seed: of split, noise, weights, order and chain.
        temperature, prior_std: of LangevinMixture; temperature 0 is plain SGD.
        noise: share of random labels.
        steps, lr: of SGD; the second half is sampled.

    Returns:
        ``nll`` on noisy test labels and ``accuracy`` on clean ones.
    """
    with seeded(seed):
        x, y = digits()
        x, labels = x.flatten(1), noisy(y, noise)
        train, test = torch.randperm(len(x)).split([TRAIN, len(x) - TRAIN])
        net = nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))
        batches = Batches(x[train], labels[train], BATCH, seed, draws=steps // 6)
        mixture = LangevinMixture(temperature, prior_std, TRAIN, 0.5, steps // 60, seed=seed)
        trainer = fit(net, batches, 6, partial(SGD, lr=lr), callbacks=[mixture])
        module = trainer.lightning_module
        logits = torch.cat(trainer.predict(module, DataLoader(x[test], 500)))
        return {
            "nll": float(F.cross_entropy(logits, labels[test])),
            "accuracy": float((logits.argmax(1) == y[test]).float().mean()),
        }


def check(results: Results) -> list[Finding]:
    def of(arm: str, metric: str) -> list[float]:
        return [each[metric] for each in results[arm]]

    findings = [
        compare(
            "On noisy labels the mixture's log-loss is at least 0.4 below that of SGD",
            "log-loss on noisy test labels",
            of("T 1", "nll"),
            of("without", "nll"),
            lambda a, b: b - a - 0.4,
        ),
        compare(
            "It classifies clean test digits better by at least 0.1",
            "accuracy on clean test labels",
            of("T 1", "accuracy"),
            of("without", "accuracy"),
            lambda a, b: a - b - 0.1,
        ),
    ]
    if "clean, without" in results:
        findings.append(
            compare(
                "Control: on clean labels and with a wide prior (std 1) the mixture at T = 1 gains nothing over SGD",
                "log-loss on clean test labels",
                of("clean, T 1, wide prior", "nll"),
                of("clean, without", "nll"),
                lambda a, b: a - b,
            )
        )
    return findings
