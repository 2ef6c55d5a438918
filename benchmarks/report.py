"""Results of the benchmark as Markdown and as a picture: ``python -m benchmarks.report bench.json [more.json ...]``.

Files of one machine are put together, later rows replacing earlier ones, so that a long run can be done in pieces.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import SAME

ROWS = ("speed", "memory", "checkpoint", "bytes", "growth")
"""Parts of the results that are rows, each with a 'case'."""
LABELS = {"fp32": "", "bf16": ", bf16", "compiled": ", compiled"}


@dataclass
class Section:
    """One table.

    Attributes:
        title: over it.
        columns: their names, the first one of the rows.
        rows: of as many texts.
        notes: what the columns mean.
        missed: (row, column) of figures that miss their target.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str]
    missed: frozenset[tuple[int, int]] = frozenset()


# -- results ---------------------------------------------------------------------------------------------------------


def key(part: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    """What a row is of: another one of the same replaces it."""
    return (part, *(str(row.get(name, "")) for name in ("case", "precision", "axis")))


def together(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Results of several runs on one machine as one.

    Raises:
        ValueError: they are of different machines.
    """
    first, *others = results
    whole = {**first, **{part: list(first[part]) for part in ROWS if part in first}}
    for other in others:
        for name in SAME:
            if other.get(name) != first.get(name):
                raise ValueError(
                    f"{name} is {first.get(name)!r} in one result and {other.get(name)!r} in another: figures of two"
                    " machines do not belong into one table; give them different files"
                )
        for part in ROWS:
            for row in other.get(part, []):
                put(whole, part, row)
        whole |= {name: value for name, value in other.items() if name == "imports"}
    return whole


def put(results: dict[str, Any], part: str, row: Mapping[str, Any]) -> None:
    """Add a row, or put it in the place of the one that is there."""
    rows = results.setdefault(part, [])
    places = [i for i, there in enumerate(rows) if key(part, there) == key(part, row)]
    if places:
        rows[places[0]] = row
    else:
        rows.append(row)


# -- texts -----------------------------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def cell(found: Mapping[str, float] | None, digits: int = 3) -> str:
    """A median and half its range."""
    if found is None:
        return ""
    return f"{found['median']:.{digits}f} ±{(found['highest'] - found['lowest']) / 2:.{digits}f}"


def size(value: float) -> str:
    """A number of things, as 10^6 where it is a power."""
    power = round(math.log10(value)) if value > 0 else 0
    return f"10^{power}" if power > 3 and value == 10**power else f"{value:g}"


def figure(value: float | None, digits: int = 2) -> str:
    """A number, or a dash for none."""
    return "-" if value is None else f"{value:.{digits}f}"


def sections(results: Mapping[str, Any]) -> list[Section]:
    """The tables of whatever there is."""
    made = [_speed(results), _memory(results), _checkpoint(results), _bytes(results), _imports(results)]
    return [section for section in (*made, *_growth(results)) if section is not None and section.rows]


def _speed(results: Mapping[str, Any]) -> Section | None:
    columns = ["a turn", "loop ms", "plain ms", "with ms", "neutral", "with/plain", "with/by hand", "share of run"]
    rows, missed = [], set()
    for i, row in enumerate(results.get("speed", [])):
        times = [row["seconds"].get(variant) for variant in ("plain loop", "plain", "recipe")]
        factors = row["factors"]
        share = f"{100 * factors['share']['median']:.0f} %" if "share" in factors else ""
        told = [f"{1e3 * t['median']:.1f}" if t else "" for t in times]
        told += [cell(factors.get(name)) for name in ("neutral", "recipe", "recipe/by hand")]
        rows.append([row["case"] + LABELS.get(row["precision"], ""), *told, share])
        for column, name, most in ((4, "neutral", 1.01), (6, "recipe/by hand", 1.03)):
            if name in factors and factors[name]["lowest"] > most:
                missed.add((i, column))
    notes = [
        "A turn is a training step, an epoch of 4 steps with its validation, or a batch predicted, as the name says.",
        "neutral: the recipe at the setting at which it does nothing, over plain Lightning; target at most 1.01.",
        "with/by hand: what the recipe costs over plain Lightning, over what the same method costs in a plain loop;"
        " target at most 1.03.",
        "share of run: of a monitor, in all of the turns' time.",
        "±: half the range over blocks. Marked where all blocks miss the target.",
    ]
    return Section("Step time", columns, rows, notes, frozenset(missed))


def _memory(results: Mapping[str, Any]) -> Section | None:
    rows = []
    for row in results.get("memory", []):
        plain, ours, by_hand = (row["bytes"].get(v) for v in ("plain", "recipe", "loop with method"))
        sizes = [f"{each / 2**20:.1f}" if each else "" for each in (plain, ours, by_hand)]
        rows.append([row["case"], *sizes, f"{ours / plain:.3f}", f"{ours / by_hand:.3f}" if by_hand else ""])
    columns = ["case", "plain MiB", "with MiB", "by hand MiB", "with/plain", "with/by hand"]
    return Section("Peak memory", columns, rows, ["All tensors at once, the weights among them."])


def _checkpoint(results: Mapping[str, Any]) -> Section | None:
    rows = []
    for row in results.get("checkpoint", []):
        added = {name: 1e3 * value for name, value in row["added seconds"].items()}
        plain, ours = row["bytes"]["plain"], row["bytes"]["recipe"]
        ms = f"{1e3 * row['seconds']['plain']['median']:.1f}"
        rows.append([row["case"], ms, cell(added, 1), f"{plain / 1024:.0f}", f"{(ours - plain) / 1024:.1f}"])
    return Section("A checkpoint", ["case", "plain ms", "adds ms", "plain KiB", "adds KiB"], rows, [])


def _bytes(results: Mapping[str, Any]) -> Section | None:
    rows, missed = [], set()
    for i, row in enumerate(results.get("bytes", [])):
        numbers = [f"{row[name] / 1024:,.1f}" for name in ("gradients", "others", "least")]
        rows.append([row["case"], *numbers, f"{row['ratio']:.4f}"])
        if row["ratio"] > 1.01:
            missed.add((i, 4))
    notes = [
        "Of one process, two over gloo. gradients: what DDP reduced; others: what the recipe sent itself.",
        "least: one gradient of every parameter that is trained in the step (two where a method needs two).",
    ]
    notes += [f"{row['case']} needs {row['sends']}." for row in results.get("bytes", []) if row.get("sends")]
    columns = ["case", "gradients KiB", "others KiB", "least KiB", "sent/least"]
    return Section("Bytes reduced in a step", columns, rows, notes, frozenset(missed))


def _imports(results: Mapping[str, Any]) -> Section | None:
    found = results.get("imports")
    if not found:
        return None
    costs = ", ".join(f"{name} {1e3 * seconds:.0f} ms" for name, seconds in found["by package"].items())
    rows = [
        ["import lightning", cell(found["lightning"], 2), cell(found["lightning, processor"], 2), ""],
        [
            f"import {found['package']}, over it",
            cell(found["added"], 2),
            cell(found["added, processor"], 2),
            f"under {found['target']}",
        ],
    ]
    missed = frozenset({(1, 1)} if found["added"]["median"] > found["target"] else ())
    notes = [f"Fresh interpreters, {found['repeats']} of them. Where the time goes: {costs}."]
    return Section("Import", ["import", "seconds", "of the processor", "target"], rows, notes, missed)


def _growth(results: Mapping[str, Any]) -> list[Section]:
    made = []
    for axis in ("recipes", "parameters", "tensors", "samples"):
        found = [row for row in results.get("growth", []) if row["axis"] == axis]
        if not found:
            continue
        sizes = sorted({n for row in found for n in row["sizes"]})
        columns = [axis, *(f"at {size(n)}" for n in sizes)]
        rows = []
        for row in found:
            ratios = {n: cell(ratio) for n, ratio in zip(row["sizes"], row["ratio"])}
            rows.append([row["case"], *(ratios.get(n, "left out") for n in sizes)])
        notes = ["A step with the recipe over one without, at every size."]
        if axis == "recipes":
            added = [f"{size(n)}: {ms['median']:.2f} ms" for n, ms in zip(found[0]["sizes"], found[0]["added ms"])]
            notes = ["A step with so many recipes at neutral over one without. Added: " + ", ".join(added) + "."]
        else:
            columns += ["slope plain", "slope with"]
            for told, row in zip(rows, found):
                told += [figure(row["slopes"].get(label)) for label in ("plain", "with")]
            notes.append("slope: of log(seconds) over log(size).")
        if axis == "parameters":
            columns += [f"peak at {size(n)}" for n in sizes]
            for told, row in zip(rows, found):
                peaks = {n: b / a for n, a, b in zip(row["sizes"], row["peak plain"], row["peak recipe"])}
                told += [figure(peaks.get(n), 3) for n in sizes]
            notes.append("peak: the most bytes of all tensors with the recipe over those without.")
        if axis == "tensors":
            columns += ["calls of plain", "calls added", "added a tensor"]
            for told, row in zip(rows, found):
                told += [f"{row[name][-1]:.0f}" for name in ("plain calls", "added calls")]
                told.append(figure(last_rise(row["sizes"], row["added calls"]), 1))
            notes.append(
                "calls: function calls in a step, Python's and those into C, at the largest size; a tensor: how"
            )
            notes[-1] += " many more with every parameter tensor, between the two largest sizes."
        if axis == "samples":
            columns += ["held B", "saved B", "before s", "slope", "after s", "slope"]
            for told, row in zip(rows, found):
                told += _per_sample(row)
            notes.append(
                "held: bytes of tensors after the last step, saved: bytes in a checkpoint, both a sample at the largest"
                " size; before, after: seconds that it adds there before the first step and after the last one."
            )
        made.append(Section(f"Growth with {axis}", columns, rows, notes))
    return made


def last_rise(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """How much a value rises with every one more, between the two largest sizes; None for fewer than two."""
    if len(sizes) < 2:
        return None
    return (values[-1] - values[-2]) / (sizes[-1] - sizes[-2])


def _per_sample(row: Mapping[str, Any]) -> list[str]:
    added, slopes, most = row["added"], row["slopes"], row["sizes"][-1]
    told = [f"{added[name][-1] / most:.1f}" for name in ("held", "checkpoint")]
    for name in ("before", "after"):
        told += [f"{added[name][-1]:.2f}", figure(slopes.get(name))]
    return told


def heading(results: Mapping[str, Any]) -> list[str]:
    """The machine, in two lines."""
    first = [f"{results.get('cpu', '?')}, {results.get('cores', '?')} cores, {results.get('ram', '?')}"]
    first += [f"GPU {results['device']}"] if results.get("device", "cpu") != "cpu" else ["no GPU here"]
    first += [f"{results.get('threads', '?')} threads, load {results.get('load', '?')} at the start"]
    second = [f"Python {results.get('python')}"] + [f"{name} {results.get(name)}" for name in ("torch", "lightning")]
    second += [f"{name} {results[name]}" for name in ("blocks", "steps", "batch") if name in results]
    second += ["one block, so ± is not known"] if results.get("blocks") == 1 else []
    return ["; ".join(first), "; ".join(second)]


# -- outputs ---------------------------------------------------------------------------------------------------------


def markdown(results: Mapping[str, Any]) -> str:
    """All tables with the machine's description; figures that miss their target in bold."""
    lines = ["# What recipes cost", "", *(f"{line}  " for line in heading(results))]
    for section in sections(results):
        lines += ["", f"## {section.title}", "", _line(section.columns)]
        lines.append(_line(["---", *["---:"] * (len(section.columns) - 1)]))
        for i, row in enumerate(section.rows):
            lines.append(_line([f"**{text}**" if (i, j) in section.missed else text for j, text in enumerate(row)]))
        lines += ["", *(f"{note}  " for note in section.notes)]
    for failed in results.get("failed", []):
        lines += ["", f"Not measured: {failed['case']}: {failed['error']}"]
    return "\n".join(lines).rstrip() + "\n"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def draw(results: Mapping[str, Any], path: Path) -> Path | None:
    """The same tables as one picture, PNG or SVG by the path's ending; None where matplotlib (the `plots` extra) is not
    installed. Figures that miss their target are shaded."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    parts = sections(results)
    line, width, small = 0.2, 15.0, 8  # inches, inches, points
    heights = [len(part.rows) + len(part.notes) + 3 for part in parts]
    total = sum(heights) + 4
    figure = Figure(figsize=(width, line * total))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 1), ylim=(total, 0))
    axes.axis("off")
    axes.text(0.01, 1.2, "What recipes cost", fontsize=14, weight="bold", va="center")
    for i, text in enumerate(heading(results)):
        axes.text(0.01, 2.2 + 0.8 * i, text, fontsize=small, color="0.35", va="center")
    y = 4.2
    for part in parts:
        axes.text(0.01, y, part.title, fontsize=11, weight="bold", va="center")
        first = 0.26
        step = (0.985 - first) / (len(part.columns) - 1)
        places = [0.01, *(first + step * (j + 1) for j in range(len(part.columns) - 1))]
        y += 1.1
        for j, (x, text) in enumerate(zip(places, part.columns)):
            axes.text(x, y, text, fontsize=small, weight="bold", ha="right" if j else "left", va="center")
        axes.axhline(y + 0.5, 0.01, 0.985, color="0.2", linewidth=0.8)
        for i, row in enumerate(part.rows):
            y += 1
            if i % 2:
                axes.axhspan(y - 0.5, y + 0.5, 0.01, 0.985, color="0.96", zorder=0)
            for j, (x, text) in enumerate(zip(places, row)):
                shade = {"facecolor": "#f6c7b6", "edgecolor": "none", "pad": 1.5} if (i, j) in part.missed else None
                axes.text(x, y, text, fontsize=small, ha="right" if j else "left", va="center", bbox=shade)
        for note in part.notes:
            y += 0.9
            axes.text(0.01, y, note, fontsize=small - 1, color="0.35", va="center")
        y += 2
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def write(results: Mapping[str, Any], json_path: Path) -> list[Path]:
    """Write a result's tables beside its JSON, as ``.md`` and ``.png``; the files written."""
    page = json_path.with_suffix(".md")
    page.write_text(markdown(results), encoding="utf-8")
    drawn = draw(results, json_path.with_suffix(".png"))
    return [page] if drawn is None else [page, drawn]


def main() -> None:
    """Put results together, and write and print their tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path, help="JSON files of `python -m benchmarks`")
    parser.add_argument("--out", type=Path, default=Path("bench.json"), help="what to write all into (%(default)s)")
    options = parser.parse_args()
    try:
        whole = together([json.loads(path.read_text(encoding="utf-8")) for path in options.results])
    except (OSError, ValueError) as error:
        parser.error(str(error))
    options.out.write_text(json.dumps(whole, indent=1), encoding="utf-8")
    write(whole, options.out)
    print(markdown(whole), end="")


if __name__ == "__main__":
    main()
