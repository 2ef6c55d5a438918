"""The mixture experiment of Bayes-error unlearnable examples, on a subset of CIFAR-10.

``LIGHTNING_RECIPES_DATA=... python -m benchmarks.papers.unlearnable`` protects the training images within 8/255, trains
a classifier on the clean half of a draw, on the mixture, on the protected half and on both halves clean, and prints one
table. On a GPU (some 3 minutes) it is CIFAR's ResNet-18 on 10,000 images, 20 steps with a new surrogate every 5, and
``unlearnable.json`` beside this file is written; on a CPU (some minutes) an 8-layer ResNet on 1,000. The paper has
all 50,000 images and up to 2,000 steps, each with a new surrogate: 91.16 % on the clean half, 69.68 % on the mixture.

All else is the paper's: SGD 0.1 with momentum 0.9 and weight decay 5e-4, batches of 128, a cosine over 30 epochs,
no augmentation and no normalisation, the clean test images; a CPU has batches of 32 and 15 epochs.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import lightning.pytorch as pl
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR

from benchmarks.claims.findings import deviation
from benchmarks.claims.training import seeded
from lightning_recipes.datamodules import ArrayDataModule, UnlearnableDataModule
from lightning_recipes.modules import ImageClassifier

PAPER = {"clean_only": 0.9116, "mix": 0.6968}
RATIO = 0.5
ALL = 10_000
"""Training images of the subset."""
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "clean_only": ("the clean half alone", {"mode": "clean_only"}),
    "mix": ("the mixture: that and the other half protected", {"mode": "mix"}),
    "protected_only": ("the protected half alone", {"mode": "protected_only"}),
    "both_clean": ("both halves clean", {"mode": "mix", "ratio": 0.0}),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "cuda": {
        "images": 10_000,
        "epochs": 30,
        "net": "cifar_resnet18",
        "net_args": {},
        "steps": 20,
        "retrain_every": 5,
        "lr": 4e-3,
        "surrogate_epochs": 30,
        "batch": 128,
    },
    "cpu": {
        "images": 1_000,
        "epochs": 15,
        "net": "cifar_resnet",
        "net_args": {"depth": 8},
        "steps": 4,
        "retrain_every": 2,
        "lr": 0.01,
        "surrogate_epochs": 15,
        "batch": 32,
    },
}
RESULTS = Path(__file__).with_suffix(".json")


def data(settings: Mapping[str, Any], seed: int, device: str, cache: str, **mixture: Any) -> UnlearnableDataModule:
    """One arm's images.

    Raises:
        FileNotFoundError: when LIGHTNING_RECIPES_DATA names no folder with them.
    """
    path = Path(os.environ.get("LIGHTNING_RECIPES_DATA", ""), "cifar10_subset.npz")
    if not path.is_file():
        raise FileNotFoundError(f"set LIGHTNING_RECIPES_DATA to the folder with cifar10_subset.npz (looked for {path})")
    images = ArrayDataModule(str(path), val_fraction=0.0, fraction=settings["images"] / ALL)
    return UnlearnableDataModule(
        images,
        settings["net"],
        settings["net_args"],
        steps=settings["steps"],
        retrain_every=settings["retrain_every"],
        lr=settings["lr"],
        surrogate_epochs=settings["surrogate_epochs"],
        surrogate_bf16=device == "cuda",
        cache_dir=cache,
        device=device,
        surrogate_batch_size=settings["batch"],
        batch_size=settings["batch"],
        seed=123 + seed,
        **{"ratio": RATIO, **mixture},
    )


def accuracy(arm: UnlearnableDataModule, settings: Mapping[str, Any], seed: int, device: str) -> float:
    """Train the paper's way on one arm's images, and measure on the clean test images."""
    torch.manual_seed(seed)  # the same first weights for all
    module = ImageClassifier(
        settings["net"],
        model_args=settings["net_args"],
        optimizer=partial(SGD, lr=0.1, momentum=0.9, weight_decay=5e-4),
        lr_scheduler=partial(CosineAnnealingLR, T_max=settings["epochs"]),
    )
    if device == "cuda":
        module = module.to(memory_format=torch.channels_last)
    trainer = pl.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed" if device == "cuda" else "32-true",
        max_epochs=settings["epochs"],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(module, arm)
    return trainer.test(module, arm, verbose=False)[0]["test/acc"]


def run(settings: Mapping[str, Any], seed: int, device: str, cache: str) -> dict[str, Any]:
    """All arms from one set of protected images: the test accuracy of each, and the build's ``curve``."""
    found: dict[str, Any] = {}
    with seeded(seed):
        for name, (_, mixture) in ARMS.items():
            arm = data(settings, seed, device, cache, **mixture)
            found[name] = accuracy(arm, settings, seed, device)
            if arm.curve:
                found["curve"] = arm.curve
    return found


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over seeds: of every arm's accuracy, and of the estimates before and after."""
    values = {name: [each[name] for each in runs] for name in ARMS}
    curves = [each["curve"] for each in runs]
    values["bayes_error_before"] = [curve["bayes_error"][0] for curve in curves]
    values["bayes_error_after"] = [
        max(e for e, fresh in list(zip(curve["bayes_error"], curve["fresh"]))[1:] if fresh) for curve in curves
    ]
    return {name: {"mean": round(mean(over), 4), "sd": round(deviation(over), 4)} for name, over in values.items()}


