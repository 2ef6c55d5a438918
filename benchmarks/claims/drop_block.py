"""DropBlock: how much is really dropped, by the paper's code and by the original formula.

The paper's nominal 5, 10, 15 and 20 % are not what its code drops, since blocks overlap and are cut by the border. That
it helps is not claimed here: it takes images larger than digits.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.claims.findings import Finding, Metrics, Results, compare
from benchmarks.claims.training import StockClassifier, digits, seeded
from lightning_recipes.callbacks import DropBlock

RECIPE = "DropBlock"
CLAIM = "Whole blocks of the maps are dropped, more of them the deeper the layer."
NOMINAL = {64: 0.05, 32: 0.10, 16: 0.15, 8: 0.20}
EFFECTIVE = {64: 0.046, 32: 0.086, 16: 0.113, 8: 0.116}  # by the paper's code, in expectation
SETTING = (
    "1,797 digits at 64x64 through four residual blocks with maps of 64, 32, 16 and 8 pixels, p = 5, 10, 15, 20 %,"
    " blocks of 7x7, batch 64, one epoch, all masks of it; without: the original gamma in the place of the paper's"
)
SEEDS = 3
ARMS: dict[str, dict[str, Any]] = {"without": {"gamma": "dropblock"}, "paper's code": {"gamma": "paper_code"}}


class HalvedBlock(nn.Module):
    """A residual block on a map of half the size."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv1, self.conv2 = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(x, self.stride)
        return x + self.conv2(self.conv1(x).relu())


class Net(nn.Module):
    """Four of them, each a stage, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(*(nn.Sequential(HalvedBlock(stride)) for stride in (1, 2, 2, 2)))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(F.interpolate(x, 64)).flatten(1))


class Counted(pl.Callback):
    """Counts, pixel by pixel, what the second convolution of every stage is given, beside what the first one made."""

    def __init__(self) -> None:
        self.dropped = dict.fromkeys(NOMINAL, 0.0)
        self.pixels = dict.fromkeys(NOMINAL, 0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for stage in pl_module.net.stages:
            stage[0].conv1.bias.data.fill_(10.0)  # no pixel is 0 of itself
            stage[0].conv2.register_forward_pre_hook(self._count)

    def _count(self, conv: nn.Module, args: tuple[Tensor, ...]) -> None:
        side = args[0].shape[-1]
        self.dropped[side] += float((args[0] == 0).sum())
        self.pixels[side] += args[0].numel()


def run(seed: int, gamma: str) -> Metrics:
    """One epoch.

    Args:
        seed: of the masks.
        gamma: of DropBlock.

    Returns:
        the share that was dropped, by the size of the map.
    """
    x, y = digits()
    with seeded(seed):
        counted = Counted()
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            callbacks=[DropBlock(gamma=gamma, seed=seed), counted],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        module = StockClassifier(Net(), lambda parameters: SGD(parameters, lr=0.0))
        trainer.fit(module, DataLoader(TensorDataset(x, y), 64))
    return {str(side): counted.dropped[side] / counted.pixels[side] for side in NOMINAL}


def check(results: Results) -> list[Finding]:
    """The means over the seeds to 0.003 of the expectation."""
    findings = []
    for side, expected in EFFECTIVE.items():
        with_code, original = ([r[str(side)] for r in results[arm]] for arm in ("paper's code", "without"))
        findings.append(
            compare(
                f"Of a nominal {NOMINAL[side]:.0%} on maps of {side} pixels the paper's code drops"
                f" {expected:.1%} (within 0.3 points)",
                f"dropped share at {side}x{side}",
                with_code,
                original,
                lambda w, wo, expected=expected: 0.003 - abs(w - expected),
            )
        )
    return findings
