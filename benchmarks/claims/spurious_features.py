"""Why averaging helps: with many different spurious features two models learn different ones, and each counts less.

The paper's MultiColorMNIST (its Table 1) on 8x8 digits: beside each digit stand 32 patches whose colours give the label
away in training. When they mostly do not in testing, the mean of two models that differ in their seed is better than
either, as long as the patches have colours of their own; with one colour for all of them there is nothing to share out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from benchmarks.claims.findings import Finding, Metrics, Results, compare
from benchmarks.claims.training import digits, seeded, turned
from benchmarks.claims.wise_ft import patches

RECIPE = "BANG"
CLAIM = "Averaging two models helps under shift where spurious features are many and different."
TRAIN, PATCHES, STEPS, BATCH, SHIFT = 1300, 32, 1500, 64, 0.75
SETTING = (
    f"{TRAIN} digits beside {PATCHES} RGB patches in their label's colour, tested on the others where a patch has a"
    f" random colour with probability {SHIFT}; two MLPs 160-64-64-10 of other seeds on the same batches, mean squared"
    f" error, Adam 1e-3, {STEPS} steps of {BATCH}; with: the mean of their outputs; without: the mean of their"
    " accuracies"
)
SEEDS = 4
ARMS: dict[str, dict[str, Any]] = {"32 colours": {"kinds": PATCHES}, "1 colour": {"kinds": 1}}


def train(nets: Sequence[nn.Module], x: Tensor, y: Tensor, seed: int) -> None:
    """Regress the one-hot labels, every network on the same batches; one Adam for all is one for each."""
    optimizer = Adam([p for net in nets for p in net.parameters()], lr=1e-3, fused=True)
    order, target = torch.Generator().manual_seed(seed), F.one_hot(y, 10).float()
    for _ in range(STEPS):
        chosen = torch.randint(len(x), (BATCH,), generator=order)
        loss = sum(F.mse_loss(net(x[chosen]), target[chosen]) for net in nets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def mlp() -> nn.Sequential:
    """160-64-64-10 with ReLU."""
    return nn.Sequential(nn.Linear(64 + 3 * PATCHES, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def run(seed: int, kinds: int) -> Metrics:
    """Train two models.

    Args:
        seed: of the split, the patches, the order and the models.
        kinds: how many patches have colours of their own.

    Returns:
        accuracy under shift: ``single``, the mean of both, and ``ensemble``, of the mean of their outputs.
    """
    y = digits()[1]
    with seeded(seed):
        order, draws = torch.randperm(len(y)), torch.Generator().manual_seed(seed)
        seen, other = order[:TRAIN], order[TRAIN:]
        with_patches = lambda i, agree: torch.cat([turned(0)[i], patches(y[i], PATCHES, agree, draws, kinds)], 1)  # noqa: E731
        x, shifted = with_patches(seen, 1.0), with_patches(other, 1 - SHIFT)
        nets = [mlp(), mlp()]
        train(nets, x, y[seen], seed)
        with torch.no_grad():
            outputs = [net(shifted) for net in nets]
    correct = lambda out: float((out.argmax(1) == y[other]).float().mean())  # noqa: E731
    return {"single": sum(map(correct, outputs)) / 2, "ensemble": correct((outputs[0] + outputs[1]) / 2)}


def check(results: Results) -> list[Finding]:
    """More than two points with 32 colours, less than one either way with one."""
    sides = lambda arm: ([r["ensemble"] for r in results[arm]], [r["single"] for r in results[arm]])  # noqa: E731
    return [
        compare(
            "With 32 patches of their own colours the mean of two models gains more than 2 points",
            "accuracy under shift",
            *sides("32 colours"),
            lambda w, wo: w - wo - 0.02,
        ),
        compare(
            "With one colour for all patches it changes less than 1 point",
            "accuracy under shift",
            *sides("1 colour"),
            lambda w, wo: 0.01 - abs(w - wo),
        ),
    ]
