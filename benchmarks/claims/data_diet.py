"""Data diet on real data: what is left out, and which labels are wrong.

Every arm trains as many steps, whatever it keeps.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, Dataset
from torchmetrics.functional.classification import binary_auroc

from benchmarks.claims.findings import Finding, Metrics, Results, compare
from benchmarks.claims.training import accuracy, digits, fit, seeded
from lightning_recipes.callbacks import DataDiet, PruneTrainSet
from lightning_recipes.callbacks.data.scores import Scores, read_scores

RECIPE = "DataDiet"
CLAIM = "Scored after a few epochs, the hardest part of a training set is the one to train on, and wrong labels show."
TRAINING, BATCH, EPOCHS = 1200, 32, 30
STEPS = EPOCHS * (TRAINING // BATCH)
AT_EPOCH, RUNS, NOISE = 5, 10, 0.1
SETTING = (
    f"MLP 64-128-10 on {TRAINING} digits, SGD 0.1 with Nesterov momentum 0.9, batch {BATCH}, {STEPS} steps whatever"
    f" is kept; EL2N after {AT_EPOCH} epochs, mean of {RUNS} runs; measured on the other {1797 - TRAINING} digits;"
    " without: as many samples drawn at random"
)
SEEDS = 5
ARMS: dict[str, dict[str, Any]] = {
    "all": {},
    "hardest 30 %": {"keep": 0.3, "mode": "keep_max"},
    "random 30 %": {"keep": 0.3, "mode": "random"},
    "easiest 30 %": {"keep": 0.3, "mode": "keep_min"},
    "hardest 20 %": {"keep": 0.2, "mode": "keep_max"},
    "random 20 %": {"keep": 0.2, "mode": "random"},
    "noisy, all": {"noisy": True},
    "noisy, hardest 50 %": {"noisy": True, "keep": 0.5, "mode": "keep_max"},
    "noisy, random 50 %": {"noisy": True, "keep": 0.5, "mode": "random"},
    "noisy, window 40 to 90 %": {"noisy": True, "keep": 0.5, "mode": "offset", "offset": 0.4},
}


class Tensors(Dataset):
    """Samples in memory, a batch at a time."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        return self.x[indices], self.y[indices]


@cache
def data(seed: int, noisy: bool) -> tuple[Tensors, Tensors, Tensor]:
    """Training and test digits of a split, and which labels of the training digits are wrong."""
    generator = torch.Generator().manual_seed(seed)
    x, y = digits()
    x = x.flatten(1)
    train, test = torch.randperm(len(x), generator=generator).split([TRAINING, len(x) - TRAINING])
    labels, wrong = y[train].clone(), torch.zeros(TRAINING, dtype=torch.bool)
    if noisy:
        chosen = torch.randperm(TRAINING, generator=generator)[: round(NOISE * TRAINING)]
        labels[chosen] = (labels[chosen] + torch.randint(1, 10, (len(chosen),), generator=generator)) % 10
        wrong[chosen] = True
    return Tensors(x[train], labels), Tensors(x[test], y[test]), wrong


def mlp() -> nn.Module:
    """64-128-10."""
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def train(
    seed: int,
    dataset: Dataset,
    callback: pl.Callback,
    steps: int = STEPS,
    network: Callable[[], nn.Module] = mlp,
    batch: int = BATCH,
    schedule: Callable[[Optimizer, int], Any] | None = None,
    **optimizer: float,
) -> nn.Module:
    """Train once, so many steps whatever the size of the data; the seed is of the first weights and the order."""
    with seeded(seed):
        net, order = network(), torch.Generator().manual_seed(seed)
        batches = DataLoader(dataset, batch, shuffle=True, drop_last=True, generator=order, collate_fn=as_it_is)
        made = partial(SGD, **{"lr": 0.1, "momentum": 0.9, "nesterov": True, **optimizer})
        fit(net, batches, -1, made, schedule, [callback], max_steps=steps)
        return net


