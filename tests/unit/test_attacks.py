"""Attacks on a linear model, where the worst point is known."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_recipes.callbacks import RobustAccuracyMonitor
from lightning_recipes.core.attacks import (
    Box,
    RobustAccuracy,
    apgd,
    auto_pgd,
    clip,
    cross_entropy,
    dlr,
    fgsm,
    momentum_pgd,
    pgd,
    runners_up,
    targeted_dlr,
)
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


# -- auto-PGD ----------------------------------------------------------------------------------------------------------

W5 = torch.tensor([[1.0, -2.0, 0.5], [-1.0, 0.0, 0.25], [0.5, 1.0, -1.0], [0.0, 0.5, 2.0], [0.2, 0.1, 0.3]])


def five(x):
    return x @ W5.T


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def net5(seed=0):
    """A small network on which attacks have something to do: 12 pixels, 5 classes."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5)).requires_grad_(False)
    for part in (net[0], net[2]):
        part.weight *= 3
    return net


def batch12(count=24, seed=1):
    x = torch.rand(count, 12, generator=seeded(seed))
    return x, net5()(x).argmax(1)


def test_dlr_by_hand():
    """z = (3, 1, 0, -1, 2): ranked 3, 2, 1, 0, -1; (1) - (3) is 2, (1) - ((3) + (4)) / 2 is 2.5."""
    z = torch.tensor([[3.0, 1.0, 0.0, -1.0, 2.0]]).repeat(2, 1)
    y = torch.tensor([0, 1])
    assert dlr(z, y).tolist() == pytest.approx([-(3 - 2) / 2, -(1 - 3) / 2])
    assert targeted_dlr(z, y, torch.tensor([2, 4])).tolist() == pytest.approx([-(3 - 0) / 2.5, -(1 - 2) / 2.5])
    assert dlr(10 * z + 7, y).tolist() == pytest.approx(dlr(z, y).tolist())  # no scale, no shift
    assert [t.tolist() for t in runners_up(z, 3)] == [[4, 4], [1, 1], [2, 2]]
    assert torch.equal(dlr((z, "more"), y), dlr(z, y))


def test_auto_pgd_finds_the_worst_point_of_a_linear_model():
    found = auto_pgd(linear, X, Y, EPS, steps=10, generator=seeded())
    assert torch.allclose(found.strongest, worst(), atol=1e-6)
    assert torch.allclose(found.loss, F.cross_entropy(linear(worst()), Y, reduction="none"), atol=1e-6)
    assert torch.equal(found.fooled, linear(worst()).argmax(1) != Y)  # a linear margin is least there
    assert torch.equal(linear(found.fooling).argmax(1) != Y, found.fooled)
    assert not found.strongest.requires_grad


def test_apgd_gives_back_the_input_of_what_it_cannot_fool():
    found = apgd(linear, X, Y, EPS, steps=10, generator=seeded())
    fooled = linear(worst()).argmax(1) != Y
    assert fooled.tolist() == [True, False, False]
    assert torch.equal(found[1:], X[1:]) and linear(found)[0].argmax() != Y[0]


def test_each_sample_has_its_own_radius():
    radii = torch.tensor([0.0, 0.05, 0.3])
    found = auto_pgd(linear, X, Y, radii, steps=8, generator=seeded())
    assert torch.allclose(found.strongest, torch.stack([worst(eps=e)[i] for i, e in enumerate(radii)]), atol=1e-6)


def test_targeted_apgd_goes_towards_every_next_class():
    """The ratio of two linear functions is largest in a corner of the ball."""
    x = torch.full((1, 3), 0.5)
    y = five(x).argmax(1)
    corners = x + 0.02 * torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    for target in runners_up(five(x), 4):
        found = auto_pgd(five, x, y, 0.02, steps=20, loss=partial(targeted_dlr, target=target), generator=seeded())
        of_corners = targeted_dlr(five(corners), y.expand(8), target.expand(8))
        assert found.loss.item() == pytest.approx(of_corners.max().item(), abs=1e-5)
    fooled = apgd(five, x, y, 0.5, steps=20, loss="targeted", targets=99, generator=seeded())
    assert five(fooled).argmax(1) != y


