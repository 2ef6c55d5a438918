"""Sample ids under every way in which a loader may bring a batch, and that nothing of the user's ever sees them."""

from __future__ import annotations

import itertools
import random
from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_recipes.callbacks import ExactResume
from lightning_recipes.core.data import ClassesShown
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.prepare import Plan
from lightning_recipes.core.recipe import Recipe
from lightning_recipes.core.sample_ids import SampleIds
from tests.stock import Classifier, Watch, quiet

N = 13
X = torch.rand(N, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(N) % 3


class Named(Dataset):
    """Samples whose input says which they are: its first entry is the index."""

    def __init__(self, x: torch.Tensor = X) -> None:
        self.x = x.clone()
        self.x[:, 0] = torch.arange(len(x))
        self.targets = Y.tolist()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: Any) -> Any:
        return self.x[index], torch.as_tensor(self.targets)[index]


class Ids(Recipe):
    """Keeps, batch by batch, the ids and what the batch says of itself."""

    def __init__(self) -> None:
        self.seen: list[tuple[list[int], list[int]]] = []
        self.sizes: list[int] = []

    def declare(self, plan: Plan) -> None:
        self.ids = SampleIds(plan.trainer, "Ids", " or something else", self.sizes.append)
        plan.install(self.ids)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append((self.ids.now().tolist(), _names(batch)))


def _names(batch: Any) -> list[int]:
    x = batch["x"] if isinstance(batch, dict) else batch[0]
    return x[..., 0].reshape(-1).long().tolist()


def fit(loader: Any, module: Any = None, *callbacks: Any, epochs: int = 2, **settings: Any) -> Ids:
    ids = Ids()
    quiet(callbacks=[ids, *callbacks], max_epochs=epochs, **settings).fit(module or Classifier(), loader)
    return ids


def right(ids: Ids, per_epoch: int | None = None) -> None:
    assert ids.seen
    for found, names in ids.seen:
        assert found == names
    if per_epoch is not None:
        assert len(ids.seen) == per_epoch


# -- samplers and workers ----------------------------------------------------------------------------------------------


class Backwards(Sampler[Any]):
    """Gives NumPy's integers."""

    def __iter__(self) -> Any:
        return iter(np.arange(N)[::-1])

    def __len__(self) -> int:
        return N


class NoLength(BatchSampler):
    """How many batches there are is not known beforehand: Lightning fetches one ahead."""

    def __len__(self) -> int:
        raise TypeError("unknown")


@pytest.mark.parametrize(
    "loader",
    [
        lambda: DataLoader(Named(), 4),
        lambda: DataLoader(Named(), 4, shuffle=True),
        lambda: DataLoader(Named(), 4, sampler=Backwards(), drop_last=True),
        lambda: DataLoader(Named(), 4, sampler=WeightedRandomSampler(torch.arange(N).float(), 20)),
        lambda: DataLoader(Named(), 4, sampler=RandomSampler(Named(), replacement=True)),
        lambda: DataLoader(Named(), batch_sampler=BatchSampler(RandomSampler(Named()), 5, False)),
        lambda: DataLoader(Named(), batch_sampler=NoLength(RandomSampler(Named()), 4, False)),
        lambda: DataLoader(Named(), batch_size=None, sampler=BatchSampler(RandomSampler(Named()), 5, False)),
        lambda: StatefulDataLoader(Named(), 4, shuffle=True),
        lambda: DataLoader(Named(), 4, collate_fn=lambda samples: [torch.stack(part) for part in zip(*samples)]),
    ],
    ids=[
        "in order",
        "shuffled",
        "a sampler of NumPy's integers",
        "weighted",
        "with replacement",
        "a batch sampler",
        "no length",
        "batches from the data set",
        "torchdata's",
        "a collate_fn",
    ],
)
def test_ids_are_the_indices_of_the_data_set(loader: Any) -> None:
    ids = fit(loader())
    right(ids)
    assert set(ids.sizes) == {N}
    assert ids.ids.total == N


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_workers_bring_them_in_the_order_of_the_batches(persistent: bool, exact: bool) -> None:
    loader = DataLoader(Named(), 2, shuffle=True, num_workers=2, persistent_workers=persistent)
    right(fit(loader, None, *([ExactResume()] if exact else [])), per_epoch=14)


@pytest.mark.parametrize("first", [True, False])
def test_either_order_beside_exact_resume(first: bool) -> None:
    ids = Ids()
    callbacks = [ids, ExactResume()] if first else [ExactResume(), ids]
    quiet(callbacks=callbacks, max_epochs=2).fit(Classifier(), DataLoader(Named(), 4, shuffle=True))
    right(ids, per_epoch=8)


# -- which data set ----------------------------------------------------------------------------------------------------


