"""GrokkingMonitor on the paper's own data: fitted after one step and at chance, near the optimum nine steps later.

The network, its data and full-batch descent are the paper's; the figures are those that the monitor measures. With
first weights that are not small against a step, fit and generalisation come late and apart.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch

from benchmarks.claims.findings import Finding, Metrics, Results
from benchmarks.claims.training import seeded
from lightning_recipes.callbacks import GrokkingMonitor
from lightning_recipes.datamodules import XORClusterDataModule
from lightning_recipes.modules import TwoLayerReLU

RECIPE = "GrokkingMonitor"
CLAIM = "A network can fit noisy labels in one step, test at chance, and generalise some steps later with them fitted."
STEPS = 10
SETTING = (
    "XOR clusters, 200 training points in 10,000 dimensions with 15 % of the labels flipped in each cluster, 1,000"
    " clean ones to test on; 200 ReLUs, full-batch gradient descent; with: after step 10; without: after step 1"
)
SEEDS = 5
ARMS: Mapping[str, Mapping[str, Any]] = {"small": {}}


def train(
    seed: int,
    steps: int,
    data: Mapping[str, Any] | None = None,
    network: Mapping[str, Any] | None = None,
    **monitor: Any,
) -> GrokkingMonitor:
    """One run of the paper's set-up, as its monitor saw it.

    Args:
        seed: of the data and of the first weights.
        data, network: arguments of both where they are not the defaults.
        monitor: further arguments of the monitor.
    """
    with seeded(seed), tempfile.TemporaryDirectory() as folder:
        clusters = XORClusterDataModule(seed=seed, **(data or {}))
        watch = GrokkingMonitor(directions=torch.stack([clusters.mu1, clusters.mu2]), **monitor)
        pl.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=steps,
            max_epochs=-1,
            check_val_every_n_epoch=steps + 1,  # the monitor has a validation of its own
            callbacks=[watch],
            logger=False,
            default_root_dir=folder,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(TwoLayerReLU(p=clusters.p, seed=seed, **(network or {})), clusters)
    return watch


def run(seed: int) -> Metrics:
    """Train once with the paper's defaults.

    Args:
        seed: of the data and of the first weights.

    Returns:
        ``train``, ``test``, ``noisy`` (accuracy on the flipped labels) and ``linear`` (linear share) at steps 1, 2
        and 10, as ``test 10``.
    """
    history = train(seed, STEPS).history
    names = {"train": "train_acc", "test": "val_acc", "noisy": "noisy_fit", "linear": "linear_share"}
    at = {step: history.steps.index(step) for step in (1, 2, 10)}
    return {f"{ours}{step:3d}": history.values[name][i] for ours, name in names.items() for step, i in at.items()}


def check(results: Results) -> list[Finding]:
    """The card's bounds, for every seed."""
    seeds = results["small"]

    def column(name: str) -> Sequence[float]:
        return [each[name] for each in seeds]

    def within(claim: str, metric: str, late: str, early: str, low: float, high: float, of: str) -> Finding:
        margin = min(min(value - low, high - value) for value in column(of))
        return Finding(claim, metric, column(late), column(early), margin)

    test, fit = ("test 10", "test  1"), ("train 10", "train  1")
    noisy, linear = ("noisy 10", "noisy  1"), ("linear 10", "linear  1")
    return [
        within("After one step all training labels are fitted", "training accuracy", *fit, 1.0, 1.0, "train  1"),
        within("After one step the test is at chance, 42 to 60 %", "test accuracy", *test, 0.42, 0.60, "test  1"),
        within("After ten steps the test is at 98 % or more", "test accuracy", *test, 0.98, 1.0, "test 10"),
        within("The flipped labels stay fitted", "accuracy on flipped labels", *noisy, 1.0, 1.0, "noisy 10"),
        within(
            "After one step the network is mostly linear, 0.7 or more", "linear share", *linear, 0.7, 1.0, "linear  1"
        ),
        within(
            "After ten steps it is not, the linear share is below 0.07", "linear share", *linear, 0.0, 0.07, "linear 10"
        ),
    ]