def as_it_is(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Collates what a data set has given as a batch."""
    return batch


@cache
def scores(seed: int, noisy: bool, runs: int) -> Scores:
    """EL2N of a split, from so many runs with other weights and another order, by way of the file."""
    dataset, _, _ = data(seed, noisy)
    with tempfile.TemporaryDirectory() as folder:
        for run in range(runs):
            recipe = DataDiet("el2n", AT_EPOCH, batch_size=TRAINING, out=folder, stop_after=True)
            train(1000 * (seed + 1) + run, dataset, recipe)
        return read_scores(folder)


def run(
    seed: int, noisy: bool = False, keep: float = 1.0, mode: str = "keep_max", offset: float | None = None
) -> Metrics:
    """Score, prune and train anew.

    Args:
        seed: of the split, the wrong labels, the weights and the order.
        noisy: a tenth of the training labels are wrong.
        keep, mode, offset: of PruneTrainSet.

    Returns:
        ``accuracy`` on the digits left out; ``auc``: the ROC-AUC of the score for wrong labels, where there are any;
        ``most_suspicious``: the share of wrong labels among as many of the most suspicious as there are wrong ones.
    """
    dataset, test, wrong = data(seed, noisy)
    found = scores(seed, noisy, RUNS)
    net = train(seed, dataset, PruneTrainSet(found.mean, keep, mode, offset, seed=seed))
    metrics = {"accuracy": accuracy(net, test.x, test.y)}
    if noisy:
        metrics["auc"] = float(binary_auroc(found.mean, wrong))
        metrics["most_suspicious"] = float(wrong[found.suspicious(int(wrong.sum()))].double().mean())
    return metrics


def check(results: Results) -> list[Finding]:
    """What is kept matters; wrong labels score highest, and then the hardest are not to be kept."""

    def pair(arm: str, other: str) -> tuple[list[float], list[float]]:
        return tuple([r["accuracy"] for r in results[name]] for name in (arm, other))

    findings = [
        compare(
            f"The hardest {share} train better than as many at random, by 1.5 points",
            "accuracy on held-out",
            *pair(f"hardest {share}", f"random {share}"),
            lambda w, wo: w - wo - 0.015,
        )
        for share in ("30 %", "20 %")
        if f"hardest {share}" in results
    ]
    findings.append(
        compare(
            "The easiest 30 % train worse than as many at random, by 5 points",
            "accuracy on held-out",
            *pair("easiest 30 %", "random 30 %"),
            lambda w, wo: wo - 0.05 - w,
        )
    )
    if "all" in results:
        findings.append(
            compare(
                "The hardest 30 % train as well as all, to half a point",
                "accuracy on held-out (without: all)",
                *pair("hardest 30 %", "all"),
                lambda w, wo: w - wo + 0.005,
            )
        )
    window, at_random = "noisy, window 40 to 90 %", "noisy, random 50 %"
    findings.append(
        compare(
            "With 10 % wrong labels the score finds them: ROC-AUC above 0.98 (a random order has 0.5)",
            "ROC-AUC for wrong labels",
            [r["auc"] for r in results[window]],
            [0.5] * len(results[window]),
            lambda w, wo: w - 0.98,
        )
    )
    findings.append(
        compare(
            "With 10 % wrong labels the window without the hardest tenth trains better than as many at random",
            "accuracy on held-out",
            *pair(window, at_random),
            lambda w, wo: w - wo,
        )
    )
    if "noisy, hardest 50 %" in results:
        findings += [
            compare(
                "With 10 % wrong labels the hardest half trains worse than as many at random, by 5 points",
                "accuracy on held-out",
                *pair("noisy, hardest 50 %", at_random),
                lambda w, wo: wo - 0.05 - w,
            ),
            compare(
                "With 10 % wrong labels the window trains better than all, by 1 point",
                "accuracy on held-out (without: all)",
                *pair(window, "noisy, all"),
                lambda w, wo: w - wo - 0.01,
            ),
        ]
    return findings
