"""``make bench``: what recipes cost in time and memory, as ratios within one run of the benchmark.

A case is trained in up to five variants that take turns step by step (:mod:`benchmarks.turns`): a plain PyTorch loop,
the same loop with the method written by hand (:mod:`benchmarks.loops`), plain Lightning, Lightning with the recipe at
neutral, and with the recipe. Nothing is asserted; results are printed and written as JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import CASES, NETWORKS
from benchmarks.turns import Settings, block, peak

Times = Mapping[str, float]
"""Seconds by variant, of steps that ran close together."""

# name: (what it is, of such times, what the times must have)
FACTORS: dict[str, tuple[str, Callable[[Times], float], Sequence[str]]] = {
    "Lightning": (
        "plain Lightning over a plain PyTorch loop",
        lambda t: t["plain"] / t["plain loop"],
        ("plain loop",),
    ),
    "neutral": (
        "Lightning with the recipe at neutral over plain Lightning; target: at most 1.01",
        lambda t: t["neutral"] / t["plain"],
        ("neutral",),
    ),
    "recipe": ("Lightning with the recipe over plain Lightning", lambda t: t["recipe"] / t["plain"], ()),
    "by hand": (
        "the method in a plain loop over the plain loop",
        lambda t: t["loop with method"] / t["plain loop"],
        ("loop with method",),
    ),
    "recipe/by hand": (
        "the quotient of these two; target: at most 1.03",
        lambda t: t["recipe"] / t["plain"] / t["loop with method"] * t["plain loop"],
        ("loop with method",),
    ),
    "own ms": (
        "what the recipe takes beyond Lightning and the method: (recipe - plain) - (by hand - plain loop)",
        lambda t: 1e3 * (t["recipe"] - t["plain"] - t["loop with method"] + t["plain loop"]),
        ("loop with method",),
    ),
}


def variants(name: str) -> list[str]:
    """The variants that a case has."""
    case = CASES[name]
    by_hand = ["plain loop", "loop with method"] if case.loop is not None else []
    return [*by_hand, "plain", *(["neutral"] if case.neutral is not None else []), "recipe"]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range over blocks."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def paired(seconds: Mapping[str, Sequence[float]], of: Callable[[Times], float]) -> float:
    """The median over rounds of what each round gives: a slow moment is in both sides of its ratio."""
    return statistics.median(of(dict(zip(seconds, each))) for each in zip(*seconds.values()))


def speed(name: str, settings: Settings, blocks: int) -> dict[str, Any]:
    """Step times of a case in seconds, and its factors."""
    found = [block(name, variants(name), "steps", settings, seed)[0] for seed in range(blocks)]
    return {
        "case": name,
        "network": CASES[name].network,
        "precision": "bf16" if settings.bf16 else "fp32",
        "seconds": {v: spread([statistics.median(seconds[v]) for seconds in found]) for v in variants(name)},
        "factors": {
            factor: spread([paired(seconds, of) for seconds in found])
            for factor, (_, of, needs) in FACTORS.items()
            if set(needs) <= set(variants(name))
        },
    }


def memory(name: str, settings: Settings) -> dict[str, Any]:
    """Peak bytes of a case's variants."""
    measured = [v for v in variants(name) if v in ("plain", "recipe", "loop with method")]
    return {"case": name, "bytes": {variant: peak(name, variant, settings) for variant in measured}}


def checkpoint(name: str, settings: Settings, blocks: int) -> dict[str, Any]:
    """Seconds and bytes of a checkpoint in the middle of an epoch without and with the recipe."""
    found = [block(name, ["plain", "recipe"], "saves", settings, seed) for seed in range(blocks)]
    added = [paired(seconds, lambda t: t["recipe"] - t["plain"]) for seconds, _ in found]
    return {
        "case": name,
        "seconds": {v: spread([statistics.median(s[v]) for s, _ in found]) for v in ("plain", "recipe")},
        "added seconds": spread(added),
        "bytes": found[0][1],
    }


# -- tables ----------------------------------------------------------------------------------------------------------


def cell(found: Mapping[str, float] | None, digits: int = 3) -> str:
    """A median and half its range."""
    if found is None:
        return ""
    return f"{found['median']:.{digits}f} ±{(found['highest'] - found['lowest']) / 2:.{digits}f}"


