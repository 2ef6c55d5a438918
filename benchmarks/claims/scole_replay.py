"""Replay by frequency on a stream of digits in which some classes are rare."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.optim import SGD

from benchmarks.claims.findings import Finding, Metrics, Results, column, compare
from benchmarks.claims.streams import through
from benchmarks.claims.training import digits, seeded
from lightning_recipes.callbacks import GroupMask
from lightning_recipes.datamodules.scole import probabilities

RECIPE = "SCoLeDataModule"
CLAIM = "Replaying the classes that come rarely, and not those that come often, raises what a stream accumulates."
TRAIN, TASKS, EVENNESS, STORED = 1300, 200, 10.0, 30
SETTING = (
    f"digits, {TRAIN} for training, {TASKS} tasks of 2 classes of which the most frequent comes"
    f" {(1 / 0.55) ** EVENNESS:.0f} times as often as the rarest (e = {EVENNESS:.0f}), {STORED} samples stored a class,"
    " an MLP 64-256-10, SGD 0.1 with GroupMask, batch 32; accuracy over all ten classes at the end"
)
SEEDS = 4
ARMS: dict[str, dict[str, Any]] = {
    "without": {},
    "frequency": {"replay": "frequency", "high_frequency": 0.15},
    "freq_acc": {"replay": "freq_acc", "high_frequency": 0.15, "task_val_fraction": 0.1},
    "random": {"replay": "random"},
}


def run(seed: int, **stream: Any) -> Metrics:
    """Train through the stream.

    Args:
        seed: of the split, first weights, tasks and order.
        **stream: of SCoLeDataModule.

    Returns:
        ``accuracy`` over all classes, and over the three ``rarest``.
    """
    with seeded(seed):
        x, y = digits()
        train, test = torch.randperm(len(x)).split([TRAIN, len(x) - TRAIN])
    found, _ = through(
        (x[train], y[train]),
        (x[test], y[test]),
        (TASKS,),
        seed,
        partial(SGD, lr=0.1),
        [GroupMask()],
        entropy_decrease=EVENNESS,
        buffer_per_class=STORED,
        **{"task_val_fraction": 0.0, **stream},
    )
    rarest = torch.from_numpy(probabilities(10, EVENNESS, seed)).argsort()[:3]
    accuracies = found[TASKS]
    return {
        "accuracy": float(accuracies @ (y[test].bincount().double() / len(test))),
        "rarest": float(accuracies[rarest].mean()),
    }


def check(results: Results) -> list[Finding]:
    """Of the arms that were run."""
    claims = [
        ("Replay by frequency raises accuracy by 5 points", "frequency", "accuracy", 0.05),
        ("It raises that of the three rarest classes by 10 points", "frequency", "rarest", 0.10),
        ("By frequency weighed with accuracy too", "freq_acc", "accuracy", 0.0),
        ("At random too", "random", "accuracy", 0.0),
    ]
    names = {"accuracy": "accuracy over all classes", "rarest": "accuracy of the three rarest classes"}
    return [
        compare(claim, names[metric], *column(results, arm, metric), lambda w, wo, least=least: w - wo - least)
        for claim, arm, metric, least in claims
        if arm in results
    ]
