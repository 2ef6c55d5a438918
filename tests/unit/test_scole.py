"""A stream of recurring tasks: which classes come when, what is replayed, and a fit that goes through it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_recipes.callbacks import (
    AAER,
    GLAD,
    PSKD,
    SLCA,
    CutMix,
    ExactResume,
    ForgettingMonitor,
    GroupMask,
    LogitAdjustment,
)
from lightning_recipes.callbacks.continual.forgetting import better, forgotten, in_words
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.tasks import recur, supplied
from lightning_recipes.datamodules import ClassIncrementalDataModule, DigitsDataModule, SCoLeDataModule
from lightning_recipes.datamodules.scole import Memory, Schedule, probabilities
from tests.conformance.lives import process
from tests.stock import Classifier, Watch, mlp, quiet, same, weights


def schedule(tasks=40, classes=10, per_task=2, **arguments):
    return Schedule(tasks, classes, per_task, **arguments).tasks()


# -- which classes come when -----------------------------------------------------------------------------------------


def test_probabilities_by_hand():
    by_hand = [0.29112, 0.26274, 0.23581, 0.21033]  # (1, .95, .90, .85)^2 = 1, .9025, .81, .7225 over 3.435
    assert probabilities(4, 2.0) == pytest.approx(by_hand, abs=1e-5)
    assert probabilities(4, 0.0) == pytest.approx([0.25] * 4)
    permuted = probabilities(4, 2.0, seed=3)
    assert sorted(permuted) == pytest.approx(sorted(by_hand), abs=1e-5)
    assert {tuple(probabilities(4, 2.0, seed).round(4)) for seed in range(8)} != {tuple(permuted.round(4))}
    assert probabilities(100, 1.0)[50] / probabilities(100, 1.0)[0] == pytest.approx(0.5), "f is 0.01 at 100 classes"
    assert (probabilities(200, 3.0) > 0).all()


def test_a_task_is_a_function_of_the_seed_and_its_number():
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    long, short = schedule(60), schedule(20)
    assert long[:20] == short, "not of how many there are"
    assert long == schedule(60) and long != schedule(60, seed=1)
    assert np.array_equal(before, np.random.get_state()[1]), "numpy's global generator is left alone"
    uniform = Schedule(60, 10, 2)
    assert sorted(uniform.draw(37, probabilities(10, 0.0, 0))) == long[37], "also on its own"


def test_uniform_tasks_have_different_classes_and_every_class_comes_alike():
    tasks = schedule(2000)
    assert all(len(set(task)) == 2 for task in tasks)
    counts = np.bincount(np.concatenate(tasks), minlength=10)
    assert abs(counts / 400 - 1).max() < 0.15
    assert recur(tasks) and not recur([[0, 1], [2]])


def test_uneven_classes_come_as_often_as_their_probability_says():
    p = probabilities(10, 10.0, 0)
    tasks = schedule(4000, per_task=1, entropy_decrease=10.0)
    assert np.bincount(np.concatenate(tasks), minlength=10) / 4000 == pytest.approx(p, abs=0.025)


def test_the_scenarios_cut_the_stream_as_they_say():
    low, high = set(range(5)), set(range(5, 10))
    incremental = schedule(40, scenario="incremental")
    assert all(set(task) <= low for task in incremental[:20]) and all(set(task) <= high for task in incremental[20:])
    forgetting = schedule(40, scenario="forgetting")
    assert all(set(task) <= low for task in forgetting[20:]) and not all(set(task) <= low for task in forgetting[:20])
    assert schedule(3, scenario="iid") == [list(range(10))] * 3
    couples = {tuple(task) for task in schedule(300, scenario="limited_couples", randomized_couples=0.1)}
    assert len(couples) == 4, "a tenth of 45"
    structured = schedule(8, 4, scenario="structured")
    assert structured == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3], [0, 1], [0, 2]]
    changed = schedule(300, 4, scenario="structured", randomized_order=1.0)
    assert changed != schedule(300, 4, scenario="structured") and [len(t) for t in changed].count(1) > 30, "doubles"


def test_a_class_that_came_becomes_rarer():
    often = schedule(10, 10, 1, prob_reduction=1e9)
    assert sorted(c for task in often for c in task) == list(range(10)), "each once before any comes again"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"per_task": 11}, "classes_per_task=11: must be at most the number of classes, 10"),
        ({"classes": 9, "scenario": "incremental"}, "another one for an odd number of classes, 9"),
        ({"per_task": 6, "scenario": "incremental"}, "classes_per_task=6: must be at most half of the 10 classes"),
        ({"per_task": 6, "scenario": "forgetting"}, "classes_per_task=6: must be at most half of the 10 classes"),
        ({"classes": 100, "per_task": 10, "scenario": "structured"}, "at most 1,000,000 combinations"),
        ({"scenario": "limited_couples", "randomized_couples": 0.001}, "randomized_couples=0.001: must be at least 1"),
    ],
)
def test_numbers_that_do_not_fit_the_classes(arguments, says):
    with pytest.raises(ValueError, match=says):
        schedule(**arguments)


# -- replay ----------------------------------------------------------------------------------------------------------


def test_frequency_replay_by_hand():
    counts = {0: 2, 1: 3, 2: 4, 3: 20}
    memory = Memory(50, counts, {c: float(n) for c, n in counts.items()})
    assert memory.frequent([3], 2, 0.01, 0.1) == [1, 2], "0 came too rarely; 3 of 50 are 0.06, 4 of 50 are 0.08"
    assert memory.frequent([3], 1, 0.01, 0.1) == [1], "the rarest first"
    assert memory.frequent([1], 2, 0.01, 0.1) == [2], "20 of 50 are too frequent"
    assert memory.frequent([3], 2, 0.06, 0.1) == [2], "above the lower bound"
    assert memory.frequent([3], 2, 0.01, 0.07) == [1]
    assert Memory().frequent([0], 2, 0.01, 0.1) == []


def test_random_replay_takes_classes_that_were_seen_and_are_not_current():
    memory, rng = Memory(5, dict.fromkeys(range(6), 1)), np.random.default_rng(0)
    numbers = []
    for _ in range(400):
        chosen = memory.at_random([0, 1], 3, 0.5, rng)
        assert len(set(chosen)) == len(chosen) and set(chosen) <= {2, 3, 4, 5}
        numbers.append(len(chosen))
    assert np.mean(numbers) == pytest.approx(1.5, abs=0.15) and max(numbers) == 3, "Binomial(3, 1/2)"
    assert memory.at_random([0, 1, 2, 3, 4, 5], 3, 1.0, rng) == []
    assert len(memory.at_random([0, 1, 2, 3], 9, 1.0, rng)) == 2


def test_stored_samples_are_written_over_ever_more_slowly():
    memory, rng, new = Memory(), np.random.default_rng(0), []
    for visit in range(30):
        before = set(memory.kept.get(7, np.empty(0)).tolist())
        memory.store(7, np.arange(1000 * visit, 1000 * visit + 999), 200, rng)
        memory.count([7])
        new.append(len(set(memory.kept[7].tolist()) - before))
        assert len(memory.kept[7]) == 200
    assert new[:4] == [200, 100, 66, 50] and new[-1] == 10
    memory.store(8, np.arange(5), 200, rng)
    assert sorted(memory.kept[8]) == [0, 1, 2, 3, 4], "all that there are"


def test_what_counts_is_a_visit_or_a_measured_accuracy():
    memory = Memory()
    memory.count([1, 4])
    memory.count([1, 2], {1: 0.25})
    assert memory.tasks == 2 and memory.occurrences == {1: 2, 4: 1, 2: 1}
    assert memory.stat == {1: 1.25, 4: 1.0, 2: 0.0}, "what was replayed and not measured counts 0"
    memory.store(1, np.arange(3), 2, np.random.default_rng(0))
    again = Memory.from_state(memory.state())
    assert (again.tasks, again.occurrences, again.stat) == (memory.tasks, memory.occurrences, memory.stat)
    assert again.kept.keys() == {1} and np.array_equal(again.kept[1], memory.kept[1])


# -- the data module -------------------------------------------------------------------------------------------------


def stream(tasks=6, **arguments):
    return SCoLeDataModule(DigitsDataModule(), num_tasks=tasks, **{"batch_size": 32, **arguments})


def ready(*args, **arguments):
    data = stream(*args, **arguments)
    data.prepare_data()
    data.setup()
    return data


class Flat(Classifier):
    def __init__(self, momentum=0.9):
        net = nn.Sequential(nn.Flatten(), mlp(64, 10, 32))
        super().__init__(net, lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=momentum))


def labels_in(loader):
    return torch.cat([y for _, y in loader])


def test_a_task_has_all_samples_of_its_classes_but_a_tenth():
    data = ready()
    for task in (0, 3):
        data.task = task
        whole = torch.isin(data.train_labels, torch.tensor(data.task_classes[task])).sum()
        labels = labels_in(data.train_dataloader())
        assert set(labels.tolist()) == set(data.task_classes[task])
        assert len(labels) + len(data.held_out) == whole and abs(len(data.held_out) - whole / 10) <= 1
        assert set(data.train_set.indices).isdisjoint(data.held_out)
    assert len(labels_in(ready(task_val_fraction=0.0).train_dataloader())) > len(labels)
    for name in ("val_dataloader", "test_dataloader"):
        assert set(labels_in(getattr(data, name)()).tolist()) == set(range(10)), "evaluation has all classes"


def test_both_streams_say_in_one_way_what_is_trained_on_and_a_sample_keeps_its_index():
    recurring, incremental = ready(), ClassIncrementalDataModule(DigitsDataModule(), tasks=5)
    incremental.setup()
    for data in (recurring, incremental):
        trainer = quiet()
        trainer.datamodule = None
        assert supplied(trainer) is None
        data.task = 2
        assert data.current_classes == data.task_classes[2]
        assert set(data.train_set.labels.tolist()) == set(data.current_classes)
        assert all(data.train_labels[i] == y for i, y in zip(data.train_set.indices, data.train_set.labels))
        assert len(data.plain_train_set) == len(data.train_set)


class Plain(Dataset):
    """Labels that stand nowhere but in the samples."""

    def __init__(self, classes):
        self.classes = classes

    def __len__(self):
        return 4 * self.classes

    def __getitem__(self, index):
        return torch.full((6,), float(index)), index % self.classes


class Somebodys(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(Plain(4), 3)

    def test_dataloader(self):
        return DataLoader(Plain(4), 3)


@pytest.mark.parametrize(
    "source",
    [lambda: (Plain(4), Plain(4)), lambda: (Plain(4), None, Plain(4)), Somebodys],
    ids=["two", "three", "module"],
)
def test_any_labelled_data_become_a_stream(source):
    data = SCoLeDataModule(source(), 5, 2, batch_size=3, task_val_fraction=0.0, validate_on="test")
    quiet(max_epochs=5).fit(module := Classifier(mlp(classes=4)), datamodule=data)
    assert data.num_classes == 4 and data.task == 4
    assert set(labels_in(data.test_dataloader()).tolist()) == {0, 1, 2, 3}
    assert module.trainer.num_val_batches == [6]


def test_a_fit_goes_through_tasks_of_different_lengths_with_one_optimizer():
    seen, optimizers = [], []
    watch = Watch(
        on_train_epoch_start=lambda t, m: (seen.append([]), optimizers.append(t.optimizers[0])),
        on_train_batch_end=lambda t, m, o, batch, i: seen[-1].append(batch[1]),
    )
    quiet(max_epochs=16, callbacks=[watch]).fit(Flat(), datamodule=(data := stream(8, epochs_per_task=2)))
    lengths = set()
    for epoch, batches in enumerate(seen):
        labels = torch.cat(batches)
        data.task = epoch // 2
        assert sorted(labels.tolist()) == sorted(data.train_set.labels.tolist()), "every sample once, none left out"
        lengths.add(len(labels))
    assert len(lengths) > 3
    assert len({id(each) for each in optimizers}) == 1
    orders = [torch.cat(batches).tolist() for batches in seen[:2]]
    assert orders[0] != orders[1], "shuffled anew in the second epoch of a task"


def test_optimizers_may_be_fresh_for_every_task():
    optimizers = []
    watch = Watch(on_train_epoch_start=lambda t, m: optimizers.append(t.optimizers[0]))
    quiet(max_epochs=6, callbacks=[watch]).fit(Flat(), datamodule=stream(3, epochs_per_task=2, reset_optimizer=True))
    assert len({id(each) for each in optimizers}) == 3 and optimizers[0] is optimizers[1]


@pytest.mark.parametrize("replay", ["random", "frequency", "freq_acc"])
def test_replayed_samples_are_stored_ones_of_other_classes(replay):
    data = stream(25, entropy_decrease=10.0, replay=replay, high_frequency=0.9, buffer_per_class=30, replay_budget=0.7)
    rows = []

    def note(trainer, module):
        rows.append((data.task, list(data.replayed), list(data.train_set.indices), copy.deepcopy(data.memory)))

    quiet(max_epochs=25, callbacks=[Watch(on_train_epoch_start=note)], limit_val_batches=0).fit(Flat(), datamodule=data)
    assert [row[0] for row in rows] == list(range(25)) and sum(len(row[1]) for row in rows) > 5
    for task, replayed, indices, memory in rows:
        assert memory.tasks == task and not set(replayed) & set(data.task_classes[task])
        stored = [i for c in replayed for i in memory.kept[c].tolist()]
        assert indices[len(indices) - len(stored) :] == stored
        assert set(data.train_labels[stored].tolist()) == set(replayed)
        for c, n in memory.occurrences.items():
            assert n == sum(c in data.task_classes[t] or c in rows[t][1] for t in range(task))
    if replay == "freq_acc":
        last = rows[-1][3]
        assert any(stat < last.occurrences[c] for c, stat in last.stat.items()), "accuracies, not visits"
        assert all(0 <= stat <= last.occurrences[c] for c, stat in last.stat.items())
        assert max(last.stat.values()) > 0


def test_the_held_out_accuracy_is_that_of_the_module_on_the_held_out_samples():
    data, found = stream(2, replay="freq_acc"), {}

    def by_hand(trainer, module):
        if trainer.current_epoch:
            return
        x = torch.stack([data.data.train_set[i][0] for i in data.held_out.tolist()])
        right = module(x).argmax(1) == data.train_labels[data.held_out]
        for c in data.task_classes[0]:
            found[c] = right[data.train_labels[data.held_out] == c].double().mean().item()

    watch = Watch(on_train_epoch_end=by_hand)
    quiet(max_epochs=2, callbacks=[watch], limit_val_batches=0).fit(Flat(), datamodule=data)
    assert {c: data.memory.stat[c] for c in data.task_classes[0]} == pytest.approx(found)


def test_a_buffer_of_no_size_is_no_replay():
    ends = []
    for arguments in ({}, {"replay": "random", "buffer_per_class": 0}):
        module = Flat()
        quiet(max_epochs=5, limit_val_batches=0).fit(module, datamodule=stream(5, **arguments))
        ends.append(weights(module))
    assert same(*ends)


def test_with_all_classes_in_every_task_the_stream_is_ordinary_epochs():
    module, plain = Flat(), Flat()
    data = stream(3, scenario="iid", task_val_fraction=0.0, seed=0)
    quiet(max_epochs=3, limit_val_batches=0).fit(module, datamodule=data)
    quiet(max_epochs=3, limit_val_batches=0).fit(plain, datamodule=DigitsDataModule(batch_size=32))
    assert same(weights(module), weights(plain))


@pytest.mark.parametrize(
    "arguments", [{"replay": "frequency", "high_frequency": 0.9}, {"replay": "freq_acc", "reset_optimizer": True}]
)
def test_a_resume_in_the_middle_of_a_task_is_exact(arguments, tmp_path):
    def fit(ckpt_path=None, *callbacks):
        data = stream(9, epochs_per_task=1, entropy_decrease=5.0, batch_size=64, **arguments)
        module = Flat()
        monitor = ForgettingMonitor(draw=False)
        recipes = [GroupMask(), monitor, ExactResume(), *callbacks]
        trainer = quiet(max_epochs=9, callbacks=recipes, enable_checkpointing=bool(callbacks), limit_val_batches=2)
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        return weights(module), data.memory.state(), monitor.curve

    saves = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    whole, memory, curve = fit(None, saves)
    written = sorted(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    for path in written[9::7]:
        again, its_memory, its_curve = fit(path)
        assert same(whole, again), path.stem
        assert str(its_memory) == str(memory) and its_curve == curve


def test_a_resume_between_tasks_needs_no_other_recipe(tmp_path):
    def fit(ckpt_path=None, *callbacks):
        data, module = stream(6, epochs_per_task=2, replay="random", buffer_per_class=20, batch_size=64), Flat()
        settings = {"max_epochs": 12, "enable_checkpointing": bool(callbacks), "limit_val_batches": 0}
        quiet(callbacks=list(callbacks), **settings).fit(module, datamodule=data, ckpt_path=ckpt_path)
        return weights(module)

    saves = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True)
    whole = fit(None, saves)
    for epoch in (1, 4, 7):
        assert same(whole, fit(tmp_path / f"epoch={epoch}.ckpt")), "in the middle of a task or at its end"


def test_two_ranks_share_out_what_one_process_reads(monkeypatch):
    def order(rank, world):
        data = ready()
        monkeypatch.setattr(SCoLeDataModule, "shard", {"num_replicas": world, "rank": rank})
        data.task = 3
        return [data.train_set.indices[i] for i in data.train_dataloader().sampler]

    whole, dealt = order(0, 1), [i for turn in zip(order(0, 2), order(1, 2), strict=True) for i in turn]
    assert dealt[: len(whole)] == whole and set(dealt) == set(whole)


@pytest.mark.ddp
def test_a_stream_with_replay_on_two_ranks_is_that_of_one_process(tmp_path):
    def fit(batch_size, **settings):
        module, monitor = Flat(0.0), ForgettingMonitor(draw=False)
        data = stream(
            12,
            entropy_decrease=5.0,
            replay="freq_acc",
            high_frequency=0.9,
            batch_size=batch_size,
            drop_last=True,
            buffer_per_class=32,
        )
        quiet(max_epochs=12, callbacks=[GroupMask(), monitor], **settings).fit(module, datamodule=data)
        return {"weights": weights(module), "memory": data.memory.state(), "replayed": data.replayed}

    def run(rank):
        torch.save(fit(16, devices=2, strategy="ddp", plugins=LightningEnvironment()), tmp_path / f"{rank}.pt")

    statuses = process(run, tmp_path, "two", ranks=2)
    assert statuses == [0, 0], "".join(path.read_text() for path in tmp_path.glob("*.error"))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    alone = fit(32)
    assert same(first["weights"], second["weights"])
    assert str(first["memory"]) == str(second["memory"]) == str(alone["memory"])
    assert len(alone["memory"]["kept"]) > 2 and first["replayed"] == second["replayed"] == alone["replayed"]
    for name, value in alone["weights"].items():
        assert torch.allclose(first["weights"][name], value, atol=1e-5), name


@pytest.mark.parametrize(
    "recipe", [PSKD, CutMix, lambda: AAER(0.05), lambda: GLAD(rank=None)], ids=["PSKD", "CutMix", "AAER", "GLAD"]
)
def test_other_recipes_go_through_a_stream(recipe):
    module = Flat(0.0)
    before = weights(module)
    data = stream(4, replay="random", buffer_per_class=20, batch_size=64)
    quiet(max_epochs=4, callbacks=[recipe()], limit_val_batches=0).fit(module, datamodule=data)
    now = weights(module)
    assert not same(before, now) and all(value.isfinite().all() for value in now.values())


def test_another_checkpoint_and_other_lengths_are_refused():
    data = ready(replay="random")
    again = ready(replay="random")
    again.load_state_dict({**data.state_dict(), "task": 2, "memory": {**Memory().state(), "tasks": 2}})
    assert again.task == 2 and again.memory.tasks == 2
    with pytest.raises(ValueError, match="another stream: replay='random' there and None here, seed=1664 there and 1"):
        ready(seed=1).load_state_dict(data.state_dict())
    with pytest.raises(RecipeError, match=r"SCoLeDataModule: the phases take 6 epochs .* is 5; set max_epochs=6"):
        quiet(max_epochs=5).fit(module := Flat(), datamodule=stream(6))
    assert "training_step" not in vars(module)


def test_a_second_plan_of_phases_is_refused_and_the_module_stays_stock():
    module = Flat()
    with pytest.raises(RecipeError, match="SCoLeDataModule and SLCA both cut the fit into phases; use one of them"):
        quiet(max_epochs=6, callbacks=[SLCA()]).fit(module, datamodule=stream(6))
    assert not module.net[1][4]._forward_hooks and "configure_optimizers" not in vars(module)
    with pytest.raises(RecipeError, match=r"LogitAdjustment: the training data may change from phase to phase"):
        quiet(max_epochs=6, callbacks=[LogitAdjustment()]).fit(module, datamodule=stream(6))
    quiet(max_epochs=6, limit_val_batches=0).fit(module, datamodule=stream(6))
    assert "configure_optimizers" not in vars(module)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"tasks": 0}, "num_tasks=0: must be at least 1"),
        ({"classes_per_task": 0}, "classes_per_task=0: must be at least 1"),
        ({"epochs_per_task": 0}, "epochs_per_task=0: must be at least 1"),
        ({"scenario": "random"}, "scenario='random': must be one of 'uniform', 'incremental'"),
        ({"entropy_decrease": -1}, "entropy_decrease=-1: must be at least 0"),
        ({"prob_reduction": 0}, "prob_reduction=0: must be at least 1"),
        ({"randomized_order": 2}, "randomized_order=2: must be between 0 and 1"),
        ({"randomized_couples": 0}, "randomized_couples=0: must be above 0 and at most 1"),
        ({"replay": "none"}, "replay='none': must be None, 'random', 'frequency' or 'freq_acc'"),
        ({"replay_budget": 2}, "replay_budget=2: must be between 0 and 1"),
        ({"low_frequency": 0.2}, "low_frequency=0.2: must be below 0.1"),
        ({"buffer_per_class": -1}, "buffer_per_class=-1: must be at least 0"),
        ({"task_val_fraction": 1}, "task_val_fraction=1: must be at least 0 and below 1"),
        ({"task_val_fraction": 0, "replay": "freq_acc"}, "must be above 0 for replay='freq_acc'"),
        ({"validate_on": "train"}, "validate_on='train': must be 'val' or 'test'"),
    ],
)
def test_bad_arguments_are_named(arguments, says):
    with pytest.raises(ValueError, match=says):
        stream(**arguments)


class Numbers(Plain):
    def __getitem__(self, index):
        return torch.zeros(6), float(index)


def test_data_that_are_no_stream_are_refused():
    with pytest.raises(ValueError, match="class 2 has no training sample"):
        SCoLeDataModule((TensorDataset(torch.zeros(4, 6), torch.tensor([0, 1, 3, 3])), None)).setup()
    with pytest.raises(RecipeError, match="labels of the training set must be class indices"):
        SCoLeDataModule((Numbers(3), None)).setup()
    with pytest.raises(ValueError, match="train_set: a list_iterator, must be a data set that is read by index"):
        SCoLeDataModule((iter([]), None)).setup()
    with pytest.raises(
        ValueError, match=r"task 0 \(classes \[\d, \d\]\) has \d+ training samples and so not one batch"
    ):
        quiet(max_epochs=6).fit(Flat(), datamodule=stream(6, batch_size=999, drop_last=True))


# -- what is measured ------------------------------------------------------------------------------------------------


def test_accuracy_and_forgetting_over_recurring_tasks(tmp_path, caplog):
    pytest.importorskip("matplotlib")
    from lightning.pytorch.loggers import CSVLogger

    data, monitor, by_hand = stream(12), ForgettingMonitor(), []

    def accuracies(trainer, module):
        x = torch.stack([x for x, _ in data.val_set])
        right = (module(x).argmax(1) == data.val_set.labels).double()
        by_hand.append([right[data.val_set.labels == c].mean().item() for c in range(10)] + [right.mean().item()])

    watch = Watch(on_validation_end=accuracies)
    logger = CSVLogger(tmp_path, name="run", version="")
    with caplog.at_level("INFO"):
        trainer = quiet(max_epochs=12, callbacks=[monitor, watch], logger=logger, check_val_every_n_epoch=3)
        trainer.fit(Flat(), datamodule=data)
    assert [row["task"] for row in monitor.curve] == [2, 5, 8, 11]
    seen: set[int] = set()
    for k, row in enumerate(monitor.curve):
        now, task = by_hand[k], int(row["task"])
        for each in data.task_classes[max(task - 2, 0) : task + 1]:
            seen |= set(each)
        best = [max(values[c] for values in by_hand[: k + 1]) for c in range(10)]
        assert row["acc_all"] == pytest.approx(now[10])
        assert row["forgetting"] == pytest.approx(np.mean([best[c] - now[c] for c in seen]))
    assert float(trainer.callback_metrics["forgetting/acc_class_3"]) == pytest.approx(by_hand[-1][3])
    assert (tmp_path / "run" / "forgetting.png").exists()
    assert f"ForgettingMonitor: {monitor.verdict}" in caplog.messages
    first, last = monitor.curve[0], monitor.curve[-1]
    words = f"on all 10 classes went from {first['acc_all']:.1%} after task 3 to {last['acc_all']:.1%} after task 12"
    assert words in monitor.verdict


def test_the_verdict_says_whether_anything_accumulates():
    row = {"task": 0.0, "acc_all": 0.2, "forgetting": 0.0, "acc_absent": 0.1}
    end = {"task": 99.0, "acc_all": 0.9, "forgetting": 0.04, "acc_absent": 0.85}
    words = in_words([row, end], 10)
    assert words == (
        "accuracy on all 10 classes went from 20.0% after task 1 to 90.0% after task 100: knowledge accumulates in"
        " spite of forgetting. A class is on average 4.0 points below its best; classes not in the task are at 85.0%"
    )
    still = in_words([row, {**end, "acc_all": 0.21, "acc_absent": float("nan")}], 10)
    assert "nothing accumulates: try GroupMask, no momentum or replay" in still and still.endswith("below its best")


def test_forgetting_of_a_stream_by_hand():
    best = better([0.5, float("nan"), 0.9], [0.7, 0.2, float("nan")])
    assert best == [0.7, 0.2, 0.9]
    assert forgotten([0.7, 0.9, 0.4], [0.5, 0.9, 0.0], [True, True, False]) == pytest.approx(0.1)
    assert forgotten(best, [0.7, 0.2, float("nan")], [True] * 3) == 0.0 == forgotten(best, best, [False] * 3)


def test_the_monitor_of_a_stream_changes_nothing():
    ends = []
    for callbacks in ([], [ForgettingMonitor(draw=False)]):
        module = Flat()
        quiet(max_epochs=4, callbacks=callbacks).fit(module, datamodule=stream(4))
        ends.append(weights(module))
    assert same(*ends)


def test_a_test_from_a_checkpoint_measures_all_classes(tmp_path):
    class Tested(Flat):
        def test_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

    module, data, path = Tested(), stream(3), tmp_path / "last.ckpt"
    trainer = quiet(max_epochs=3, callbacks=[ForgettingMonitor(draw=False)])
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(path)
    again = quiet(callbacks=[ForgettingMonitor(draw=False)])
    again.test(Tested(), datamodule=(fresh := stream(3)), ckpt_path=path, weights_only=True, verbose=False)
    assert fresh.task == 2
    x = torch.stack([x for x, _ in data.test_set])
    right = (module(x).argmax(1) == data.test_set.labels).double().mean().item()
    assert float(again.callback_metrics["forgetting/acc_all"]) == pytest.approx(right)
