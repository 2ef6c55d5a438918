"""What a comparison came to: one HTML file that needs nothing else, the same as Markdown, and the raw results.

:func:`collect` reads the results that are there and does the sums; everything else only shows them. It may be called
while runs are still under way.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from lightning_recipes.compare import charts
from lightning_recipes.compare.engines import failure, result
from lightning_recipes.compare.plan import BASE, Plan
from lightning_recipes.compare.statistics import (
    Difference,
    Estimate,
    corrected,
    difference,
    estimate,
    ratio,
    seeds_needed,
)
from lightning_recipes.core.artefacts import Content, write_text, written_whole
from lightning_recipes.core.errors import RecipeError

SHARED = (
    "Runs shared their machine, with one another (--jobs above 1, several commands) or with other programs: step times"
    " and fit times are noisy."
)
Values = dict[int, float]
"""By seed."""


@dataclass
class Row:
    """One arm in the report.

    Attributes:
        name, laid: of the arm, and the configs it is made of.
        values: the metric after the fit, by seed; finite ones.
        mean: of them.
        difference: from the base; None for the base, and where there is nothing to compare.
        step, fit, memory: ratios to the base: of a training step, of the whole fit, of peak memory.
        trainable, parameters: the most that trained, and all.
        failed: (seed, what happened, last lines) of runs that failed.
        missing: seeds that have not been run.
        order: 'same' data order as the base on every seed, 'other', or '' where it is not known.
        words: what to make of it.
        verdict: 'base', 'better', 'worse', 'noise' or 'none'.
    """

    name: str
    laid: str
    values: Values = field(default_factory=dict)
    mean: Estimate | None = None
    difference: Difference | None = None
    step: Estimate | None = None
    fit: Estimate | None = None
    memory: Estimate | None = None
    trainable: int = 0
    parameters: int = 0
    failed: list[tuple[int, str, list[str]]] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)
    order: str = ""
    words: str = ""
    verdict: str = "none"


@dataclass
class Report:
    """Everything that is shown.

    Attributes:
        plan: what was to be run.
        rows: the base first.
        curves: by arm, the metric over the training steps; empty where it is only known at the end.
        curve_of: name of what the curves show.
        done: runs that have a result.
        notes: what to know of how it was measured.
        machines: in words.
    """

    plan: Plan
    rows: list[Row]
    curves: dict[str, charts.Curve]
    curve_of: str
    done: int
    notes: list[str]
    machines: list[str]

    @property
    def headline(self) -> str:
        """The whole in a sentence or two."""
        arms = self.rows[1:]
        counts = {each: sum(row.verdict == each for row in arms) for each in ("better", "worse", "noise", "none")}
        recipes = "1 recipe" if len(arms) == 1 else f"{len(arms)} recipes"
        told = (
            f"{counts['better']} better than the base, {counts['worse']} worse, {counts['noise']} not told from noise"
        )
        parts = [f"Of {recipes}: {told}" + (f", {counts['none']} without a comparison" if counts["none"] else "") + "."]
        if len(self.plan.seeds) == 1:
            parts.append("One seed shows no spread: no difference here can be told from noise. Give --seeds 5 or more.")
        failed, missing = (sum(len(getattr(row, name)) for row in self.rows) for name in ("failed", "missing"))
        if failed:
            parts.append(f"{failed} of {len(self.plan.runs)} runs failed.")
        if missing:
            parts.append(f"{missing} of {len(self.plan.runs)} runs are still to be done.")
        return " ".join(parts)


# -- the sums --------------------------------------------------------------------------------------------------------


def check_metric(plan: Plan, found: Content) -> None:
    """Look for the metric in what a run of the base logged.

    Raises:
        RecipeError: names what was logged.
    """
    if plan.metric not in found["metrics"]:
        names = ", ".join(sorted(found["metrics"])) or "nothing"
        told = "".join(f"; {note}" for note in found["notes"])
        raise RecipeError(
            f"metric {plan.metric!r} is not logged; the base logs {names}{told}. The run is kept: give one of these as"
            " --metric, and nothing is run twice"
        )


def collect(plan: Plan) -> Report:
    """Read what is there and do the sums."""
    found = {arm.name: {run.seed: result(run) for run in plan.of(arm.name)} for arm in plan.arms}
    there = {name: {s: each for s, each in seeds.items() if each is not None} for name, seeds in found.items()}
    base = there[BASE]
    rows = []
    for arm in plan.arms:
        row = Row(arm.name, arm.laid)
        for run in plan.of(arm.name):
            _take(row, run.seed, there[arm.name].get(run.seed), failure(run), plan.metric)
        results = there[arm.name]
        row.mean = estimate(list(row.values.values())) if row.values else None
        row.trainable = max((each["trainable"] for each in results.values()), default=0)
        row.parameters = max((each["parameters"] for each in results.values()), default=0)
        row.order = _order(base, results)
        for name, key in (("step", "step_seconds"), ("fit", "fit_seconds"), ("memory", "peak_memory")):
            values = [{s: each[key] for s, each in of.items()} for of in (base, results)]
            setattr(row, name, ratio(*values))
        rows.append(row)
    differences = corrected([difference(rows[0].values, row.values) for row in rows[1:]])
    for row, each in zip(rows[1:], differences, strict=True):
        row.difference = each
    comparisons = sum(each is not None and each.p is not None for each in differences)
    for row in rows:
        row.verdict, row.words = _words(row, plan.mode, comparisons)
    results = [each for seeds in there.values() for each in seeds.values()]
    curves, of = _curves(plan, there)
    return Report(plan, rows, curves, of, len(results), _notes(plan, rows, there), _machines(results))


def _take(row: Row, seed: int, found: Content | None, failed: Mapping[str, Any] | None, metric: str) -> None:
    """Put a run into its row: its value, or what became of it."""
    if found is None and failed is None:
        row.missing.append(seed)
    elif found is None:
        row.failed.append((seed, failed["what"], list(failed["lines"])))
    elif metric not in found["metrics"]:
        logged = ", ".join(sorted(found["metrics"])) or "nothing"
        row.failed.append((seed, f"it did not log {metric}", [f"it logged {logged}", *found["notes"]]))
    elif not math.isfinite(found["metrics"][metric]):
        row.failed.append((seed, f"{metric} ended at {found['metrics'][metric]}: the training diverged", []))
    else:
        row.values[seed] = found["metrics"][metric]


def _order(base: Mapping[int, Content], results: Mapping[int, Content]) -> str:
    """Whether runs handed out the same samples in the same order, as far as both recorded it."""
    seen = ""
    for seed in base:
        if seed not in results:
            continue
        for one, other in zip(base[seed]["order"], results[seed]["order"]):
            both = min(len(one), len(other))
            if one[:both] != other[:both]:
                return "other"
            seen = "same" if both else seen
    return seen


def _words(row: Row, mode: str, comparisons: int) -> tuple[str, str]:
    """The verdict on a row, and what to make of it in words."""
    if row.name == BASE:
        return "base", "What the others are compared with." if row.values else "No run of the base gave a value."
    if row.difference is None:
        if row.failed and not row.values:
            return "none", "Every run that was tried failed; see below."
        return "none", "Not run yet." if not row.values else "No seed on which the base gave a value too."
    found, each = row.difference.estimate, row.difference
    if found.n == 1:
        return "noise", f"{signed(found.mean)} on the one seed that there is: nothing can be told from one."
    if each.p is None and found.mean == 0:
        return "noise", "The same value as the base on every seed: nothing that this metric sees."
    if each.p is None:
        says = f"{signed(found.mean)} on each of {found.n} seeds: without a spread the t-test has nothing to go by."
        return "noise", says
    size = f"{signed(found.mean)} (95 % {signed(found.low)} to {signed(found.high)})"
    p = _p_words(each.p_corrected)
    if comparisons > 1:
        p += f" after correction for {comparisons} comparisons"
    if each.told:
        better = (found.mean > 0) == (mode == "max")
        return ("better", f"Better than the base: {size}, {p}.") if better else ("worse", f"Worse: {size}, {p}.")
    alone = f" ({_p_words(each.p)} without it)" if each.p < 0.05 else ""
    needed = seeds_needed(found)
    more = f" Some {needed} seeds would tell a true difference of this size." if needed else ""
    return "noise", f"Can't be told from noise: {size}, {p}{alone}.{more}"


def _curves(plan: Plan, there: Mapping[str, Mapping[int, Content]]) -> tuple[dict[str, charts.Curve], str]:
    """The metric by measurement; of a test metric, which is known at the end only, its namesake in validation."""
    names = [plan.metric, plan.metric.replace("test", "val", 1), plan.metric.replace("test", "valid", 1)]
    for name in dict.fromkeys(names):
        curves = {}
        for arm, results in there.items():
            runs = [[point for point in each["curve"] if name in point] for each in results.values()]
            longest = max(map(len, runs), default=0)
            if longest < (1 if arm == BASE else 2):
                continue
            kind = "of-base" if arm == BASE else "of-one"
            at = [[run[i] for run in runs if i < len(run)] for i in _thinned(longest)]
            values = [[point[name] for point in points if math.isfinite(point[name])] for points in at]
            kept = [(points, found) for points, found in zip(at, values) if found]
            curves[arm] = charts.Curve(
                [sum(point["step"] for point in points) / len(points) for points, _ in kept],
                [sum(found) / len(found) for _, found in kept],
                [min(found) for _, found in kept],
                [max(found) for _, found in kept],
                kind,
            )
        if any(len(curve.x) > 1 for curve in curves.values()):
            return curves, name
    return {}, ""


def _thinned(count: int, most: int = 120) -> list[int]:
    """At most so many places of so many, the last among them."""
    return sorted({round(i * (count - 1) / (min(count, most) - 1 or 1)) for i in range(min(count, most))})


def _notes(plan: Plan, rows: Sequence[Row], there: Mapping[str, Mapping[int, Content]]) -> list[str]:
    results = [each for seeds in there.values() for each in seeds.values()]
    direction = "larger" if plan.mode == "max" else "smaller"
    budget = f"{plan.budget.words} a run" if plan.budget else "as long as the base config says"
    notes = [
        f"{plan.metric} after the last step, {direction} is better; seeds {', '.join(map(str, plan.seeds))};"
        f" trained {budget}.",
        "Base and recipes ran on the same seeds and, as far as a recipe does not choose the samples itself, on the same"
        " data in the same order. Differences are paired by seed: mean, Student's 95 % interval, p of the paired t-test"
        " after Holm's correction.",
        "Ratios are geometric means over seeds, with the lowest and the highest. Step time is from the end of one"
        " batch to that of the next, with data, hooks and logging; a fit's time includes its validations.",
    ]
    if results and all(each["machine"]["device"] == "cpu" for each in results):
        before = sorted(each["memory_before"] for each in results)[len(results) // 2] / 2**20
        notes.append(f"Memory is that of the whole process, of which {before:.0f} MiB were there before training.")
    elif results:
        notes.append("Memory is what PyTorch had allocated on the GPU at most.")
    if len({each["machine"]["host"] for each in results} | {each["machine"]["device"] for each in results}) > 2:
        notes.append("The runs were on several machines: of times and memory only large differences mean anything.")
    if _shared(results):
        notes.append(SHARED)
    other = [row.name for row in rows if row.order == "other"]
    if other:
        notes.append(f"Other samples, or another order, than the base by their own doing: {', '.join(other)}.")
    return notes


def _shared(results: Sequence[Content]) -> bool:
    """Whether runs went on at once on one machine, or most of them beside more programs than it has cores."""
    spans: dict[str, list[tuple[float, float]]] = {}
    for each in results:
        if each.get("started"):  # not kept by earlier versions
            spans.setdefault(each["machine"]["host"], []).append(
                (each["started"], each["started"] + each["fit_seconds"])
            )
    at_once = any(one[1] > other[0] for found in spans.values() for one, other in pairwise(sorted(found)))
    beside = [each["load"] > each["machine"]["cores"] for each in results if "load" in each]
    return at_once or 2 * sum(beside) > len(results)


def _machines(results: Sequence[Content]) -> list[str]:
    found = [
        "{host}: {device}, {threads} threads, torch {torch}, lightning {lightning}, Python {python}".format(
            **each["machine"]
        )
        for each in results
    ]
    return sorted(set(found))


# -- numbers as text -------------------------------------------------------------------------------------------------


def plain(value: float, digits: int = 4) -> str:
    """A value of the metric."""
    return "–" if not math.isfinite(value) else f"{value:.{digits}g}".replace("-", "−")


def signed(value: float) -> str:
    """A difference."""
    return "0" if value == 0 else f"{value:+.3g}".replace("-", "−")


def p_text(p: float) -> str:
    """A p-value in a table."""
    return "<0.001" if p < 0.001 else f"{p:.2g}" if p < 0.1 else f"{p:.2f}"


def _p_words(p: float) -> str:
    return "p below 0.001" if p < 0.001 else f"p = {p_text(p)}"


def _mean(row: Row) -> str:
    if row.mean is None:
        return "–"
    if row.mean.n < 2:
        return plain(row.mean.mean)
    return f"{plain(row.mean.mean)} ({plain(row.mean.low)} to {plain(row.mean.high)})"


def _difference(row: Row) -> str:
    if row.difference is None:
        return "–"
    found = row.difference.estimate
    return signed(found.mean) + (f" ({signed(found.low)} to {signed(found.high)})" if found.n > 1 else "")


def _p(row: Row) -> str:
    told = row.difference and row.difference.p_corrected is not None
    return p_text(row.difference.p_corrected) if told else "–"


def _ratio(found: Estimate | None) -> str:
    if found is None:
        return "–"
    spread = f" ({found.low:.2f}–{found.high:.2f})" if found.n > 1 and found.high - found.low >= 0.005 else ""
    return f"×{found.mean:.2f}{spread}"


def _cells(report: Report) -> Iterator[tuple[Row, dict[str, str]]]:
    """The table: by column, what stands in each row."""
    for row in report.rows:
        base, total = row.name == BASE, len(report.plan.seeds)
        seeds = f"{len(row.values)}" if len(row.values) == total else f"{len(row.values)} of {total}"
        trainable = f"{row.trainable:,}" if row.trainable else "–"
        if row.trainable and row.trainable < row.parameters:
            trainable += f" of {row.parameters:,}"
        yield (
            row,
            {
                "seeds": seeds,
                f"{report.plan.metric}": _mean(row),
                "difference": "" if base else _difference(row),
                "p": "" if base else _p(row),
                "step time": "" if base else _ratio(row.step),
                "memory": "" if base else _ratio(row.memory),
                "trainable": trainable,
            },
        )


# -- pictures --------------------------------------------------------------------------------------------------------

_KINDS = {"base": "of-base", "better": "of-better", "worse": "of-worse", "noise": "of-noise", "none": "of-noise"}


def _intervals(report: Report) -> dict[str, str]:
    """By recipe, its difference on the axis that all share."""
    rows = [row for row in report.rows if row.difference is not None]
    found = [row.difference.estimate for row in rows]
    values = [value for each in found for value in (each.mean, each.low, each.high)] + [0.0]
    across = charts.scale(values, 8, 232, 0.03)
    return {
        row.name: charts.interval(
            each.mean, each.low, each.high, across, _KINDS[row.verdict], f"{row.name}: {_difference(row)}"
        )
        for row, each in zip(rows, found)
    }


def cost_picture(report: Report, alone: bool = False) -> str:
    """Quality against cost; empty where there is nothing to draw."""
    points = [
        charts.Point(
            row.name,
            row.fit.mean,
            row.difference.estimate.mean,
            row.difference.estimate.low,
            row.difference.estimate.high,
            _KINDS[row.verdict],
        )
        for row in report.rows
        if row.difference is not None and row.fit is not None
    ]
    if not points:
        return ""
    base = charts.Point(BASE, 1.0, 0.0, math.nan, math.nan, "of-base")
    better = "up" if report.plan.mode == "max" else "down"
    says = "Difference in the metric over the time of the fit, for each recipe"
    ylabel = f"{report.plan.metric}, difference from the base ({better} is better)"
    return charts.cost_picture([base, *points], "time of the fit, base = 1", ylabel, says, alone)


def curve_pictures(report: Report, alone: bool = False) -> dict[str, str]:
    """By recipe, its learning curve beside the base's."""
    if not report.curves:
        return {}
    values = sorted(v for curve in report.curves.values() for v in (*curve.low, *curve.high) if math.isfinite(v))
    cut = len(values) // 20  # the first steps, from which the rest would be a flat line
    values = values[cut:] if report.plan.mode == "max" else values[: len(values) - cut]
    axis = charts.scale(values, 0, 1, 0.04)
    base = [report.curves[BASE]] if BASE in report.curves else []
    others = {name: curve for name, curve in report.curves.items() if name != BASE} or {BASE: None}
    return {
        name: charts.curves_picture(
            [*base, *([curve] if curve else [])],
            name,
            "training step",
            (axis.low, axis.high),
            f"{report.curve_of} of {name} and of the base over the training steps",
            alone,
        )
        for name, curve in others.items()
    }


