"""GroupMask on a stream of digits, two classes at a time, that come again and again."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.optim import SGD, Adam

from benchmarks.claims.findings import Finding, Metrics, Results, compare
from benchmarks.claims.streams import through
from benchmarks.claims.training import digits, seeded
from lightning_recipes.callbacks import GroupMask

RECIPE = "GroupMask"
CLAIM = (
    "On recurring tasks plain training accumulates knowledge in spite of forgetting; masking absent classes speeds it."
)
TRAIN, AFTER = 1300, (1, 50, 300)
SETTING = (
    f"digits, {TRAIN} for training, 300 tasks of 2 classes drawn at random, one epoch of batch 32 each, an MLP"
    " 64-256-10, SGD without momentum at 0.1 with the mask and 0.01 without (as far apart as the paper's for Adam);"
    " accuracy over all ten classes"
)
SEEDS = 2
ARMS: dict[str, dict[str, Any]] = {
    "without": {"lr": 0.01, "mask": False},
    "GroupMask": {"lr": 0.1},
    "without, same rate": {"lr": 0.1, "mask": False},
    "GroupMask, momentum": {"lr": 0.1, "momentum": 0.9},
    "Adam": {"lr": 1e-3, "mask": False, "adam": True},
}


def run(seed: int, lr: float, mask: bool = True, momentum: float = 0.0, adam: bool = False) -> Metrics:
    """Train through the stream.

    Args:
        seed: of the split, first weights, tasks and order.
        lr, momentum: of SGD; `adam` takes Adam instead.
        mask: with GroupMask.

    Returns:
        ``after_<n>``: accuracy over all classes after n tasks.
    """
    with seeded(seed):
        x, y = digits()
        train, test = torch.randperm(len(x)).split([TRAIN, len(x) - TRAIN])
    optimizer = partial(Adam, lr=lr) if adam else partial(SGD, lr=lr, momentum=momentum)
    found, _ = through(
        (x[train], y[train]),
        (x[test], y[test]),
        AFTER,
        seed,
        optimizer,
        [GroupMask()] if mask else [],
        task_val_fraction=0.0,
    )
    share = y[test].bincount().double() / len(test)
    return {f"after_{tasks}": float(accuracies @ share) for tasks, accuracies in found.items()}


def check(results: Results) -> list[Finding]:
    """Of the arms that were run."""

    def of(arm: str, tasks: int) -> list[float]:
        return [r[f"after_{tasks}"] for r in results[arm]]

    found = [
        compare(
            f"{title}: below 35 % after one task (here: without), above 85 % after 300 (here: with)",
            "accuracy over all classes",
            of(arm, 300),
            of(arm, 1),
            lambda last, first: min(last - 0.85, 0.35 - first),
        )
        for title, arm in (("Knowledge accumulates with the mask", "GroupMask"), ("And without it", "without"))
        if arm in results
    ]
    claims = [
        ("After 50 tasks the mask is 10 points ahead", "GroupMask", "without", 50, 0.10),
        ("It is ahead at the same rate too, after 50 tasks", "GroupMask", "without, same rate", 50, 0.0),
        ("Momentum (here: without) hurts, after 300 tasks", "GroupMask", "GroupMask, momentum", 300, 0.0),
        ("After 50 tasks it is ahead of Adam (here: without)", "GroupMask", "Adam", 50, 0.0),
    ]
    return found + [
        compare(
            claim,
            f"accuracy over all classes after {tasks} tasks",
            of(mine, tasks),
            of(other, tasks),
            lambda w, wo, least=least: w - wo - least,
        )
        for claim, mine, other, tasks, least in claims
        if mine in results and other in results
    ]