def test_points_keep_to_ball_and_box_in_normalised_inputs():
    mean, std = [0.5, 0.2, 0.1], [0.5, 2.0, 0.1]
    m, s = torch.tensor(mean), torch.tensor(std)
    box, x = Box(mean, std), (X - m) / s
    for attacked in (
        auto_pgd(linear, x, Y, EPS, 15, box=box, generator=seeded()).strongest,
        momentum_pgd(linear, x, Y, EPS, 15, 0.05, 0.5, box=box, generator=seeded()),
    ):
        pixels = attacked * s + m
        assert torch.allclose(pixels, worst(), atol=1e-5)  # the weights see normalised inputs: the same directions


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_auto_pgd_needs_no_gradients_around_it(context):
    net = net5()
    outside = auto_pgd(net, *batch12(), 0.1, 6, generator=seeded())
    with context():
        x, y = (tensor.clone() for tensor in batch12())
        inside = auto_pgd(net, x, y, 0.1, 6, generator=seeded())
        last = momentum_pgd(net, x, y, 0.1, 3, 0.05, generator=seeded())
    assert torch.equal(outside.strongest, inside.strongest)
    assert ((last - batch12()[0]).abs() <= 0.1 + 1e-6).all()


def test_half_precision_inputs_are_attacked_in_fp32():
    x, y = batch12()
    found = auto_pgd(lambda at: net5()(at).bfloat16(), x.bfloat16(), y, 0.1, 4, generator=seeded())
    assert found.strongest.dtype == found.loss.dtype == torch.float32


def test_the_global_random_state_and_the_network_are_left_alone():
    net, (x, y) = net5().requires_grad_(), batch12()
    state = torch.get_rng_state()
    apgd(net, x, y, 0.1, 3, generator=seeded())
    assert torch.equal(torch.get_rng_state(), state) and net[0].weight.grad is None


def test_losses_that_need_more_classes_say_so():
    with pytest.raises(RecipeError, match="on the targeted loss needs 4 classes; there are 2"):
        apgd(linear, X, Y, EPS, loss="targeted")
    with pytest.raises(RecipeError, match="on the dlr loss needs 3 classes; there are 2"):
        apgd(linear, X, Y, EPS, loss="dlr")


def test_momentum_pgd_by_hand():
    """Two steps from a start of radius 0: the first goes along dL/dx, the second along dL/dx + 0.5 dL/dx before."""
    net, (x, y) = net5(), batch12(4)

    def gradient(at):
        at = at.clone().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(net(at), y, reduction="sum"), at)[0]

    start = x + (torch.rand(x.shape, generator=seeded()) * 2 - 1) * 0.2
    start = start.clamp(0, 1)
    first = gradient(start)
    then = torch.minimum(torch.maximum(start + 0.05 * first.sign(), x - 0.2), x + 0.2).clamp(0, 1)
    second = gradient(then) + 0.5 * first
    by_hand = torch.minimum(torch.maximum(then + 0.05 * second.sign(), x - 0.2), x + 0.2).clamp(0, 1)
    found = momentum_pgd(net, x, y, 0.2, 2, 0.05, 0.5, generator=seeded())
    assert torch.allclose(found, by_hand, atol=1e-6)


@pytest.mark.parametrize("loss", ["ce", "dlr", "targeted"])
def test_auto_pgd_is_its_authors(loss):
    """The same start, and 30 steps: three checks of the step size among them."""
    authors = pytest.importorskip("pyautoattack.autopgd_base")
    net, (x, y) = net5(), batch12()
    target = runners_up(net(x), 1)[0]
    if loss == "targeted":
        theirs = authors.APGDAttack_targeted(net, n_iter=30, eps=0.08, device="cpu")
        theirs.loss, theirs.y_target = "dlr-targeted", target
        ours = partial(targeted_dlr, target=target)
    else:
        theirs = authors.APGDAttack(net, n_iter=30, eps=0.08, loss=loss, device="cpu")
        ours = {"ce": cross_entropy, "dlr": dlr}[loss]
    theirs.init_hyperparam(x)
    torch.manual_seed(3)
    strongest, right, value, fooling = theirs.attack_single_run(x, y)
    found = auto_pgd(net, x, y, 0.08, 30, ours, generator=seeded(3))
    assert torch.allclose(found.strongest, strongest, atol=1e-6)
    assert torch.allclose(found.loss, value, atol=1e-6)
    assert torch.equal(found.fooled, ~right)
    assert torch.allclose(found.fooling, fooling, atol=1e-6)
    assert 0 < found.fooled.sum() < len(x)
