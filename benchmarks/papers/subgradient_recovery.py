"""Figures of the subgradient-recovery paper: error against the size of the first factors, and against the rank set.

``python -m benchmarks.papers.subgradient_recovery`` recovers every matrix over three seeds on one core (a minute),
prints a table, draws ``subgradient_recovery_scale.png`` and ``subgradient_recovery_rank.png`` and writes
``subgradient_recovery.json`` beside this file. Nothing is downloaded. X* is 20 x 20, of rank 3 and norm 1.73. The
steps are those of the recipe's own functions in a plain loop; its tests hold a fit with the callback against them, and
``configs/papers/subgradient_recovery.yaml`` is one of the points as such a fit.

    scale   600 measurements, 10 % of them with outliers of std 10, factors of 20 columns
    rank    1200 measurements, 30 % outliers, from factors of size 1e-6 (spectral) and of size 1

The spread is the smallest and largest of the seeds, of matrix, measurements and first factors.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.papers.command import Command, load, save
from lightning_recipes.callbacks.adapters.subgm import (
    decay_for,
    small_factor,
    spectral_init,
    subgradient,
    subgradient_step,
)
from lightning_recipes.core.diagnostics import draw_curves
from lightning_recipes.core.random import generator
from lightning_recipes.datamodules import MatrixSensingDataModule
from lightning_recipes.modules.low_rank_recovery import measure

SEEDS, STEPS, ETA = 3, 1200, 0.25
D, R = 20, 3
SCALES = (1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
RANKS = (3, 5, 10, 20)
OUTLIERS: Mapping[str, Any] = {"m": 1200, "outlier_prob": 0.3}
FIGURES: dict[str, dict[str, list[tuple[float, dict[str, Any]]]]] = {
    "scale": {
        "absolute errors": [(scale, {"init_scale": scale}) for scale in SCALES],
        "squared errors": [(scale, {"init_scale": scale, "squared": True}) for scale in (1.0, 1e-3, 1e-6)],
    },
    "rank": {
        "first factors of size 1e-6": [
            (rank, {"rank": rank, "init_scale": 1e-6, "spectral": True, **OUTLIERS}) for rank in RANKS
        ],
        "of size 1": [(rank, {"rank": rank, "init_scale": 1.0, **OUTLIERS}) for rank in RANKS],
    },
}
AXES = {"scale": "size of the first factors", "rank": "columns of the factors (the true rank is 3)"}
RESULTS = Path(__file__).with_suffix(".json")
Points = dict[str, list[float]]


def recover(
    seed: int,
    init_scale: float,
    rank: int = D,
    d: int = D,
    r: int = R,
    m: int = 600,
    outlier_prob: float = 0.1,
    spectral: bool = False,
    squared: bool = False,
    steps: int = STEPS,
) -> float:
    """||X - X*||_F after so many steps from factors of size `init_scale`.

    Args:
        seed: of the matrix, the measurements and the first factors.
        rank: columns of the factors.
        spectral: start along the mean sign of the measurements instead of at random.
        squared: step along the gradient of squared errors.
    """
    data = MatrixSensingDataModule(d, r, m, outlier_prob, seed=seed)
    data.setup()
    a, y = data.measurements
    if spectral:
        u = init_scale * spectral_init(a, y, rank)
    else:
        u = small_factor((d, rank), d, init_scale, generator(seed, "SubGM", 0, 0))
    rho = decay_for(init_scale, ETA)
    for t in range(steps):
        x = u @ u.T
        if squared:
            q = (a.flatten(1).T @ (measure(a, x) - y)).view_as(x) / m
            q = q + q.T
        else:
            q = subgradient(a, y, x)
        u = subgradient_step(u, q, ETA * rho**t)
    return torch.linalg.norm(u @ u.T - data.truth).item()


def points(figure: str, seeds: int) -> dict[str, Points]:
    """One figure over seeds.

    Returns:
        by curve: ``at``, and at each of these the ``median``, ``low`` and ``high`` of the error over seeds.
    """
    curves = FIGURES[figure]
    found: dict[str, Points] = {}
    with tqdm(total=seeds * sum(map(len, curves.values())), desc=figure, unit="run") as bar:
        for name, settings in curves.items():
            found[name] = {"at": [at for at, _ in settings], "median": [], "low": [], "high": []}
            for _, arguments in settings:
                errors = []
                for seed in range(seeds):
                    errors.append(recover(seed, **arguments))
                    bar.update()
                for key, value in (("median", median(errors)), ("low", min(errors)), ("high", max(errors))):
                    found[name][key].append(float(f"{value:.4g}"))
    return found


def table(figure: str, found: Mapping[str, Points], seeds: int) -> str:
    """One figure as aligned text."""
    rows = [(AXES[figure], "error", "smallest and largest", f"{figure}, {seeds} seeds, median")]
    for name, curve in found.items():
        for at, middle, low, high in zip(*(curve[key] for key in ("at", "median", "low", "high")), strict=True):
            rows.append((f"{at:g}", f"{middle:.2e}", f"{low:.2e} to {high:.2e}", name))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join("  ".join([*(cell.rjust(w) for cell, w in zip(row[:3], widths)), row[3]]) for row in rows)


def draw(figure: str, found: Mapping[str, Points], path: Path) -> Path | None:
    """Error on a log axis; None where matplotlib is not installed."""
    x = {name: [math.log10(at) if figure == "scale" else at for at in curve["at"]] for name, curve in found.items()}
    curves = {name: (x[name], curve["median"]) for name, curve in found.items()}
    bands = {name: (curve["low"], curve["high"]) for name, curve in found.items()}
    title = f"Robust matrix recovery: error against {'initialisation scale' if figure == 'scale' else 'rank set'}"
    xlabel = f"log10 of the {AXES[figure]}" if figure == "scale" else AXES[figure]
    return draw_curves(path, curves, title, xlabel, "||X - X*||_F", bands, log_y=True)


def main(args: Iterable[str] | None = None) -> int:
    parsed = Command(RESULTS, __doc__, seeds=SEEDS, names=FIGURES, noun="figure").parse(args)
    results = load(parsed.output)
    for name in parsed.names:
        began, found = time.time(), points(name, parsed.seeds)
        print(f"\n{table(name, found, parsed.seeds)}\n{time.time() - began:.0f} s", flush=True)
        results[name] = {"seeds": parsed.seeds, "curves": found}
        save(parsed.output, results)
        picture = parsed.output.with_name(f"{parsed.output.stem}_{name}.png")
        if draw(name, found, picture) is not None:
            print(f"wrote {parsed.output} and {picture}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
