"""The command that draws generalisation error over time and width goes through, and what it has written is whole."""

from __future__ import annotations

import json

import pytest

from benchmarks.papers import generalization_dynamics


def test_the_generalization_dynamics_command_writes_and_draws_theory_and_simulation(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(generalization_dynamics, "WIDTHS", (0.5, 1.0))
    monkeypatch.setattr(generalization_dynamics, "N", 30)
    monkeypatch.setattr(generalization_dynamics, "SHOWN", (0.0, 1.0, 3.0))
    monkeypatch.setattr(generalization_dynamics, "END", 3.0)
    path, picture = tmp_path / "found.json", tmp_path / "found.png"
    assert generalization_dynamics.main(["--seeds", "2", "--output", str(path), "--picture", str(picture)]) == 0
    found = json.loads(path.read_text())
    assert found["seeds"] == 2 and list(found["alpha"]) == ["0.5", "1"]
    for each in found["alpha"].values():
        assert len(each["theory"]["course"]) == 3 and [len(at) for at in each["simulation"]["course"]] == [2, 2, 2]
        assert each["theory"]["course"][0] == 7
    assert picture.stat().st_size > 1000
    assert "best, theory" in capsys.readouterr().out


def test_the_generalization_dynamics_figures_on_file_follow_the_theory():
    found = json.loads(generalization_dynamics.RESULTS.read_text(encoding="utf-8"))
    assert found["seeds"] == generalization_dynamics.SEEDS
    assert list(found["alpha"]) == [f"{alpha:g}" for alpha in generalization_dynamics.WIDTHS]
    for each in found["alpha"].values():
        theory, seen = each["theory"], each["simulation"]
        for expected, values in zip(theory["course"], seen["course"], strict=True):
            assert sum(values) / len(values) == pytest.approx(expected, rel=0.15)
    lost = {alpha: sum(e["simulation"]["end"]) - sum(e["simulation"]["best"]) for alpha, e in found["alpha"].items()}
    assert max(lost, key=lost.get) == "1"
