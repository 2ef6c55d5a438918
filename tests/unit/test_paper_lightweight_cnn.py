"""The command that reproduces the lightweight CNN goes through, and what it has written is whole."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.papers import lightweight_cnn, subgradient_recovery


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
def few(monkeypatch):
    small = {"d": 6, "r": 1, "m": 90, "steps": 30}
    figures = {
        "scale": {"absolute errors": [(at, {"init_scale": at, **small}) for at in (1.0, 1e-3)]},
        "rank": {"of size 1": [(rank, {"rank": rank, "init_scale": 1.0, **small}) for rank in (3, 5)]},
    }
    monkeypatch.setattr(subgradient_recovery, "FIGURES", figures)


def test_the_subgradient_recovery_command_writes_and_draws_both_figures(few, tmp_path, capsys):
    path = tmp_path / "found.json"
    assert subgradient_recovery.main(["--seeds", "2", "--output", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found.keys() == {"scale", "rank"}
    for name, curve in (("scale", "absolute errors"), ("rank", "of size 1")):
        assert found[name]["seeds"] == 2
        points = found[name]["curves"][curve]
        assert len(points["at"]) == len(points["median"]) == 2
        assert all(low <= middle <= high for low, middle, high in zip(*(points[k] for k in ("low", "median", "high"))))
        assert (tmp_path / f"found_{name}.png").stat().st_size > 1000
    assert "smallest and largest" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        subgradient_recovery.main(["width"])
    assert "no figure named 'width'; there are scale, rank" in capsys.readouterr().err


def test_the_subgradient_recovery_figures_on_file_show_the_small_start_and_not_the_rank():
    found = json.loads(subgradient_recovery.RESULTS.read_text(encoding="utf-8"))
    assert found.keys() == subgradient_recovery.FIGURES.keys()
    scale = found["scale"]["curves"]["absolute errors"]
    assert scale["at"] == list(subgradient_recovery.SCALES)
    assert scale["median"][0] > 0.1 and scale["median"][3] < 5e-3, "from size 1 and from 1e-3"
    small = found["rank"]["curves"]["first factors of size 1e-6"]["median"]
    assert max(small) < 1.25 * min(small), "the rank does not matter"
