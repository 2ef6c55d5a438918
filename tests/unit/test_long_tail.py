"""Long tails: the data module, counting labels, accuracy by group, and the monitor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from lightning_recipes.callbacks import LongTailMonitor
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.group_accuracy import LongTailAccuracy
from lightning_recipes.core.labels import class_counts, labels_in, labels_of, training_set
from lightning_recipes.datamodules import DigitsDataModule, LongTailedDataModule, RotatedDigitsDataModule
from lightning_recipes.datamodules.long_tailed import exponential_profile
from lightning_recipes.modules import ImageClassifier
from tests.stock import Classifier, Watch, loader, quiet, same, samples, weights

# -- the data module ---------------------------------------------------------------------------------------------------


def ready(**kwargs: Any) -> LongTailedDataModule:
    data = LongTailedDataModule(DigitsDataModule(), **kwargs)
    data.prepare_data()
    data.setup()
    return data


def test_the_profile_is_that_of_cifar_lt() -> None:
    cifar10 = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert exponential_profile(5000, 10, 100).tolist() == cifar10
    cifar100 = exponential_profile(500, 100, 100)
    assert (cifar100[0], cifar100[-1], cifar100.sum()) == (500, 5, 10847)  # CIFAR-100-LT has 10,847 images
    assert exponential_profile(7, 3, 1).tolist() == [7, 7, 7]
    assert exponential_profile(5, 3, 100).tolist() == [5, 1, 1]  # no class without a sample


def test_classes_have_the_profile_and_validation_and_test_stay_whole() -> None:
    data, whole = ready(imbalance_ratio=10, largest=60), DigitsDataModule()
    whole.setup()
    assert data.class_counts.tolist() == exponential_profile(60, 10, 10).tolist()
    assert (len(data.val_set), len(data.test_set)) == (len(whole.val_set), len(whole.test_set))
    assert data.num_classes == 10
    x, y = next(iter(data.train_dataloader()))
    assert x.shape[1:] == (1, 8, 8) and x.max() <= 1 and y.dtype == torch.int64


def test_the_largest_class_takes_as_many_as_all_classes_have_enough_for() -> None:
    counts, there = ready(imbalance_ratio=1).class_counts, ready(imbalance_ratio=1).data.train_set.labels
    assert counts.tolist() == [int(torch.bincount(there).min())] * 10
    steep = ready(imbalance_ratio=1000).class_counts
    assert steep[0] == (there == 0).sum() and steep[-1] == 1


def test_class_order_by_label_by_seed_and_by_hand() -> None:
    sizes = exponential_profile(60, 10, 10)
    order = [3, 1, 4, 5, 9, 2, 6, 0, 7, 8]
    by_hand = ready(imbalance_ratio=10, largest=60, class_order=order).class_counts
    assert by_hand[torch.tensor(order)].tolist() == sizes.tolist()
    first, again, other = (
        ready(imbalance_ratio=10, largest=60, class_order="random", seed=s).class_counts.tolist() for s in (0, 0, 1)
    )
    assert first == again != other
    assert sorted(first, reverse=True) == sizes.tolist() and first != sizes.tolist()


def test_samples_are_chosen_by_the_seed_and_a_longer_tail_is_part_of_a_shorter_one() -> None:
    def chosen(**kwargs: Any) -> set[int]:
        return set(ready(largest=60, **kwargs).train_set.indices.tolist())

    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    assert chosen(imbalance_ratio=10) == chosen(imbalance_ratio=10) != chosen(imbalance_ratio=10, seed=1)
    assert chosen(imbalance_ratio=100) < chosen(imbalance_ratio=10) < chosen(imbalance_ratio=1)
    assert np.array_equal(before[0], np.random.get_state()[1]) and torch.equal(before[1], torch.get_rng_state())


def test_it_wraps_a_data_module_with_domains_too() -> None:
    data = LongTailedDataModule(RotatedDigitsDataModule(), imbalance_ratio=10, largest=50)
    data.setup()
    assert data.class_counts.tolist() == exponential_profile(50, 10, 10).tolist()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"imbalance_ratio": 0.5}, "imbalance_ratio=0.5: must be at least 1"),
        ({"largest": 0}, "largest=0: must be None or an integer of at least 1"),
        ({"class_order": "size"}, "class_order='size': must be 'label', 'random' or a list"),
        ({"class_order": [0, 1, 1]}, r"class_order=\[0, 1, 1\]: must be each label from 0 to 9 once"),
        ({"largest": 1000}, r"largest=1000, imbalance_ratio=100\.0: asks for 1000 samples .* may be at most \d+"),
    ],
)
def test_bad_arguments_of_the_data_module(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ready(**arguments)


def test_a_foreign_data_module_is_refused_and_counts_wait_for_setup() -> None:
    with pytest.raises(ValueError, match="must be a data module of lightning_recipes"):
        LongTailedDataModule(LightningDataModule())
    with pytest.raises(RuntimeError, match="class_counts is known after setup"):
        _ = LongTailedDataModule(DigitsDataModule()).class_counts


# -- counting labels ---------------------------------------------------------------------------------------------------


class Plain(Dataset):
    """Knows its labels by nothing but its samples, and draws random numbers for each."""

    def __init__(self, labels: list[int], make: Any = lambda x, y: (x, y)) -> None:
        self.own, self.make, self.read = labels, make, 0

    def __len__(self) -> int:
        return len(self.own)

    def __getitem__(self, i: int) -> Any:
        self.read += 1
        return self.make(torch.rand(2), self.own[i])


LABELS = [2, 0, 1, 2, 2, 0]


@pytest.mark.parametrize("name", ["targets", "labels", "_labels"])
@pytest.mark.parametrize("kind", [list, np.asarray, torch.tensor])
def test_labels_of_a_data_set_that_says_them_are_taken_without_reading_it(name: str, kind: Any) -> None:
    data = Plain(LABELS)
    setattr(data, name, kind(LABELS))
    assert labels_of(data).tolist() == LABELS
    assert labels_of(Subset(data, [5, 0, 2])).tolist() == [0, 2, 1]
    assert labels_of(ConcatDataset([data, Subset(data, [1])])).tolist() == [*LABELS, 0]
    assert data.read == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda x, y: (x, y),
        lambda x, y: (x, torch.tensor(y), "more"),
        lambda x, y: {"image": x, "label": y},
        lambda x, y: {"input_ids": x, "labels": torch.tensor(y)},
    ],
)
def test_labels_of_any_other_data_set_are_read_once_without_a_trace_in_the_random_state(make: Any) -> None:
    data = Plain(LABELS, make)
    before = torch.get_rng_state()
    assert labels_of(data).tolist() == LABELS and data.read == len(LABELS)
    assert torch.equal(torch.get_rng_state(), before)


def test_labels_of_tensors_and_of_a_subset_without_attributes() -> None:
    x = torch.rand(6, 2)
    assert labels_of(TensorDataset(x, torch.tensor(LABELS, dtype=torch.int32))).tolist() == LABELS
    assert labels_of(Subset(Plain(LABELS), [3, 1])).tolist() == [2, 0]
    assert labels_of(DigitsDataModule().load().train).shape == (1797,)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (TensorDataset(torch.rand(4, 2), torch.rand(4)), "must be class indices.*got float32 of shape"),
        (TensorDataset(torch.rand(4, 2), torch.eye(4).long()), r"got int64 of shape \(4, 4\)"),
        (TensorDataset(torch.rand(4, 2), torch.tensor([0, -1, 1, 0])), "count from 0; .* training set is -1"),
        (TensorDataset(torch.rand(4, 2)), "has no label"),
        (Plain(LABELS, lambda x, y: {"image": x}), "has no label"),
        (Plain(LABELS, lambda x, y: (x, "cat")), "must be class indices"),
    ],
)
def test_labels_that_cannot_be_counted(data: Any, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        labels_of(data)


def test_labels_in_batches_of_every_form() -> None:
    y = torch.tensor([1, 0])
    assert labels_in((torch.rand(2), y)) is y and labels_in([torch.rand(2), y, 3]) is y
    assert labels_in({"x": 1, "labels": y}) is y
    assert labels_in(torch.rand(2)) is None and labels_in((torch.rand(2),)) is None and labels_in({"x": 1}) is None


def test_the_training_set_of_a_trainer_is_whole_in_a_fit_and_out_of_it() -> None:
    counted: list[list[int]] = []
    count = Watch(on_train_start=lambda trainer, module: counted.append(class_counts(trainer).tolist()))
    quiet(callbacks=[count]).fit(Classifier(), loader(*samples(7)))
    assert counted == [[3, 2, 2]]

    data = ready(imbalance_ratio=10, largest=20)
    trainer = quiet()
    module = ImageClassifier(in_chans=1)
    trainer.test(module, datamodule=data, verbose=False)
    assert class_counts(trainer).tolist() == data.class_counts.tolist()

    trainer = quiet()
    trainer.validate(Classifier(), loader(*samples()), verbose=False)
    with pytest.raises(RecipeError, match="there is no training set here"):
        training_set(trainer)


class Endless(IterableDataset):
    def __iter__(self) -> Any:
        yield from zip(*samples())


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (lambda: DataLoader(Endless(), batch_size=4), r"the training data \(DataLoader\) are no one data set"),
        (lambda: [*loader(*samples())], r"the training data \(list\) are no one data set"),
        (lambda: [loader(*samples()), loader(*samples())], r"the training data \(list\) are no one data set"),
    ],
)
def test_training_data_without_an_index(data: Any, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        quiet(callbacks=[Watch(on_train_start=lambda t, m: training_set(t))]).fit(Classifier(), data())


# -- accuracy by group -------------------------------------------------------------------------------------------------


def test_accuracy_by_group_is_the_mean_over_classes_not_over_samples() -> None:
    """Counts 101, 100, 20, 19: many {0}, medium {1, 2}, few {3}."""
    metric = LongTailAccuracy([101, 100, 20, 19])
    labels = torch.tensor([0, 0, 1, 1, 1, 1, 2, 3])
    predictions = torch.tensor([0, 1, 1, 1, 1, 0, 0, 3])  # 1/2, 3/4, 0/1, 1/1
    metric.update(predictions[:3], labels[:3])
    metric.update(F.one_hot(predictions[3:], 4).float(), labels[3:])
    values = {name: float(value) for name, value in metric.compute().items()}
    assert values == {"many": 0.5, "medium": 0.375, "few": 1.0, "balanced": (0.5 + 0.75 + 0 + 1) / 4}


def test_a_class_without_test_samples_does_not_count_and_a_group_without_any_is_nan() -> None:
    metric = LongTailAccuracy([500, 400, 50, 1])
    metric.update(torch.tensor([0, 0]), torch.tensor([0, 2]))
    values = metric.compute()
    assert values["many"] == 1 and values["medium"] == 0 and values["few"].isnan() and values["balanced"] == 0.5


def test_thresholds_are_arguments_and_bad_ones_are_refused() -> None:
    metric = LongTailAccuracy([10, 5, 1], many=5, few=2)
    assert {name: mask.tolist() for name, mask in metric.groups.items() if name != "balanced"} == {
        "many": [True, False, False],
        "medium": [False, True, False],
        "few": [False, False, True],
    }
    with pytest.raises(ValueError, match="few must be at least 0"):
        LongTailAccuracy([3, 2], many=5, few=7)
    with pytest.raises(ValueError, match="one number of samples a class"):
        LongTailAccuracy([3, -2])
    with pytest.raises(ValueError, match=r"must be \(N, 3\)"):
        metric.update(torch.rand(2, 4), torch.tensor([0, 1]))


# -- the monitor -------------------------------------------------------------------------------------------------------


class Biased(Classifier):
    """Always says class 0."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 3))
        with torch.no_grad():
            self.net.weight.zero_()
            self.net.bias.copy_(torch.tensor([1.0, 0.0, 0.0]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])


