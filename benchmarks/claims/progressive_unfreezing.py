"""ProgressiveUnfreezing on real data: a CIFAR-10 ResNet-20 fine-tuned on ten CIFAR-100 classes with five images each.

The paper's own comparison, at its own rates, does NOT show here: full fine-tuning is better by some three points. What
does show is that head-first training with smaller rates below keeps the pre-trained features where a peak rate ten
times as high makes full fine-tuning lose them. That rate was chosen, on other classes than these, after the first
result was seen. Nearly all of it comes from the rates: at these sizes waking the layers one by one adds nothing
measurable to them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from benchmarks.claims.findings import Finding, Metrics, Results, compare
from benchmarks.claims.training import accuracy, fit, seeded
from lightning_recipes.callbacks import ProgressiveUnfreezing
from lightning_recipes.modules import CifarResNet

RECIPE = "ProgressiveUnfreezing"
CLAIM = "Waking layers from the head down, each at a smaller rate, fine-tunes better on little data than all at once."
CLASSES, SHOTS, BATCH, EPOCHS, PAPER_LR = 10, 5, 8, 30, 1e-3
SETTING = (
    f"CIFAR-10 ResNet-20 on {CLASSES} classes of CIFAR-100 with {SHOTS} images each, {EPOCHS} epochs of batch {BATCH},"
    " AdamW under OneCycle, flips; the other 85 images of each class are the test; without: full fine-tuning, same rate"
)
SEEDS = 3
ARMS: dict[str, dict[str, Any]] = {
    "full": {"unfreezes": False},
    "progressive": {},
    "untrained_x10": {"unfreezes": False, "lr": 10 * PAPER_LR, "pretrained": False},
    "full_x10": {"unfreezes": False, "lr": 10 * PAPER_LR},
    "progressive_x10": {"lr": 10 * PAPER_LR},
}
_MEAN, _STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def data_folder() -> Path:
    """The folder of real data.

    Raises:
        FileNotFoundError: when LIGHTNING_RECIPES_DATA names none.
    """
    folder = os.environ.get("LIGHTNING_RECIPES_DATA", "")
    if not os.path.isfile(os.path.join(folder, "cifar100_subset.npz")):
        raise FileNotFoundError("set LIGHTNING_RECIPES_DATA to the folder with cifar100_subset.npz and the ResNet-20")
    return Path(folder)


@cache
def _images() -> tuple[Tensor, np.ndarray]:
    file = np.load(data_folder() / "cifar100_subset.npz")
    images = torch.from_numpy(np.concatenate([file["x_train"], file["x_test"]])).permute(0, 3, 1, 2).float() / 255
    return (images - _MEAN) / _STD, np.concatenate([file["y_train"], file["y_test"]])


def few_shots(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels: ten of the fifty classes that nothing was chosen on."""
    images, labels = _images()
    random = np.random.RandomState(1000 + seed)
    reported = np.random.RandomState(7).permutation(100)[50:]
    orders = [random.permutation(np.flatnonzero(labels == c)) for c in random.choice(reported, CLASSES, replace=False)]
    train, test = np.concatenate([o[:SHOTS] for o in orders]), np.concatenate([o[SHOTS:] for o in orders])
    y = torch.arange(CLASSES)
    return images[train], y.repeat_interleave(SHOTS), images[test], y.repeat_interleave(len(test) // CLASSES)


class Flipped:
    """Whole batches in a new order every epoch, each image mirrored every other time."""

    def __init__(self, x: Tensor, y: Tensor, seed: int) -> None:
        self.x, self.y, self._draw = x, y, torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.x) // BATCH

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for chosen in torch.randperm(len(self.x), generator=self._draw).split(BATCH)[: len(self)]:
            mirrored = torch.rand(len(chosen), 1, 1, 1, generator=self._draw) < 0.5
            yield torch.where(mirrored, self.x[chosen].flip(3), self.x[chosen]), self.y[chosen]


def run(seed: int, unfreezes: bool = True, lr: float = PAPER_LR, pretrained: bool = True) -> Metrics:
    """Fine-tune once.

    Args:
        seed: of classes, images, head and order.
        unfreezes: with the recipe, at the paper's schedule, ratios and decays; or all layers at one rate.
        lr: peak rate of the head.
        pretrained: start from the CIFAR-10 weights.

    Returns:
        ``accuracy`` on the test images after the last epoch.
    """
    with seeded(seed):
        x, y, x_test, y_test = few_shots(seed)
        net = CifarResNet(20, num_classes=CLASSES)
        if pretrained:
            state = load_file(data_folder() / "cifar10_resnet20.safetensors")
            net.load_state_dict({k: v for k, v in state.items() if not k.startswith("linear")}, strict=False)
            nn.init.uniform_(net.linear.weight, -(64**-0.5), 64**-0.5)
        recipe = ProgressiveUnfreezing(
            groups=["linear", "layer3", "layer2", "layer1"],
            weight_decay=(1e-5, 1e-4, 1e-4, 1e-4),
            never=["conv1", "bn1"],
        )
        fit(
            net,
            Flipped(x, y, seed),
            EPOCHS,
            partial(AdamW, lr=lr, weight_decay=1e-4),
            lambda optimizer, steps: OneCycleLR(optimizer, lr, steps),
            [recipe] if unfreezes else [],
        )
        return {"accuracy": accuracy(net, x_test, y_test)}


def check(results: Results) -> list[Finding]:
    """At the paper's rates; at ten times them; and that there is something to keep. Of the arms that were run."""
    claims = [
        ("At the paper's rates it is at least as accurate as full fine-tuning", "progressive", "full", 0.0),
        (
            "At ten times the paper's peak rate it is more accurate than full fine-tuning by at least 4 points",
            "progressive_x10",
            "full_x10",
            0.04,
        ),
        (
            "Pre-training helps in this setting: full fine-tuning beats an untrained start (here: without) by 8 points",
            "full_x10",
            "untrained_x10",
            0.08,
        ),
    ]
    return [
        compare(
            claim,
            "test accuracy",
            [r["accuracy"] for r in results[with_recipe]],
            [r["accuracy"] for r in results[without]],
            lambda w, wo, least=least: w - wo - least,
        )
        for claim, with_recipe, without, least in claims
        if with_recipe in results and without in results
    ]
