"""The command that reproduces data diet goes through, and what it has written is whole."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.papers import data_diet


@pytest.fixture
def diet(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (300, 1, 8, 8), dtype=torch.uint8, generator=generator)
    y = torch.arange(300) % 10
    monkeypatch.setattr(data_diet, "images", lambda name: (x[:200], y[:200], x[200:], y[200:]))
    for name, value in {"TRAINING": 200, "BATCH": 20, "EPOCHS": 2, "AT_EPOCH": 1}.items():
        monkeypatch.setattr(data_diet, name, value)


def test_the_data_diet_command_writes_every_arm_and_draws(diet, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "found.json"
    arguments = ["fashion_mnist", "--seeds", "1", "--runs", "2", "--output", str(path), "--pictures", str(tmp_path)]
    assert data_diet.main(arguments) == 0
    ((name, found),) = json.loads(path.read_text()).items()
    assert (name, found["test_images"], found["seeds"], found["runs"]) == ("fashion_mnist", 100, 1, 2)
    assert found["clean"].keys() == data_diet.ARMS.keys() and found["noisy"].keys() == data_diet.NOISY_ARMS.keys()
    assert 0 <= found["auc"] <= 1 and 0 <= found["wrong_among_most_suspicious"] <= 1
    out = capsys.readouterr().out
    assert all(words in out for words in [*data_diet.ARMS, *data_diet.NOISY_ARMS])
    assert {each.name for each in tmp_path.glob("*.png")} == {"fashion_mnist_clean.png", "fashion_mnist_noisy.png"}


def test_the_data_diet_command_says_what_is_missing(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("LIGHTNING_RECIPES_DATA", str(tmp_path))
    data_diet.images.cache_clear()
    assert data_diet.main(["cifar10", "--output", str(tmp_path / "none.json")]) == 1
    assert "set LIGHTNING_RECIPES_DATA to the folder with cifar10_subset.npz" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        data_diet.main(["mnist"])
    assert "no set named 'mnist'; there are fashion_mnist, cifar10" in capsys.readouterr().err


def test_wrong_labels_are_a_tenth_and_every_one_is_wrong():
    y = torch.arange(1000) % 10
    labels, wrong = data_diet.with_wrong_labels(y)
    assert int(wrong.sum()) == 100 and torch.equal(labels != y, wrong)


def test_the_data_diet_figures_on_file_are_of_every_arm():
    found = json.loads(data_diet.RESULTS.read_text(encoding="utf-8"))
    assert "fashion_mnist" in found and found.keys() <= data_diet.FILES.keys()
    for of_set in found.values():
        assert (of_set["seeds"], of_set["runs"]) == (data_diet.SEEDS, data_diet.RUNS)
        assert of_set["clean"].keys() == data_diet.ARMS.keys()
        assert of_set["noisy"].keys() == data_diet.NOISY_ARMS.keys()
