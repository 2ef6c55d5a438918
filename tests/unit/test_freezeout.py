"""FreezeOut: when layers freeze, at what rates they go there, and that frozen is frozen."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim import SGD, AdamW

from lightning_recipes.callbacks import ExactResume, FreezeOut
from lightning_recipes.callbacks.finetuning.freezeout import freezing_times, rate
from lightning_recipes.core.errors import RecipeError
from tests.stock import Classifier, Watch, loader, mlp, quiet, same, samples, weights

X, Y = samples(16)
STEPS = 16  # 4 epochs of 4 batches


def fit(module, *callbacks, epochs=4, **trainer):
    quiet(callbacks=list(callbacks), max_epochs=epochs, **trainer).fit(module, loader(X, Y))
    return module


@pytest.mark.parametrize(
    ("power", "expected"),
    [
        (1, [0.5, 0.625, 0.75, 0.875, 1]),
        (2, [0.25, 0.390625, 0.5625, 0.765625, 1]),
        (3, [0.125, 0.244140625, 0.421875, 0.669921875, 1]),
    ],
)
def test_the_times_of_five_layers(power, expected):
    assert freezing_times(5, 0.5, power) == pytest.approx(expected)


def test_a_single_layer_trains_to_the_end():
    assert freezing_times(1, 0.5, 3) == [1.0]


def test_rates_go_down_by_half_a_cosine():
    assert rate(0.0, 0.5, scaled=False) == 1.0
    assert rate(0.0, 0.5, scaled=True) == 2.0
    assert rate(0.25, 0.5, scaled=True) == pytest.approx(1.0)
    assert rate(0.5, 0.5, scaled=True) == 0.0


def test_scaling_keeps_how_far_a_layer_can_move():
    for end in (0.125, 0.5, 1.0):
        assert sum(rate(i / 1e4, end, scaled=True) for i in range(10_000)) / 1e4 == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("scaled", [True, False])
def test_a_fit_is_the_plain_loop_with_a_rate_a_layer(scaled):
    module = Classifier()
    by_hand = mlp()
    by_hand.load_state_dict(module.net.state_dict())
    fit(module, FreezeOut(t0=0.5, how="squared", scale_lr=scaled))
    layers, ends = [by_hand[0], by_hand[2], by_hand[4]], [0.25, 0.5625, 1.0]
    for step in range(STEPS):
        x, y = X[step % 4 * 4 : step % 4 * 4 + 4], Y[step % 4 * 4 : step % 4 * 4 + 4]
        by_hand.zero_grad()
        F.cross_entropy(by_hand(x), y).backward()
        with torch.no_grad():
            for layer, end in zip(layers, ends):
                t = step / STEPS
                factor = 0.0 if t >= end else 0.5 * (1 + math.cos(math.pi * t / end)) / (end if scaled else 1)
                for p in layer.parameters():
                    p -= 0.1 * factor * p.grad
    for (name, ours), theirs in zip(module.net.named_parameters(), by_hand.parameters()):
        assert torch.allclose(ours, theirs, atol=1e-7), name


def test_a_frozen_layer_has_no_gradient_no_state_and_is_in_eval_mode():
    seen = []

    def note(trainer, module, *args):
        first = module.net[0]
        state = trainer.optimizers[0].state
        seen.append(
            (first[0].weight.grad is not None, first[0].weight in state, first.training, module.net[2].training)
        )

    net = nn.Sequential(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout()), nn.ReLU(), nn.Linear(5, 3))
    module = Classifier(net, lambda parameters: AdamW(parameters, lr=0.01))
    fit(module, FreezeOut(t0=0.5, how="linear"), Watch(on_train_batch_end=note))
    assert seen == [(True, True, True, True)] * 8 + [(False, False, False, True)] * 8
    assert all(part.training for part in module.modules())
    assert all(p.requires_grad for p in module.parameters())


def test_what_never_trains_and_groups_by_name():
    module = Classifier()
    before = weights(module)
    fit(module, FreezeOut(groups=["net.4", "net.2"], never=["net.0"]))
    after = weights(module)
    assert torch.equal(before["net.0.weight"], after["net.0.weight"])
    assert not torch.equal(before["net.2.weight"], after["net.2.weight"])


@pytest.mark.parametrize("step", [3, 4, 5, 9])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_fit_ends_where_the_whole_one_does(step, accumulate, tmp_path):
    recipes = lambda: [FreezeOut(t0=0.5, how="squared"), ExactResume()]  # noqa: E731
    make = lambda: Classifier(optimizer=lambda parameters: SGD(parameters, lr=0.1, momentum=0.9))  # noqa: E731
    saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=step, save_top_k=-1)
    settings = {"accumulate_grad_batches": accumulate, "epochs": 8}
    whole = fit(make(), *recipes(), saves, enable_checkpointing=True, **settings)
    resumed = fit_from(tmp_path / f"step={step}.ckpt", make(), *recipes(), **settings)
    assert same(weights(whole), weights(resumed))


def fit_from(path, module, *callbacks, epochs, **trainer):
    quiet(callbacks=list(callbacks), max_epochs=epochs, **trainer).fit(module, loader(X, Y), ckpt_path=path)
    return module


def test_a_fit_without_an_end_is_refused():
    with pytest.raises(RecipeError, match=r"FreezeOut needs Trainer\(max_steps=\.\.\.\) or max_epochs"):
        fit(Classifier(), FreezeOut(), epochs=-1)
