"""Two branches, joined and unfrozen from the head down: as accurate as the better one, and robuster than the plain one.

The paper's promise at the size of digits; ``benchmarks/papers/lightweight_cnn.py`` has its own data. That the order of
unfreezing matters does not show: waking all layers at once is as accurate.
"""

from __future__ import annotations

import os
import tempfile
from functools import cache, partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.claims.findings import Finding, Metrics, Results, compare
from benchmarks.claims.training import Batches, accuracy, digits, fit, seeded
from lightning_recipes.callbacks import ProgressiveUnfreezing
from lightning_recipes.core.schedule import EveryN
from lightning_recipes.modules import AugmentBatch, DualInputOutput, UnifiedClassifier

RECIPE = "DualInputOutput"
CLAIM = "Two tiny CNNs on two views of the images, joined and fine-tuned from the head down, are better than either."
TRAIN, BATCH, STAGE1_EPOCHS, EVERY = 600, 32, 25, 4
SETTING = (
    f"{TRAIN} digits for training and the rest for the test, convolutions of 10 and 20 filters, 5,450 parameters"
    f" together; stage 1: {STAGE1_EPOCHS} epochs of Adam 3e-3, batch {BATCH}; stage 2: head, conv2 and conv1 for"
    f" {EVERY} epochs each, SGD 0.02 with momentum 0.9, down to 0 over the second half"
)
SEEDS = 5
ARMS: dict[str, dict[str, Any]] = {name: {"net": name} for name in ("A", "B", "gradual", "at_once")}
GROUPS = [["head"], ["a.conv2", "b.conv2"], ["a.conv1", "b.conv1"]]


def late_decay(optimizer: Optimizer, steps: int) -> LambdaLR:
    """Constant, then down to nothing over the second half of the steps: layers that wake late are trained all the same,
    and the last steps leave no noise.
    """
    return LambdaLR(optimizer, lambda step: min(1.0, 2 * (1 - step / steps)))


def split(seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the digits to train and to test on."""
    generator = torch.Generator().manual_seed(seed)
    train, test = torch.randperm(1797, generator=generator).split([TRAIN, 1797 - TRAIN])
    return train, test


@cache
def stage1(seed: int) -> bytes:
    """The checkpoint of both branches."""
    x, y = digits()
    train, _ = split(seed)
    with seeded(seed), tempfile.TemporaryDirectory() as folder:
        module = DualInputOutput(model_args={"size": 8, "padding": 1}, optimizer=partial(Adam, lr=3e-3), seed=seed)
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=STAGE1_EPOCHS,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, Batches(x[train], y[train], BATCH, seed))
        path = os.path.join(folder, "stage1.ckpt")
        trainer.save_checkpoint(path)
        with open(path, "rb") as file:
            return file.read()


def run(seed: int, net: str) -> Metrics:
    """Measure one branch after stage 1, or the unified model after stage 2.

    Args:
        seed: of the split, first weights, augmentation, order and head.
        net: an arm's name.

    Returns:
        ``accuracy`` on test digits as they are, ``augmented`` on one augmented copy of each.
    """
    x, y = digits()
    train, test = split(seed)
    with seeded(seed), tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "stage1.ckpt")
        with open(path, "wb") as file:
            file.write(stage1(seed))
        if net in ("A", "B"):
            module = DualInputOutput.load_from_checkpoint(path, weights_only=True)
            trained: nn.Module = getattr(module, net.lower()).eval()
        else:
            trained = UnifiedClassifier.from_checkpoint(path)
            recipe = ProgressiveUnfreezing(groups=GROUPS, at=EveryN(EVERY), lr_scale=None)
            fit(
                trained,
                Batches(x[train], y[train], BATCH, seed),
                EVERY * len(GROUPS),
                partial(SGD, lr=0.02, momentum=0.9),
                late_decay,
                callbacks=[recipe] if net == "gradual" else [],
            )
    with seeded(seed):  # the same augmented copies for every arm
        augmented = AugmentBatch()(x[test])
    return {
        "accuracy": accuracy(trained, x[test], y[test]),
        "augmented": accuracy(trained, augmented, y[test]),
    }


def check(results: Results) -> list[Finding]:
    """Against the better branch, against the plain branch on augmented images, and against all layers at once."""

    def of(arm: str, metric: str) -> list[float]:
        return [each[metric] for each in results[arm]]

    better = [max(pair) for pair in zip(of("A", "accuracy"), of("B", "accuracy"), strict=True)]
    findings = [
        compare(
            "The unified model is at least as accurate as the better branch (here: without), less half a point",
            "test accuracy",
            of("gradual", "accuracy"),
            better,
            lambda w, wo: w - wo + 0.005,
        ),
        compare(
            "On augmented images it is more accurate than the branch that never saw any (here: without)",
            "accuracy on augmented test images",
            of("gradual", "augmented"),
            of("A", "augmented"),
            lambda w, wo: w - wo - 0.02,
        ),
    ]
    if "at_once" in results:
        findings.append(
            compare(
                "Unfreezing step by step is more accurate than all layers at once (here: without), by half a point",
                "test accuracy",
                of("gradual", "accuracy"),
                of("at_once", "accuracy"),
                lambda w, wo: w - wo - 0.005,
            )
        )
    return findings
