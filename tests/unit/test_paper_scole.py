"""SCoLe's curve: the command goes through, and what it has written is whole."""

from __future__ import annotations

import json

import pytest

from benchmarks.papers import scole


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(scole, "AFTER", (1, 3, 6))
    monkeypatch.setattr(scole, "ARMS", dict(list(scole.ARMS.items())[:2] + list(scole.ARMS.items())[-1:]))


def test_the_scole_command_writes_and_draws_every_arm(short, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "found.json"
    assert scole.main(["digits", "--seeds", "2", "--output", str(path)]) == 0
    found = json.loads(path.read_text())["digits"]
    assert found["seeds"] == 2 and found["tasks"] == [1, 3, 6] and found["arms"].keys() == scole.ARMS.keys()
    for curve in found["arms"].values():
        assert len(curve["mean"]) == len(curve["sd"]) == 3 and all(0 <= value <= 1 for value in curve["mean"])
    assert (tmp_path / "found_digits.png").read_bytes()[:4] == b"\x89PNG"
    out = capsys.readouterr().out
    assert all(arm in out for arm in scole.ARMS)


def test_scole_says_what_data_are_missing(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("LIGHTNING_RECIPES_DATA", str(tmp_path))
    scole.images.cache_clear()
    assert scole.main(["mnist", "--output", str(tmp_path / "none.json")]) == 1
    assert "mnist left out: set LIGHTNING_RECIPES_DATA to the folder with mnist.npz" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        scole.main(["cifar"])
    assert "no set named 'cifar'; there are digits, mnist" in capsys.readouterr().err


def test_the_curves_on_file_are_of_every_arm_over_300_tasks():
    found = json.loads(scole.RESULTS.read_text(encoding="utf-8"))
    assert scole.SETS[0] in found
    for name, of_set in found.items():
        assert of_set["tasks"] == list(scole.AFTER) and of_set["tasks"][-1] == 300
        assert of_set["seeds"] == scole.SEEDS and of_set["arms"].keys() == scole.ARMS.keys()
        assert scole.RESULTS.with_name(f"scole_{name}.png").is_file()
        for arm, curve in of_set["arms"].items():
            assert len(curve["mean"]) == len(scole.AFTER)
            assert arm == scole.REFERENCE or (curve["mean"][0] < 0.35 and curve["mean"][-1] > 0.75), "it accumulates"
