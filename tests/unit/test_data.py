"""A fit that trains on some samples of its training set alone."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, Subset, TensorDataset, WeightedRandomSampler

from lightning_recipes.core.data import SamplesKept, only
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.labels import known_labels
from lightning_recipes.core.loader import end_of_recording
from lightning_recipes.core.random import held_left_alone
from tests.stock import Classifier, Watch, quiet, samples

X, Y = samples(12)
ODD = [1, 3, 5, 7, 9, 11]


def trained_on(data, choose, **trainer):
    """The labels of every batch, and the data set that was asked of."""
    found, asked = [], []
    run = quiet(callbacks=[Watch(on_train_batch_start=lambda t, m, batch, index: found.append(batch[1].tolist()))])

    def chosen(dataset):
        asked.append(dataset)
        return choose

    with ExitStack() as undo:
        SamplesKept(run, None, chosen).install(undo)
        undo.callback(end_of_recording)  # a session does it where there is a recipe
        run.fit(Classifier(), data)
    return found, asked


def test_the_whole_data_set_is_asked_of_and_the_rest_is_left_out():
    data = TensorDataset(X, torch.arange(12) % 3)
    found, asked = trained_on(DataLoader(data, 4), ODD)
    assert asked == [data] and found == [[1, 0, 2, 1], [0, 2]]


class Backwards(Sampler):
    """A sampler of the user's own."""

    def __iter__(self):
        return iter(range(11, -1, -1))

    def __len__(self):
        return 12


def test_a_sampler_of_the_users_own_keeps_its_order_over_what_is_left():
    found, _ = trained_on(DataLoader(TensorDataset(X, Y), 4, sampler=Backwards()), ODD)
    assert found == [Y[[11, 9, 7, 5]].tolist(), Y[[3, 1]].tolist()]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(X, Y))


class Batches:
    def __iter__(self):
        return iter([(X, Y)])


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (lambda: DataLoader(Stream(), 4), "no part of a DataLoader of Stream can be taken"),
        (lambda: [DataLoader(TensorDataset(X, Y))] * 2, "no part of several loaders can be taken"),
        (lambda: Batches(), "no part of a Batches can be taken"),
    ],
)
def test_what_no_part_can_be_taken_of_is_refused(data, says):
    with pytest.raises(RecipeError, match=says):
        trained_on(data(), ODD)


def test_weights_go_with_their_samples_and_draws_with_their_share():
    sampler = WeightedRandomSampler(torch.arange(12.0), 24, generator=torch.Generator().manual_seed(0))
    loader = only(DataLoader(TensorDataset(X, Y), 4, sampler=sampler), ODD)
    assert loader.sampler.weights.tolist() == [1, 3, 5, 7, 9, 11] and len(loader.sampler) == 12
    assert loader.sampler.generator is sampler.generator


def test_labels_that_a_data_set_knows_are_not_read():
    class Unread(Dataset):
        targets = [2, 0, 1]  # noqa: RUF012

        def __len__(self):
            return 3

    class Unknown(Unread):
        targets = None

    assert known_labels(Subset(Unread(), [2, 0])).tolist() == [1, 2] and known_labels(Unknown()) is None


def test_generators_that_a_data_set_holds_end_as_they_began():
    class Holds:
        def __init__(self):
            self.own = torch.Generator().manual_seed(0)

    holds = Holds()
    before = holds.own.get_state()
    with held_left_alone(holds):
        torch.rand(3, generator=holds.own)
    assert torch.equal(before, holds.own.get_state())
