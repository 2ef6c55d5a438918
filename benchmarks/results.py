"""``python -m benchmarks.results [GROUP...]``: the table of what recipes change, by ``lightning-recipes compare``.

A group is a file in ``configs/compare/``: a base, the recipes that lie over it, a metric and a budget. Where a file
``<group>_start.yaml`` stands beside it, that is fitted first. Runs are kept under ``--out``, and what is there is not
run again; the sums go to ``benchmarks/results.json``, from which ``python -m benchmarks.readme`` makes the table, and
are drawn in ``benchmarks/results.png``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lightning_recipes.catalog import config_folder, recipes
from lightning_recipes.compare.plan import BASE

RESULTS = Path(__file__).parent / "results.json"

COLOURS = {"better": "#0f7a45", "worse": "#b3261e", "noise": "#59636e"}
"""By verdict, as in the reports."""

# Why a recipe is in no group.
REASONS = {
    "AdaptiveSmoothing": "acts at evaluation only, on two trained networks; see its claim",
    "AdaptiveSmoothingModule": "trains a mixing network for two trained ones; see its paper's config",
    "BackdoorAdjustment": "acts at evaluation only, on several trained networks; see its claim",
    "BalancedCNN": "a network of its own: nothing to lay over a base",
    "BayesGapMonitor": "measures prior-data fitted networks only",
    "BooleanTaskDataModule": "a data set of its own: nothing to lay over a base",
    "DualInputOutput": "a network of its own in two stages; see 'A paper from end to end'",
    "ForgettingMonitor": "measures streams of tasks; it is in the base of GroupMask",
    "GaussianRFDataModule": "a data set of its own: nothing to lay over a base",
    "InContextPrediction": "acts at prediction only",
    "LinearStudent": "a module of its own: nothing to lay over a base",
    "LowRankRecovery": "a module of its own: nothing to lay over a base",
    "MatrixSensingDataModule": "a data set of its own: nothing to lay over a base",
    "PFNModule": "a module of its own: nothing to lay over a base",
    "RandomFeatureRegressor": "a module of its own: nothing to lay over a base",
    "RobustAccuracyMonitor": "measures; it is in the base of AAER",
    "SCoLeDataModule": "a stream of data; it is the base of GroupMask",
    "StudentTeacherDataModule": "a data set of its own: nothing to lay over a base",
    "SubGM": "for losses of absolute errors under SGD; see its paper's config and its claim",
    "TwoLayerReLU": "a module of its own: nothing to lay over a base",
    "UnlearnableDataModule": "makes data worse on purpose; see its claim",
    "XORClusterDataModule": "a data set of its own: nothing to lay over a base",
}


def groups() -> dict[str, Path]:
    """The comparisons, by name."""
    found = sorted((config_folder() / "compare").glob("*.yaml"))
    return {path.stem: path for path in found if not path.stem.endswith("_start")}


def compared() -> dict[str, str]:
    """The group of every recipe that has one."""
    found: dict[str, str] = {}
    for group, path in groups().items():
        for each in yaml.safe_load(path.read_text(encoding="utf-8"))["recipe"]:
            name = each.partition("=")[0] if isinstance(each, str) else each["name"]
            if name in found:
                raise ValueError(f"{name} stands in {found[name]} and in {group}: there is one row a recipe")
            found[name] = group
    return found


def run(group: str, out: Path, more: list[str]) -> dict[str, Any]:
    """Do a group, or what is left of it, and return its sums.

    Raises:
        SystemExit: when what it begins from cannot be made; a run that fails is in the sums.
    """
    here = out / group
    here.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "lightning_recipes.cli"]
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    start = f"compare/{group}_start.yaml"
    if (config_folder() / start).is_file() and not (here / "start.done").exists():
        if subprocess.run([*command, "fit", "--config", start], cwd=here, env=env).returncode:
            raise SystemExit(f"{start} failed")
        (here / "start.done").touch()
    subprocess.run([*command, "compare", "--config", f"compare/{group}.yaml", *more], cwd=here, env=env)
    return json.loads((here / "comparison" / "summary.json").read_text(encoding="utf-8"))


def results_table() -> str:
    """One row a recipe that exists: what it changed, or why nothing was compared."""
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    from lightning_recipes.compare.report import SHARED

    where = compared()
    lines = [SHARED, ""] if any(SHARED in summary["notes"] for summary in found.values()) else []
    lines.append("| recipe | base | metric | base | with it | difference (95 %) | p | step time | memory | in words |")
    lines.append("|---|---|---|---|---|---|---|---|---|---|")
    for name in sorted(recipes(), key=str.lower):
        summary = found.get(where.get(name, ""))
        rows = {row["recipe"]: row for row in summary["rows"]} if summary else {}
        if name in rows:
            cells = _cells(summary, rows[BASE], rows[name])
        else:
            reason = "not run yet" if name in where else REASONS.get(name, "in no comparison yet")
            cells = [where.get(name, ""), *[""] * 7, reason]
        lines.append(f"| `{name}` | {' | '.join(cell.replace('|', ' ') for cell in cells)} |")
    return "\n".join(lines)


def _cells(summary: dict[str, Any], base: dict[str, Any], row: dict[str, Any]) -> list[str]:
    from lightning_recipes.compare.report import p_text, signed

    about = [summary["base"].partition(" (")[0], summary["metric"]]  # a base's name, without the configs behind it
    difference = row["difference"]
    if difference is None or row["mean"] is None or base["mean"] is None:
        last = [line for each in row["failed"] for line in each["lines"][-1:]]
        return [*about, *[""] * 6, f"no comparison: {last[0] if last else row['words']}"]
    spread = f" ({signed(difference['low'])} to {signed(difference['high'])})" if difference["n"] > 1 else ""
    verdict = f"**{row['verdict']}**" if row["verdict"] == "better" else _verdict(row)
    means = [f"{each['mean']['mean']:.4g} ± {each['mean']['sd'] or 0:.2g}" for each in (base, row)]
    p = p_text(row["p_corrected"]) if row["p_corrected"] is not None else ""
    ratios = [f"×{row[each]['mean']:.2f}" if row[each] else "" for each in ("step", "memory")]
    return [*about, *means, signed(difference["mean"]) + spread, p, *ratios, verdict]


def _verdict(row: Mapping[str, Any]) -> str:
    """The words for a row that was compared."""
    if row["verdict"] == "noise" and row["p"] is None:
        alike = row["difference"]["mean"] == 0 and row["difference"]["n"] > 1
        return "no difference at all" if alike else "nothing can be told"
    return {"noise": "can't be told from noise"}.get(row["verdict"], row["verdict"])


def draw(results: Mapping[str, Mapping[str, Any]], path: Path) -> Path | None:
    """A panel a base, a row a recipe: the paired difference with its 95 % interval; None where matplotlib (the `plots`
    extra) is not installed.

    Args:
        results: summaries by group.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    from lightning_recipes.compare.report import signed

    panels = {}  # of those with something to draw, the longest first
    for group, summary in sorted(results.items(), key=lambda item: -len(item[1]["rows"])):
        rows = [row for row in summary["rows"] if row["difference"] is not None]
        if rows:
            panels[group] = summary, sorted(rows, key=lambda row: row["difference"]["mean"])
    if not panels:
        return None
    heights = [0.23 * len(rows) + 0.3 for _, rows in panels.values()]  # inches
    figure = Figure(figsize=(9, sum(heights) + 0.55 * len(panels) + 0.7), layout="constrained")
    all_axes = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, (group, (summary, rows)) in zip(all_axes, panels.items()):
        base = next(row for row in summary["rows"] if row["recipe"] == BASE)["mean"]
        seeds = "1 seed" if len(summary["seeds"]) == 1 else f"{len(summary['seeds'])} seeds"
        title = f"{group}: {summary['metric']}, the base at {base['mean']:.4g}, {seeds}"
        axes.set_title(title, loc="left", fontsize=9.5, fontweight="bold")
        if summary["mode"] == "min":
            axes.set_title("smaller is better", loc="right", fontsize=8.5, color=COLOURS["noise"])
        axes.axvline(0, color="#1b1f24", linewidth=0.8, zorder=1)
        for place, row in enumerate(rows):
            found, colour = row["difference"], COLOURS[row["verdict"]]
            if found["low"] is not None:
                axes.plot([found["low"], found["high"]], [place] * 2, color=colour, linewidth=2, solid_capstyle="butt")
            axes.plot(found["mean"], place, "o", color=colour, markersize=5)
            words = f"{signed(found['mean'])}  {_verdict(row)}"
            axes.annotate(
                words, (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=8, color=colour
            )
        axes.set_yticks(range(len(rows)), [row["recipe"] for row in rows], fontsize=8.5)
        axes.set_ylim(-0.7, len(rows) - 0.3)
        axes.tick_params(axis="x", labelsize=8)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right", "left"]].set_visible(False)
    figure.supxlabel("difference from the base on the same seeds, with its 95 % interval", fontsize=9)
    figure.savefig(path, dpi=120)
    return path


def main() -> None:
    """Run groups and keep their sums."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.results", description=__doc__.splitlines()[0])
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(groups())}; all without one")
    parser.add_argument("--out", type=Path, default=Path("comparisons"), help="where runs are kept (%(default)s)")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="where the sums go, and a picture beside them (%(default)s)"
    )
    parser.add_argument("--jobs", default="1", help="runs at once (%(default)s)")
    parser.add_argument("--seeds", help="as compare has it, instead of the group's own")
    parser.add_argument("--budget", help="as compare has it, instead of the group's own")
    options = parser.parse_args()
    unknown = [name for name in options.groups if name not in groups()]
    if unknown:
        parser.error(f"no group {', '.join(unknown)}; there are {', '.join(groups())}")
    more = [f"--jobs={options.jobs}"]
    more += [f"--{name}={value}" for name in ("seeds", "budget") if (value := getattr(options, name))]
    for group in options.groups or groups():
        summary = run(group, options.out, more)
        found = json.loads(options.results.read_text(encoding="utf-8")) if options.results.is_file() else {}
        text = json.dumps(dict(sorted({**found, group: summary}.items())), indent=1)
        options.results.write_text(text + "\n", encoding="utf-8")
    draw(json.loads(options.results.read_text(encoding="utf-8")), options.results.with_suffix(".png"))


if __name__ == "__main__":
    main()
