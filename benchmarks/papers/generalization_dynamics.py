"""Figure of the generalisation-dynamics paper: test error against time and against width, theory and simulation.

``python -m benchmarks.papers.generalization_dynamics`` trains linear students over five seeds on one core (about a
minute), prints a table, draws ``generalization_dynamics.png`` and writes ``generalization_dynamics.json`` beside this
file. Nothing is downloaded.

Left, test error against training time for as many samples as half, all and twice the parameters. Right, against
parameters a sample, N/P, at the best time to stop and at time 50: the peak of overtraining at N = P, and on both sides
of it hardly any. The curves are the theory for large N, the points the mean and the bars the standard deviation over
seeds of students of 200 parameters. All widths share the teachers of the seeds, whose weights happen to be larger than
in the theory; the means are up to a tenth above it and at most 1.6 standard deviations away. Signal and noise are the
same at every width: a wider student faces a wider teacher.
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
from benchmarks.claims.generalization_dynamics import INR, SNR, path
from benchmarks.papers.command import Command, save
from lightning_recipes.core.linear_dynamics import (
    expected_test_error,
    marchenko_pastur,
    optimal_stopping_time,
)

SEEDS, N, RATE, END = 5, 200, 0.1, 50.0
CURVES = (0.5, 1.0, 2.0)
WIDTHS = (0.25, 0.5, 0.75, 1.0, 1.25, 2.0, 4.0)
"""Alpha, samples a parameter; those of CURVES among them."""
SHOWN = (0.0, 0.2, 0.6, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0)
RESULTS, PICTURE = Path(__file__).with_suffix(".json"), Path(__file__).with_suffix(".png")


def theory(alpha: float) -> dict[str, Any]:
    """The best time to stop, the error then and at the end, and the error at the times shown; for large N."""
    law = marchenko_pastur(alpha)
    star = optimal_stopping_time(law, SNR, INR)
    ends = expected_test_error(torch.tensor([star, END]), law, SNR, INR).tolist()
    course = expected_test_error(torch.tensor(SHOWN), law, SNR, INR).tolist()
    return {"t_star": star, "best": ends[0], "end": ends[1], "course": course}


def simulation(alpha: float, seeds: int) -> dict[str, Any]:
    """The same of trained students: each a list of one value a seed; the best is the least along the path."""
    paths = [path(seed, alpha, END, N, RATE) for seed in range(seeds)]
    return {
        "best": [min(each) for each in paths],
        "end": [each[-1] for each in paths],
        "course": [[each[round(t / RATE)] for each in paths] for t in SHOWN],
    }


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Theory and simulation as aligned text."""
    rows = [("alpha", "t*", "best, theory", "simulated", f"at {END:g}, theory", "simulated")]
    for alpha, found in results.items():
        expected, seen = found["theory"], found["simulation"]
        cells = [f"{mean(seen[name]):.3f} ± {deviation(seen[name]):.3f}" for name in ("best", "end")]
        star, best, end = (f"{expected[name]:.3f}" for name in ("t_star", "best", "end"))
        rows.append((alpha, star, best, cells[0], end, cells[1]))
    return "\n".join("  ".join(cell.rjust(15) for cell in row) for row in rows)


def draw(results: Mapping[str, Mapping[str, Any]], file: Path) -> Path | None:
    """Error against time and against width; None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    over_time, over_width = figure.subplots(1, 2)
    points = {"fmt": "o", "markersize": 4, "capsize": 3, "label": "simulation"}
    times = torch.cat([torch.zeros(1), torch.logspace(-1, 1.7, 100)])
    for number, alpha in enumerate(alpha for alpha in CURVES if f"{alpha:g}" in results):
        law, seen = marchenko_pastur(alpha), results[f"{alpha:g}"]["simulation"]["course"]
        color = f"C{number}"
        over_time.plot(times, expected_test_error(times, law, SNR, INR), color=color, label=f"alpha {alpha:g}, theory")
        middle, spread = [mean(each) for each in seen], [deviation(each) for each in seen]
        over_time.errorbar(SHOWN, middle, spread, **points, color=color)
    over_time.set_xscale("symlog", linthresh=1)
    over_time.xaxis.set_major_formatter("{x:g}")
    over_time.set(xlabel="time", ylabel="test error, in units of the label noise")
    alphas = torch.logspace(-0.7, 0.7, 61).tolist()
    curves = [theory(alpha) for alpha in alphas]
    for number, (name, label) in enumerate((("best", "at the best time"), ("end", f"at time {END:g}"))):
        color = f"C{number}"
        over_width.plot([1 / a for a in alphas], [c[name] for c in curves], color=color, label=f"{label}, theory")
        seen = {1 / float(alpha): found["simulation"][name] for alpha, found in results.items()}
        middle, spread = [mean(each) for each in seen.values()], [deviation(each) for each in seen.values()]
        over_width.errorbar(list(seen), middle, spread, **points, color=color)
    over_width.set_xscale("log")
    over_width.xaxis.set_major_formatter("{x:g}")
    over_width.set_xticks([1 / float(alpha) for alpha in results], minor=False)
    over_width.minorticks_off()
    over_width.set(xlabel="parameters a sample, N / P = 1 / alpha", ylabel="test error")
    for axes in (over_time, over_width):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"Linear student and teacher, SNR {SNR:g}, INR {INR:g}: mean and standard deviation over seeds")
    figure.savefig(file, dpi=120)
    return file


def main(args: Iterable[str] | None = None) -> int:
    parsed = Command(RESULTS, __doc__, seeds=SEEDS, picture=PICTURE).parse(args)
    began = time.time()
    results = {
        f"{alpha:g}": {"theory": theory(alpha), "simulation": simulation(alpha, parsed.seeds)}
        for alpha in tqdm(WIDTHS, "alpha", unit="width")
    }
    print(f"\n{table(results)}\n{parsed.seeds} seeds, mean ± sd; {time.time() - began:.0f} s", flush=True)
    found = {"seeds": parsed.seeds, "n": N, "times": SHOWN, "alpha": results}
    save(parsed.output, found, 4)
    drawn = draw(results, parsed.picture)
    print(f"wrote {parsed.output}" + ("" if drawn is None else f" and {drawn}"), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
