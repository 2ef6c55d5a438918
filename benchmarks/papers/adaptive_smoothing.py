"""Adaptive smoothing on CIFAR-10: an accurate ResNet-20, a small robust CNN, and the mixing network trained for them.

``LIGHTNING_RECIPES_DATA=... python -m benchmarks.papers.adaptive_smoothing`` trains the mixing network (some minutes on
one core), measures every arm on clean test images and under Auto-PGD through the whole mixture, prints a table and
writes ``adaptive_smoothing.json`` beside this file. The paper's networks are larger by a factor of 500 and trained with
more data (clean 95.23 %, AutoAttack 68.06 % of a mixture on CIFAR-10); its schedule here is in small: fewer attacks of
fewer iterations, a narrower mixing network at a larger rate.

Nothing below was chosen by what it gives on the images that are reported on; ``--held-out`` measures on others.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms.v2 import Normalize
from tqdm import tqdm

from benchmarks.claims.training import Batches, seeded
from benchmarks.papers.command import Command, missing, save
from lightning_recipes.callbacks import AdaptiveSmoothing, RobustAccuracyMonitor
from lightning_recipes.core.weights import load_weights
from lightning_recipes.modules import AdaptiveSmoothingModule, CifarResNet, ImageClassifier, Mixer

EPSILON, STEPS, TEST = 8 / 255, 20, 250
STANDARD = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
ROBUST = {"mean": [0.4914, 0.4822, 0.4465], "std": [0.2023, 0.1994, 0.2010]}
PREFIX = "cifar10_cnn_a_adv4/"
BATCH, IMAGES, EPOCHS, SEED = 80, 2_000, 1, 0
TRAINING: dict[str, Any] = {
    "widths": (48, 32, 48, 64),
    "attack": "pgd",
    "iterations": 10,
    "targets": 4,
    "further": 4,
    "lr": 2e-3,
    "epsilon": EPSILON,
}
EVALUATION: dict[str, Any] = {"std_scale": 1.0, "rob_scale": 1.0}
ARMS: dict[str, float | tuple[float, float]] = {  # a constant, or the range of the trained network's weight
    "standard": 0.0,
    "robust": 1.0,
    "alpha .8": 0.8,
    "alpha .9": 0.9,
    "alpha .95": 0.95,
    "trained, .84 - .99": (0.84, 0.99),
    "trained, .5 - 1": (0.5, 1.0),
}
RESULTS = Path(__file__).with_suffix(".json")


def folder() -> Path:
    """Where the data lie.

    Raises:
        FileNotFoundError: when LIGHTNING_RECIPES_DATA names no folder with them.
    """
    path = Path(os.environ.get("LIGHTNING_RECIPES_DATA", ""))
    for name in ("cifar10_subset.npz", "cifar10_resnet20.safetensors", "robust_cnns.safetensors"):
        if not (path / name).is_file():
            raise FileNotFoundError(f"set LIGHTNING_RECIPES_DATA to the folder with {name} (looked for {path / name})")
    return path


@cache
def images(part: str) -> tuple[Tensor, Tensor]:
    """Images in [0, 1] ``[n, 3, 32, 32]`` and labels: part 'train' or 'test'."""
    file = np.load(folder() / "cifar10_subset.npz")
    return torch.from_numpy(file[f"x_{part}"]).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(file[f"y_{part}"])


def standard() -> CifarResNet:
    """ResNet-20, 92 % on clean images."""
    net = CifarResNet(20)
    load_weights(net, str(folder() / "cifar10_resnet20.safetensors"))
    return net.eval()


def robust() -> nn.Sequential:
    """The CNN of two convolutions that was trained under attack; its maps are '1' and '3'."""
    state = load_file(folder() / "robust_cnns.safetensors")
    net = nn.Sequential(
        nn.Conv2d(3, 16, 4, 2, 1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2048, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )
    net.load_state_dict({name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)})
    return net.eval()


def _trainer(**settings: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        **settings,
    )


def train(count: int, epochs: int) -> Mixer:
    """The mixing network, trained on so many images."""
    x, y = images("train")
    with seeded(SEED):
        module = AdaptiveSmoothingModule(
            standard(),
            robust(),
            ("layer2", "layer3"),
            ("1", "3"),
            standard_input_transform=Normalize(**STANDARD),
            robust_input_transform=Normalize(**ROBUST),
            **TRAINING,
        )
        chosen = torch.randperm(len(x))[:count]
        _trainer(max_epochs=epochs, log_every_n_steps=1).fit(module, Batches(x[chosen], y[chosen], BATCH, SEED))
    return module.mixer


def measure(arm: str, mixer: Mixer, x: Tensor, y: Tensor) -> dict[str, float]:
    """Accuracy of one arm on clean images and under attack, as a stock module with the callback tests."""
    alpha = ARMS[arm]
    if isinstance(alpha, tuple):
        how: dict[str, Any] = {"alpha": None, "mixer": mixer, "alpha_range": alpha}
    else:
        how = {"alpha": alpha}
    recipe = AdaptiveSmoothing(robust(), partner_input_transform=Normalize(**ROBUST), **EVALUATION, **how)
    monitor = RobustAccuracyMonitor("apgd", EPSILON, STEPS, restarts=1)
    stock = ImageClassifier(standard(), num_classes=10, **STANDARD)
    trainer = _trainer(callbacks=[recipe, monitor], enable_progress_bar=False)
    with seeded(SEED):
        (values,) = trainer.test(stock, DataLoader(TensorDataset(x, y), 250), verbose=False)
    found = {"clean": values["robust_accuracy/clean"], "attacked": values[f"robust_accuracy/apgd-{STEPS}-1"]}
    if "adaptive_smoothing/alpha_mean" in values:
        found["alpha_mean"] = values["adaptive_smoothing/alpha_mean"]
    return {name: round(value, 4) for name, value in found.items()}


def table(found: dict[str, dict[str, float]], count: int) -> str:
    """The arms as aligned text."""
    rows = [("clean", "attacked", f"{count} test images, in %")]
    rows += [(f"{100 * v['clean']:.1f}", f"{100 * v['attacked']:.1f}", arm) for arm, v in found.items()]
    return "\n".join("  ".join([*(cell.rjust(9) for cell in row[:2]), row[2]]) for row in rows)


def main(args: Iterable[str] | None = None) -> int:
    """Returns 1 where the data are missing."""
    command = Command(RESULTS, __doc__)
    command.add_argument("--images", type=int, default=IMAGES, metavar="N", help="to train on; default: %(default)s")
    command.add_argument("--epochs", type=int, default=EPOCHS, metavar="N", help="default: %(default)s")
    command.add_argument("--test", type=int, default=TEST, metavar="N", help="images to test on; default: %(default)s")
    command.add_argument("--mixer", type=Path, metavar="FILE", help="a mixing network to measure, or where to write it")
    command.add_argument("--held-out", action="store_true", help="measure on other test images")
    parsed = command.parse(args)
    if parsed.images < BATCH or parsed.epochs < 1 or not 1 <= parsed.test <= 1000:
        command.error(f"--images must be at least {BATCH}, --epochs at least 1, --test from 1 to 1000")

    began = time.time()
    try:
        x, y = images("test")
        there = parsed.mixer is not None and parsed.mixer.is_file()
        mixer = Mixer.load(parsed.mixer) if there else train(parsed.images, parsed.epochs)
    except FileNotFoundError as error:
        return missing("left out", error)
    if parsed.mixer is not None and not there:
        mixer.save(parsed.mixer)
    seconds = time.time() - began
    where = slice(-parsed.test, None) if parsed.held_out else slice(0, parsed.test)
    found = {}
    for arm in tqdm(ARMS, "arms"):
        found[arm] = measure(arm, mixer, x[where], y[where])
    print(f"\n{table(found, parsed.test)}\ntrained in {seconds:.0f} s, {time.time() - began:.0f} s in all", flush=True)
    if not parsed.held_out:
        results = {
            "test_images": parsed.test,
            "training_images": parsed.images,
            "epochs": parsed.epochs,
            "attack": f"apgd-{STEPS}-1",
            "epsilon": round(EPSILON, 5),
            "arms": found,
        }
        save(parsed.output, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
