"""The command that does adaptive smoothing's experiment goes through, and what it writes is whole."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from benchmarks.papers import adaptive_smoothing
from lightning_recipes.modules import CifarResNet


@pytest.fixture
def little_cifar(monkeypatch):
    """Random images, untrained networks and a mixing network that trains on one batch."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(24, 3, 32, 32, generator=generator), torch.arange(24) % 10
    monkeypatch.setattr(adaptive_smoothing, "images", lambda part: (x, y))
    monkeypatch.setattr(adaptive_smoothing, "standard", lambda: CifarResNet(8).eval())
    convolutions = nn.Sequential(nn.Conv2d(3, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU())
    robust = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(2048, 10)).eval()
    monkeypatch.setattr(adaptive_smoothing, "robust", lambda: robust)
    monkeypatch.setattr(adaptive_smoothing, "BATCH", 12)
    monkeypatch.setattr(adaptive_smoothing, "STEPS", 1)
    little = {"widths": (48, 4, 4, 4), "iterations": 1, "targets": 1, "further": 2}
    monkeypatch.setattr(adaptive_smoothing, "TRAINING", {**adaptive_smoothing.TRAINING, **little})


def test_the_adaptive_smoothing_command_writes_every_arm(little_cifar, tmp_path, capsys):
    path = tmp_path / "found.json"
    assert adaptive_smoothing.main(["--images", "12", "--test", "10", "--output", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["test_images"] == 10 and found["attack"] == "apgd-1-1"
    assert found["arms"].keys() == adaptive_smoothing.ARMS.keys()
    for arm in found["arms"].values():
        assert 0 <= arm["attacked"] <= arm["clean"] <= 1
    out = capsys.readouterr().out
    assert all(arm in out for arm in adaptive_smoothing.ARMS)
    path.unlink()
    assert adaptive_smoothing.main(["--images", "12", "--test", "10", "--held-out", "--output", str(path)]) == 0
    assert not path.exists(), "what was held out is no result"


def test_adaptive_smoothing_says_which_data_are_missing(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("LIGHTNING_RECIPES_DATA", str(tmp_path))
    adaptive_smoothing.images.cache_clear()
    assert adaptive_smoothing.main([]) == 1
    assert "left out: set LIGHTNING_RECIPES_DATA to the folder with cifar10_subset.npz" in capsys.readouterr().err