@pytest.mark.parametrize("verb", ["validate", "test"])
@pytest.mark.parametrize("inference_mode", [True, False])
def test_a_module_that_always_says_the_frequent_class(verb: str, inference_mode: bool) -> None:
    monitor = LongTailMonitor([200, 50, 3])
    trainer = quiet(callbacks=[monitor], inference_mode=inference_mode)
    module = Biased()
    (values,) = getattr(trainer, verb)(module, loader(*samples(10)), verbose=False)
    found = {k.removeprefix("long_tail/"): v for k, v in values.items() if k.startswith("long_tail/")}
    assert found == pytest.approx({"many": 1.0, "medium": 0.0, "few": 0.0, "balanced": 1 / 3})
    assert "forward" not in vars(module)


def test_groups_come_from_the_training_set_and_those_without_classes_are_not_logged() -> None:
    data = ready(imbalance_ratio=10, largest=60)  # 60 to 6 samples: no class is many-shot
    module = ImageClassifier(in_chans=1)
    trainer = quiet(callbacks=[LongTailMonitor()])
    trainer.fit(module, datamodule=data)
    logged = {k for k in trainer.callback_metrics if k.startswith("long_tail/")}
    assert logged == {"long_tail/medium", "long_tail/few", "long_tail/balanced"}
    (tested,) = trainer.test(module, datamodule=data, verbose=False)
    x, y = (torch.stack(part) for part in zip(*data.test_set))
    predicted = module.eval()(x).argmax(1)
    within = torch.stack([(predicted[y == c] == c).float().mean() for c in range(10)])
    assert tested["long_tail/balanced"] == pytest.approx(float(within.mean()))
    few = data.class_counts < 20
    assert tested["long_tail/few"] == pytest.approx(float(within[few].mean()))
    assert tested["long_tail/medium"] == pytest.approx(float(within[~few].mean()))


