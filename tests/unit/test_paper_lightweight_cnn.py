"""The command that reproduces the lightweight CNN goes through, and what it has written is whole."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.papers import lightweight_cnn


@pytest.fixture
def little(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (300, 1, 28, 28), dtype=torch.uint8, generator=generator)
    y = torch.arange(300) % 10
    monkeypatch.setattr(lightweight_cnn, "images", lambda name, held_out: (x[:200], y[:200], x[200:], y[200:]))
    monkeypatch.setattr(lightweight_cnn, "STAGE1_EPOCHS", 1)


def test_the_lightweight_cnn_command_writes_every_arm(little, tmp_path, capsys):
    path = tmp_path / "found.json"
    assert lightweight_cnn.main(["mnist", "--seeds", "2", "--output", str(path)]) == 0
    (name, found), *others = json.loads(path.read_text()).items()
    assert name == "mnist" and not others
    assert found["test_images"] == 100 and found["seeds"] == 2
    assert found["arms"].keys() == lightweight_cnn.ARMS.keys()
    for arm in found["arms"].values():
        assert 0 <= arm["clean"] <= 1 and 0 <= arm["augmented"] <= 1
    out = capsys.readouterr().out
    assert all(words in out for words in lightweight_cnn.ARMS.values())
    assert lightweight_cnn.main(["fashion_mnist", "--seeds", "1", "--held-out", "--output", str(path)]) == 0
    assert json.loads(path.read_text()).keys() == {"mnist"}, "what was held out is no result"


def test_the_same_seed_gives_the_same_figures(little):
    assert lightweight_cnn.run("mnist", 1) == lightweight_cnn.run("mnist", 1)


def test_missing_data_and_unknown_sets_are_said(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("LIGHTNING_RECIPES_DATA", str(tmp_path))
    assert lightweight_cnn.main(["--output", str(tmp_path / "none.json")]) == 1
    assert "mnist left out: set LIGHTNING_RECIPES_DATA to the folder with mnist.npz" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        lightweight_cnn.main(["cifar"])
    assert "no set named 'cifar'; there are mnist, fashion_mnist" in capsys.readouterr().err


def test_the_figures_on_file_are_of_every_arm_at_the_papers_size():
    found = json.loads(lightweight_cnn.RESULTS.read_text(encoding="utf-8"))
    assert found.keys() == lightweight_cnn.PAPER.keys()
    for name, of_set in found.items():
        assert of_set["seeds"] == lightweight_cnn.SEEDS
        assert of_set["paper"] == {"accuracy": lightweight_cnn.PAPER[name], "parameters": 14_862}
        assert of_set["arms"].keys() == lightweight_cnn.ARMS.keys()
        assert of_set["arms"]["gradual"]["parameters"] == 13_850 <= of_set["paper"]["parameters"]
