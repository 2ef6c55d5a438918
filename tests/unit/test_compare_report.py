"""What the report says and shows, in words, in files and in a browser."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_recipes.compare import charts, report
from lightning_recipes.compare.plan import BASE
from lightning_recipes.core.errors import RecipeError
from tests.comparison import content, made_up

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A report of made-up results, and its folder."""
    plan = made_up(tmp_path_factory.mktemp("comparison"))
    found = report.collect(plan)
    return found, report.save(found).parent


def row(found, name):
    return next(each for each in found.rows if each.name == name)


def test_every_recipe_has_its_verdict(saved):
    found, _ = saved
    verdicts = {each.name: each.verdict for each in found.rows}
    assert verdicts == {
        "base": "base",
        "better": "better",
        "worse": "worse",
        "noise": "noise",
        "a_recipe_with_a_rather_long_name+another": "noise",
        "failing": "none",
    }
    assert found.headline == (
        "Of 5 recipes: 1 better than the base, 1 worse, 2 not told from noise, 1 without a comparison."
        " 5 of 30 runs failed."
    )


def test_the_figures_are_those_of_the_runs(saved):
    found, _ = saved
    better = row(found, "better")
    assert better.mean.mean == pytest.approx((0.93 + 0.941 + 0.919 + 0.951 + 0.93) / 5)
    # differences 0.03, 0.031, 0.029, 0.031, 0.03
    assert better.difference.estimate.mean == pytest.approx(0.0302)
    assert better.step.mean == pytest.approx(2.0) and better.memory.mean == pytest.approx(2.0)
    assert row(found, "worse").trainable == 100
    assert (better.order, row(found, "noise").order) == ("same", "other")


def test_the_words_say_when_nothing_can_be_told(saved):
    found, _ = saved
    words = row(found, "noise").words
    assert words.startswith(
        "Can't be told from noise: +0.003 (95 % −0.0149 to +0.0209), p = 0.67 after correction for 4"
    )
    assert re.search(r"Some \d+ seeds would tell a true difference of this size\.", words)
    assert row(found, "better").words.startswith("Better than the base: +0.0302 (95 % ")
    assert "p below 0.001 after correction for 4 comparisons" in row(found, "better").words


@pytest.mark.parametrize(
    ("starts", "loads", "shared"),
    [
        ((0, 10), (1.0, 1.0), False),  # each fit takes 2 seconds
        ((0, 1.5), (1.0, 1.0), True),
        ((0, 10), (2.5, 3.0), True),  # more programs than the two cores
        ((0, 10), (1.0, 3.0), False),  # in one of two runs
    ],
)
def test_step_times_of_runs_that_shared_their_machine_are_said_to_be_noisy(tmp_path, starts, loads, shared):
    whole = made_up(tmp_path, seeds=1)
    plan = replace(whole, arms=whole.arms[:2], runs=whole.runs[:2])
    for one, start, load in zip(plan.runs, starts, loads, strict=True):
        kept = content(0.9, started=1.7e9 + start, load=load)
        one.artefact.save({**kept, "machine": {**kept["machine"], "cores": 2}})
    found = report.collect(plan)
    assert (report.SHARED in found.notes) == shared
    assert (report.SHARED in report.html(found)) == shared and (report.SHARED in report.markdown(found, {})) == shared


def test_with_a_smaller_is_better_metric_the_verdicts_turn(tmp_path):
    plan = made_up(tmp_path)
    turned = report.collect(type(plan)(**{**vars(plan), "metric": "val/loss", "mode": "min"}))
    assert row(turned, "better").verdict == "better" and row(turned, "better").difference.estimate.mean < 0
    assert row(turned, "worse").verdict == "worse"


def test_one_seed_tells_nothing_and_the_report_says_so(tmp_path):
    found = report.collect(made_up(tmp_path, seeds=1))
    assert {each.verdict for each in found.rows[1:5]} == {"noise"}
    assert row(found, "better").words == "+0.03 on the one seed that there is: nothing can be told from one."
    assert "One seed shows no spread" in found.headline
    report.save(found)


def test_a_run_that_diverged_or_lacks_the_metric_is_told_of_and_left_out(tmp_path):
    plan = made_up(tmp_path)
    of = plan.of("better")
    of[0].artefact.save(content(math.nan))
    of[1].artefact.save({**content(0.9), "metrics": {"val/loss": 0.1}})
    found = row(report.collect(plan), "better")
    assert sorted(found.values) == [2, 3, 4] and found.difference.estimate.n == 3
    assert [(seed, what) for seed, what, _ in found.failed] == [
        (0, "val/acc ended at nan: the training diverged"),
        (1, "it did not log val/acc"),
    ]


def test_a_recipe_that_changes_nothing_is_said_to(tmp_path):
    plan = made_up(tmp_path)
    for run, base in zip(plan.of("noise"), plan.of(BASE)):
        run.artefact.save(base.artefact.load())
    assert "The same value as the base on every seed" in row(report.collect(plan), "noise").words