# Tables: their columns with the widths of these.
SPEED = {"case": 27, "loop ms": 7, "plain ms": 8, "with ms": 7, **dict.fromkeys(FACTORS, 13)}
MEMORY = {"case": 27, "plain MiB": 9, "with MiB": 8, "by hand MiB": 11, "with/plain": 10}
CHECKPOINT = {"case": 27, "plain ms": 8, "adds ms": 13, "plain KiB": 9, "adds KiB": 8}


def speed_row(row: Mapping[str, Any]) -> list[str]:
    name = row["case"] + (", bf16" if row["precision"] == "bf16" else "")
    times = [row["seconds"].get(variant) for variant in ("plain loop", "plain", "recipe")]
    factors = [cell(row["factors"].get(f), 1 if f.endswith("ms") else 3) for f in FACTORS]
    return [name, *(f"{1e3 * t['median']:.1f}" if t else "" for t in times), *factors]


def memory_row(row: Mapping[str, Any]) -> list[str]:
    plain, recipe, by_hand = (row["bytes"].get(v) for v in ("plain", "recipe", "loop with method"))
    sizes = [f"{size / 2**20:.1f}" if size else "" for size in (plain, recipe, by_hand)]
    return [row["case"], *sizes, f"{recipe / plain:.3f}"]


def checkpoint_row(row: Mapping[str, Any]) -> list[str]:
    added = {key: 1e3 * value for key, value in row["added seconds"].items()}
    plain, recipe = row["bytes"]["plain"], row["bytes"]["recipe"]
    ms = f"{1e3 * row['seconds']['plain']['median']:.1f}"
    return [row["case"], ms, cell(added, 1), f"{plain / 1024:.0f}", f"{(recipe - plain) / 1024:.1f}"]


class Table:
    """Prints rows as they come, drawn in columns or as Markdown."""

    def __init__(self, columns: Mapping[str, int], markdown: bool) -> None:
        self.widths, self.markdown = [max(len(name), width) for name, width in columns.items()], markdown
        print()
        self.row(list(columns))
        print(self._line("-" * width for width in self.widths), flush=True)

    def row(self, cells: Sequence[str]) -> None:
        first, *others = cells
        padded = (text.rjust(width) for text, width in zip(others, self.widths[1:]))
        print(self._line([first.ljust(self.widths[0]), *padded]), flush=True)

    def _line(self, cells: Iterable[str]) -> str:
        return f"| {' | '.join(cells)} |" if self.markdown else "  ".join(cells)


# -- the command -----------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "lightning", "timm", "peft")},
        "networks": {name: " ".join(map(str, network)) for name, network in NETWORKS[device].items()},
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    cases = "; ".join(CASES).replace("%", "%%")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"cases whose name begins so, of: {cases}")
    parser.add_argument("--blocks", type=int, default=5, help="how often all is begun anew (%(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="timed steps a block and variant (%(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="batch size (%(default)s)")
    parser.add_argument("--json", type=Path, default=Path("bench.json"), help="where to write results (%(default)s)")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    options = parser.parse_args()
    chosen = [
        name for name in CASES if not options.names or name.lower().startswith(tuple(map(str.lower, options.names)))
    ]
    if not chosen:
        parser.error(f"no case begins with {' or '.join(options.names)}; there are {'; '.join(CASES)}")
    settings = Settings(batch=options.batch, steps=options.steps)
    precisions = [settings, replace(settings, bf16=True)] if torch.cuda.is_available() else [settings]
    results: dict[str, Any] = {**machine(), "batch": options.batch, "blocks": options.blocks, "steps": options.steps}
    print("\n".join(f"{key}: {value}" for key, value in results.items()))

    def measure(kind: str, columns: Mapping[str, int], names: Sequence[str], find: Any, show: Any) -> None:
        results[kind] = []
        table = Table(columns, options.markdown)
        for name in names:
            for row in find(name):
                results[kind].append(row)
                table.row(show(row))
                options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")

    measure("speed", SPEED, chosen, lambda n: (speed(n, s, options.blocks) for s in precisions), speed_row)
    print("\n".join(f"  {factor}: {what}" for factor, (what, *_) in FACTORS.items()))
    print("  ±: half the range over blocks")
    in_process = [name for name in chosen if not CASES[name].num_workers]  # workers' batches are in shared memory
    measure("memory", MEMORY, in_process, lambda n: [memory(n, settings)], memory_row)
    saving = [name for name in chosen if CASES[name].saves]
    if saving:
        measure("checkpoint", CHECKPOINT, saving, lambda n: [checkpoint(n, settings, options.blocks)], checkpoint_row)


if __name__ == "__main__":
    main()
