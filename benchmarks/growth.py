"""How the time of a step and what is held grow: with recipes attached, parameters, parameter tensors, and samples.

Along each axis (:mod:`benchmarks.grown`) runs with and without a recipe take turns at every size. What grows is told by
the slope of a straight line through the logarithms: 0 stays, 1 is proportional; and by the ratio of the two at every
size, which is what a user notices.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import psutil

from benchmarks.grown import AXES
from benchmarks.report import spread
from benchmarks.turns import Settings, calls, holds, peak, side_by_side

BATCH = {"recipes": 32, "parameters": 8, "tensors": 8, "samples": 32}
COPIES = 14  # of all weights that two runs hold at most: gradients, AdamW's moments, what a recipe keeps


def slope(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """Of the least-squares line through (log size, log value); None for fewer than two positive values."""
    pairs = [(math.log(n), math.log(value)) for n, value in zip(sizes, values) if value > 0]
    if len({x for x, _ in pairs}) < 2:
        return None
    line = statistics.linear_regression([x for x, _ in pairs], [y for _, y in pairs])
    return line.slope


def paired(
    those: Mapping[str, tuple[str, str]], settings: Settings, blocks: int
) -> tuple[dict[str, float], dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Runs in turns, the first of them the baseline.

    Returns:
        seconds of a step, the median; ratios to the baseline, and milliseconds over it, with their range over blocks.
    """
    first, *others = those
    found = [side_by_side(those, "steps", settings, seed)[0] for seed in range(blocks)]
    seconds = {label: statistics.median(statistics.median(each[label]) for each in found) for label in those}

    def over(label: str, of: Callable[[float, float], float]) -> dict[str, float]:
        return spread([statistics.median(map(of, each[label], each[first])) for each in found])

    ratios = {label: over(label, lambda a, b: a / b) for label in others}
    return seconds, ratios, {label: over(label, lambda a, b: 1e3 * (a - b)) for label in others}


def with_recipes(settings: Settings, blocks: int, sizes: Sequence[int] = AXES["recipes"]) -> dict[str, Any]:
    """So many recipes at neutral on one network, all beside a run without any."""
    settings = replace(settings, batch=BATCH["recipes"])
    those = {"plain": ("nothing", "plain"), **{str(n): (f"neutral @ recipes {n}", "recipe") for n in sizes}}
    seconds, ratios, added = paired(those, settings, blocks)
    return {
        "case": "recipes at neutral",
        "axis": "recipes",
        "sizes": list(sizes),
        "plain": [seconds["plain"]] * len(sizes),
        "with": [seconds[str(n)] for n in sizes],
        "ratio": [ratios[str(n)] for n in sizes],
        "added ms": [added[str(n)] for n in sizes],
        "slopes": {"with": slope(sizes, [seconds[str(n)] for n in sizes])},
    }


def with_size(what: str, axis: str, settings: Settings, blocks: int, sizes: Sequence[int]) -> dict[str, Any]:
    """A step of one recipe and of plain training at every size. Sizes that memory does not hold are left out.

    Along the parameters it measures peak memory too, along the tensors it counts function calls: neither depends on how
    busy the machine is.
    """
    settings = replace(settings, batch=BATCH[axis])
    row: dict[str, Any] = {
        "case": what,
        "axis": axis,
        "sizes": [],
        "plain": [],
        "with": [],
        "ratio": [],
        "added ms": [],
    }
    for n in sizes:
        if axis == "parameters" and psutil.virtual_memory().available < 4 * n * COPIES:
            continue
        name = f"{what} @ {axis} {n}"
        seconds, ratios, added = paired({"plain": (name, "plain"), "with": (name, "recipe")}, settings, blocks)
        row["sizes"].append(n)
        for label in ("plain", "with"):
            row[label].append(seconds[label])
        row["ratio"].append(ratios["with"])
        row["added ms"].append(added["with"])
        if axis == "parameters":
            for variant in ("plain", "recipe"):
                row.setdefault(f"peak {variant}", []).append(peak(name, variant, settings))
        if axis == "tensors":
            plain, ours = (calls(name, variant, replace(settings, steps=5)) for variant in ("plain", "recipe"))
            row.setdefault("plain calls", []).append(plain)
            row.setdefault("added calls", []).append(ours - plain)
    row["slopes"] = {label: slope(row["sizes"], row.get(label, [])) for label in ("plain", "with", "added calls")}
    return row


def with_samples(what: str, settings: Settings, blocks: int, sizes: Sequence[int]) -> dict[str, Any]:
    """As :func:`with_size`, and what is held for every sample, written into a checkpoint, and taken before the first
    step and after the last one; all of it what the recipe adds."""
    row = with_size(what, "samples", settings, blocks, sizes)
    added: dict[str, list[float]] = {name: [] for name in ("held", "checkpoint", "before", "after")}
    for n in row["sizes"]:
        name = f"{what} @ samples {n}"
        found = {variant: [holds(name, variant, settings) for _ in range(blocks)] for variant in ("plain", "recipe")}
        for key, values in added.items():
            plain, ours = (statistics.median(each[key] for each in found[v]) for v in ("plain", "recipe"))
            values.append(ours - plain)
    row["added"] = added
    row["slopes"] |= {name: slope(row["sizes"], values) for name, values in added.items()}
    return row
