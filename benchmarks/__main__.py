"""``make bench``: what recipes cost in time and memory, as ratios within one run of the benchmark.

``python -m benchmarks [SUBJECT ...] [AXIS ...] [NAME ...]``. The subjects:

    steps    time of a step and peak memory, against the same method by hand and against plain training
    bytes    what two processes exchange in a step, against the least that they have to (:mod:`benchmarks.reduced`)
    imports  what importing the recipes adds to importing Lightning (:mod:`benchmarks.imports`)
    growth   along the axes recipes (attached), parameters, tensors and samples (:mod:`benchmarks.growth`)

Results are printed as they come, and written as JSON, as Markdown and as a picture (:mod:`benchmarks.report`).

For steps, a case is trained in up to five variants that take turns step by step (:mod:`benchmarks.turns`): a plain
PyTorch loop, the same loop with the method written by hand (:mod:`benchmarks.loops`), plain Lightning, Lightning with
the recipe at neutral, and with the recipe. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import growth, report
from benchmarks.cases import CASES
from benchmarks.grown import AXES, GROWS
from benchmarks.imports import imports
from benchmarks.machine import SAME, Progress, machine
from benchmarks.reduced import reduced
from benchmarks.report import cell, spread
from benchmarks.turns import Settings, block, peak

SUBJECTS = ("steps", "bytes", "imports", "growth")
MODES = {"fp32": {}, "bf16": {"bf16": True}, "compiled": {"bf16": True, "compiled": True}}
"""Settings of a run by name; compiled is in bf16 too, as one compiles on a GPU."""

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


def paired(seconds: Mapping[str, Sequence[float]], of: Callable[[Times], float]) -> float:
    """The median over rounds of what each round gives: a slow moment is in both sides of its ratio."""
    return statistics.median(of(dict(zip(seconds, each))) for each in zip(*seconds.values()))


def share(seconds: Mapping[str, Sequence[float]]) -> float:
    """Of the run's time that a monitor takes: in all turns together, since it does not measure in every one."""
    return 1 - sum(seconds["plain"]) / sum(seconds["recipe"])


