"""Attacks on a linear model, where the worst point is known."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_recipes.callbacks import RobustAccuracyMonitor
from lightning_recipes.core.attacks import Box, RobustAccuracy, clip, fgsm, pgd
from lightning_recipes.core.errors import RecipeError
from tests.stock import Classifier, Watch, loader, mlp, quiet, same, samples, weights

W = torch.tensor([[1.0, -2.0, 0.5], [-1.0, 0.0, 0.25]])  # of two classes
D = W[0] - W[1]  # (2, -2, 0.25)
X = torch.tensor([[0.5, 0.5, 0.5], [0.9, 0.1, 0.95], [0.2, 0.8, 0.3]])
Y = torch.tensor([0, 0, 1])
EPS = 0.1


def linear(x):
    return x @ W.T


def worst(x=X, y=Y, eps=EPS, low=0.0, high=1.0):
    """Down the margin by eps in every pixel, inside the box: of all points of the ball the loss is largest there."""
    direction = torch.where(y[:, None] == 0, -D.sign(), D.sign())
    return (x + eps * direction).clamp(low, high)


def test_fgsm_finds_the_worst_point_of_a_linear_model():
    assert torch.allclose(fgsm(linear, X, Y, EPS), worst())
    assert fgsm(linear, X, Y, EPS)[1].tolist() == pytest.approx([0.8, 0.2, 0.85])


def test_pgd_finds_it_too_for_samples_that_stay_right():
    y = linear(X).argmax(1)
    found = pgd(linear, X, y, EPS, steps=10, restarts=2, generator=torch.Generator().manual_seed(0))
    margins = (linear(worst(y=y)) * F.one_hot(y, 2)).sum(1) - (linear(worst(y=y)) * (1 - F.one_hot(y, 2))).sum(1)
    for i in range(3):
        if margins[i] > 0:  # never fooled, so it went all the way
            assert torch.allclose(found[i], worst(y=y)[i], atol=1e-6)
    assert ((found - X).abs() <= EPS + 1e-6).all()
    right = linear(found).argmax(1) == y
    assert torch.equal(right, margins > 0)


def test_pgd_stops_moving_what_is_already_wrong():
    y = 1 - linear(X).argmax(1)  # all wrong from the start on, whatever the start
    found = pgd(linear, X, y, 1e-3, steps=5, restarts=1, generator=torch.Generator().manual_seed(0))
    start = torch.rand(X.shape, generator=torch.Generator().manual_seed(0)) * 2e-3 - 1e-3
    assert torch.allclose(found, X + start, atol=1e-7)


def test_restarts_keep_the_largest_loss_of_each_sample():
    """One step of size 0 leaves the start: the best of 20 starts."""
    g = torch.Generator().manual_seed(0)
    starts = torch.stack([torch.rand(X.shape, generator=g) * 2 * EPS - EPS for _ in range(20)])
    losses = torch.stack([F.cross_entropy(linear((X + s).clamp(0, 1)), Y, reduction="none") for s in starts])
    best = (X + starts[losses.argmax(0), torch.arange(3)]).clamp(0, 1)
    found = pgd(linear, X, Y, EPS, 1, 20, step_size=0.0, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(found, best, atol=1e-6)


def test_a_normalised_box():
    mean, std = [0.5, 0.2, 0.1], [0.5, 2.0, 0.1]
    m, s = torch.tensor(mean), torch.tensor(std)
    box, x = Box(mean, std), (X - m) / s
    low, high, unit = box.bounds(x)
    assert torch.allclose(low, -m / s) and torch.allclose(high, (1 - m) / s) and torch.allclose(unit, 1 / s)
    # the model sees normalised inputs; weights are positive multiples of those on pixels, so the directions are W's
    assert torch.allclose(fgsm(linear, x, Y, EPS, box), (worst() - m) / s, atol=1e-6)
    found = pgd(linear, x, Y, EPS, 20, 3, box=box, generator=torch.Generator().manual_seed(0)) * s + m
    assert ((found - X).abs() <= EPS + 1e-5).all() and (found >= -1e-5).all() and (found <= 1 + 1e-5).all()


def test_images_have_their_channels_second():
    low, high, unit = Box([0.5, 0.1], [0.5, 0.1]).bounds(torch.zeros(3, 2, 4, 4))
    assert low.shape == high.shape == unit.shape == (2, 1, 1)
    assert low.flatten().tolist() == pytest.approx([-1, -1])
    assert high.flatten().tolist() == pytest.approx([1, 9])


def test_an_input_range():
    low, high, unit = Box(input_range=(-1.0, 3.0)).bounds(X)
    assert (low, high, unit) == (-1, 3, 1)
    assert torch.allclose(fgsm(linear, X, Y, 5.0, Box(input_range=(-1.0, 3.0))), worst(eps=5.0, low=-1, high=3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mean": [0.5]}, "mean and std go together"),
        ({"mean": [0.5], "std": [0.0]}, "std must be positive"),
        ({"mean": [0.5], "std": [0.5, 0.5]}, "one value a channel; got 1 and 2"),
        ({"input_range": (1.0, 1.0)}, "low < high"),
    ],
)
def test_bad_boxes(arguments, message):
    with pytest.raises(RecipeError, match=message):
        Box(**arguments)


def test_another_number_of_channels():
    with pytest.raises(RecipeError, match=r"2 channels; the batch has shape \(3, 3\)"):
        fgsm(linear, X, Y, EPS, Box([0.5, 0.5], [0.5, 0.5]))


def test_clip_with_tensor_bounds():
    assert clip(torch.tensor([-2.0, 0.5, 9]), torch.tensor([-1.0, 0, 0]), torch.tensor([1.0, 1, 2])).tolist() == [
        -1,
        0.5,
        2,
    ]


def test_parameters_get_no_gradient():
    net = nn.Linear(3, 2)
    pgd(net, X, Y, EPS, 2, 1)
    fgsm(net, X, Y, EPS)
    assert net.weight.grad is None


# -- the metric --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_robust_accuracy_in_every_mode(context):
    """Margins of the three samples: 0.125, 1.8375 and 1.125; FGSM takes 2 x 0.2 + 0.025 = 0.425 off each."""
    margins = (X @ D) * torch.tensor([1.0, 1, -1])
    assert margins.tolist() == pytest.approx([0.125, 1.8375, 1.125])
    metric = RobustAccuracy(lambda logits, x, y: fgsm(logits, x, y, EPS))
    clean = RobustAccuracy()
    with context():
        for part in (slice(0, 2), slice(2, 3)):
            metric.update(linear, X[part].clone(), Y[part].clone())
            clean.update(linear, X[part].clone(), Y[part].clone())
    assert metric.compute().item() == pytest.approx(2 / 3)
    assert clean.compute() == 1
    metric.reset()
    assert metric.compute() == 0


# -- the monitor -------------------------------------------------------------------------------------------------------


class Stepped(Classifier):
    """A step with everything that a probe could disturb."""

    def __init__(self):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3))
        super().__init__(net)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train/loss", loss)
        return loss


def test_the_monitor_measures_what_attacks_by_hand_give():
    x, y = samples()
    module = Classifier()
    monitor = RobustAccuracyMonitor(attack="fgsm", epsilon=0.3)
    trainer = quiet(callbacks=[monitor])
    trainer.validate(module, loader(x, y), verbose=False)
    net = mlp()
    start = x.clone().requires_grad_()
    gradient = torch.autograd.grad(F.cross_entropy(net(start), y), start)[0]
    attacked = (x + 0.3 * gradient.sign()).clamp(0, 1)
    assert trainer.callback_metrics["robust_accuracy/fgsm"].item() == pytest.approx(
        (net(attacked).argmax(1) == y).float().mean().item()
    )
    assert trainer.callback_metrics["robust_accuracy/clean"].item() == pytest.approx(
        (net(x).argmax(1) == y).float().mean().item()
    )


def test_the_monitor_leaves_no_trace_in_the_fit():
    x, y = samples()
    results = []
    for callbacks in ([], [RobustAccuracyMonitor(epsilon=0.3, steps=3, restarts=2)]):
        module = Stepped()
        torch.manual_seed(1)
        trainer = quiet(callbacks=callbacks, max_epochs=3)
        trainer.fit(module, loader(x, y), loader(x, y))
        results.append((weights(module), torch.get_rng_state(), trainer.callback_metrics))
    (plain, state, logged), (watched, after, more) = results
    assert same(plain, watched)
    assert torch.equal(state, after)
    assert {"robust_accuracy/clean", "robust_accuracy/pgd-3-2"} == more.keys() - logged.keys()
    assert all(torch.equal(logged[name], more[name]) for name in logged)


def test_the_monitor_measures_every_n_epochs_and_some_batches():
    x, y = samples()
    seen = []
    monitor = RobustAccuracyMonitor(attack="fgsm", epsilon=0.3, every_n_epochs=2, limit_batches=1)
    watch = Watch(on_validation_epoch_end=lambda *args: seen.append(int(monitor._clean.total)))
    quiet(callbacks=[monitor, watch], max_epochs=4).fit(Classifier(), loader(x, y), loader(x, y))
    assert seen == [4, 0, 4, 0]
    assert monitor.state()["history"]["steps"] == [4, 12]


def test_the_same_seed_gives_the_same_measurement():
    x, y = samples()
    values = []
    for seed in (0, 0, 1):
        monitor = RobustAccuracyMonitor(epsilon=0.2, steps=1, restarts=1, step_size=0.0, seed=seed)
        torch.manual_seed(len(values))
        trainer = quiet(callbacks=[monitor])
        trainer.validate(Classifier(), loader(x, y), verbose=False)
        values.append(trainer.callback_metrics["robust_accuracy/pgd-1-1"].item())
    assert values[0] == values[1]


def test_several_monitors_stand_side_by_side():
    x, y = samples()
    monitors = [RobustAccuracyMonitor(attack="fgsm"), RobustAccuracyMonitor(steps=2, restarts=1)]
    trainer = quiet(callbacks=monitors)
    trainer.fit(Classifier(), loader(x, y), loader(x, y))
    assert {"robust_accuracy/fgsm", "robust_accuracy/pgd-2-1"} <= trainer.callback_metrics.keys()


def test_a_test_run_is_measured_too():
    class Tests(Classifier):
        def test_step(self, batch, batch_idx):
            pass

    x, y = samples()
    trainer = quiet(callbacks=[RobustAccuracyMonitor(attack="fgsm")])
    trainer.test(Tests(), loader(x, y), verbose=False)
    assert "robust_accuracy/fgsm" in trainer.callback_metrics
