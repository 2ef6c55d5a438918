"""The quickstart: three stock modules, each trained without and with a recipe, on real data that is already there.

``python -m lightning_recipes.quickstart`` (``make quickstart``) trains on scikit-learn's digits, prints what every
recipe changed and what it cost, and draws it. Nothing is downloaded; every number comes from the run.
"""

from __future__ import annotations

import argparse
import copy
import logging
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from tqdm import tqdm

from lightning_recipes.callbacks import AAER, PEGO, ProgressiveUnfreezing, RobustAccuracyMonitor
from lightning_recipes.core.attacks import RobustAccuracy
from lightning_recipes.datamodules import DigitsDataModule, RotatedDigitsDataModule
from lightning_recipes.modules import ImageClassifier

EPSILON = 0.3
VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 64, "depth": 2, "num_heads": 4}


@dataclass
class Line:
    """One row of the table: a quantity without and with the recipe."""

    task: str
    quantity: str
    without: float
    with_recipe: float
    cost: str = ""


class Progress(pl.Callback):
    """One bar over all runs, in epochs."""

    def __init__(self, bar: tqdm, what: str) -> None:
        self.bar, self.what = bar, what

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.bar.set_description(self.what)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.bar.update()


class Curve(pl.Callback):
    """A validation metric by epoch."""

    def __init__(self, name: str) -> None:
        self.name, self.values = name, []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.values.append(float(trainer.callback_metrics[self.name]))


