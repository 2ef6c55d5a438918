"""Two classes of another data module."""

from __future__ import annotations

import pytest
import torch

from lightning_recipes.datamodules import DigitsDataModule, TwoClassDataModule


def ready(**arguments) -> TwoClassDataModule:
    data = TwoClassDataModule(**{"data": DigitsDataModule(), "classes": (8, 1), **arguments})
    data.setup()
    return data


def test_all_samples_of_two_classes_are_labelled_0_and_1() -> None:
    data, plain = ready(), DigitsDataModule()
    plain.setup()
    assert data.class_names == [plain.class_names[8], plain.class_names[1]] and data.num_classes == 2
    for ours, theirs in ((data.train_set, plain.train_set), (data.test_set, plain.test_set)):
        there = torch.nonzero((theirs.labels == 8) | (theirs.labels == 1)).flatten()
        assert torch.equal(ours.labels, (theirs.labels[there] == 1).long())
        assert all(torch.equal(ours[i][0], theirs[j][0]) for i, j in ((0, int(there[0])), (-1, int(there[-1]))))


def test_as_many_training_samples_of_each_as_asked_for_and_the_same_by_seed() -> None:
    data = ready(samples=(5, 90))
    assert torch.bincount(data.train_set.labels).tolist() == [5, 90]
    assert torch.equal(data.test_set.labels, ready().test_set.labels)
    again, other = ready(samples=(5, 90)), ready(samples=(5, 90), seed=1)
    images = [torch.stack([each.train_set[i][0] for i in range(95)]) for each in (data, again, other)]
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"classes": (1, 1)}, r"classes=\(1, 1\): must be two different labels"),
        ({"classes": (1, 10)}, r"classes=\(1, 10\): must be labels below 10"),
        ({"samples": (0, 5)}, r"samples=\(0, 5\): must be None or two numbers of at least 1"),
        ({"samples": (5, 9999)}, r"samples=\(5, 9999\): must be at most \d+ of class 1"),
        ({"data": None}, "data=None: must be a data module"),
    ],
)
def test_bad_arguments_are_one_error(arguments: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ready(**arguments)