# -- HTML ------------------------------------------------------------------------------------------------------------

_PAGE_STYLE = """
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 24px 20px 48px; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 8px; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 36px 0 12px; }
p { margin: 0 0 10px; max-width: 75ch; }
.soft, .legend { color: var(--soft); font-size: .92rem; }
.headline { font-size: 1.1rem; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th { text-align: left; font-weight: 600; color: var(--soft); border-bottom: 1px solid var(--line); }
th, td { padding: 8px 10px 8px 0; vertical-align: top; }
tbody td, tbody th { border-bottom: 1px solid var(--grid); }
tbody th { color: var(--ink); overflow-wrap: anywhere; }
tbody th small { display: block; font-weight: 400; color: var(--soft); }
td small { display: block; color: var(--soft); white-space: nowrap; }
td.drawn { min-width: 170px; } td.drawn svg { display: block; width: 100%; max-width: 240px; }
.words td { padding-top: 0; color: var(--soft); } .row td, .row th { border-bottom: 0; padding-bottom: 2px; }
.tag { display: inline-block; font-weight: 600; } .better { color: var(--better); } .worse { color: var(--worse); }
.grid { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); }
.grid > div, .picture { background: var(--card); border-radius: 10px; padding: 12px; }
.grid svg, .picture svg { display: block; width: 100%; height: auto; }
.picture { max-width: 560px; }
pre { background: var(--card); border-radius: 10px; padding: 12px; overflow-x: auto; font-size: .82rem; margin: 6px 0; }
summary { cursor: pointer; } li { margin-bottom: 6px; } ul { padding-left: 1.2em; max-width: 80ch; }
.key { display: inline-block; width: 14px; height: 3px; vertical-align: middle; margin: 0 4px 0 10px; }
@media (max-width: 760px) {
  main { padding: 16px 14px 40px; }
  thead { display: none; }
  table, tbody, tr, td, tbody th { display: block; width: 100%; }
  tbody td, tbody th { border: 0; padding: 2px 0; }
  .row { border-top: 1px solid var(--line); padding-top: 12px; }
  .words { padding-bottom: 12px; }
  tbody th { font-size: 1.05rem; }
  td[data-of] { display: flex; justify-content: space-between; gap: 16px; }
  td[data-of]::before { content: attr(data-of); color: var(--soft); flex: none; }
  td[data-of]:has(span:empty) { display: none; } td[data-of] span { text-align: right; }
  td.drawn { padding: 6px 0; } td.drawn svg { max-width: none; }
}
"""


