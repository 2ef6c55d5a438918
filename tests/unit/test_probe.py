"""Reading the training set from within a fit."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.features import Taps
from lightning_recipes.core.probe import encode, reads_anew, samples_of, training_samples
from tests.stock import Classifier, Watch, in_two_ranks, mlp, quiet, same, samples, weights

X, Y = samples(14)


class Noisy(TensorDataset):
    """A transform that draws random numbers."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + torch.rand(()), y


class Plain(LightningDataModule):
    def __init__(self):
        super().__init__()
        self.plain_train_set = TensorDataset(X, Y)

    def train_dataloader(self):
        return DataLoader(Noisy(X, Y), 4, shuffle=True)


class WithDropout(nn.Sequential):
    def __init__(self):
        super().__init__(mlp()[:2], nn.Dropout(0.5), mlp()[2:])


def encoding(found, when=lambda trainer: True):
    """A callback that encodes the training set by the input of the last layer."""

    def look(trainer, module, *args):
        if when(trainer):
            with Taps(module, {"z": ("net.2.4", "input")}) as taps:
                found.append(encode(trainer, module, lambda: {"z": taps["z"]}))

    return Watch(on_train_batch_end=look)


def test_every_sample_once_in_order_with_the_plain_transform_where_there_is_one():
    found = []
    trainer = quiet(callbacks=[encoding(found, lambda trainer: trainer.global_step == 1)])
    module = Classifier(WithDropout())
    trainer.fit(module, datamodule=Plain())
    (encoded,) = found
    assert torch.equal(encoded.targets, Y)
    assert encoded.features["z"].shape == (14, 5)


def test_the_features_are_those_of_the_network_in_eval_mode():
    found, module = [], Classifier(WithDropout(), lambda p: torch.optim.SGD(p, lr=0.0))
    quiet(callbacks=[encoding(found)]).fit(module, DataLoader(TensorDataset(X, Y), 4, shuffle=True))
    module.eval()
    expected = module.net[2][:2](module.net[0](X)).detach()
    assert len(found) == 4
    for encoded in found:
        assert torch.allclose(encoded.features["z"], expected, atol=1e-7)
        assert torch.equal(encoded.targets, Y)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_look_leaves_no_trace_in_the_run(workers):
    """Shuffled data with a random transform, and dropout: everything that draws a number."""
    ends = []
    for callbacks in ([], [encoding([])]):
        torch.manual_seed(3)
        module = Classifier(WithDropout())
        data = DataLoader(Noisy(X, Y), 4, shuffle=True, num_workers=workers)
        quiet(callbacks=callbacks, max_epochs=2).fit(module, data)
        ends.append(weights(module))
    assert same(*ends)


def test_a_short_last_batch_and_the_indices():
    seen = []

    def look(trainer, *args):
        seen.extend((len(x), share) for (x, y), share in training_samples(trainer))

    quiet(callbacks=[Watch(on_train_start=look)]).fit(Classifier(), DataLoader(TensorDataset(X, Y), 4))
    assert [size for size, _ in seen] == [4, 4, 4, 2]
    assert [index for _, share in seen for index in share] == list(range(14))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(X, Y))


class Batches:
    def __iter__(self):
        return iter([(X[:4], Y[:4])])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: DataLoader(Stream(), 4), "one DataLoader over a data set read by index; got DataLoader of Stream"),
        (lambda: Batches(), "got Batches"),
        (lambda: {"a": DataLoader(TensorDataset(X, Y)), "b": DataLoader(TensorDataset(X, Y))}, "got 2 loaders"),
    ],
)
def test_data_that_cannot_be_read_by_index_are_an_error(data, message):
    class Mean(Classifier):
        def training_step(self, batch, batch_idx):
            return next(self.parameters()).mean()

    watch = Watch(on_train_start=lambda trainer, module: training_samples(trainer))
    with pytest.raises(RecipeError, match=message):
        quiet(callbacks=[watch]).fit(Mean(), data())


def test_features_that_are_no_vectors_are_an_error():
    def look(trainer, module):
        with pytest.raises(RecipeError, match=r"one feature vector a sample; z is \(1,\) for 4 samples"):
            encode(trainer, module, lambda: {"z": torch.zeros(1)})

    quiet(callbacks=[Watch(on_train_start=look)]).fit(Classifier(), DataLoader(TensorDataset(X, Y), 4))


def _rank(rank, path):
    found = []
    trainer = quiet(
        devices=2,
        strategy="ddp",
        callbacks=[encoding(found, lambda trainer: trainer.global_step == 1)],
        plugins=LightningEnvironment(),
        limit_train_batches=1,
    )
    torch.manual_seed(0)
    module = Classifier(WithDropout(), lambda p: torch.optim.SGD(p, lr=0.0))
    trainer.fit(module, DataLoader(TensorDataset(X, Y), 3))
    torch.save((found[0].features["z"], found[0].targets), f"{path}/rank{rank}.pt")


@pytest.mark.ddp
def test_two_ranks_share_the_work_and_both_get_all_of_it_in_order(tmp_path):
    in_two_ranks(_rank, tmp_path)
    torch.manual_seed(0)
    module = Classifier(WithDropout()).eval()
    expected = module.net[2][:2](module.net[0](X)).detach()
    for rank in range(2):
        features, targets = torch.load(tmp_path / f"rank{rank}.pt")
        assert torch.equal(targets, Y)
        assert torch.allclose(features, expected, atol=1e-6)


class PartOfPlain(Plain):
    """A part of a part of the training set is shown."""

    def train_dataloader(self):
        return DataLoader(Subset(Subset(Noisy(X, Y), [9, 3, 5, 1]), [2, 0]), 2)


def test_of_a_part_of_the_training_set_the_plain_samples_are_read():
    found = []
    look = Watch(on_train_start=lambda trainer, module: found.append(list(training_samples(trainer))))
    quiet(callbacks=[look]).fit(Classifier(), datamodule=PartOfPlain())
    (((x, y), share),) = found[0]
    assert torch.equal(x, X[[5, 9]]) and torch.equal(y, Y[[5, 9]]) and share == [0, 1]


def test_a_random_transform_is_seen_and_leaves_no_trace():
    class Own(TensorDataset):
        def __init__(self):
            super().__init__(X, Y)
            self.own = torch.Generator().manual_seed(1)

        def __getitem__(self, index):
            return X[index] + torch.rand((), generator=self.own), Y[index]

    own = Own()
    states = torch.get_rng_state(), own.own.get_state()
    assert reads_anew(Noisy(X, Y)) and reads_anew(own) and not reads_anew(TensorDataset(X, Y))
    assert torch.equal(states[0], torch.get_rng_state()) and torch.equal(states[1], own.own.get_state())


def test_samples_are_read_in_batches_of_the_callers_own():
    data = DataLoader(TensorDataset(X, Y), 4, num_workers=1)
    samples = samples_of(data, batch_size=5, num_workers=0)
    assert [len(x) for (x, _), _ in samples] == [5, 5, 4] and samples.loader.num_workers == 0
