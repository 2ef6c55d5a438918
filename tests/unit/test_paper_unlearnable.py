"""The command of the mixture experiment goes through on every arm."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.papers import unlearnable

LITTLE = ["--device", "cpu", "--images", "40", "--steps", "1", "--epochs", "1", "--surrogate-epochs", "1"]


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """Ten images of each of ten classes, of which the command takes a share."""
    draws, labels = np.random.default_rng(0), np.arange(100) % 10
    images = draws.integers(0, 256, (100, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "cifar10_subset.npz", x_train=images, y_train=labels, x_test=images[:20], y_test=labels[:20])
    monkeypatch.setenv("LIGHTNING_RECIPES_DATA", str(tmp_path))
    monkeypatch.setattr(unlearnable, "ALL", 100)


def test_the_unlearnable_command_trains_every_arm_on_one_build(cifar, tmp_path, capsys):
    args = [*LITTLE, "--output", str(tmp_path / "found.json"), "--cache", str(tmp_path / "cache")]
    assert unlearnable.main(args) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["images"] == 40 and found["device"] == "CPU" and found["steps"] == 1 and found["seeds"] == 1
    out = capsys.readouterr().out
    for arm, (words, _) in unlearnable.ARMS.items():
        assert 0 <= found["found"][arm]["mean"] <= 1 and words in out
    assert len(found["curves"][0]["bayes_error"]) == 2
    assert len(list((tmp_path / "cache").glob("*.pt"))) == 1


def test_the_unlearnable_command_says_what_is_missing_or_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LIGHTNING_RECIPES_DATA", str(tmp_path))
    assert unlearnable.main(LITTLE) == 1
    assert "set LIGHTNING_RECIPES_DATA to the folder with cifar10_subset.npz" in capsys.readouterr().err
    for wrong, says in (
        (["--seeds", "0"], "--seeds must be at least 1; got 0"),
        (["--images", "5"], "from 20 to 10000"),
    ):
        with pytest.raises(SystemExit):
            unlearnable.main(["--device", "cpu", *wrong])
        assert says in capsys.readouterr().err
