"""PSKD on real data: digits with clean labels, and with some of them drawn at random."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR
from torch.utils.data import DataLoader, Dataset
from torchmetrics.functional.classification import multiclass_calibration_error

from benchmarks.claims.findings import Finding, Metrics, Results, compare
from benchmarks.claims.training import digits, fit, seeded
from lightning_recipes.callbacks import PSKD
from lightning_recipes.modules import aurc

RECIPE = "PSKD"
CLAIM = "Labels refined by the model's own past predictions give probabilities that are worth more, and fewer errors."
TRAINING, BATCH, EPOCHS = 300, 32, 60
SETTING = (
    f"MLP 64-256-256-10 on {TRAINING} digits (the labels, or 20 % or 40 % of them drawn at random), SGD .05 with"
    f" Nesterov momentum .9 and weight decay 5e-4, {EPOCHS} epochs, rate x.1 after 30 and 45, batch {BATCH}; measured"
    f" on the other {1797 - TRAINING} digits; alpha_T 0.8; without: alpha_T=0"
)
SEEDS = 5
NOISES = {"clean": 0.0, "20 %": 0.2, "40 %": 0.4}
ARMS: dict[str, dict[str, Any]] = {
    f"{arm}, {name}": {"alpha_T": alpha, "noise": noise}
    for name, noise in NOISES.items()
    for arm, alpha in (("without", 0.0), ("with", 0.8))
}


class Tensors(Dataset):
    """Samples in memory, a batch at a time."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        return self.x[indices], self.y[indices]


def _as_it_is(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch


def run(seed: int, alpha_T: float, noise: float) -> Metrics:
    """Train once.

    Args:
        seed: of the split, the labels that are drawn, the weights and the order.
        alpha_T: of PSKD.
        noise: share of training labels that are drawn at random from all ten.

    Returns:
        on the digits left out: ``accuracy``, ``nll``, ``ece`` of 10 bins, and ``aurc``.
    """
    with seeded(seed):
        x, y = digits()
        x = x.flatten(1)
        training, held_out = torch.randperm(len(x)).split([TRAINING, len(x) - TRAINING])
        labels = y[training].clone()
        drawn = torch.randperm(TRAINING)[: round(noise * TRAINING)]
        labels[drawn] = torch.randint(10, (len(drawn),))
        net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
        order = torch.Generator().manual_seed(seed)
        data = DataLoader(Tensors(x[training], labels), BATCH, shuffle=True, generator=order, collate_fn=_as_it_is)
        optimizer = partial(SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
        fit(net, data, EPOCHS, optimizer, _drops, [PSKD(alpha_T)])
        with torch.no_grad():
            logits, labels = net(x[held_out]), y[held_out]
        p = logits.softmax(1)
        return {
            "accuracy": float((p.argmax(1) == labels).float().mean()),
            "nll": float(F.cross_entropy(logits, labels)),
            "ece": float(multiclass_calibration_error(p, labels, 10, n_bins=10)),
            "aurc": float(aurc(p.amax(1), p.argmax(1) == labels)),
        }


def _drops(optimizer: SGD, steps: int) -> MultiStepLR:
    """The paper's drops, after half and three quarters of the steps."""
    return MultiStepLR(optimizer, [steps // 2, steps * 3 // 4])


def pair(results: Results, noise: str, metric: str) -> tuple[list[float], list[float]]:
    """One metric seed by seed, with and without, at that share of drawn labels."""
    return tuple([r[metric] for r in results[f"{arm}, {noise}"]] for arm in ("with", "without"))


def in_four_of_five(claim: str, metric: str, with_recipe: Sequence[float], without: Sequence[float]) -> Finding:
    """Lower in at least four seeds of five."""
    lower = sum(w < wo for w, wo in zip(with_recipe, without, strict=True))
    return Finding(claim, metric, with_recipe, without, lower - 0.8 * len(without))


def check(results: Results) -> list[Finding]:
    """Negative log-likelihood at every share of drawn labels, calibration with none, accuracy with many."""
    return [
        *(
            in_four_of_five(
                f"NLL is lower in at least 4 of 5 seeds, labels {name}", "NLL on held-out", *pair(results, name, "nll")
            )
            for name in NOISES
            if f"with, {name}" in results
        ),
        in_four_of_five(
            "The calibration error is lower in at least 4 of 5 seeds, labels clean",
            "ECE on held-out",
            *pair(results, "clean", "ece"),
        ),
        compare(
            "Accuracy gains at least 3 points, labels 40 % drawn",
            "accuracy on held-out",
            *pair(results, "40 %", "accuracy"),
            lambda w, wo: w - wo - 0.03,
        ),
    ]
