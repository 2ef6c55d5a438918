"""Figure of the paper on overparameterisation: test error of random features against width and against samples.

``python -m benchmarks.papers.overparameterization`` solves ridge regression on Gaussian random features over ten seeds
on one core (a quarter of a minute), prints a table, draws ``overparameterization.png`` and writes
``overparameterization.json`` beside this file. Nothing is downloaded.

Left, against the width with 256 samples; right, against samples with 256 features; at the best ridge and at the
smallest. The curves are the eigenframework's prediction, the points the mean and the bars the standard deviation over
seeds of simulations with 1,000 test points. At the best ridge more is always better; at the smallest the error peaks
where features are as many as samples. The paper's figure is of 10,000 modes and 45 trials; here 2,000 and ten.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.claims.findings import deviation
from benchmarks.claims.overparameterization import MODES, NOISE, RIDGES, gaussian
from benchmarks.papers.command import Command, save
from lightning_recipes.core.ridge_theory import rf_risk

SEEDS, FIXED = 10, 256
SIZES = (16, 32, 64, 128, 256, 512, 1024)
RESULTS, PICTURE = Path(__file__).with_suffix(".json"), Path(__file__).with_suffix(".png")
KINDS = {"width": "features, with 256 samples", "samples": "samples, with 256 features"}


def theory(n: float, k: float) -> dict[str, float]:
    """Test error at the best ridge and at the smallest."""
    i = torch.arange(1, MODES + 1, dtype=torch.float64)
    tests = rf_risk(i**-1.5, i**-0.75, n, k, RIDGES, NOISE).test
    return {"best": float(tests.min()), "smallest": float(tests[0])}


def simulation(n: int, k: int, seeds: int) -> dict[str, list[float]]:
    """The same measured; one value a seed. The best ridge is that of least mean over seeds, so that no seed chooses."""
    tests = torch.tensor([gaussian(seed, n, k, RIDGES)[0] for seed in range(seeds)])
    return {"best": tests[:, int(tests.mean(0).argmin())].tolist(), "smallest": tests[:, 0].tolist()}


def at(kind: str, size: float) -> tuple[Any, Any]:
    """Samples and features."""
    return (FIXED, size) if kind == "width" else (size, FIXED)


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Theory and simulation as aligned text."""
    rows = [("", "", "best, theory", "simulated", "smallest, theory", "simulated")]
    for kind, sizes in results.items():
        for size, found in sizes.items():
            cells = []
            for name in ("best", "smallest"):
                seen = found["simulation"][name]
                cells += [f"{found['theory'][name]:.3f}", f"{mean(seen):.3f} ± {deviation(seen):.3f}"]
            rows.append((kind, size, *cells))
    return "\n".join("  ".join(cell.rjust(16) for cell in row) for row in rows)


def draw(results: Mapping[str, Mapping[str, Any]], file: Path) -> Path | None:
    """Error against width and against samples; None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, (kind, sizes) in zip(figure.subplots(1, 2, sharey=True), results.items()):
        low, high = min(map(float, sizes)), max(map(float, sizes))
        grid = torch.logspace(torch.tensor(low).log10(), torch.tensor(high).log10(), 61).tolist()
        curves = [theory(*at(kind, size)) for size in grid]
        for number, (name, label) in enumerate((("best", "best ridge"), ("smallest", f"ridge {float(RIDGES[0]):g}"))):
            axes.plot(grid, [curve[name] for curve in curves], color=f"C{number}", label=f"{label}, theory")
            seen = [found["simulation"][name] for found in sizes.values()]
            middle, spread = [mean(each) for each in seen], [deviation(each) for each in seen]
            style = {"fmt": "o", "markersize": 4, "capsize": 3, "color": f"C{number}", "label": "simulation"}
            axes.errorbar([float(size) for size in sizes], middle, spread, **style)
        axes.set(xlabel=KINDS[kind], xscale="log", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend()
        axes.set_ylabel("test error")
    figure.suptitle("Ridge regression on random features: mean and standard deviation over seeds")
    figure.savefig(file, dpi=120)
    return file


def main(args: Iterable[str] | None = None) -> int:
    parsed = Command(RESULTS, __doc__, seeds=SEEDS, picture=PICTURE).parse(args)
    began = time.time()
    results: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
    for kind, size in tqdm([(kind, size) for kind in KINDS for size in SIZES], unit="size"):
        place = at(kind, size)
        results[kind][str(size)] = {"theory": theory(*place), "simulation": simulation(*place, parsed.seeds)}
    print(f"\n{table(results)}\n{parsed.seeds} seeds, mean ± sd; {time.time() - began:.0f} s", flush=True)
    found = {"seeds": parsed.seeds, "modes": MODES, "noise": NOISE, **results}
    save(parsed.output, found, 4)
    drawn = draw(results, parsed.picture)
    print(f"wrote {parsed.output}" + ("" if drawn is None else f" and {drawn}"), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
