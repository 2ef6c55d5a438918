"""SCoLe's curve: accuracy over all classes against 300 recurring tasks of two, on digits (or MNIST).

``python -m benchmarks.papers.scole`` trains every arm over its seeds on one core (some minutes), prints a table, draws
``scole_digits.png`` with the spread over seeds and writes ``scole.json`` beside this file.
``LIGHTNING_RECIPES_DATA=... python -m benchmarks.papers.scole mnist`` does so on a tenth of MNIST's training images and
all its test images, which takes several times as long. The network is an MLP with 256 hidden units; the dashed curve is
the same network trained on all classes at once for as many steps.

The paper's own plot has about 0.98 to 1.0 of a reference accuracy on MNIST after 200 to 500 tasks, from about 0.2 after
the first. Rates are those that were measured on digits when the method was first looked at; nothing was chosen here.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import SGD, Adam
from tqdm import tqdm

from benchmarks.claims.findings import deviation
from benchmarks.claims.streams import through
from benchmarks.claims.training import digits, seeded
from benchmarks.papers.command import Command, load, missing, save
from lightning_recipes.callbacks import GroupMask
from lightning_recipes.datamodules.splits import balanced_share

SETS = ("digits", "mnist")
TASKS, AFTER = 300, (1, 2, 5, 10, *range(20, 301, 10))
BATCH = {"digits": 32, "mnist": 64}
SEEDS = 3
ARMS: dict[str, dict[str, Any]] = {
    "GroupMask, SGD 0.1": {"lr": 0.1, "mask": True},
    "SGD 0.01": {"lr": 0.01},
    "Adam 0.001": {"lr": 1e-3, "adam": True},
    "GroupMask, SGD 0.1, momentum 0.9": {"lr": 0.1, "mask": True, "momentum": 0.9},
    "all classes at once, SGD 0.1": {"lr": 0.1, "scenario": "iid"},
}
REFERENCE = "all classes at once, SGD 0.1"
RESULTS = Path(__file__).with_suffix(".json")


@cache
def images(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images in [0, 1] and labels, then those that accuracy is measured on.

    Raises:
        FileNotFoundError: when LIGHTNING_RECIPES_DATA names no folder with them.
    """
    if name == "digits":
        x, y = digits()
        with seeded(0):
            train, test = torch.randperm(len(x)).split([1300, len(x) - 1300])
        return x[train], y[train], x[test], y[test]
    path = Path(os.environ.get("LIGHTNING_RECIPES_DATA", ""), f"{name}.npz")
    if not path.is_file():
        raise FileNotFoundError(f"set LIGHTNING_RECIPES_DATA to the folder with {name}.npz (looked for {path})")
    file = np.load(path)
    x, y, x_test, y_test = (torch.from_numpy(file[k]) for k in ("x_train", "y_train", "x_test", "y_test"))
    kept = torch.from_numpy(balanced_share(y, 0.1, 0))
    return x[kept, None].float() / 255, y[kept].long(), x_test[:, None].float() / 255, y_test.long()


def run(
    name: str,
    seed: int,
    lr: float,
    mask: bool = False,
    momentum: float = 0.0,
    adam: bool = False,
    scenario: str = "uniform",
    after: Sequence[int] = AFTER,
) -> list[float]:
    """Train through the stream; the accuracy over all classes after each number of tasks in `after`.

    With 'iid' a fifth of an epoch stands for a task of two of ten classes: the same steps on all classes.
    """
    x, y, x_test, y_test = images(name)
    optimizer = partial(Adam, lr=lr) if adam else partial(SGD, lr=lr, momentum=momentum)
    at = [max(1, round(n / 5)) for n in after] if scenario == "iid" else list(after)
    found, _ = through(
        (x, y),
        (x_test, y_test),
        at,
        seed,
        optimizer,
        [GroupMask()] if mask else [],
        BATCH[name],
        scenario=scenario,
        task_val_fraction=0.0,
    )
    share = y_test.bincount().double() / len(y_test)
    return [float(found[n] @ share) for n in at]


def summary(curves: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, dict[str, list[float]]]:
    """Mean and standard deviation over seeds by arm, one a number of tasks."""
    return {
        arm: {
            "mean": [round(mean(values), 4) for values in zip(*runs)],
            "sd": [round(deviation(values), 4) for values in zip(*runs)],
        }
        for arm, runs in curves.items()
    }


def table(name: str, found: Mapping[str, Mapping[str, Sequence[float]]], seeds: int, after: Sequence[int]) -> str:
    """Some moments of every curve as aligned text."""
    shown = [i for i, n in enumerate(after) if n in (1, 10, 50, 100, 200, after[-1])]
    rows = [
        (*(str(after[i]) for i in shown), f"tasks; {name}, {seeds} seeds, accuracy over all classes, mean ± sd in %")
    ]
    for arm, curve in found.items():
        rows.append((*(f"{100 * curve['mean'][i]:.1f} ± {100 * curve['sd'][i]:.1f}" for i in shown), arm))
    return "\n".join("  ".join([*(cell.rjust(12) for cell in row[:-1]), row[-1]]) for row in rows)


def draw(
    path: Path, name: str, found: Mapping[str, Mapping[str, Sequence[float]]], seeds: int, after: Sequence[int]
) -> None:
    """The curves with their spread; nothing where matplotlib (the `plots` extra) is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for arm, curve in found.items():
        middle, spread = np.array(curve["mean"]), np.array(curve["sd"])
        (line,) = axes.plot(after, middle, label=arm, linestyle="--" if arm == REFERENCE else "-")
        axes.fill_between(after, middle - spread, middle + spread, color=line.get_color(), alpha=0.2)
    axes.set(
        title=f"{name}: two of ten classes a task, {seeds} seeds (mean and standard deviation)",
        xlabel="recurring tasks",
        ylabel="accuracy over all classes",
        ylim=(0, 1),
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def main(args: Iterable[str] | None = None) -> int:
    """Returns 1 where the data are missing."""
    parsed = Command(RESULTS, __doc__, seeds=SEEDS, names=SETS, noun="set", chosen=SETS[:1]).parse(args)
    results = load(parsed.output)
    for name in parsed.names:
        began = time.time()
        curves: dict[str, list[list[float]]] = {arm: [] for arm in ARMS}
        try:
            images(name)
            for seed, arm in tqdm([(s, a) for s in range(parsed.seeds) for a in ARMS], name, unit="run"):
                curves[arm].append(run(name, seed, **ARMS[arm], after=AFTER))
        except FileNotFoundError as error:
            return missing(f"{name} left out", error)
        found = summary(curves)
        print(f"\n{table(name, found, parsed.seeds, AFTER)}\n{time.time() - began:.0f} s", flush=True)
        draw(parsed.output.with_name(f"{parsed.output.stem}_{name}.png"), name, found, parsed.seeds, AFTER)
        results[name] = {"seeds": parsed.seeds, "tasks": list(AFTER), "arms": found}
        save(parsed.output, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
