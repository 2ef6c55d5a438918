"""Coarser labels over another data module."""

from __future__ import annotations

import pytest
import torch
import yaml

from lightning_recipes import catalog
from lightning_recipes.datamodules import DigitsDataModule, SuperclassDataModule


def test_digits_are_even_or_odd_and_keep_their_digit() -> None:
    data = SuperclassDataModule(DigitsDataModule(), [0, 1] * 5, ["even", "odd"], batch_size=8)
    data.setup()
    assert data.class_names == ["even", "odd"] and data.num_classes == 2
    plain = DigitsDataModule()
    plain.setup()
    for ours, theirs in (
        (data.train_set, plain.train_set),
        (data.val_set, plain.val_set),
        (data.test_set, plain.test_set),
    ):
        assert torch.equal(ours.fine, theirs.labels) and torch.equal(ours.labels, theirs.labels % 2)
        image, label = ours[3]
        assert torch.equal(image, theirs[3][0]) and label == theirs[3][1] % 2
    x, y = next(iter(data.train_dataloader()))
    assert x.shape == (8, 1, 8, 8) and set(y.tolist()) <= {0, 1}


def test_probes_see_the_training_images_without_their_augmentation() -> None:
    turned = SuperclassDataModule(DigitsDataModule(train_transform=lambda image: image.flip(-1)), [0, 1] * 5)
    turned.setup()
    plain = turned.plain_train_set
    assert torch.equal(plain[0][0], turned.train_set[0][0].flip(-1)) and torch.equal(plain.fine, turned.train_set.fine)


def test_bad_super_classes_are_one_error() -> None:
    with pytest.raises(ValueError, match=r"superclasses=\[0, 2\]: must be numbers from 0 to at least 1, none left out"):
        SuperclassDataModule(DigitsDataModule(), [0, 2])
    with pytest.raises(ValueError, match=r"names=.*: must be None or 2 names"):
        SuperclassDataModule(DigitsDataModule(), [0, 1] * 5, ["even"])
    with pytest.raises(ValueError, match="superclasses=4: must be one of each 10 classes"):
        SuperclassDataModule(DigitsDataModule(), [0, 1, 0, 1]).setup()


def test_the_papers_super_classes_are_20_of_5_classes_each() -> None:
    path = catalog.config_folder() / "papers" / "projection_head_cifar100.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    of = torch.tensor(config["data"]["init_args"]["superclasses"])
    assert of.bincount().tolist() == [5] * 20
    # the five aquatic mammals: beaver, dolphin, otter, seal, whale
    assert torch.where(of == 0)[0].tolist() == [4, 30, 55, 72, 95]