def test_a_metric_that_is_not_logged_names_those_that_are(tmp_path):
    plan = made_up(tmp_path)
    wrong = type(plan)(**{**vars(plan), "metric": "val_acc"})
    with pytest.raises(
        RecipeError, match=r"'val_acc' is not logged; the base logs val/acc, val/loss.*nothing is run twice"
    ):
        report.check_metric(wrong, content(0.9))


def test_the_markdown_is_a_table_with_pictures_beside_it(saved):
    found, out = saved
    text = (out / "report.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(found.rows) and len({line.count("|") for line in rows}) == 1
    for name in re.findall(r"\]\((.*?)\)", text):
        assert (out / name).read_text(encoding="utf-8").startswith("<svg ")
    assert "RecipeError: <b>this is why</b>" in text
    assert "failing, seeds 0, 1, 2, 3, 4: it ended with code 1" in text


def test_the_raw_results_hold_every_run(saved):
    found, out = saved
    rows = list(csv.DictReader((out / "runs.csv").open(encoding="utf-8")))
    assert len(rows) == found.done == 25
    first = next(each for each in rows if each["recipe"] == "worse" and each["seed"] == "2")
    assert float(first["val/acc"]) == 0.842 and float(first["step_seconds"]) == 0.011
    curves = list(csv.DictReader((out / "curves.csv").open(encoding="utf-8")))
    assert len(curves) == 250 and curves[0]["step"] == "20"
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert [each["verdict"] for each in summary["rows"]] == [each.verdict for each in found.rows]


def test_parquet_is_the_same_as_the_csv(saved):
    parquet = pytest.importorskip("pyarrow.parquet")
    _, out = saved
    table = parquet.read_table(out / "runs.parquet")
    assert table.num_rows == 25 and table.column("val/acc")[0].as_py() == 0.90


def test_the_page_names_no_other_place(saved):
    _, out = saved
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<b>this is why</b>" not in page, "what a run printed is text"
    assert set(re.findall(r"https?://[^\"' ]*", page)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(script|link rel=.stylesheet|img|iframe)|@import|url\(", page)


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium here: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
        found = driver.chromium.launch(executable_path=CHROMIUM, args=[*quiet, "--disable-sync"])
        yield found
        found.close()


def test_the_page_in_a_browser(saved, browser):
    """At desktop and phone width, light and dark: nothing sticks out, nothing is fetched, nothing goes wrong."""
    page_path = (saved[1] / "report.html").resolve().as_uri()
    colours = {}
    for width in (1280, 390):
        for scheme in ("light", "dark"):
            context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
            page, said, asked = context.new_page(), [], []
            page.on("console", lambda message, said=said: said.append(message.text))
            page.on("pageerror", lambda error, said=said: said.append(str(error)))
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.goto(page_path)
            assert said == [] and asked == [page_path]
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            style = "e => [getComputedStyle(e).backgroundColor, getComputedStyle(e).color]"
            colours[width, scheme] = page.eval_on_selector("body", style)
            out = "es => es.filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML)"
            assert page.eval_on_selector_all("main *:not(pre *)", out) == []
            small = "es => es.map(e => e.getBoundingClientRect().height / e.getBBox().height * 12)"
            assert min(page.eval_on_selector_all("svg[viewBox] text", small)) > 9, "letters of at least 9 pixels"
            covers = """es => es.flatMap((a, i) => es.slice(i + 1).filter(b => {
              const [p, q] = [a.getBoundingClientRect(), b.getBoundingClientRect()];
              return p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 3 && q.top < p.bottom - 3;
            }).map(b => a.textContent + ' | ' + b.textContent))"""
            assert page.eval_on_selector_all(".picture svg text", covers) == []
            context.close()
    assert colours[1280, "light"] == colours[390, "light"] and colours[1280, "dark"] == colours[390, "dark"]
    assert not set(colours[390, "light"]) & set(colours[390, "dark"])


def test_ticks_are_round_and_within():
    assert charts.ticks(0.0, 1.0) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert charts.ticks(-0.049, 0.021) == pytest.approx([-0.04, -0.02, 0, 0.02])
    assert charts.ticks(12_000, 61_000) == [20_000, 30_000, 40_000, 50_000, 60_000]


def test_a_scale_of_one_value_has_room_around_it():
    found = charts.scale([0.5], 0, 100)
    assert found(0.5) == 50 and found.low < 0.5 < found.high


def test_drawings_are_well_formed_and_say_what_they_show(saved):
    from xml.etree import ElementTree

    found, out = saved
    for path in [*Path(out).glob("*.svg")]:
        root = ElementTree.parse(path).getroot()
        assert root.attrib["aria-label"] and root.attrib["viewBox"]
    assert len(list(Path(out).glob("curve-*.svg"))) == 4 and found.curve_of == "val/acc"
