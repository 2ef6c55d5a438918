"""The repository's own comparisons: every recipe has a row, and every config of theirs is one that can be run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from benchmarks import results
from lightning_recipes import catalog
from lightning_recipes.compare import report
from lightning_recipes.compare.plan import make_plan
from tests.comparison import made_up


def test_every_recipe_is_compared_or_has_a_reason_and_never_both():
    known, compared = set(catalog.recipes()), set(results.compared())
    assert compared | set(results.REASONS) == known
    assert not compared & set(results.REASONS)


@pytest.mark.parametrize("group", results.groups())
def test_the_configs_are_read(group, tmp_path):
    config = yaml.safe_load(results.groups()[group].read_text(encoding="utf-8"))
    arguments = [config.get(name) for name in ("seeds", "mode", "budget")]
    plan = make_plan(config["base"], config["recipe"], config["metric"], tmp_path, *arguments)
    for arm in plan.arms[1:]:
        added = [each["class_path"].rsplit(".", 1)[-1] for each in arm.config["trainer"]["callbacks"]]
        assert arm.name in added


def test_the_table_has_a_row_a_recipe_from_the_sums(tmp_path, monkeypatch):
    plan = made_up(tmp_path / "out")
    summary = report.summary(report.collect(plan))
    for row, name in zip(summary["rows"][1:], ("Mixup", "CutMix", "PSKD", "SmallInit", "Guidance")):
        row["recipe"] = name
    (tmp_path / "results.json").write_text(json.dumps({"digits_cnn": summary}), encoding="utf-8")
    monkeypatch.setattr(results, "RESULTS", Path(tmp_path / "results.json"))
    lines = results.results_table().splitlines()
    assert len(lines) == 2 + len(catalog.recipes())
    rows = {line.split("`")[1]: line for line in lines[2:]}
    assert (
        "| 0.904 ± 0.011 | 0.9342 ± 0.012 | +0.0302 (+0.0292 to +0.0312) | <0.001 | ×2.00 | ×2.00 | **better** |"
        in (rows["Mixup"])
    )
    assert rows["CutMix"].endswith("| worse |") and rows["PSKD"].endswith("| can't be told from noise |")
    assert rows["Guidance"].endswith("| no comparison: RecipeError: <b>this is why</b> |")
    assert rows["DropBlock"].endswith("| not run yet |")
    assert rows["BackdoorAdjustment"].endswith(f"| {results.REASONS['BackdoorAdjustment']} |")
    assert report.SHARED not in rows["Mixup"] and not lines[0].startswith(report.SHARED)
    summary["notes"].append(report.SHARED)
    (tmp_path / "results.json").write_text(json.dumps({"digits_cnn": summary}), encoding="utf-8")
    assert results.results_table().splitlines() == [report.SHARED, "", *lines]


def test_the_picture_has_a_panel_a_base_and_a_row_a_recipe(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **how: drawn.append(figure))
    summary = report.summary(report.collect(made_up(tmp_path / "out")))
    alone = {**summary, "rows": summary["rows"][:2]}
    assert results.draw({"one": alone, "all": summary}, tmp_path / "results.png") == tmp_path / "results.png"
    panels = drawn[0].axes
    assert [axes.get_title(loc="left") for axes in panels] == [
        "all: val/acc, the base at 0.904, 5 seeds",
        "one: val/acc, the base at 0.904, 5 seeds",
    ]
    names = [[label.get_text() for label in axes.get_yticklabels()] for axes in panels]
    assert names == [["worse", "noise", "a_recipe_with_a_rather_long_name+another", "better"], ["better"]]
    low, high = panels[1].lines[1].get_xdata()
    assert (low, high) == pytest.approx((0.0292, 0.0312), abs=1e-4)
    assert [words.get_text() for words in panels[1].texts] == ["+0.0302  better"]
    assert panels[1].lines[1].get_color() == results.COLOURS["better"] != panels[0].lines[1].get_color()
    assert results.draw({}, tmp_path / "none.png") is None
