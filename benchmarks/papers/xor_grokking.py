"""Figure of the XOR-grokking paper: accuracy against steps on a log axis, over seeds, from small and large weights.

``python -m benchmarks.papers.xor_grokking`` trains every arm over five seeds on one core (about three minutes),
prints a table, draws ``xor_grokking.png`` and writes ``xor_grokking.json`` beside this file. Nothing is downloaded.

    small   the paper's setting as the method card has it: fitted after one step at chance, right by step 10
    weak    the same with |mu|^2 = 200 instead of 400: the same course, to a lower end
    large   first weights that are not small against a step: fitted some hundred steps in, generalising over thousands

What is measured is what GrokkingMonitor sees; the spread is the standard deviation over seeds of data and weights.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from tqdm import tqdm

from benchmarks.claims.findings import deviation
from benchmarks.claims.xor_grokking import train
from benchmarks.papers.command import Command, load, save
from lightning_recipes.core.diagnostics import draw_curves

SEEDS = 5
ARMS: Mapping[str, Mapping[str, Any]] = {
    "small": {"steps": 30},
    "weak": {"steps": 30, "data": {"mu_norm": math.sqrt(200)}},
    "large": {
        "steps": 3000,
        "data": {"n": 100, "p": 2000, "mu_norm": math.sqrt(150), "eta": 0.1},
        "network": {"m": 64, "lr": 1e-3, "omega": 1e-2},
    },
}
SHOWN = {"train_acc": "train", "val_acc": "test", "noisy_fit": "flipped labels", "linear_share": "linear share"}
RESULTS, PICTURE = Path(__file__).with_suffix(".json"), Path(__file__).with_suffix(".png")
Curve = dict[str, list[float]]


def course(arm: str, seeds: int) -> tuple[dict[str, Any], list[str]]:
    """One arm over seeds.

    Returns:
        steps, by name of what was measured its mean and ``<name>_sd`` at each of them, and by seed the step at which it
        fitted and generalised (None for never); and what the monitor said at the end of every run.
    """
    watches = [train(seed, **ARMS[arm]) for seed in tqdm(range(seeds), arm, unit="seed")]
    found: dict[str, Any] = {"steps": watches[0].history.steps}
    for name in SHOWN:
        over_seeds = list(zip(*(watch.history.values[name] for watch in watches), strict=True))
        found[name] = [round(mean(values), 4) for values in over_seeds]
        found[f"{name}_sd"] = [round(deviation(values), 4) for values in over_seeds]
    found["fit_step"], found["gen_step"] = [w.fit_step for w in watches], [w.gen_step for w in watches]
    return found, [watch.verdict for watch in watches]


def table(arm: str, found: Mapping[str, Any], seeds: int) -> str:
    """One arm as aligned text."""
    rows = [("step", *SHOWN.values(), f"{arm}, {seeds} seeds, mean ± sd")]
    for i, step in enumerate(found["steps"]):
        rows.append((str(step), *(f"{found[name][i]:.3f} ± {found[f'{name}_sd'][i]:.3f}" for name in SHOWN), ""))
    return "\n".join("  ".join(cell.rjust(15 if column else 5) for column, cell in enumerate(row)) for row in rows)


def draw(results: Mapping[str, Mapping[str, Any]], path: Path) -> Path | None:
    """Training and test accuracy of all arms against steps; None where matplotlib is not installed."""
    curves: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
    bands: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
    for arm, found in results.items():
        for name in ("train_acc", "val_acc"):
            label = f"{arm}, {SHOWN[name]}"
            middle, spread = found[name], found[f"{name}_sd"]
            curves[label] = found["steps"], middle
            bands[label] = tuple([m + sign * s for m, s in zip(middle, spread)] for sign in (-1, 1))
    title = "XOR clusters: accuracy against steps, mean and standard deviation over seeds"
    return draw_curves(path, curves, title, "step of gradient descent", "accuracy", bands, log_x=True)


def main(args: Iterable[str] | None = None) -> int:
    parsed = Command(RESULTS, __doc__, seeds=SEEDS, names=ARMS, noun="arm", picture=PICTURE).parse(args)
    results = load(parsed.output)
    for name in parsed.names:
        began = time.time()
        found, verdicts = course(name, parsed.seeds)
        print(f"\n{table(name, found, parsed.seeds)}", *verdicts, f"{time.time() - began:.0f} s", sep="\n", flush=True)
        results[name] = {"seeds": parsed.seeds, **found}
        save(parsed.output, results)
    ordered = {name: results[name] for name in ARMS if name in results}
    if draw(ordered, parsed.picture) is not None:
        print(f"wrote {parsed.output} and {parsed.picture}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
