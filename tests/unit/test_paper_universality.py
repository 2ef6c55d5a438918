"""The command that draws regret against samples goes through, and what it has written is what the bound says."""

from __future__ import annotations

import json
import math
from statistics import mean

import pytest
import torch

from benchmarks.papers import universality
from lightning_recipes.callbacks.regularization.hypothesis_weight import cumulative_log_loss
from lightning_recipes.core.random import generator
from lightning_recipes.datamodules.boolean_task import RULES, all_inputs, draw_task


def test_the_universality_command_writes_and_draws(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(universality, "WIDTHS", {2: 3000, 8: 2500})
    path, picture = tmp_path / "found.json", tmp_path / "found.png"
    assert universality.main(["--seeds", "2", "--output", str(path), "--picture", str(picture)]) == 0
    found = json.loads(path.read_text())
    assert found["seeds"] == 2 and list(found["width"]) == ["2", "8"]
    for each in found["width"].values():
        assert len(each["constant"]["regret"]["128"]) == 2
        assert each["constant"]["neg_log_w"] == each["constant"]["bound"] > 0
    assert picture.stat().st_size > 1000
    assert "-log W" in capsys.readouterr().out


def test_networks_compute_what_they_compute():
    table, counts = universality.functions(8, 1000)
    assert counts.sum() == 1000 and table.shape == (len(counts), 32)
    assert len(table.unique(dim=0)) == len(table)
    assert universality.parameters(8) == 57 and universality.parameters(512) == 3585


def test_rules_that_differ_by_the_order_and_sign_of_bits_are_counted_together():
    assert [len(universality.alike(rule)) for rule in RULES] == [2, 10, 80, 20]
    table, counts = universality.functions(8, 2000)
    functions, shared = universality.shared_out(table, counts)
    assert shared.sum().item() == pytest.approx(2000) and len(functions.unique(dim=0)) == len(functions)
    bit = universality.alike("first_bit")
    hits = sum(int(counts[(table == f).all(1)].sum()) for f in bit)
    assert [shared[(functions == f).all(1)].item() for f in bit] == pytest.approx([hits / 10] * 10)


def test_the_regret_is_the_code_length_less_that_of_the_rule():
    table, counts = universality.functions(8, 500)
    places, labels = draw_task(5, "majority", 0.1, 128, generator("universality", "majority", 3))
    value = torch.tensor([math.log(0.1), math.log(0.9)], dtype=torch.float64)
    each = value[(table[:, places] == labels.bool()).long()]
    truth = value[(RULES["majority"][1](all_inputs(5))[places] == labels.bool()).long()].cumsum(0)
    expected = cumulative_log_loss(each, (counts / counts.sum()).double().log()) + truth
    shown = torch.tensor(universality.SHOWN) - 1
    assert torch.allclose(universality.regrets(table, counts, "majority", 3), expected[shown], atol=1e-5)


def test_the_universality_figures_on_file_are_those_of_the_card():
    found = json.loads(universality.RESULTS.read_text(encoding="utf-8"))["width"]
    assert list(found) == ["8", "64", "512"]
    ends = {rule: [mean(each[rule]["regret"]["128"]) for each in found.values()] for rule in universality.RULES}
    for rule in ("constant", "first_bit", "majority"):
        for each in found.values():
            assert mean(each[rule]["regret"]["128"]) < each[rule]["neg_log_w"], "the bound"
        assert abs(ends[rule][2] / ends[rule][0] - 1) < 0.2, "63 times as many parameters cost next to nothing"
    for number, each in enumerate(found.values()):
        assert each["parity"]["neg_log_w"] is None, "never drawn"
        order = [ends[rule][number] for rule in ("constant", "first_bit", "majority", "parity")]
        assert order == sorted(order) and order[3] > 20