def test_a_test_after_a_fit_keeps_the_groups_of_what_was_trained() -> None:
    monitor = LongTailMonitor(many=2, few=2)
    trainer = quiet(callbacks=[monitor])
    x, y = samples(7)  # 3, 2, 2 samples
    trainer.fit(Biased(), loader(x, y), loader(x, y))
    (values,) = trainer.test(Biased(), loader(x, y), verbose=False)
    assert values["long_tail/many"] == 1.0 and values["long_tail/medium"] == 0.0


@pytest.mark.parametrize("sanity", [0, 2])
def test_the_fit_is_bitwise_the_same_with_it(sanity: int, tmp_path: Path) -> None:
    def train(callbacks: list[Any]) -> dict[str, Tensor]:
        torch.manual_seed(0)
        module = Classifier(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)))
        trainer = quiet(
            max_epochs=3,
            callbacks=callbacks,
            logger=CSVLogger(tmp_path) if callbacks else False,
            num_sanity_val_steps=sanity,
        )
        x, y = samples()
        trainer.fit(module, DataLoader(TensorDataset(x, y), 4, shuffle=True), loader(x, y))
        assert "forward" not in vars(module)
        return weights(module)

    assert same(train([LongTailMonitor()]), train([]))
    assert list(tmp_path.rglob("long_tail.png"))