def speed(name: str, settings: Settings, blocks: int, mode: str = "fp32") -> dict[str, Any]:
    """Step times of a case in seconds, and its factors."""
    found = [block(name, variants(name), "steps", settings, seed)[0] for seed in range(blocks)]
    shares = {"share": spread([share(seconds) for seconds in found])} if CASES[name].monitors else {}
    return {
        "case": name,
        "network": CASES[name].network,
        "precision": mode,
        "seconds": {v: spread([statistics.median(seconds[v]) for seconds in found]) for v in variants(name)},
        "factors": {
            factor: spread([paired(seconds, of) for seconds in found])
            for factor, (_, of, needs) in FACTORS.items()
            if set(needs) <= set(variants(name))
        }
        | shares,
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


# Tables: their columns with the widths of these.
SPEED = {"case": 37, "loop ms": 7, "plain ms": 8, "with ms": 7, **dict.fromkeys(FACTORS, 13), "share": 13}
MEMORY = {"case": 37, "plain MiB": 9, "with MiB": 8, "by hand MiB": 11, "with/plain": 10}
CHECKPOINT = {"case": 37, "plain ms": 8, "adds ms": 13, "plain KiB": 9, "adds KiB": 8}
BYTES = {"case": 37, "gradients KiB": 13, "others KiB": 10, "least KiB": 9, "sent/least": 10}
GROWTH = {"case": 27, "of": 10, "sizes": 28, "with/plain": 40, "slope plain": 11, "slope with": 10}


def speed_row(row: Mapping[str, Any]) -> list[str]:
    name = row["case"] + report.LABELS[row["precision"]]
    times = [row["seconds"].get(variant) for variant in ("plain loop", "plain", "recipe")]
    factors = [cell(row["factors"].get(f), 1 if f.endswith("ms") else 3) for f in FACTORS]
    times = [f"{1e3 * t['median']:.1f}" if t else "" for t in times]
    return [name, *times, *factors, cell(row["factors"].get("share"))]


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


def bytes_row(row: Mapping[str, Any]) -> list[str]:
    numbers = [f"{row[name] / 1024:.1f}" for name in ("gradients", "others", "least")]
    return [row["case"], *numbers, f"{row['ratio']:.4f}"]


def growth_row(row: Mapping[str, Any]) -> list[str]:
    sizes, ratios = (" ".join(each) for each in (map(report.size, row["sizes"]), map(cell, row["ratio"])))
    slopes = [report.figure(row["slopes"].get(label)) for label in ("plain", "with")]
    return [row["case"], row["axis"], sizes, ratios, *slopes]


# -- the command -----------------------------------------------------------------------------------------------------


@dataclass
class Part:
    """One row to be measured.

    Attributes:
        kind: of the results that it stands among.
        name: of the row.
        find: measures it.
        seconds: that this took on two cores, roughly.
        columns: of the table that it is printed in.
        show: its cells.
        mode: of a step time.
    """

    kind: str
    name: str
    find: Callable[[], dict[str, Any]]
    seconds: float
    columns: Mapping[str, int]
    show: Callable[[Mapping[str, Any]], list[str]]
    mode: str = ""


def steps_parts(chosen: Sequence[str], modes: Mapping[str, Settings], blocks: int) -> list[Part]:
    """Step times of all cases, then peak memory, then checkpoints."""

    def seconds(name: str, settings: Settings, many: int = blocks) -> float:
        turns = (settings.free + settings.steps + 1) * CASES[name].epochs
        each = 0.6 if CASES[name].turn == "epoch" else 0.08
        return many * len(variants(name)) * (1.5 + each * turns)

    first = next(iter(modes.values()))
    parts = [
        Part("speed", n, lambda n=n, m=m, s=s: speed(n, s, blocks, m), seconds(n, s), SPEED, speed_row, m)
        for n in chosen
        for m, s in modes.items()
    ]
    in_process = [name for name in chosen if not CASES[name].num_workers]  # workers' batches are in shared memory
    parts += [Part("memory", n, lambda n=n: memory(n, first), 8.0, MEMORY, memory_row) for n in in_process]
    saving = [name for name in chosen if CASES[name].saves]
    return parts + [
        Part("checkpoint", n, lambda n=n: checkpoint(n, first, blocks), seconds(n, first), CHECKPOINT, checkpoint_row)
        for n in saving
    ]


def bytes_parts(chosen: Sequence[str]) -> list[Part]:
    """What every case that trains sends."""
    training = [name for name in chosen if CASES[name].turn != "prediction"]
    return [Part("bytes", n, lambda n=n: reduced(n), 3.5, BYTES, bytes_row) for n in training]


def growth_parts(names: Sequence[str], axes: Sequence[str], settings: Settings, blocks: int, quick: bool) -> list[Part]:
    """Everything that grows, along these axes."""
    sizes = {axis: at[: len(at) - quick] for axis, at in AXES.items()}
    parts = []
    if not names and "recipes" in axes:
        find = lambda: growth.with_recipes(settings, blocks)  # noqa: E731
        parts.append(Part("growth", "recipes", find, blocks * 20.0, GROWTH, growth_row))
    for axis, each in (("parameters", 25.0), ("tensors", 8.0), ("samples", 12.0)):
        for name in [name for name in GROWS[axis] if axis in axes and begins(name, names)]:
            measure = growth.with_samples if axis == "samples" else growth.with_size

            def find(name: str = name, axis: str = axis, measure: Any = measure) -> dict[str, Any]:
                axes = () if axis == "samples" else (axis,)
                return measure(name, *axes, settings, blocks, sizes[axis])

            seconds = blocks * each * len(sizes[axis])
            parts.append(Part("growth", f"{name} ({axis})", find, seconds, GROWTH, growth_row))
    return parts


def begins(name: str, words: Sequence[str]) -> bool:
    """Whether a name begins with one of these words, or there are none."""
    return not words or name.lower().startswith(tuple(map(str.lower, words)))


def parser() -> argparse.ArgumentParser:
    """Of the command's options."""
    made = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    cases = "; ".join(CASES).replace("%", "%%")
    subjects = ", ".join(SUBJECTS)
    what = f"subjects, of {subjects}, all unless given or cases are; axes of the growth, of {', '.join(AXES)}, all"
    what += f" unless given; and cases whose name begins so, of: {cases}"
    made.add_argument("names", nargs="*", metavar="NAME", help=what)
    made.add_argument("--blocks", type=int, default=5, help="how often all is begun anew (%(default)s)")
    made.add_argument("--steps", type=int, default=20, help="timed steps a block and variant (%(default)s)")
    made.add_argument("--batch", type=int, default=32, help="batch size of steps (%(default)s)")
    made.add_argument(
        "--modes", nargs="+", choices=list(MODES), help="precisions of steps; fp32, and on a GPU all of them"
    )
    made.add_argument("--quick", action="store_true", help="growth without its largest size")
    made.add_argument("--add", action="store_true", help="keep what the file of results has, and measure what it lacks")
    made.add_argument(
        "--json",
        type=Path,
        default=Path("bench.json"),
        help="where to write results; the tables go beside it, as .md and .png (%(default)s)",
    )
    made.add_argument("--markdown", action="store_true", help="print Markdown tables")
    return made


def main() -> None:
    """Measure and print."""
    command = parser()
    options = command.parse_args()
    subjects = [name for name in SUBJECTS if name in options.names]
    axes = [name for name in options.names if name in AXES]
    names = [name for name in options.names if name not in (*SUBJECTS, *AXES)]
    subjects = subjects or (["growth"] if axes else ["steps"] if names else list(SUBJECTS))
    chosen = [name for name in CASES if begins(name, names)]
    grows = [name for some in GROWS.values() for name in some if begins(name, names)]
    if not chosen and not ("growth" in subjects and grows):
        command.error(f"no case begins with {' or '.join(names)}; there are {'; '.join(CASES)}")
    for option in ("blocks", "steps", "batch"):
        if getattr(options, option) < 1:
            command.error(f"--{option} must be at least 1; got {getattr(options, option)}")
    gpu = torch.cuda.is_available()
    settings = Settings(batch=options.batch, steps=options.steps)
    modes = {mode: replace(settings, **MODES[mode]) for mode in options.modes or (MODES if gpu else ("fp32",))}
    results: dict[str, Any] = {**machine(), "batch": options.batch, "blocks": options.blocks, "steps": options.steps}
    if options.add and options.json.is_file():
        before = json.loads(options.json.read_text(encoding="utf-8"))
        other = [name for name in SAME if before.get(name) != results[name]]
        if other:
            command.error(f"--add: {options.json} is of another machine ({', '.join(other)}); give another --json")
        results = before
        results.pop("failed", None)
    described = {key: value for key, value in results.items() if not isinstance(value, list) and key != "imports"}
    print("\n".join(f"{key}: {value}" for key, value in described.items()))
    if not gpu and "steps" in subjects and not options.modes:
        print("no GPU here: bf16 and compiled are not measured")
    kept = {report.key(kind, row) for kind in report.ROWS for row in results.get(kind, [])} if options.add else set()

    parts: list[Part] = []
    if "steps" in subjects:
        parts += steps_parts(chosen, modes, options.blocks)
    if "bytes" in subjects:
        parts += bytes_parts(chosen)
    if "growth" in subjects:
        parts += growth_parts(names, axes or list(AXES), settings, options.blocks, options.quick)
    measure_all(parts, results, kept, options, "imports" in subjects and not (options.add and "imports" in results))
    options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    for path in report.write(results, options.json):
        print(f"wrote {path}", file=sys.stderr)
    if results.get("failed"):
        failed = "; ".join(f"{each['case']}: {each['error']}" for each in results["failed"])
        sys.exit(f"not measured: {failed}")


def measure_all(
    parts: Sequence[Part], results: dict[str, Any], kept: set[Any], options: argparse.Namespace, with_imports: bool
) -> None:
    """Measure part by part into `results`, which are written after each; what fails does not end the rest."""

    def save() -> None:
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")

    todo = [part for part in parts if not any(_same(part, key) for key in kept)]
    expected = {f"{part.kind} {i}: {part.name}": part.seconds for i, part in enumerate(todo, 1)}
    progress = Progress({**({"imports": 60.0} if with_imports else {}), **expected})
    if with_imports:
        began = time.perf_counter()
        results["imports"] = found = imports(options.blocks)
        print(f"\nimport lightning: {cell(found['lightning'], 2)} s")
        print(f"import {found['package']} over it: {cell(found['added'], 2)} s; target: under {found['target']}")
        save()
        progress.done("imports", time.perf_counter() - began)
    table, kind = None, None
    for part, name in zip(todo, expected):
        if part.kind != kind:
            _explain(kind)
            kind, table = part.kind, Table(part.columns, options.markdown)
            results.setdefault(kind, [])
        began = time.perf_counter()
        try:
            row = part.find()
        except RuntimeError as error:
            results.setdefault("failed", []).append({"case": name, "error": str(error)})
        else:
            report.put(results, kind, row)
            table.row(part.show(row))
        save()
        progress.done(name, time.perf_counter() - began)
    _explain(kind)


def _same(part: Part, key: tuple[str, ...]) -> bool:
    """Whether a row that is there already is what a part would measure. A row says its case, precision and axis."""
    kind, case, precision, axis = key
    if kind != part.kind:
        return False
    if kind == "growth":
        return part.name == ("recipes" if axis == "recipes" else f"{case} ({axis})")
    return part.name == case and (kind != "speed" or precision == part.mode)


def _explain(kind: str | None) -> None:
    if kind == "speed":
        print("\n".join(f"  {factor}: {what}" for factor, (what, *_) in FACTORS.items()))
        print("  share: of the run's time that a monitor takes")
        print("  ±: half the range over blocks")


if __name__ == "__main__":
    main()
