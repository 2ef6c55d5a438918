"""``make bench``: what a recipe costs, as ratios to the same training without it, measured in one run.

Every recipe and its baseline take turns, block by block, so that a slow moment of the machine hits both. Nothing is
asserted; results are printed and written as JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_recipes.callbacks import AAER, GLAD, PEGO, ProgressiveUnfreezing
from lightning_recipes.modules import ImageClassifier

VIT = {"img_size": 32, "patch_size": 4, "embed_dim": 192, "depth": 6, "num_heads": 3}
CASES: dict[str, tuple[str, Callable[[], list[pl.Callback]]]] = {
    "AAER, neutral": ("resnet18", lambda: [AAER(0.0)]),
    "AAER": ("resnet18", lambda: [AAER()]),
    "ProgressiveUnfreezing, neutral": (
        "resnet18",
        lambda: [ProgressiveUnfreezing(["head", "*layer*", "*conv1*", "*bn1*"], (0, 0, 0, 0), 1.0)],
    ),
    "ProgressiveUnfreezing, head only": ("resnet18", lambda: [ProgressiveUnfreezing(at=(0,), lr_scale=1.0)]),
    "ProgressiveUnfreezing, all awake": ("resnet18", lambda: [ProgressiveUnfreezing(at=(0,) * 6, lr_scale=0.5)]),
    "PEGO": ("vit", lambda: [PEGO()]),
    "GLAD": ("vit", lambda: [GLAD()]),
    "GLAD, mix 0 (plain LoRA)": ("vit", lambda: [GLAD(mix=0.0)]),
}


class Clock(pl.Callback):
    """Seconds of every training step after the first few."""

    def __init__(self, skip: int) -> None:
        self.skip, self.seconds = skip, []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        _wait(pl_module.device)
        self.start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        _wait(pl_module.device)
        if index >= self.skip:
            self.seconds.append(time.perf_counter() - self.start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_a_step(network: str, callbacks: list[pl.Callback], steps: int, batch: int) -> float:
    """Median step time of one block of steps, in seconds."""
    torch.manual_seed(0)
    module = (
        ImageClassifier("resnet18")
        if network == "resnet18"
        else ImageClassifier("vit_tiny_patch16_224", model_args=VIT)
    )
    data = TensorDataset(torch.rand(batch * (steps + 3), 3, 32, 32), torch.randint(10, (batch * (steps + 3),)))
    clock = Clock(skip=3)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    pl.Trainer(max_epochs=1, callbacks=[*callbacks, clock], devices=1, **quiet).fit(module, DataLoader(data, batch))
    return statistics.median(clock.seconds)


def measure(name: str, blocks: int, steps: int, batch: int) -> dict[str, Any]:
    """One case against its baseline: the median over blocks of the ratio of step times."""
    network, recipes = CASES[name]
    pairs = [
        (seconds_a_step(network, [], steps, batch), seconds_a_step(network, recipes(), steps, batch))
        for _ in range(blocks)
    ]
    ratios = sorted(with_recipe / plain for plain, with_recipe in pairs)
    return {
        "recipe": name,
        "network": network,
        "plain_ms": 1e3 * statistics.median(plain for plain, _ in pairs),
        "with_ms": 1e3 * statistics.median(with_recipe for _, with_recipe in pairs),
        "ratio": statistics.median(ratios),
        "lowest": ratios[0],
        "highest": ratios[-1],
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="only cases whose name contains one of these")
    parser.add_argument("--blocks", type=int, default=5, help="how often each pair is measured")
    parser.add_argument("--steps", type=int, default=10, help="timed steps a block")
    parser.add_argument("--batch", type=int, default=32, help="batch size")
    parser.add_argument("--json", type=Path, default=Path("bench.json"), help="where to write the results")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    chosen = [name for name in CASES if not options.names or any(n.lower() in name.lower() for n in options.names)]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, batch {options.batch}\n")
    print(f"{'recipe':<34} {'network':<10} {'plain ms':>9} {'with ms':>9} {'ratio':>6}   lowest to highest")
    results = []
    for name in chosen:
        row = measure(name, options.blocks, options.steps, options.batch)
        results.append(row)
        print(
            f"{name:<34} {row['network']:<10} {row['plain_ms']:9.1f} {row['with_ms']:9.1f} {row['ratio']:6.2f}"
            f"   {row['lowest']:.2f} to {row['highest']:.2f}",
            flush=True,
        )
    options.json.write_text(json.dumps({"device": device, "torch": torch.__version__, "results": results}, indent=1))


if __name__ == "__main__":
    main()