def html(report: Report) -> str:
    """The whole as one page that loads nothing."""
    drawn, cells = _intervals(report), list(_cells(report))
    columns = list(cells[0][1])
    body = []
    for row, found in cells:
        name = f"<th scope='row'>{escape(row.name)}{f'<small>{escape(row.laid)}</small>' if row.laid else ''}</th>"
        values = [f"<td data-of='{escape(column)}'>{_stacked(found[column])}</td>" for column in columns]
        values.insert(3, f"<td class='drawn'>{drawn[row.name]}</td>" if row.name in drawn else "<td></td>")
        body.append(f"<tr class='row'>{name}{''.join(values)}</tr>")
        tag = f" class='tag {row.verdict}'" if row.verdict in ("better", "worse") else ""
        body.append(
            f"<tr class='words'><td colspan='{len(columns) + 2}'><span{tag}>{escape(row.words)}</span></td></tr>"
        )
    titles = [f"<th scope='col'>{escape(column)}</th>" for column in columns]
    titles.insert(3, "<th scope='col'>difference, drawn</th>")
    parts = [
        f"<h1>{escape(_title(report))}</h1>",
        f"<p class='headline'>{escape(report.headline)}</p>",
        f"<p class='soft'>Base: {escape(report.plan.base)}</p>",
        f"<table><thead><tr><th scope='col'>recipe</th>{''.join(titles)}</tr></thead>",
        f"<tbody>{''.join(body)}</tbody></table>",
    ]
    if picture := cost_picture(report):
        parts += ["<h2>Quality against cost</h2>", f"<div class='picture'>{picture}</div>"]
    if pictures := curve_pictures(report):
        keys = [
            f"<span class='key' style='background:var(--{c})'></span>{n}"
            for c, n in (("one", "recipe"), ("base", "base"))
        ]
        parts += ["<h2>Learning curves</h2>", f"<p class='legend'>{escape(_curve_words(report))}{''.join(keys)}</p>"]
        parts.append(f"<div class='grid'>{''.join(f'<div>{picture}</div>' for picture in pictures.values())}</div>")
    failed = list(_failures(report))
    if failed:
        parts.append("<h2>Runs that failed</h2>")
    for title, lines in failed:
        last = f"<pre>{escape(chr(10).join(lines))}</pre>" if lines else ""
        parts.append(f"<details open><summary>{escape(title)}</summary>{last}</details>")
    parts.append("<h2>How it was measured</h2>")
    parts.append(f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in [*report.notes, *report.machines])}</ul>")
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<meta name='color-scheme' content='light dark'><link rel='icon' href='data:,'>"
        f"<title>{escape(_title(report))}</title><style>{charts.STYLE}{_PAGE_STYLE}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _stacked(words: str) -> str:
    """A cell with what stands in brackets below the rest."""
    value, bracket, rest = words.partition(" (")
    return f"<span>{escape(value)}{f' <small>({escape(rest)}</small>' if bracket else ''}</span>"