class Quickstart:
    """Runs the three comparisons and keeps their figures.

    Args:
        quick: a tenth of the epochs, to see that everything works.
    """

    def __init__(self, quick: bool = False) -> None:
        epochs = {"adversarial": 30, "pretrain": 8, "transfer": 15, "domains": 25, "adapt": 10}
        self.epochs = {name: max(1, n // 10) if quick else n for name, n in epochs.items()}
        total = 2 * (self.epochs["adversarial"] + self.epochs["transfer"] + self.epochs["adapt"])
        self.bar = tqdm(
            total=total + self.epochs["pretrain"] + self.epochs["domains"], unit="epoch", dynamic_ncols=True
        )
        self.lines: list[Line] = []
        self.curves: dict[str, dict[str, list[float]]] = {}

    def fit(
        self,
        what: str,
        module: pl.LightningModule,
        data: pl.LightningDataModule,
        epochs: int,
        callbacks: Sequence[pl.Callback] = (),
        **trainer: Any,
    ) -> float:
        """Train; the seconds that a training epoch took."""
        pl.seed_everything(0, verbose=False)
        start = time.perf_counter()
        quiet = {
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        fit = pl.Trainer(
            max_epochs=epochs, accelerator="cpu", callbacks=[*callbacks, Progress(self.bar, what)], **quiet, **trainer
        )
        fit.fit(module, data)
        return (time.perf_counter() - start) / epochs

    def robustness(self) -> None:
        """Single-step adversarial training, without and with the regulariser that keeps it from collapsing."""
        curves: dict[str, list[float]] = {}
        results, seconds = {}, {}
        for name, lambda1 in (("plain single-step training", 0.0), ("AAER", 1.0)):
            pl.seed_everything(0, verbose=False)
            epochs = self.epochs["adversarial"]
            module = ImageClassifier(_narrow_net(), **_cyclic(0.2, epochs * 36))
            data = DigitsDataModule(size=16, batch_size=32)
            curve = Curve("robust_accuracy/pgd-10-1")
            monitor = RobustAccuracyMonitor("pgd", EPSILON, steps=10, restarts=1, limit_batches=4)
            recipe = AAER(EPSILON, lambda1=lambda1, lambda3=2.0)  # the paper raises lambda3 with epsilon
            seconds[name] = self.fit(f"robustness: {name}", module, data, epochs, [recipe, monitor, curve])
            curves[name] = curve.values
            results[name] = _accuracies(module.eval(), data)
        (clean, robust), (clean_with, robust_with) = results.values()
        cost = f"step time x {seconds['AAER'] / seconds['plain single-step training']:.2f}"
        self.lines += [
            Line("AAER", f"accuracy under PGD-20, eps {EPSILON}", robust, robust_with, cost),
            Line("", "clean accuracy", clean, clean_with),
        ]
        self.curves["accuracy under attack"] = curves

    def transfer(self) -> None:
        """From upright digits to 60 turned ones at a high rate: all at once, or head first and deeper layers slower."""
        upright = RotatedDigitsDataModule((0,), (45,))
        start = ImageClassifier("small_cnn", in_chans=1, optimizer=_adamw(3e-3))
        self.fit("transfer: pre-training", start, upright, self.epochs["pretrain"])
        turned = RotatedDigitsDataModule((45,), (0,), per_domain=8, fraction=0.08)
        epochs, results, curves, seconds = self.epochs["transfer"], {}, {}, {}
        unfreeze = ProgressiveUnfreezing(at=(0, 0.1, 0.3, 0.6), lr_scale=(1, 0.5, 0.25, 0.1))
        for name, recipes in (("full fine-tuning", []), ("ProgressiveUnfreezing", [unfreeze])):
            module = ImageClassifier(copy.deepcopy(start.net), in_chans=1, optimizer=_adamw(3e-3))
            curve = Curve("val/acc")
            seconds[name] = self.fit(f"transfer: {name}", module, turned, epochs, [*recipes, curve])
            results[name] = _accuracy(module, turned.val_dataloader()), _accuracy(module, upright.val_dataloader())
            curves[name] = curve.values
        (new, kept), (new_with, kept_with) = results.values()
        cost = f"step time x {seconds['ProgressiveUnfreezing'] / seconds['full fine-tuning']:.2f}"
        self.lines += [
            Line("ProgressiveUnfreezing", "accuracy on the new task (turned by 45)", new, new_with, cost),
            Line("", "accuracy kept on the old task (upright)", kept, kept_with),
        ]
        self.curves["transfer: validation accuracy"] = curves

    def domains(self) -> None:
        """A small transformer trained on upright digits, then on turned ones: all of it, or by orthogonal adapters."""
        upright = RotatedDigitsDataModule((0, 15), (75,))
        start = ImageClassifier("vit_tiny_patch16_224", in_chans=1, model_args=VIT, optimizer=_adamw(3e-3))
        self.fit("domains: pre-training", start, upright, self.epochs["domains"])
        turned = RotatedDigitsDataModule((30, 45), (60,))
        results, sizes = {}, {}
        for name, recipes in (("full fine-tuning", []), ("PEGO", [PEGO(rank=4, groups=2, weight=1e-4)])):
            module = copy.deepcopy(start)
            trained = _Trainable()
            self.fit(f"domains: {name}", module, turned, self.epochs["adapt"], [*recipes, trained])
            sizes[name] = trained.share
            results[name] = _accuracy(module, upright.val_dataloader()), _accuracy(module, turned.test_dataloader())
        (source, unseen), (source_with, unseen_with) = results.values()
        cost = f"{sizes['PEGO']:.0%} of the weights train"
        self.lines += [
            Line("PEGO", "accuracy kept on the first domains (0, 15)", source, source_with, cost),
            Line("", "accuracy on an unseen domain (60)", unseen, unseen_with),
        ]

    def run(self) -> None:
        """All three, one after the other."""
        for part in (self.robustness, self.transfer, self.domains):
            part()
        self.bar.set_description("done")
        self.bar.close()

    def table(self) -> str:
        """What every recipe changed, as text."""
        header = f"{'recipe':<22} {'quantity':<42} {'without':>8} {'with':>8} {'change':>8}  cost"
        rows = [
            f"{line.task:<22} {line.quantity:<42} {line.without:8.1%} {line.with_recipe:8.1%}"
            f" {100 * (line.with_recipe - line.without):+8.1f}  {line.cost}"
            for line in self.lines
        ]
        return "\n".join([header, "-" * len(header), *rows])

    def draw(self, path: Path) -> Path | None:
        """The curves and the table's figures in one picture; None without matplotlib."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return None
        figure = Figure(figsize=(13, 4), layout="constrained")
        *left, right = figure.subplots(1, 3)
        for axes, (title, curves) in zip(left, self.curves.items(), strict=True):
            for name, values in curves.items():
                axes.plot(range(1, len(values) + 1), values, marker="o", markersize=3, label=name)
            axes.set(title=title, xlabel="epoch", ylim=(0, 1))
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
        places = range(len(self.lines))
        right.barh([p + 0.2 for p in places], [line.without for line in self.lines], 0.38, label="without", color="0.7")
        right.barh([p - 0.2 for p in places], [line.with_recipe for line in self.lines], 0.38, label="with recipe")
        right.set_yticks(list(places), [line.quantity for line in self.lines], fontsize=7)
        right.set(title="without and with", xlim=(0, 1))
        right.invert_yaxis()
        right.legend(fontsize=8)
        figure.savefig(path, dpi=120)
        return path


def _narrow_net() -> nn.Module:
    """A net narrow enough that single-step adversarial training collapses on it."""
    layers: list[nn.Module] = []
    for width_in, width, stride in ((1, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1)):
        layers += [nn.Conv2d(width_in, width, 3, stride, 1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10))


class _Trainable(pl.Callback):
    """The share of the module's weights that trains."""

    share = 1.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        sizes = [(p.numel(), p.requires_grad) for p in pl_module.parameters()]
        self.share = sum(n for n, trains in sizes if trains) / sum(n for n, _ in sizes)


def _adamw(lr: float) -> Any:
    return lambda parameters: torch.optim.AdamW(parameters, lr=lr)


def _cyclic(lr: float, steps: int) -> dict[str, Any]:
    """The schedule of single-step adversarial training: up to the rate at half of all steps, and down again."""
    return {
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=5e-4),
        "lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.CyclicLR(optimizer, 0, lr, steps // 2),
        "lr_interval": "step",
    }


@torch.no_grad()
def _accuracy(module: nn.Module, loaders: Any) -> float:
    module.eval()
    hits = [module(x).argmax(1) == y for loader in _listed(loaders) for x, y in loader]
    return torch.cat(hits).float().mean().item()


def _accuracies(module: nn.Module, data: pl.LightningDataModule) -> tuple[float, float]:
    """Clean accuracy, and that under PGD-20, on the test data."""
    from functools import partial

    from lightning_recipes.core.attacks import pgd

    generator = torch.Generator().manual_seed(0)
    robust = RobustAccuracy(partial(pgd, epsilon=EPSILON, steps=20, restarts=1, generator=generator))
    for x, y in data.test_dataloader():
        robust.update(module, x, y)
    return _accuracy(module, data.test_dataloader()), robust.compute().item()


def _listed(loaders: Any) -> list[Any]:
    return loaders if isinstance(loaders, list) else [loaders]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the quickstart from the command line."""
    parser = argparse.ArgumentParser(prog="python -m lightning_recipes.quickstart", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the epochs, to see that everything works")
    parser.add_argument("--picture", type=Path, default=Path("quickstart.png"), help="where to draw")
    options = parser.parse_args(arguments)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    print("Three stock modules on scikit-learn's digits, each trained without and with a recipe.\n")
    start = time.perf_counter()
    quickstart = Quickstart(options.quick)
    quickstart.run()
    print(f"\n{quickstart.table()}\n")
    print(f"One run each, seed 0, {time.perf_counter() - start:.0f} seconds; one run shows no spread.")
    picture = quickstart.draw(options.picture)
    print(f"Picture: {picture}" if picture else "No picture: matplotlib is not installed (the `plots` extra)")
    print(
        "\nNext:\n"
        "  lightning-recipes list                      what there is\n"
        "  lightning-recipes show AAER                 what it does, costs and takes\n"
        "  lightning-recipes fit --config base/digits_cnn.yaml --config recipes/aaer.yaml\n"
        "  Trainer(callbacks=[AAER(epsilon=8/255)])    in your own script; your module stays as it is\n"
        "(the command is in .venv/bin)"
    )


if __name__ == "__main__":
    main()
