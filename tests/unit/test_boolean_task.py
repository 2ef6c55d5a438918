"""Boolean tasks: the rules, the noise, and who draws what."""

import pytest
import torch

from lightning_recipes.datamodules import BooleanTaskDataModule
from lightning_recipes.datamodules.boolean_task import RULES, all_inputs, draw_task


def test_all_inputs_are_there_once():
    assert all_inputs(2).tolist() == [[-1, -1], [-1, 1], [1, -1], [1, 1]]
    assert len(all_inputs(5).unique(dim=0)) == 32


def test_the_rules_are_what_they_are_called():
    x = all_inputs(3)
    told = {name: rule(x).tolist() for name, (_, rule) in RULES.items()}
    assert told["constant"] == [True] * 8
    assert told["first_bit"] == [False] * 4 + [True] * 4
    assert told["majority"] == [False, False, False, True, False, True, True, True]
    assert told["parity"] == [True, True, False, False, False, False, True, True]


def test_a_label_is_flipped_as_often_as_it_is_said():
    places, labels = draw_task(5, "majority", 0.1, 20_000, torch.Generator().manual_seed(0))
    wrong = labels != RULES["majority"][1](all_inputs(5))[places].long()
    assert wrong.float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert places.bincount(minlength=32).min() > 500


def test_the_data_module_trains_on_noisy_and_validates_on_clean_labels():
    data = BooleanTaskDataModule(rule="parity", noise=0.2, n=400)
    data.setup()
    x, y = data.train_set.tensors
    assert x.shape == (400, 5) and 0.1 < (y != (x[:, 0] == x[:, 1]).long()).float().mean() < 0.3
    x, y = next(iter(data.val_dataloader()))
    assert len(x) == 32 and torch.equal(y, (x[:, 0] == x[:, 1]).long())
    again, other = BooleanTaskDataModule(rule="parity", noise=0.2, n=400), BooleanTaskDataModule(n=400, seed=1)
    again.setup(), other.setup()
    assert torch.equal(again.train_set.tensors[1], data.train_set.tensors[1])
    assert not torch.equal(other.train_set.tensors[0], data.train_set.tensors[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "xor"}, "rule='xor': must be one of 'constant', 'first_bit', 'majority', 'parity'"),
        ({"rule": "majority", "bits": 2}, "bits=2: must be from 3 to 20 for 'majority'"),
        ({"noise": 0.5}, "noise=0.5: must be at least 0 and below 0.5"),
        ({"n": 0}, "n=0: must be at least 1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        BooleanTaskDataModule(**arguments)