def _failures(report: Report) -> Iterator[tuple[str, list[str]]]:
    """Which runs failed in what way, and the last lines of one of them; seeds that failed alike together."""
    for row in report.rows:
        alike: dict[str, tuple[list[int], str, list[str]]] = {}
        for seed, what, lines in row.failed:
            alike.setdefault(f"{what} {lines[-1:]}", ([], what, lines))[0].append(seed)
        for seeds, what, lines in alike.values():
            yield f"{row.name}, seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}: {what}", lines


def _title(report: Report) -> str:
    count = len(report.rows) - 1
    return f"{report.plan.metric}: {count} recipe{'s' if count > 1 else ''} against the base"


def _curve_words(report: Report) -> str:
    return f"{report.curve_of} by training step: the mean over seeds, and the band from the lowest to the highest seed."


# -- Markdown, raw results -------------------------------------------------------------------------------------------


def markdown(report: Report, pictures: Mapping[str, str]) -> str:
    """The whole as Markdown.

    Args:
        pictures: by what they show, the files of them.
    """
    cells = list(_cells(report))
    columns = list(cells[0][1])
    lines = [f"# {_title(report)}", "", report.headline, "", f"Base: {report.plan.base}", ""]
    lines += [f"| recipe | {' | '.join(columns)} | in words |", f"|---|{'---|' * (len(columns) + 1)}"]
    for row, found in cells:
        values = " | ".join(_cell(found[column]) for column in columns)
        lines.append(f"| {_cell(row.name)} | {values} | {_cell(row.words)} |")
    for what, path in pictures.items():
        lines += ["", f"![{what}]({path})"]
    for title, last in _failures(report):
        lines += ["", f"**{title}**"]
        lines += ["", "```", *last, "```"] if last else []
    lines += ["", "## How it was measured", "", *(f"- {note}" for note in [*report.notes, *report.machines])]
    return "\n".join(lines) + "\n"