def test_a_subset_of_a_subset_has_the_ids_of_the_data_set_below() -> None:
    inner = Subset(Named(), [12, 3, 5, 7, -1])
    ids = fit(DataLoader(Subset(inner, torch.tensor([4, 1, 3])), 2, shuffle=True))
    assert sorted(itertools.chain(*(found for found, _ in ids.seen[:2]))) == [3, 7, 12]
    assert ids.ids.total == N
    right(ids)


class WithLabels(Subset):
    labels = (0, 1)


class ByRulesOfItsOwn(Subset):
    def __getitems__(self, indices: list[int]) -> Any:
        return super().__getitems__([len(self) - 1 - index for index in indices])


def test_a_kind_of_subset_is_seen_through_unless_it_reads_by_rules_of_its_own() -> None:
    ids = fit(DataLoader(WithLabels(Named(), [12, 3]), 2), epochs=1)
    assert ids.ids.total == N and [found for found, _ in ids.seen] == [[12, 3]]
    ids = fit(DataLoader(ByRulesOfItsOwn(Named(), [12, 3]), 2), epochs=1)
    assert ids.ids.total == 2 and [found for found, _ in ids.seen] == [[0, 1]]


def test_several_data_sets_in_one_count_on() -> None:
    ids = fit(DataLoader(ConcatDataset([Named(X[:5]), Named(X[5:9])]), 3), epochs=1)
    assert [found for found, _ in ids.seen] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert ids.ids.total == 9


def test_another_part_of_the_data_shown_later_keeps_every_samples_id() -> None:
    """The classes of one task, then of another: the loader's own indices begin at 0 again, the ids do not."""
    module = Classifier()
    ids = Ids()

    class Tasks(Recipe):
        def declare(self, plan: Plan) -> None:
            self.shown = ClassesShown(plan.trainer, self)
            self.shown.training = [0]
            plan.install(self.shown)

        def on_train_epoch_end(self, trainer: Any, *args: Any) -> None:
            self.shown.training = [2]

    trainer = quiet(callbacks=[Tasks(), ids], max_epochs=2, reload_dataloaders_every_n_epochs=1)
    trainer.fit(module, DataLoader(Named(), 4, shuffle=True))
    right(ids)
    epochs = [sorted(itertools.chain(*(found for found, _ in part))) for part in (ids.seen[:2], ids.seen[2:])]
    assert epochs == [[0, 3, 6, 9, 12], [2, 5, 8, 11]]


# -- nobody sees them --------------------------------------------------------------------------------------------------


class Structured(Classifier):
    """Dict batches, and hooks that look at them."""

    def __init__(self) -> None:
        super().__init__()
        self.types: set[Any] = set()

    def _look(self, batch: Any) -> Any:
        self.types.add((type(batch), tuple(batch)))
        return batch

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self._look(batch)

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        return self._look(batch)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self._look(batch)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self._look(batch)
        return super().training_step((batch["x"], batch["y"]), batch_idx)


def test_any_structure_comes_as_the_users_collate_fn_made_it() -> None:
    given = []

    def collate(samples: Any) -> Any:
        given.append((type(samples), {type(sample) for sample in samples}))
        return {"x": torch.stack([x for x, _ in samples]), "y": torch.stack([y for _, y in samples])}

    module = Structured()
    watch = Watch(
        on_train_batch_start=lambda trainer, m, batch, i: module._look(batch),
        on_train_batch_end=lambda trainer, m, outputs, batch, i: module._look(batch),
    )
    right(fit(DataLoader(Named(), 4, shuffle=True, collate_fn=collate), module, watch), per_epoch=8)
    assert module.types == {(dict, ("x", "y"))}
    assert given == [(list, {tuple})] * 8


def test_a_data_set_that_fetches_many_at_once_is_asked_for_many_at_once() -> None:
    asked: list[Any] = []

    class Many(Named):
        def __getitems__(self, indices: Any) -> Any:
            asked.append(list(indices))
            return [self[index] for index in indices]

    right(fit(DataLoader(Many(), 4), epochs=1))
    assert asked == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12]]


def test_the_loader_is_the_users_own_during_the_fit_and_after_it() -> None:
    data = Named()
    loader = DataLoader(data, 4, num_workers=1, persistent_workers=True)
    before = set(vars(loader))
    collate = loader.collate_fn
    shown = []

    def look(trainer: pl.Trainer, *args: Any) -> None:
        shown.append(trainer.train_dataloader.dataset is data and trainer.train_dataloader.collate_fn is collate)

    right(fit(loader, None, Watch(on_train_batch_end=look)))
    assert shown == [True] * 8
    assert set(vars(loader)) == before
    assert loader.dataset is data
    assert [len(part) for part in next(iter(loader))] == [4, 4], "plain batches again"


