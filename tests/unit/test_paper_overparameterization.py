"""The command that draws random features' error over width and samples goes through, and its figures are whole."""

from __future__ import annotations

import json
from statistics import mean

import pytest

from benchmarks.papers import overparameterization


def test_the_overparameterization_command_writes_and_draws_theory_and_simulation(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(overparameterization, "SIZES", (8, 16))
    monkeypatch.setattr(overparameterization, "FIXED", 16)
    path, picture = tmp_path / "found.json", tmp_path / "found.png"
    assert overparameterization.main(["--seeds", "2", "--output", str(path), "--picture", str(picture)]) == 0
    found = json.loads(path.read_text())
    for kind in ("width", "samples"):
        assert list(found[kind]) == ["8", "16"]
        for each in found[kind].values():
            assert [len(each["simulation"][name]) for name in ("best", "smallest")] == [2, 2]
    assert picture.stat().st_size > 1000
    assert "best, theory" in capsys.readouterr().out


def test_the_overparameterization_figures_on_file_follow_the_theory():
    found = json.loads(overparameterization.RESULTS.read_text(encoding="utf-8"))
    assert found["seeds"] == overparameterization.SEEDS
    for kind in ("width", "samples"):
        assert list(found[kind]) == [str(size) for size in overparameterization.SIZES]
        best = [each["theory"]["best"] for each in found[kind].values()]
        assert best == sorted(best, reverse=True)
        for size, each in found[kind].items():
            for name, expected in each["theory"].items():
                assert mean(each["simulation"][name]) == pytest.approx(expected, rel=0.15), (kind, size, name)
        smallest = {size: mean(each["simulation"]["smallest"]) for size, each in found[kind].items()}
        assert max(smallest, key=smallest.get) == "256", "the peak is where features are as many as samples"