def _cell(words: str) -> str:
    return words.replace("|", r"\|").replace("\n", " ")


def records(plan: Plan) -> list[dict[str, Any]]:
    """One a run that has a result: what it was, what it cost, and everything that it logged last."""
    found = []
    for run in plan.runs:
        content = result(run)
        if content is not None:
            costs = {k: content[k] for k in ("steps", "step_seconds", "fit_seconds", "peak_memory", "memory_before")}
            sizes = {"trainable": content["trainable"], "parameters": content["parameters"]}
            where = {"device": content["machine"]["device"], "host": content["machine"]["host"]}
            what = {"recipe": run.arm, "seed": run.seed, "folder": str(run.folder)}
            found.append({**what, **costs, **sizes, **where, **content["metrics"]})
    return found


def curve_records(plan: Plan) -> list[dict[str, Any]]:
    """One a run and moment: what was logged then."""
    found = []
    for run in plan.runs:
        content = result(run)
        found += [{"recipe": run.arm, "seed": run.seed, **point} for point in (content or {"curve": []})["curve"]]
    return found


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with all columns that any of them has."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def summary(report: Report) -> dict[str, Any]:
    """The table as plain values, for a program."""

    def each(found: Estimate | None) -> dict[str, Any] | None:
        return None if found is None else {k: v if not isinstance(v, float) or math.isfinite(v) else None
                                           for k, v in vars(found).items()}  # fmt: skip

    rows = [
        {
            "recipe": row.name,
            "laid": row.laid,
            "mean": each(row.mean),
            "difference": each(row.difference.estimate) if row.difference else None,
            "p": row.difference.p if row.difference else None,
            "p_corrected": row.difference.p_corrected if row.difference else None,
            "verdict": row.verdict,
            "words": row.words,
            "step": each(row.step),
            "fit": each(row.fit),
            "memory": each(row.memory),
            "trainable": row.trainable,
            "parameters": row.parameters,
            "order": row.order,
            "failed": [{"seed": seed, "what": what, "lines": lines} for seed, what, lines in row.failed],
        }
        for row in report.rows
    ]
    plan = report.plan
    about = {"base": plan.base, "metric": plan.metric, "mode": plan.mode, "seeds": list(plan.seeds)}
    return {
        **about,
        "budget": plan.budget.words if plan.budget else None,
        "machines": report.machines,
        "notes": report.notes,
        "rows": rows,
    }


