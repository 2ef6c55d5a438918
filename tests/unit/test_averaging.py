"""Means of two sets of weights, weights swapped in and out, Fisher information, and batch-norm statistics anew."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_recipes.core.averaging import (
    Swap,
    copied,
    distance,
    fisher_information,
    fisher_mean,
    interpolate,
    tensors_of,
)
from lightning_recipes.core.batch_norm import recalibrate, running_norms, statistics_names
from lightning_recipes.core.random import key
from tests.stock import same, weights


def tensor(*values, **kwargs):
    return torch.tensor(values, **kwargs)


# -- means -------------------------------------------------------------------------------------------------------------


def test_the_numbers_of_the_card():
    one, three = tensor(1.0), tensor(3.0)
    assert interpolate(one, three, 0.25).item() == 1.5
    assert fisher_mean(one, three, 0.5, tensor(4.0), tensor(1.0)).item() == pytest.approx(1.4)


def test_a_fisher_mean_with_equal_informations_is_the_plain_mean_and_a_floor_is_kept():
    first, second = torch.randn(5), torch.randn(5)
    assert torch.allclose(
        fisher_mean(first, second, 0.3, torch.ones(5), torch.ones(5)), interpolate(first, second, 0.3)
    )
    nothing = torch.zeros(5)  # without a floor this would be 0 / 0
    assert torch.allclose(fisher_mean(first, second, 0.3, nothing, nothing), interpolate(first, second, 0.3))
    one_sided = fisher_mean(first, second, 0.5, nothing, torch.ones(5), floor=0.25)
    assert torch.allclose(one_sided, (0.25 * first + second) / 1.25)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_both_ends_are_exact(dtype):
    first, second = torch.randn(100).to(dtype), torch.randn(100).to(dtype)
    assert torch.equal(interpolate(first, second, 0), first)
    assert torch.equal(interpolate(first, second, 1), second)
    assert interpolate(first, second, 0.5).dtype == dtype


def test_half_precision_weights_are_averaged_in_fp32():
    """1 + 2^-7 is the next bf16 number after 1; in bf16 arithmetic a quarter of the way would be lost on the way."""
    first, second = tensor(1.0, dtype=torch.bfloat16), tensor(3.0 + 2**-6, dtype=torch.bfloat16)
    exact = 0.25 * first.float() + 0.75 * second.float()
    assert interpolate(first, second, 0.75).item() == exact.bfloat16().item()


def test_integers_are_those_of_the_second_end():
    assert interpolate(tensor(0), tensor(100), 0.5).item() == 100
    assert interpolate(tensor(0), tensor(100), 0).item() == 0


def test_distance():
    first = {"a": tensor(1.0, 2.0), "b": tensor([1.0]), "count": tensor(3)}
    second = {"a": tensor(4.0, 6.0), "b": tensor([13.0]), "count": tensor(300)}
    assert distance(first, second).item() == 13.0


# -- tensors of a module -----------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)
        self.b.weight = self.a.weight
        self.register_buffer("scratch", torch.ones(2), persistent=False)


def test_tied_weights_count_once_and_buffers_that_are_not_saved_do_not():
    names = list(tensors_of(Tied()))
    assert names == [
        *["a.weight", "a.bias", "norm.weight", "norm.bias", "b.bias"],
        *["norm.running_mean", "norm.running_var", "norm.num_batches_tracked"],
    ]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_swapping_in_and_out_leaves_the_weights_bitwise_and_in_the_same_tensors(mode):
    module = Tied()
    module.norm.running_mean.normal_()
    before, places = weights(module), {name: id(value) for name, value in tensors_of(module).items()}
    swap = Swap(module)
    with mode():
        swap.put(["a.weight", "norm.running_mean"], lambda name, own: own / 3)
        assert torch.equal(module.b.weight, before["a.weight"] / 3), "once, though it has two names"
        swap.put(["a.weight"], lambda name, own: own * 2)  # from the module's own again
        assert torch.equal(module.a.weight, before["a.weight"] * 2)
        assert torch.equal(swap.own["a.weight"], before["a.weight"])
        swap.back()
    assert same(weights(module), before)
    assert {name: id(value) for name, value in tensors_of(module).items()} == places
    assert not swap.own
    module.a(torch.randn(2, 3)).sum().backward()
    assert module.a.weight.grad is not None


def test_what_is_kept_is_the_modules_own():
    module = Tied()
    swap = Swap(module)
    swap.put(["a.weight"], lambda name, own: torch.zeros_like(own))
    swap.keep()
    swap.back()
    assert not module.a.weight.any()


def test_a_state_dict_taken_in_between_is_mended_under_every_name():
    module = Tied()
    before, swap = weights(module), Swap(module)
    swap.put(["a.weight", "norm.running_var"], lambda name, own: own + 1)
    taken = dict(module.state_dict())
    assert not same(taken, before)
    swap.mend(taken)
    assert same(taken, before)


def test_copies_do_not_follow_the_module():
    module = Tied()
    held, before = copied(tensors_of(module)), weights(module)
    with torch.no_grad():
        module.a.weight.zero_()
    assert torch.equal(held["a.weight"], before["a.weight"])


# -- Fisher information ------------------------------------------------------------------------------------------------


def test_fisher_information_is_the_expected_squared_gradient_of_the_log_likelihood():
    """Against the closed form of a softmax regression, by all labels: d log p(y|x) / dW = (onehot(y) - p) x^T."""
    torch.manual_seed(0)
    x, net = torch.randn(40, 3), nn.Linear(3, 4)
    p = net(x).softmax(1)
    per_label = [(F.one_hot(torch.tensor(y), 4) - p)[:, :, None] * x[:, None, :] for y in range(4)]  # [40, 4, 3] each
    exact = sum(p[:, y, None, None] * per_label[y].square() for y in range(4)).mean(0)
    frozen = nn.Parameter(torch.ones(1), requires_grad=False)
    parameters = {**dict(net.named_parameters()), "unused": nn.Parameter(torch.ones(1)), "frozen": frozen}
    draws = key(0)
    found = fisher_information(parameters, (net(x[i : i + 8]) for _ in range(200) for i in range(0, 40, 8)), draws)
    assert set(found) == {"weight", "bias"}
    assert torch.allclose(found["weight"], exact, rtol=0.1, atol=0.01)
    assert all(p.grad is None for p in net.parameters()), "gradients of the training are left alone"
    alone = fisher_information({"weight": net.weight}, (net(x[i : i + 1]) for _ in range(5) for i in range(40)), draws)
    assert torch.allclose(alone["weight"], exact, rtol=0.6, atol=0.05), "batches of any size estimate the same"


# -- batch norm --------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.drop, self.second = nn.BatchNorm1d(3), nn.Dropout(0.5), nn.BatchNorm1d(3, momentum=0.3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.second(self.drop(2 * self.first(x) + 1))


def test_recalibrated_statistics_are_averages_over_batches_and_all_else_is_as_before():
    torch.manual_seed(0)
    net, batches = Net(), [torch.randn(8, 3) * (i + 1) + i for i in range(4)]
    for batch in batches:
        net(batch * 100)
    net.second.eval()
    before, state = weights(net), torch.get_rng_state()
    recalibrate(net, net, batches)
    mean = torch.stack([b.mean(0) for b in batches]).mean(0)
    assert torch.allclose(net.first.running_mean, mean, atol=1e-6)
    assert torch.allclose(net.first.running_var, torch.stack([b.var(0) for b in batches]).mean(0), rtol=1e-5)
    assert torch.allclose(net.second.running_mean, torch.ones(3), atol=1e-6), "dropout is off meanwhile"
    assert torch.equal(torch.get_rng_state(), state)
    after = weights(net)
    kept = [name for name in before if name not in statistics_names(net)]
    assert "calls" in kept and "first.num_batches_tracked" in kept
    assert same({n: before[n] for n in kept}, {n: after[n] for n in kept})
    assert (net.first.momentum, net.second.momentum) == (0.1, 0.3)
    assert (net.training, net.first.training, net.second.training) == (True, True, False)


def test_recalibration_after_an_error_has_put_the_layers_back():
    net = Net()

    def fail(batch):
        raise RuntimeError("in mid-pass")

    with pytest.raises(RuntimeError, match="in mid-pass"):
        recalibrate(net, fail, [torch.zeros(2, 3)])
    assert net.second.momentum == 0.3
    assert net.training


def test_without_running_statistics_nothing_is_read():
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False))
    assert running_norms(net) == {}
    batches = itertools.count()
    recalibrate(copy.deepcopy(net), net, batches)
    assert next(batches) == 0
