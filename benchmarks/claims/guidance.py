"""Guidance: a fully connected network that is too deep to train on its own trains beside an untrained guide.

The guide is a residual convolutional network with random weights: what it passes on is its architecture. Guided in
the first 100 of 630 steps alone, the other variant of the paper, it does not train better here than without.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from benchmarks.claims.findings import Finding, Metrics, Results, column, compare
from benchmarks.claims.training import Batches, accuracy, digits, fit, seeded
from lightning_recipes.callbacks import Guidance
from lightning_recipes.modules import DeepMLP

RECIPE = "Guidance"
CLAIM = "A network too deep to train on its own trains when its layers are pulled towards those of an untrained guide."
LAYERS, WIDTH, EPOCHS, BATCH, TRAINING, START = 24, 64, 30, 64, 1297, 100
SETTING = (
    f"digits; {LAYERS} x [Linear {WIDTH}, batch norm, ReLU, dropout 0.1] and a linear layer, Adam 1e-3, batch {BATCH},"
    f" {EPOCHS} epochs; guide: untrained residual conv net of 8 channels, 5 blocks"
)
SEEDS = 3
ARMS: Mapping[str, Mapping[str, Any]] = {
    "without": {"alpha": 0.0},
    "all steps": {},
    f"first {START} steps": {"guide_steps": START},
}


class Block(nn.Module):
    """Pre-activation residual block of two 3x3 convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(2))
        self.convolutions = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for norm, convolution in zip(self.norms, self.convolutions):
            out = convolution(F.relu(norm(out)))
        return x + out


class Guide(nn.Module):
    """A stem and residual blocks on 8x8 images; their outputs are its maps."""

    def __init__(self, channels: int = 8, blocks: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(channels) for _ in range(blocks)))
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def run(seed: int, epochs: int = EPOCHS, **arguments: Any) -> Metrics:
    """Train once.

    Args:
        seed: of split, weights, order and the guide's weights.
        epochs: fewer of them for the test, which has less time.
        **arguments: Guidance's.

    Returns:
        ``accuracy`` on the test digits; ``loss``: cross-entropy on the training digits, both in eval mode.
    """
    with seeded(seed):
        x, y = digits()
        order = torch.randperm(len(x))
        train, test = order[:TRAINING], order[TRAINING:]
        net = DeepMLP(widths=[WIDTH] * LAYERS)
        guidance = Guidance(
            f"{__name__}:Guide", pretrained=False, guide_layers=["stem", "blocks.*"], seed=seed, **arguments
        )
        fit(
            net,
            Batches(x[train], y[train], BATCH, seed),
            epochs,
            partial(Adam, lr=1e-3, fused=True),
            callbacks=[guidance],
        )
        with torch.no_grad():
            loss = F.cross_entropy(net(x[train]), y[train]).item()
        return {"accuracy": accuracy(net, x[test], y[test]), "loss": loss}


def check(results: Results) -> list[Finding]:
    """More accurate by 0.2, whether guided in all steps or in the first ones."""
    return [
        compare(
            f"The deep network trains (guided in {arm}): test accuracy higher by 0.2",
            "test accuracy",
            *column(results, arm, "accuracy"),
            lambda w, wo: w - wo - 0.2,
        )
        for arm in results
        if arm != "without"
    ]