def save(report: Report) -> Path:
    """Write everything into the comparison's folder; return the path of the page."""
    out = report.plan.out
    out.mkdir(parents=True, exist_ok=True)
    pictures = {}
    if picture := cost_picture(report, alone=True):
        write_text(out / "cost.svg", picture)
        pictures["Quality against cost"] = "cost.svg"
    for number, (name, picture) in enumerate(curve_pictures(report, alone=True).items()):
        write_text(out / f"curve-{number}.svg", picture)
        pictures[f"Learning curve: {name}"] = f"curve-{number}.svg"
    write_text(out / "report.md", markdown(report, pictures))
    runs, curves = records(report.plan), curve_records(report.plan)
    write_text(out / "runs.csv", as_csv(runs))
    write_text(out / "curves.csv", as_csv(curves))
    write_text(out / "summary.json", json.dumps(summary(report), indent=1))
    _save_parquet(out / "runs.parquet", runs)
    _save_parquet(out / "curves.parquet", curves)
    write_text(out / "report.html", html(report))
    return out / "report.html"


def _save_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """The same as the CSV, where pyarrow is there."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return
    columns = dict.fromkeys(name for row in rows for name in row)
    if columns:
        table = pyarrow.table({name: [row.get(name) for row in rows] for name in columns})
        with written_whole(path, sync=False) as file:
            pyarrow.parquet.write_table(table, file)
