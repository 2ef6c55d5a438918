"""Classes in turn: the data module, and the user's own loaders cut by class."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
)
from torchvision.transforms import v2

from lightning_recipes.core.data import ClassesShown, check_can_be_cut, only
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.tasks import cut, supplied, up_to
from lightning_recipes.datamodules import ClassIncrementalDataModule, DigitsDataModule
from lightning_recipes.modules import ImageClassifier
from tests.stock import Classifier, Watch, mlp, quiet


def ready(**kwargs):
    data = ClassIncrementalDataModule(DigitsDataModule(), **kwargs)
    data.prepare_data()
    data.setup()
    return data


def labels_in(loader):
    return torch.cat([y for _, y in loader])


# -- tasks -----------------------------------------------------------------------------------------------------------


def test_a_number_of_tasks_cuts_the_classes_in_order_and_the_first_are_the_larger():
    assert cut(5, range(10)) == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert cut(3, [4, 2, 0, 1, 3]) == [[4, 2], [0, 1], [3]]
    assert cut(1, range(3)) == [[0, 1, 2]]
    assert cut([[2], [0, 1]], range(3)) == [[2], [0, 1]]
    assert up_to([[2], [0, 1], [3]], 1) == [2, 0, 1]


@pytest.mark.parametrize(
    ("tasks", "says"),
    [
        (4, "tasks=4: must be from 1 to the number of classes, 3"),
        ([[0, 1], [1, 2]], "class 1 stands in them twice; tasks must not overlap"),
        ([[0], [2]], "class 1 is in no task; there are 3 classes"),
        ([[0, 1], [2, 3]], "there is no class 3; the classes are 0 to 2"),
        ([[0, 1, 2], []], "every task must have at least one class"),
    ],
)
def test_tasks_that_do_not_fit_the_classes_are_refused(tasks, says):
    with pytest.raises(RecipeError, match=says):
        cut(tasks, range(3))


# -- the data module -------------------------------------------------------------------------------------------------


def test_every_class_is_trained_on_in_one_task_and_labels_stay():
    data = ready(tasks=5, batch_size=50)
    assert sorted(up_to(data.task_classes, 4)) == list(range(10))
    seen = []
    for task in range(5):
        data.task = task
        labels = labels_in(data.train_dataloader())
        assert set(labels.tolist()) == set(data.task_classes[task])
        seen.append(len(labels))
    assert sum(seen) == len(data.data.train_set)


def test_evaluation_has_a_loader_for_every_task_so_far_or_one_for_all():
    data, together = ready(tasks=5), ready(tasks=5, evaluate="together")
    data.task = together.task = 2
    for name in ("val_dataloader", "test_dataloader"):
        loaders = getattr(data, name)()
        assert [set(labels_in(loader).tolist()) for loader in loaders] == [set(c) for c in data.task_classes[:3]]
        assert set(labels_in(getattr(together, name)()).tolist()) == set(data.seen_classes)
    data.task = 0
    assert isinstance(data.val_dataloader(), DataLoader), "a module without dataloader_idx can take the first task"


def test_validation_may_be_on_the_test_samples_as_the_fields_tables_are():
    data = ready(tasks=5, validate_on="test", task=1)
    for mine, test in zip(data.val_dataloader(), data.test_dataloader(), strict=True):
        assert torch.equal(labels_in(mine), labels_in(test))


def test_the_class_order_is_drawn_by_the_seed_or_given():
    assert ready(tasks=2).task_classes == ready(tasks=2).task_classes
    assert ready(tasks=2).task_classes != ready(tasks=2, seed=1).task_classes
    assert ready(tasks=2, class_order="labels").task_classes == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    order = [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    assert ready(classes_per_task=3, class_order=order).task_classes == [[9, 8, 7], [6, 5, 4], [3, 2, 1], [0]]
    first = ready(classes_per_task=2, first=4, class_order="labels")
    assert first.task_classes == [[0, 1, 2, 3], [4, 5], [6, 7], [8, 9]]
    assert ready(tasks=[[1, 0], [2, 3, 4, 5, 6, 7, 8, 9]]).task_classes[0] == [1, 0]


def test_the_training_order_is_a_function_of_seed_and_epoch():
    def orders(**kwargs):
        data = ready(tasks=2, batch_size=999, **kwargs)
        loader = data.train_dataloader()
        found = []
        for epoch in (0, 1, 0):
            loader.sampler.set_epoch(epoch)
            found.append(labels_in(loader))
        return found

    first, second, again = orders()
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(orders(), orders()))


def test_the_plain_training_samples_are_those_of_the_task_under_the_evaluation_transform():
    inner = DigitsDataModule(train_transform=v2.RandomErasing(p=1.0, value=255), mean=[0.5], std=[0.5])
    data = ClassIncrementalDataModule(inner, tasks=5, task=3)
    data.setup()
    plain, reference = data.plain_train_set, DigitsDataModule(mean=[0.5], std=[0.5])
    reference.setup()
    places = np.flatnonzero(np.isin(reference.train_set.labels.numpy(), data.task_classes[3]))
    assert len(plain) == len(places) == len(data.train_set)
    assert all(torch.equal(plain[i][0], reference.train_set[p][0]) for i, p in enumerate(places))
    assert any(not torch.equal(plain[i][0], data.train_set[i][0]) for i in range(10))


def test_a_checkpoint_holds_the_task_and_refuses_other_tasks():
    data = ready(tasks=5)
    data.task = 3
    again = ready(tasks=5)
    again.load_state_dict(data.state_dict())
    assert again.task == 3
    assert set(labels_in(again.train_dataloader()).tolist()) == set(data.task_classes[3])
    with pytest.raises(ValueError, match="written with other tasks"):
        ready(tasks=2).load_state_dict(data.state_dict())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "tasks=None, classes_per_task=None: give one of them"),
        ({"tasks": 2, "classes_per_task": 2}, "tasks=2, classes_per_task=2: give one of them"),
        ({"tasks": 0}, "tasks=0: must be at least 1"),
        ({"classes_per_task": 0}, "classes_per_task=0: must be at least 1"),
        ({"tasks": 2, "first": 3}, "first=3: must be None without classes_per_task"),
        ({"tasks": 2, "class_order": "random"}, "class_order='random': must be 'seed', 'labels' or a list"),
        ({"tasks": [[0], [1]], "class_order": [0, 1]}, "must be left out where tasks lists the classes"),
        ({"tasks": 2, "evaluate": "all"}, "evaluate='all': must be 'per_task' or 'together'"),
        ({"tasks": 2, "validate_on": "train"}, "validate_on='train': must be 'val' or 'test'"),
        ({"tasks": 2, "task": -1}, "task=-1: must be an integer of at least 0"),
    ],
)
def test_bad_arguments_are_named(arguments, says):
    with pytest.raises(ValueError, match=says):
        ClassIncrementalDataModule(DigitsDataModule(), **arguments)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"tasks": 11}, "must be from 1 to the number of classes, 10"),
        ({"tasks": 2, "task": 2}, "task=2: must be from 0 to 1"),
        ({"tasks": 2, "class_order": [0, 1, 2]}, "must be all classes from 0 to 9, each once"),
    ],
)
def test_what_does_not_fit_the_data_shows_in_setup(arguments, says):
    with pytest.raises(ValueError, match=says):
        ready(**arguments)


def test_a_module_trains_task_by_task_in_a_loop_and_a_recipe_finds_the_tasks():
    data, module = ready(tasks=5, batch_size=64), ImageClassifier(num_classes=10, in_chans=1)
    found = []
    for task in (0, 1):
        data.task = task
        trainer = quiet(limit_train_batches=2, callbacks=[Watch(on_fit_start=lambda t, m: found.append(supplied(t)))])
        trainer.fit(module, data)
        assert [k for k in trainer.callback_metrics if k.startswith("val/acc")] == (
            ["val/acc"] if task == 0 else ["val/acc/dataloader_idx_0", "val/acc/dataloader_idx_1"]
        )
    assert found == [(data, data.task_classes)] * 2


# -- the user's own loaders ------------------------------------------------------------------------------------------

X, Y = torch.arange(12.0)[:, None].expand(12, 6).contiguous(), torch.arange(12) % 3


class InReverse(SequentialSampler):
    def __iter__(self):
        return reversed(range(len(self.data_source)))


def shown(loader, classes):
    trainer, module = quiet(), Classifier(mlp(classes=3))
    seen, labels = [], []
    part = ClassesShown(trainer, trainer, labels.append)
    part.training = part.evaluation = classes

    def install(trainer, module, stage):
        part.trainer = trainer
        part.install(undo)

    with ExitStack() as undo:
        watch = Watch(
            setup=install,
            on_train_batch_end=lambda t, m, o, batch, i: seen.append(batch),
            on_validation_batch_end=lambda t, m, o, batch, i, *_: seen.append(batch),
        )
        quiet(callbacks=[watch]).fit(module, loader, DataLoader(loader.dataset, 5))
    return torch.cat([x[:, 0] for x, _ in seen]), torch.cat([y for _, y in seen]), labels


def test_the_users_own_loaders_show_some_classes_in_training_and_validation():
    x, y, labels = shown(DataLoader(TensorDataset(X, Y), 5), [0, 2])
    keep = [i for i in range(12) if i % 3 != 1]
    assert x.tolist() == keep + keep
    assert set(y.tolist()) == {0, 2}
    assert len(labels) == 1 and torch.equal(labels[0], Y), "the check sees all labels, once"


def test_a_shuffled_loader_stays_shuffled_by_its_own_generator():
    def order(seed):
        loader = DataLoader(TensorDataset(X, Y), 4, shuffle=True, generator=torch.Generator().manual_seed(seed))
        return only(loader, [0, 3, 5, 7]), loader

    first, loader = order(0)
    assert type(first.sampler) is RandomSampler and first.sampler.generator is loader.generator
    once, twice = (torch.cat([x[:, 0] for x, _ in first]).tolist() for _ in range(2))
    assert sorted(once) == sorted(twice) == [0, 3, 5, 7]
    assert [torch.cat([x[:, 0] for x, _ in order(0)[0]]).tolist() for _ in range(2)] == [once, once]


def test_any_other_sampler_keeps_its_order():
    data = TensorDataset(X, Y)
    chosen = only(DataLoader(data, 2, sampler=InReverse(data)), [1, 4, 10])
    assert torch.cat([x[:, 0] for x, _ in chosen]).tolist() == [10, 4, 1]
    assert len(chosen) == 2
    shuffled = DistributedSampler(data, 1, 0, seed=3)
    chosen = only(DataLoader(data, 2, sampler=shuffled), [1, 4, 10])
    orders = []
    for epoch in range(4):
        chosen.sampler.set_epoch(epoch)
        expected = [i for i in shuffled if i in (1, 4, 10)]
        orders.append(torch.cat([x[:, 0] for x, _ in chosen]).tolist())
        assert orders[-1] == expected
    assert len(set(map(tuple, orders))) > 1


def test_two_ranks_deal_out_the_order_of_one_process(monkeypatch):
    import lightning_recipes.core.data as module

    data, kept = TensorDataset(X[:11], Y[:11]), [0, 2, 3, 7, 9]
    whole = list(only(DataLoader(data, sampler=DistributedSampler(data, 1, 0)), kept).sampler)
    dealt = []
    for rank in range(2):
        samplers = [DistributedSampler(data, 2, r) for r in range(2)]

        def gather(orders, own, samplers=samplers):
            orders[:] = [list(s) for s in samplers]

        monkeypatch.setattr(module, "rank_and_world", lambda rank=rank: (rank, 2))
        monkeypatch.setattr(module, "active", lambda: True)
        monkeypatch.setattr(module.dist, "all_gather_object", gather)
        sampler = only(DataLoader(data, sampler=samplers[rank]), kept).sampler
        assert len(sampler) == 3
        dealt.append(list(sampler))
    joined = [index for turn in zip(*dealt) for index in turn]
    assert joined == [*whole, whole[0]], "the last turn is filled up with the first"


def test_other_settings_of_the_loader_are_kept():
    collate = torch.utils.data.default_collate
    loader = DataLoader(TensorDataset(X, Y), 4, drop_last=True, collate_fn=collate, pin_memory=False, timeout=0)
    chosen = only(loader, list(range(7)))
    assert (chosen.batch_size, chosen.drop_last, chosen.collate_fn, len(chosen)) == (4, True, collate, 1)
    assert list(only(loader, [])) == []


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(X, Y))


class Pairs(Dataset):
    """Labels that stand nowhere but in the samples; drawing them moves the random state."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return X[index] + torch.rand(()), int(Y[index])


def test_labels_that_stand_only_in_the_samples_are_read_without_a_trace():
    before = torch.get_rng_state()
    part = ClassesShown(quiet(), None)
    part.training = [1]
    loader = part._shown(DataLoader(ConcatDataset([Pairs(), Pairs()]), 3), True)
    assert torch.equal(before, torch.get_rng_state())
    assert len(loader.dataset) == 8
    assert all((y == 1).all() for _, y in loader)


def test_loaders_that_cannot_be_cut_are_refused():
    class Mine(DataLoader):
        pass

    data = TensorDataset(X, Y)
    for loader in (
        DataLoader(Stream(), 2),
        Mine(data, 2),
        DataLoader(data, batch_sampler=_Own(SequentialSampler(data), 2, False)),
        [1, 2],
    ):
        with pytest.raises(RecipeError, match=r"give a plain DataLoader .* or a ClassIncrementalDataModule"):
            check_can_be_cut(loader)
    part = only(DataLoader(data, sampler=SubsetRandomSampler([0, 1, 2])), [2, 5])
    with pytest.raises(RecipeError, match="SubsetRandomSampler does not go once over the 12 training samples"):
        list(part)


class _Own(BatchSampler):
    pass