def table(found: Mapping[str, Mapping[str, float]], heading: str) -> str:
    """The arms as aligned text."""
    rows = [("accuracy", "the paper", heading)]
    for name, (words, _) in ARMS.items():
        paper = f"{100 * PAPER[name]:.2f}" if name in PAPER else ""
        rows.append((f"{100 * found[name]['mean']:.2f} ± {100 * found[name]['sd']:.2f}", paper, words))
    for when in ("before", "after"):
        value = found[f"bayes_error_{when}"]
        rows.append((f"{value['mean']:.3f} ± {value['sd']:.3f}", "", f"estimated Bayes error {when} the ascent"))
    return "\n".join("  ".join([row[0].rjust(14), row[1].rjust(9), row[2]]) for row in rows)


def main(args: Iterable[str] | None = None) -> int:
    """Returns 1 where the data are missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.papers.unlearnable", description=__doc__)
    parser.add_argument("--device", choices=["auto", *SETTINGS], default="auto", help="default: a GPU if there is one")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="default: %(default)s")
    for name in ("images", "steps", "retrain_every", "epochs", "surrogate_epochs"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help="default: the device's")
    parser.add_argument("--lr", type=float, metavar="X", help="of the ascent; default: the device's")
    parser.add_argument("--cache", metavar="FOLDER", help="keep the protected images here, and go on from them")
    parser.add_argument("--output", type=Path, metavar="FILE", help=f"default: {RESULTS.name} on a GPU, else none")
    parsed = parser.parse_args(args)
    if parsed.seeds < 1:
        parser.error(f"--seeds must be at least 1; got {parsed.seeds}")
    device = parsed.device if parsed.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    given = {name: getattr(parsed, name) for name in SETTINGS[device] if getattr(parsed, name, None) is not None}
    settings = {**SETTINGS[device], **given}
    if not 20 <= settings["images"] <= ALL:
        parser.error(f"--images must be from 20 to {ALL}; got {settings['images']}")

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module=r"lightning\.")  # advice for real runs
    began, runs = time.time(), []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for seed in range(parsed.seeds):
                runs.append(run(settings, seed, device, parsed.cache or folder))
        except FileNotFoundError as error:
            print(error, file=sys.stderr)
            return 1
    found = summary(runs)
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    heading = (
        f"{settings['net']}, {settings['images']} images of CIFAR-10, {where}, {parsed.seeds} seeds, mean ± sd in %"
    )
    print(f"\n{table(found, heading)}\n{time.time() - began:.0f} s", flush=True)
    output = parsed.output or (RESULTS if device == "cuda" else None)
    if output is not None:
        facts = {"device": where, "seeds": parsed.seeds, "ratio": RATIO, **settings, "paper": PAPER, "found": found}
        text = json.dumps({**facts, "curves": [each["curve"] for each in runs]}, indent=2)
        output.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
