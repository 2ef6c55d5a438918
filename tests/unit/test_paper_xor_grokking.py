"""The command that trains on XOR clusters goes through, and what it has written is whole."""

from __future__ import annotations

import json

import pytest

from benchmarks.papers import xor_grokking


@pytest.fixture
def tiny(monkeypatch):
    data = {"n": 40, "p": 400, "mu_norm": 6.0, "n_val": 40}
    monkeypatch.setattr(xor_grokking, "ARMS", {"small": {"steps": 5, "data": data, "network": {"m": 16, "lr": 2.5e-3}}})


def test_the_xor_grokking_command_writes_and_draws_every_arm(tiny, tmp_path, capsys):
    path, picture = tmp_path / "found.json", tmp_path / "found.png"
    assert xor_grokking.main(["--seeds", "2", "--output", str(path), "--picture", str(picture)]) == 0
    (name, found), *others = json.loads(path.read_text()).items()
    assert name == "small" and not others and found["seeds"] == 2
    assert found["steps"] == [0, 1, 2, 3, 5] and len(found["gen_step"]) == 2
    for measured in xor_grokking.SHOWN:
        assert len(found[measured]) == len(found[f"{measured}_sd"]) == 5
        assert all(0 <= value <= 1 for value in found[measured])
    assert picture.stat().st_size > 1000
    out = capsys.readouterr().out
    assert "flipped labels" in out and "tep" in out
    with pytest.raises(SystemExit):
        xor_grokking.main(["medium"])
    assert "no arm named 'medium'; there are small" in capsys.readouterr().err


def test_the_xor_grokking_figures_on_file_are_of_every_arm_and_show_the_delay():
    found = json.loads(xor_grokking.RESULTS.read_text(encoding="utf-8"))
    assert found.keys() == xor_grokking.ARMS.keys()
    for of_arm in found.values():
        assert of_arm["seeds"] == xor_grokking.SEEDS
    small, large = found["small"], found["large"]
    assert small["train_acc"][1] == 1 and small["val_acc"][1] < 0.6 < 0.98 < small["val_acc"][-1]
    assert min(large["fit_step"]) >= 50, "fitted late from large weights"
    assert large["val_acc"][-1] > large["val_acc"][large["steps"].index(100)] + 0.1