def test_whoever_iterates_over_the_loader_besides_the_fit_gets_plain_batches() -> None:
    loader = DataLoader(Named(), 4)
    found = []
    ids = fit(loader, None, Watch(on_train_batch_start=lambda *args: found.append(next(iter(loader)))), epochs=1)
    assert all(isinstance(batch, list) and len(batch) == 2 for batch in found)
    right(ids, per_epoch=4)


class _Tells(Dataset):
    """Says in a batch what its worker sees of the data set."""

    def __init__(self) -> None:
        self.mark = 0

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        seen = get_worker_info().dataset
        return torch.tensor([index, self.mark, seen.mark, len(seen), 0, 0]).float(), torch.tensor(0)


def _mark(worker: int) -> None:
    get_worker_info().dataset.mark = 7


def test_a_worker_init_fn_reaches_the_data_set_itself() -> None:
    ids = Ids()
    told = []
    watch = Watch(on_train_batch_end=lambda trainer, m, outputs, batch, i: told.append(batch[0][:, :4].tolist()))
    loader = DataLoader(_Tells(), 2, num_workers=1, worker_init_fn=_mark)
    quiet(callbacks=[ids, watch]).fit(Classifier(), loader)
    assert told == [[[0, 7, 7, 4], [1, 7, 7, 4]], [[2, 7, 7, 4], [3, 7, 7, 4]]]
    right(ids)


# -- resume ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_epoch_goes_on_with_the_ids_of_its_other_half(tmp_path: Any, workers: int) -> None:
    def run(ckpt: Any = None, *more: Any) -> list[Any]:
        pl.seed_everything(1 if ckpt else 0, verbose=False)
        ids, exact = Ids(), ExactResume()
        trainer = quiet(callbacks=[exact, ids, *more], max_epochs=2, enable_checkpointing=bool(more))
        loader = DataLoader(Subset(Named(), range(1, N)), 2, shuffle=True, num_workers=workers)
        trainer.fit(Classifier(), loader, ckpt_path=ckpt)
        right(ids)
        return ids.seen

    whole = run(None, ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1))
    random.seed(9)
    assert run(str(tmp_path / "step=4.ckpt")) == whole[4:]
    assert len(whole) == 12


# -- refusals ----------------------------------------------------------------------------------------------------------

SAYS = "Ids needs a stable id per training sample; give a map-style dataset or something else "


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(Named())


class Batches:
    """Of tensors in memory."""

    def __iter__(self) -> Any:
        return zip(X.split(4), Y.split(4))


class OwnIteration(DataLoader):
    """Iterates by itself."""

    def __iter__(self) -> Any:
        return iter([[X[:4], Y[:4]]])


class Words(Sampler[str]):
    def __iter__(self) -> Any:
        return iter("abcd")

    def __len__(self) -> int:
        return 4


class ByWord(Named):
    def __getitem__(self, index: str) -> Any:
        return super().__getitem__("abcd".index(index))


@pytest.mark.parametrize(
    ("loader", "why"),
    [
        (lambda: DataLoader(Stream(), 4), r"\(Stream is read from one end to the other\)"),
        (lambda: Batches(), r"\(the training data are a Batches\)"),
        (lambda: {"a": DataLoader(Named(), 4), "b": DataLoader(Named(), 4)}, r"\(there are 2 training loaders\)"),
        (lambda: OwnIteration(Named(), 4), r"\(its batches come from elsewhere than its data set\)"),
        (lambda: DataLoader(ByWord(), 4, sampler=Words()), r"\(its sampler gives 'a', no integers\)"),
    ],
    ids=["a stream", "batches in memory", "two loaders", "an iteration of its own", "a sampler of words"],
)
def test_data_without_an_index_are_refused(loader: Any, why: str) -> None:
    data = loader()
    module = Classifier()
    with pytest.raises(RecipeError, match=SAYS + why):
        fit(data, module)


def test_the_stand_in_is_taken_off_when_a_fit_fails() -> None:
    loader = DataLoader(TensorDataset(X, Y), 4)

    def fail(*args: Any) -> None:
        raise RuntimeError("today")

    with pytest.raises(RuntimeError, match="today"):
        fit(loader, None, Watch(on_train_batch_end=fail))
    assert "_get_iterator" not in vars(loader)
    assert isinstance(next(iter(loader)), list)


def test_two_who_ask_share_the_numbering() -> None:
    first, second = ExitStack(), ExitStack()
    trainer = quiet(max_epochs=1)
    found = []
    one, two = SampleIds(trainer, "One"), SampleIds(trainer, "Two")
    one.install(first)
    two.install(second)
    watch = Watch(on_train_batch_end=lambda *args: found.append((one.now().tolist(), two.now().tolist())))
    trainer.callbacks.append(watch)
    trainer.fit(Classifier(), DataLoader(Named(), 7))
    assert found == [([*range(7)], [*range(7)]), ([*range(7, 13)], [*range(7, 13)])]
