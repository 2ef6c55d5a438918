"""The linear student and its teacher: what they draw, and that they train as theory says."""

from __future__ import annotations

import pytest
import torch

from lightning_recipes.datamodules import StudentTeacherDataModule
from lightning_recipes.modules import LinearStudent
from lightning_recipes.modules.linear_student import true_test_error
from tests.stock import quiet


def test_samples_have_the_variances_that_the_theory_asks_for() -> None:
    data = StudentTeacherDataModule(400, 2.5, 5.0, seed=3)
    data.setup()
    x, y = data.train_set.tensors
    assert x.shape == (1000, 400) and y.shape == (1000,)
    assert float(x.var()) == pytest.approx(1 / 400, rel=0.02)
    assert float(data.teacher.var()) == pytest.approx(5.0, rel=0.2)
    assert float((y - x @ data.teacher).var()) == pytest.approx(1.0, rel=0.15)
    assert len(data.val_set) == len(data.test_set) == 1000
    assert not torch.equal(data.val_set.tensors[0][:5], data.test_set.tensors[0][:5])


def test_the_same_seed_draws_the_same_and_another_does_not() -> None:
    one, again, other = (StudentTeacherDataModule(20, seed=seed) for seed in (0, 0, 1))
    for each in (one, again, other):
        each.setup()
    assert torch.equal(one.train_set.tensors[0], again.train_set.tensors[0])
    assert torch.equal(one.teacher, again.teacher) and not torch.equal(one.teacher, other.teacher)


def test_an_epoch_is_one_batch_of_all_samples_in_order() -> None:
    data = StudentTeacherDataModule(10, 3.0)
    data.setup()
    ((x, y),) = list(data.train_dataloader())
    assert torch.equal(x, data.train_set.tensors[0]) and torch.equal(y, data.train_set.tensors[1])


def test_a_step_of_the_student_is_gradient_descent_on_the_mean_of_squares() -> None:
    data, module = StudentTeacherDataModule(12, 2.0, n_test=5), LinearStudent(12, 0.7, lr=0.5)
    data.setup()
    x, y = data.train_set.tensors
    start = module.readout.weight.detach().clone()
    quiet(max_epochs=1).fit(module, datamodule=data)
    expected = start - 0.5 * 2 / 24 * (x @ start[0] - y) @ x
    assert torch.allclose(module.readout.weight.detach(), expected, atol=1e-6)


def test_first_weights_are_of_their_deviation_and_draw_nothing_from_the_global_state() -> None:
    state = torch.get_rng_state()
    weight = LinearStudent(2000, 0.5, seed=1).readout.weight.detach()
    assert torch.equal(state, torch.get_rng_state())
    assert float(weight.std()) == pytest.approx(0.5, rel=0.05)
    assert not LinearStudent(5).readout.weight.any()
    assert not torch.equal(weight, LinearStudent(2000, 0.5, seed=2).readout.weight.detach())


def test_the_true_test_error_is_that_of_many_new_samples() -> None:
    teacher, weight = torch.tensor([1.0, 2.0, 0.0, 0.0]), torch.tensor([[0.0, 0.0, 0.0, 4.0]])
    assert true_test_error(weight, teacher) == 1 + (1 + 4 + 16) / 4
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(200_000, 4, generator=draws) / 2
    y = x @ teacher + torch.randn(200_000, generator=draws)
    assert float((x @ weight[0] - y).square().mean()) == pytest.approx(6.25, rel=0.02)


def test_bad_arguments_are_told() -> None:
    for arguments, says in (
        ({"n_features": 0}, "n_features=0: must be at least 1"),
        ({"alpha": 0.0}, "alpha=0.0: must be positive"),
        ({"snr": -1.0}, "snr=-1.0: must be at least 0"),
        ({"n_test": 0}, "n_test=0: must be at least 1"),
    ):
        with pytest.raises(ValueError, match=says):
            StudentTeacherDataModule(**arguments)
    for arguments, says in (
        ({"n_features": 0}, "n_features=0: must be at least 1"),
        ({"init_std": -1.0}, "init_std=-1.0: must be at least 0"),
        ({"lr": 0.0}, "lr=0.0: must be positive"),
    ):
        with pytest.raises(ValueError, match=says):
            LinearStudent(**arguments)