class AsksItsNet(Classifier):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch[0])


def test_logits_of_a_named_submodule() -> None:
    (values,) = quiet(callbacks=[LongTailMonitor([9, 9, 9], forward="net")]).validate(
        AsksItsNet(Biased().net), loader(*samples(6)), verbose=False
    )
    assert values["long_tail/few"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("monitor", "module", "data", "says"),
    [
        (lambda: LongTailMonitor(), Biased, loader(*samples()), "no training set here; give class_counts="),
        (lambda: LongTailMonitor([5, 5]), Biased, loader(*samples()), "there are 2 class counts and the logits have 3"),
        (lambda: LongTailMonitor([5] * 3), AsksItsNet, loader(*samples()), r"no logits \[4, classes\].*forward='NAME'"),
        (lambda: LongTailMonitor([5] * 3, forward="body"), Biased, loader(*samples()), r"\['net'\]\); got 'body'"),
        (lambda: LongTailMonitor([5] * 3), Biased, DataLoader(samples()[0], 4), "have no class indices"),
    ],
)
def test_what_cannot_be_measured_is_one_error_and_leaves_the_module_alone(
    monitor: Any, module: Any, data: Any, says: str
) -> None:
    class AnyBatch(module):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch if isinstance(batch, (list, tuple)) else (batch, torch.zeros(4).long()), 0)

    made = AnyBatch()
    with pytest.raises(RecipeError, match=f"LongTailMonitor: .*{says}"):
        quiet(callbacks=[monitor()]).validate(made, data, verbose=False)
    assert "forward" not in vars(made)
