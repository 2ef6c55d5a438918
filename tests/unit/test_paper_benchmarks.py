"""The commands that reproduce a paper go through, and what they have written is whole."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.papers import lightweight_cnn, xor_grokking


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
