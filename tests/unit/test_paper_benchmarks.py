"""The commands that reproduce a paper go through, and what they have written is whole."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.papers import generalization_dynamics, lightweight_cnn


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
