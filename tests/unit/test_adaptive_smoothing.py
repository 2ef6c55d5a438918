"""Adaptive smoothing: its maths against the card's numbers, whose outputs an evaluation reports and an attack attacks,
and the training of the mixing network."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_recipes.callbacks import (
    AdaptiveSmoothing,
    BackdoorAdjustment,
    ExactResume,
    RobustAccuracyMonitor,
    WiSEFT,
)
from lightning_recipes.core.attacks import pgd
from lightning_recipes.core.companion import fingerprint
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.random import generator
from lightning_recipes.modules import AdaptiveSmoothingModule, Mixer, MixingNetwork
from lightning_recipes.modules.adaptive_smoothing import attack_iterations, rate_at
from lightning_recipes.modules.mixer import (
    GammaNorm,
    alpha_of,
    certified,
    clamped,
    lipschitz_radius,
    margin,
    mixing_loss,
    mixing_widths,
    mixture,
    smoothed_radius,
    squeezed,
)
from tests.conformance.lives import process
from tests.stock import Classifier, Watch, loader, mlp, quiet, same, samples, weights

# -- the mixture -------------------------------------------------------------------------------------------------------

G, H = torch.tensor([[4.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0]])


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("alpha", "out", "says"),
    [
        (0.5, [-0.5305, -1.2144, -2.1645], 0),
        (0.8, [-1.0148, -0.7670, -1.7540], 1),
        (0.85, [-1.1244, -0.7086, -1.6994], 1),
    ],
)
def test_the_cards_oracle(alpha: float, out: list[float], says: int) -> None:
    found = mixture(G, H, alpha)
    assert found[0].tolist() == pytest.approx(out, abs=1e-4) and found.argmax() == says
    assert torch.allclose(mixture(G, H, torch.tensor([[alpha]])), found)


def test_gammas_that_are_numbers() -> None:
    assert alpha_of(2.0) == pytest.approx(0.880797, abs=1e-6)
    assert (alpha_of(-math.inf), alpha_of(math.inf), alpha_of(0.0)) == (0, 1, 0.5)
    assert squeezed(torch.tensor([0.0, 0.5, 1.0]), 0.84, 0.99).tolist() == pytest.approx([0.84, 0.915, 0.99])


def test_the_ends_are_one_network_bitwise_and_its_scale() -> None:
    g, h = noise(5, 4), noise(5, 4, seed=1)
    assert mixture(g, h, 0) is g and mixture(g, h, 1.0) is h
    assert torch.equal(mixture(g, h, 0, std_scale=2.0), 2 * g) and torch.equal(mixture(g, h, 1, rob_scale=0.3), 0.3 * h)


def test_the_same_network_twice_is_itself_and_one_half_is_symmetric() -> None:
    g, h = noise(5, 4), noise(5, 4, seed=1)
    for alpha in (0.1, 0.5, 0.93):
        assert torch.allclose(mixture(g, g, alpha).softmax(1), g.softmax(1), atol=1e-6)
    assert torch.allclose(mixture(g, h, 0.5), mixture(h, g, 0.5), atol=1e-6)
    by_hand = 0.3 * (2 * g).softmax(1) + 0.7 * (0.5 * h).softmax(1)
    assert torch.allclose(mixture(g, h, 0.7, 2.0, 0.5).softmax(1), by_hand, atol=1e-6)


def test_nothing_underflows_and_half_precision_is_mixed_in_fp32() -> None:
    g, h = torch.tensor([[200.0, 0.0]]), torch.tensor([[150.0, 0.0]])
    assert mixture(g, h, 0.5)[0, 1].item() == pytest.approx(-150.6931, abs=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        assert mixture(G.bfloat16(), H.bfloat16(), 0.8).dtype == torch.float32
    assert mixture(G.double(), H.double(), 0.8).dtype == torch.float64
    alpha = torch.tensor([[0.0], [1.0]], requires_grad=True)  # a sigmoid that has run into its ends
    out = mixture(noise(2, 3).requires_grad_(), noise(2, 3, seed=1), alpha)
    assert torch.isfinite(torch.autograd.grad(out.sum(), alpha)[0]).all()


# -- what is certain ---------------------------------------------------------------------------------------------------


def test_a_margin_above_the_bound_is_certain_and_one_just_below_is_not() -> None:
    g, h = 4 * noise(10_000, 4), 3 * noise(10_000, 4, seed=1)
    probabilities = h.softmax(1)
    for alpha in (0.55, 0.7, 0.9):
        sure = certified(margin(probabilities), alpha)
        assert torch.equal(sure, margin(probabilities) >= (1 - alpha) / alpha) and 100 < sure.sum() < 10_000
        assert torch.equal(mixture(g, h, alpha).argmax(1)[sure], h.argmax(1)[sure])
    # h = (.5 + m/2, .5 - m/2) and a standard network that is sure of the other class
    for slack, holds in ((1e-3, True), (-1e-3, False)):
        m = 0.3 / 0.7 + slack
        p = torch.tensor([[0.5 + m / 2, 0.5 - m / 2]])
        against = torch.tensor([[-60.0, 60.0]])
        assert certified(margin(p), 0.7).item() is holds
        assert (mixture(against, p.log(), 0.7).argmax() == 0).item() is holds


def test_below_one_half_nothing_is_certain() -> None:
    sure = torch.tensor([[1.0, 0.0]])
    assert not certified(margin(sure), 0.49).item() and certified(margin(sure), 0.5).item()
    assert lipschitz_radius(sure, 0.49, 1.0).item() == smoothed_radius(sure, 0.49, 1.0).item() == 0


def test_the_radius_of_a_lipschitz_network_is_where_its_margin_meets_the_bound() -> None:
    """h(x) = (.9 - x, .1 + x) on a line, slopes 1: the margin .8 - 2 x is (1 - a) / a at x = .4 - (1 - a) / 2a."""
    h = torch.tensor([[0.9, 0.1]])
    for alpha in (0.6, 0.8, 1.0):
        assert lipschitz_radius(h, alpha, 1.0).item() == pytest.approx(
            max(0.0, 0.4 - (1 - alpha) / (2 * alpha)), abs=1e-6
        )
    three = torch.tensor([[0.7, 0.2, 0.1]])  # a = 1: (.7 - .2) / (1 + 2) = 1/6 and (.7 - .1) / (1 + 5) = .1
    assert lipschitz_radius(three, 1.0, torch.tensor([1.0, 2.0, 5.0])).item() == pytest.approx(0.1)
    both = lipschitz_radius(torch.cat([h, h]), torch.tensor([0.8, 1.0]), 1.0)
    assert both.tolist() == pytest.approx([0.275, 0.4])


def test_the_radius_of_a_smoothed_network_is_reached_by_a_half_space() -> None:
    """p(x) = 1[x_1 < 0] smoothed by N(0, s^2) is Phi(-x_1 / s). At a = 1 the class turns at x_1 = 0, that is -x_1 away.
    At a < 1 the mixture with a hostile network turns where a (2 Phi(z) - 1) = 1 - a, which is no nearer."""
    sigma, x = 0.5, -0.8
    phi = torch.special.ndtr
    h = torch.stack([phi(torch.tensor(-x / sigma)), phi(torch.tensor(x / sigma))])[None].double()
    assert smoothed_radius(h, 1.0, sigma).item() == pytest.approx(0.8, abs=1e-5)
    for alpha in (0.6, 0.8, 0.95):
        turns = -x - sigma * torch.special.ndtri(torch.tensor(0.5 + (1 - alpha) / (2 * alpha))).item()
        assert 0 < smoothed_radius(h, alpha, sigma).item() <= turns + 1e-6


# -- gamma -------------------------------------------------------------------------------------------------------------


def test_the_loss_by_hand() -> None:
    out, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0])
    gamma, attacked = torch.tensor([[0.5], [-1.0]]), torch.tensor([0.0, 1.0])
    b = [math.log(1 + math.exp(0.5)), math.log(1 + math.exp(1.0))]  # -log(1 - s(.5)), -log s(-1)
    e = [math.log(1 + math.exp(-1.0)), 2 + math.log(1 + math.exp(-2.0))]
    for weights_ in ((1.5, 0.0, 0.2), (1.0, 0.5, 0.1)):
        by_hand = [weights_[0] * i + weights_[1] * j + weights_[2] * i * j for i, j in zip(b, e)]
        assert mixing_loss(out, y, gamma, attacked, weights_).tolist() == pytest.approx(by_hand, abs=1e-6)


def test_outputs_are_clamped_about_their_mean_without_a_gradient_of_its_own() -> None:
    r = torch.tensor([[-2.0], [0.0], [2.0], [0.4]], requires_grad=True)
    mean, std = r.mean().item(), r.std().item()
    kept = clamped(r)
    assert kept.flatten().tolist() == pytest.approx([mean - 0.6 * std, 0.0, mean + 0.6 * std, 0.4])
    assert torch.autograd.grad(kept.sum(), r)[0].flatten().tolist() == [0, 1, 0, 1]
    alone = torch.tensor([[3.0]])
    assert clamped(alone) is alone


def test_the_norm_is_a_batch_norm_without_weights() -> None:
    ours, theirs = GammaNorm(), nn.BatchNorm1d(1, affine=False, momentum=0.01)
    for seed in range(3):
        r = 3 * noise(8, 1, seed=seed) + 1
        assert torch.allclose(ours(r), theirs(r), atol=1e-6)
    assert torch.allclose(ours.mean, theirs.running_mean) and torch.allclose(ours.var, theirs.running_var)
    assert torch.allclose(ours.eval()(r), theirs.eval()(r), atol=1e-6)


def test_the_mixing_network_has_the_official_widths_and_its_stages_halve_the_maps() -> None:
    assert mixing_widths(160) == (160, 320, 512, 768) and mixing_widths(512) == (512, 256, 384, 512)
    assert mixing_widths(16) == (16, 32, 64, 128) and mixing_widths(200) == (200, 400, 512, 512)
    net, sizes = MixingNetwork(8, 12, (10, 6, 4)).eval(), []
    for stage in net.stages:
        stage.register_forward_hook(lambda _, inputs, output: sizes.append(tuple(output.shape[1:])))
    maps = [noise(2, 3, 16, 16), noise(2, 5, 16, 16)], [noise(2, 4, 8, 8), noise(2, 8, 8, 8)]
    out = net(*maps)
    assert out.shape == (2, 1) and sizes == [(10, 8, 8), (6, 4, 4), (4, 2, 2)]
    # F = L0(U) + conv(V); F = L2(L1(F)); pool; linear without a bias
    f = net.stages[0](torch.cat(maps[0], 1)) + net.conv(torch.cat(maps[1], 1))
    assert torch.allclose(out, net.linear(net.stages[2](net.stages[1](f)).mean((2, 3))))
    assert net.linear.bias is None and net.conv.bias is None and not net.stages[0][1].shortcut


def test_iterations_are_chi_squared_and_at_least_one() -> None:
    drawn = torch.tensor([attack_iterations(75, generator(i, "test")) for i in range(400)]).double()
    assert drawn.mean().item() == pytest.approx(75, abs=2) and drawn.var().item() == pytest.approx(150, rel=0.3)
    assert min(attack_iterations(1, generator(i, "test")) for i in range(50)) == 1


def test_the_rate_warms_up_and_falls_along_a_cosine() -> None:
    assert rate_at(0, 100) == pytest.approx(1 - math.exp(-1 / 4))
    assert rate_at(50, 100) == pytest.approx(0.5 * (1 - math.exp(-51 / 4)))
    assert rate_at(100, 100) == 0 and rate_at(0, 1) == pytest.approx(1 - math.exp(-1))


# -- the callback ------------------------------------------------------------------------------------------------------

X, Y = samples(12)


class Evaluates(Classifier):
    """A stock classifier that predicts, tests, and logs its accuracy."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__(net)
        self.seen: list[Tensor] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self(batch[0])
        self.seen.append(logits)
        self.log("acc", (logits.argmax(1) == batch[1]).float().mean())

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])


class Counted(nn.Module):
    """Counts its calls."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.calls = net, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.net(x)


def predicted(module: Classifier, *callbacks: Any, **trainer: Any) -> Tensor:
    return torch.cat(quiet(callbacks=list(callbacks), **trainer).predict(module, loader(X, Y)))


STD, ROB = mlp(seed=1), mlp(seed=2)


@pytest.mark.parametrize("role", ["robust", "standard"])
def test_predictions_are_the_mixtures_and_the_module_is_given_back(role: str) -> None:
    own, partner = (STD, ROB) if role == "robust" else (ROB, STD)
    module, partner = Evaluates(own), copy.deepcopy(partner).train()
    recipe = AdaptiveSmoothing(partner, role, 0.7, std_scale=2.0, rob_scale=0.5)
    with torch.no_grad():
        by_hand = mixture(STD(X), ROB(X), 0.7, 2.0, 0.5)
        assert torch.allclose(predicted(module, recipe), by_hand, atol=1e-6)
        assert torch.equal(module(X), own(X)) and "forward" not in vars(module)
    assert partner.training and all(p.requires_grad for p in partner.parameters())
    gamma = AdaptiveSmoothing(partner, role, None, math.log(0.7 / 0.3), 2.0, 0.5)
    assert torch.allclose(predicted(module, gamma), by_hand, atol=1e-6)


def test_at_the_ends_one_network_alone_runs() -> None:
    std, rob = (torch.cat([net(x) for x in X.split(4)]) for net in (STD, ROB))  # batch by batch, to be bitwise the same
    for alpha, role in ((0.0, "robust"), (1.0, "standard")):  # the module alone
        partner = Counted(ROB)
        recipe = AdaptiveSmoothing(partner, role, alpha)
        assert recipe.neutral and torch.equal(predicted(Evaluates(STD), recipe), std) and not partner.calls
        scales = {"std_scale": 3.0} if role == "robust" else {"rob_scale": 3.0}
        recipe = AdaptiveSmoothing(partner, role, alpha, **scales)
        assert not recipe.neutral and torch.equal(predicted(Evaluates(STD), recipe), 3 * std) and not partner.calls
    for alpha, role in ((1.0, "robust"), (0.0, "standard")):  # the partner alone
        own = Counted(STD)
        assert torch.equal(predicted(Evaluates(own), AdaptiveSmoothing(ROB, role, alpha)), rob) and not own.calls
        gamma = math.inf if role == "robust" else -math.inf
        recipe = AdaptiveSmoothing(ROB, role, None, gamma)
        assert torch.equal(predicted(Evaluates(own), recipe), rob) and not own.calls


def test_stages_are_chosen_and_a_fit_is_left_alone() -> None:
    plain, partner = predicted(Evaluates(STD)), Counted(ROB)
    assert torch.equal(predicted(Evaluates(STD), AdaptiveSmoothing(ROB, stages=["test"])), plain)
    runs = []
    for callbacks in ([], [AdaptiveSmoothing(partner)]):
        module = Evaluates(copy.deepcopy(STD))
        torch.manual_seed(0)
        quiet(callbacks=callbacks, max_epochs=2).fit(module, loader(X, Y), loader(X, Y))
        runs.append((weights(module), torch.get_rng_state(), torch.cat(module.seen)))
    assert same(runs[0][0], runs[1][0]) and all(torch.equal(a, b) for a, b in zip(runs[0][1:], runs[1][1:]))
    assert not partner.calls


def test_clean_accuracies_of_both_and_of_the_mixture_are_logged() -> None:
    trainer = quiet(callbacks=[AdaptiveSmoothing(ROB, alpha=0.6)])
    (values,) = trainer.test(Evaluates(STD), loader(X, Y, size=5), verbose=False)
    right = {"acc_standard": STD(X), "acc_robust": ROB(X), "acc": mixture(STD(X), ROB(X), 0.6)}
    for name, logits in right.items():
        share = (logits.argmax(1) == Y).float().mean().item()
        assert values[f"adaptive_smoothing/{name}"] == pytest.approx(share)
    assert values["acc"] == pytest.approx(values["adaptive_smoothing/acc"])


def test_another_normalisation_and_a_submodule() -> None:
    class Inner(Evaluates):
        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.net(batch[0])

    recipe = AdaptiveSmoothing(ROB, alpha=0.6, partner_input_transform=lambda x: 2 * x, forward="net")
    assert torch.allclose(predicted(Inner(STD), recipe), mixture(STD(X), ROB(2 * X), 0.6), atol=1e-6)


def test_a_partner_by_name_with_its_weights_in_a_file(tmp_path: Path) -> None:
    torch.save(ROB.state_dict(), tmp_path / "rob.pt")
    recipe = AdaptiveSmoothing("tests.stock:mlp", partner_checkpoint=str(tmp_path / "rob.pt"), partner_args={"seed": 5})
    assert torch.allclose(predicted(Evaluates(STD), recipe), mixture(STD(X), ROB(X), 0.9), atol=1e-6)


def test_checkpoints_hold_a_hash_of_the_partner_and_none_of_its_weights(tmp_path: Path) -> None:
    module = Evaluates(copy.deepcopy(STD))
    trainer = quiet(callbacks=[AdaptiveSmoothing(ROB)])
    trainer.fit(module, loader(X, Y))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]["AdaptiveSmoothing"]
    assert saved["state"] == {"partner": fingerprint(ROB)} and saved["arguments"]["partner"] == "Sequential"
    with pytest.warns(UserWarning, match="the partner is another one than when the checkpoint was written"):
        quiet(callbacks=[AdaptiveSmoothing(mlp(seed=9))]).validate(
            module, loader(X, Y), ckpt_path=tmp_path / "a.ckpt", verbose=False
        )


def test_it_mixes_with_the_weights_that_wise_ft_leaves() -> None:
    module = Evaluates(copy.deepcopy(STD))
    quiet(callbacks=[WiSEFT(0.5), AdaptiveSmoothing(ROB)]).fit(module, loader(X, Y))
    assert torch.allclose(
        predicted(module, AdaptiveSmoothing(ROB)), mixture(module.net(X), ROB(X), 0.9).detach(), atol=1e-6
    )


def test_below_one_half_it_warns() -> None:
    with pytest.warns(UserWarning, match="alpha is 0.3; no robustness can be certified below 0.5"):
        predicted(Evaluates(STD), AdaptiveSmoothing(ROB, alpha=0.3))


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        (
            lambda: AdaptiveSmoothing(mlp(classes=4)),
            "the module has 3 outputs and the partner 4; both must have the same",
        ),
        (lambda: AdaptiveSmoothing(_Pair()), r"the partner gives tuple of \[.*\] and no logits"),
        (lambda: AdaptiveSmoothing(STD), "partner shares parameters with the module"),
        (lambda: AdaptiveSmoothing("tests.stock:nothing"), "partner='tests.stock:nothing' cannot be imported"),
        (lambda: AdaptiveSmoothing("no_net"), "partner='no_net' must be a module, an import path"),
        (lambda: AdaptiveSmoothing(ROB, alpha=None, mixer="no.pt"), "mixer='no.pt': there is no such file"),
        (lambda: AdaptiveSmoothing(ROB, forward="body"), "forward must be 'forward' or the name of a submodule"),
    ],
)
def test_what_cannot_be_mixed_is_refused(recipe: Any, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        predicted(Evaluates(STD), recipe())


class _Pair(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return x, x


def test_an_evaluation_that_goes_past_the_forward_is_an_error() -> None:
    class Past(Evaluates):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.net(batch[0])

    with pytest.raises(RecipeError, match=r"no logits .* came out of the module in the evaluation step"):
        quiet(callbacks=[AdaptiveSmoothing(ROB)]).validate(Past(STD), loader(X, Y), verbose=False)


def test_two_owners_of_the_outputs_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"cannot share a Trainer|both replace the outputs"):
        predicted(Evaluates(STD), AdaptiveSmoothing(ROB), BackdoorAdjustment([Evaluates(mlp(seed=7))]))


# -- an attack on the mixture ------------------------------------------------------------------------------------------


def mean_of(values: Any) -> float:
    return float(values.float().mean())


@pytest.mark.parametrize("inference_mode", [True, False])
def test_the_robust_accuracy_monitor_attacks_the_mixture_and_not_one_network(inference_mode: bool) -> None:
    """The same attack by hand, on the mixture written out."""
    x, y = samples(24)
    std, rob = mlp(width=16, seed=1), mlp(width=16, seed=2)
    for net in (std, rob):  # right on most samples, so that there is something to lose
        optimizer = torch.optim.Adam(net.parameters(), 0.05)
        for _ in range(60):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    monitor = RobustAccuracyMonitor(epsilon=0.15, steps=5, restarts=1, seed=3)
    trainer = quiet(callbacks=[AdaptiveSmoothing(rob, alpha=0.6), monitor], inference_mode=inference_mode)
    (values,) = trainer.validate(Evaluates(std), loader(x, y, size=24), verbose=False)

    def attacked(net: Any, by: Any) -> float:
        start = generator(3, "RobustAccuracyMonitor", 0, 0)
        return mean_of(net(pgd(by, x, y, 0.15, 5, 1, generator=start)).argmax(1) == y)

    mixed = lambda at: mixture(std(at), rob(at), 0.6)  # noqa: E731
    assert values["robust_accuracy/pgd-5-1"] == pytest.approx(attacked(mixed, mixed))
    assert values["robust_accuracy/clean"] == pytest.approx(mean_of(mixed(x).argmax(1) == y))
    # An attack of one network alone leaves more of the mixture.
    assert attacked(mixed, mixed) < min(attacked(mixed, std), attacked(mixed, rob))


# -- the module that trains the mixing network -------------------------------------------------------------------------


class Small(nn.Sequential):
    """8x8 grey images; its first two convolutions give the maps, '0' and '2'."""

    def __init__(self, width: int = 4, classes: int = 5, seed: int = 0, stride: int = 2) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            super().__init__(
                nn.Conv2d(1, width, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(width, 2 * width, 3, stride, padding=1),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(2 * width, classes),
            )


IMAGES = torch.rand(48, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(48) % 5
WIDTHS = (7, 6, 5, 4)


def module(**arguments: Any) -> AdaptiveSmoothingModule:
    settings = {
        "standard": Small(3, seed=1),
        "robust": Small(4, seed=2),
        "standard_features": ("0", "2"),
        "robust_features": ("0", "2"),
        "input_shape": (1, 8, 8),
        "widths": WIDTHS,
        "iterations": 2,
        "targets": 2,
        "further": 2,
        "lr": 1e-2,
        "epsilon": 0.1,
    }
    return AdaptiveSmoothingModule(**{**settings, **arguments})


def batches(size: int = 12) -> DataLoader:
    return DataLoader(TensorDataset(IMAGES, LABELS), size)


def fit(net: AdaptiveSmoothingModule, *callbacks: Any, epochs: int = 2, **settings: Any) -> Any:
    trainer = quiet(max_epochs=epochs, callbacks=list(callbacks), **settings)
    trainer.fit(net, batches())
    return trainer


def test_a_batch_is_its_clean_parts_and_its_attacks_in_mini_batches_accumulated() -> None:
    """12 images in 3 parts of 4, 3 attacks of the first: 6 mini-batches of 4, optimizer steps of 4 and of 2."""
    net, seen, steps = module(), [], []
    net.mixer.register_forward_hook(lambda *args: None)
    real = net.as_trained

    def watched(x: Tensor) -> Any:
        if net.mixer.training:
            seen.append(x)
        return real(x)

    net.as_trained = watched
    watch = Watch(on_train_batch_end=lambda trainer, *rest: steps.append(trainer.global_step))
    frozen = [fingerprint(base) for base in (net.standard, net.robust)]
    start = weights(net)
    trainer = fit(net, watch, epochs=1)
    assert net.parts == 6 and [len(each) for each in seen] == [4] * 24 and steps == [2, 4, 6, 8]
    first = torch.cat(seen[:6])
    clean = [(first == image).flatten(1).all(1).any().item() for image in IMAGES[:12]]
    assert all(clean) and len(first) == 24
    changed = first[[not any(torch.equal(f, c) for c in IMAGES[:12]) for f in first]]
    distance = (changed[:, None] - IMAGES[None, :4]).abs().flatten(2).amax(2)
    assert len(changed) == 12 and (distance.amin(1) <= 1.1 * 0.1 + 1e-6).all()
    assert (distance.amin(1) >= 0.4 * 0.1 * 0.5).all() and changed.min() >= 0 and changed.max() <= 1
    assert [fingerprint(base) for base in (net.standard, net.robust)] == frozen
    assert not same(start, weights(net)) and not any("standard" in key or "robust" in key for key in net.state_dict())
    logged = trainer.callback_metrics
    assert {
        f"adaptive_smoothing/{n}" for n in ("gamma_clean", "gamma_attacked", "clean_below", "attacked_above")
    } < set(logged)
    assert 0 < logged["adaptive_smoothing/alpha_mean"] < 1


def test_the_papers_numbers_are_the_defaults() -> None:
    net = AdaptiveSmoothingModule(
        Small(classes=10), Small(classes=10, seed=1), ("0", "2"), ("0", "2"), input_shape=(1, 8, 8)
    )
    assert (net.parts, net.accumulate, net.iterations, net.targets) == (20, 4, 75, 9)
    assert net.mixer.structure["widths"] == [16, 32, 64] and net.mixer.network.conv.weight.shape[:2] == (16, 16)
    assert (net.lr, net.weight_decay, net.clip, net.seed) == (5e-5, 1e-5, 10.0, 20220304)
    assert net.loss_weights == (1.5, 0.0, 0.2) and net.mixer.structure["alpha_range"] == [0.84, 0.99]
    assert module(attack="pgd", iterations=None).iterations == 20


def test_it_evaluates_with_other_constants_and_a_squeezed_weight() -> None:
    net = module(std_scale=2.0, rob_scale=0.5, eval_affine=(1.0, 0.7), alpha_range=(0.6, 0.8)).eval()
    with torch.no_grad():
        (g, h), maps = net._ask(IMAGES)
        gamma = net.mixer.gamma(maps, (1.0, 0.7))
        by_hand = mixture(g, h, 0.6 + 0.2 * gamma.sigmoid(), 2.0, 0.5)
        assert torch.allclose(net(IMAGES), by_hand, atol=1e-6)
        out, gamma = net.as_trained(IMAGES)
        trained = net.mixer.norm(net.mixer.network(*zip(*maps))) * 2.0 + 0.4
        assert torch.allclose(gamma, trained, atol=1e-5) and torch.allclose(
            out, mixture(g, h, trained.sigmoid()), atol=1e-5
        )
    trainer = quiet()
    (values,) = trainer.validate(net, batches(), verbose=False)
    assert values["val/acc"] == pytest.approx(mean_of(by_hand.argmax(1) == LABELS))
    assert values["val/acc_standard"] == pytest.approx(mean_of(g.argmax(1) == LABELS))
    assert values["val/acc_robust"] == pytest.approx(mean_of(h.argmax(1) == LABELS))
    assert 0.6 < values["val/alpha_mean"] < 0.8


@pytest.mark.parametrize("attack", ["apgd", "pgd"])
def test_attacks_go_through_the_mixing_network_and_leave_it_alone(attack: str) -> None:
    """With all weight on driving gamma up, the attack must find images with a larger gamma."""
    net = module(attack=attack, iterations=6, targets=0)
    before = weights(net)
    gammas = {}
    for name in ("clean", "attacked"):
        images = IMAGES if name == "clean" else net.attacked(IMAGES, LABELS, 0)[0]
        with torch.no_grad():
            gammas[name] = net.eval().as_trained(images)[1].mean().item()
        net.train()
    assert same(before, weights(net)) and all(p.grad is None for p in net.parameters())
    (again,), (other,) = (net.attacked(IMAGES, LABELS, key) for key in (0, 1))
    assert torch.equal(again, net.attacked(IMAGES, LABELS, 0)[0]) and not torch.equal(again, other)
    asked = []
    real = net.mixer.gamma
    net.mixer.gamma = lambda maps, affine: asked.append(maps[0][0].requires_grad) or real(maps, affine)
    net.attacked(IMAGES[:4], LABELS[:4], 0)
    assert asked and all(asked)  # there is a graph from the images to gamma in every pass of the attack


def test_a_run_that_stops_between_two_batches_and_goes_on_ends_bitwise_the_same(tmp_path: Path) -> None:
    whole = module()
    saved = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=2, filename="{step}", save_weights_only=False)
    fit(whole, saved, ExactResume(), enable_checkpointing=True)
    checkpoints = sorted(tmp_path.glob("*.ckpt"), key=lambda p: int(p.stem.split("=")[1]))
    assert len(checkpoints) == 8
    middle = torch.load(checkpoints[4], weights_only=True)  # an epoch is four batches of two optimizer steps
    assert not any("Small" in key or key.startswith(("standard", "robust")) for key in middle["state_dict"])
    for number in (3, 4):
        resumed = module()
        trainer = quiet(max_epochs=2, callbacks=[ExactResume()])
        trainer.fit(resumed, batches(), ckpt_path=checkpoints[number])
        assert same(weights(whole), weights(resumed)) and trainer.global_step == 16


def test_another_base_is_refused_on_a_resume(tmp_path: Path) -> None:
    trainer = fit(module(), epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(RecipeError, match="robust is not the network that the checkpoint's mixing network was trained"):
        quiet(max_epochs=2).fit(module(robust=Small(4, seed=7)), batches(), ckpt_path=tmp_path / "a.ckpt")
    loaded = AdaptiveSmoothingModule.load_from_checkpoint(
        tmp_path / "a.ckpt", standard=Small(3, seed=1), robust=Small(4, seed=2)
    )
    assert same(weights(loaded), weights(trainer.lightning_module))
    assert torch.equal(loaded.eval()(IMAGES), trainer.lightning_module.eval()(IMAGES))


def test_a_copy_listens_to_its_own_networks_and_follows_to_another_type() -> None:
    net = module().eval()
    twin = copy.deepcopy(net)
    assert twin.standard is not net.standard and torch.equal(twin(IMAGES), net(IMAGES))
    twin.double()
    assert next(twin.standard.parameters()).dtype == torch.float64
    assert torch.allclose(twin(IMAGES.double()).float(), net(IMAGES), atol=1e-5)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_gradients_are_clipped_by_their_norm_once_they_are_unscaled(precision: str) -> None:
    norms = []

    class Clipped(AdaptiveSmoothingModule):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            super().on_before_optimizer_step(optimizer)
            norms.append(torch.stack([p.grad.norm() for p in self.mixer.parameters()]).norm().item())

    net = Clipped(
        Small(3, seed=1), Small(4, seed=2), ("0", "2"), ("0", "2"), (1, 8, 8), widths=WIDTHS, iterations=1, targets=0,
        further=2, clip=1e-3,
    )  # fmt: skip
    fit(net, epochs=1, **({} if precision == "32-true" else {"plugins": [half(precision)]}))
    assert norms and max(norms) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            {"robust": Small(4, classes=7)},
            "standard has 5 outputs, robust has 7 outputs: both networks must have the same",
        ),
        ({"robust": _Pair()}, "no part of _Pair"),
        (
            {"robust": Small(4, stride=1)},
            r"the late ones: standard's '0' \[3, 8, 8\], standard's '2' \[6, 4, 4\], robust's",
        ),
        ({"robust_features": ("0", "0")}, r"the early maps .* the late ones"),
        ({"robust_features": ("0",)}, "robust_features must be the names of two parts"),
        ({"standard_features": ("0", "9")}, "'9' is no part of Small; its parts are"),
        (
            {"standard_features": ("0", "0"), "robust_features": ("0", "0")},
            "late maps must have half the height and width",
        ),
        ({"input_shape": (3, 8, 8)}, r"does not take images of input_shape=\(3, 8, 8\)"),
        (
            {"alpha_range": (0.9, 1.1)},
            r"alpha_range must be \(low, high\) with 0 <= low <= high <= 1; got \(0.9, 1.1\)",
        ),
        ({"alpha_range": (-0.1, 0.9)}, "alpha_range must be"),
        ({"rob_scale": 0.0}, "rob_scale must be positive; got 0.0"),
        ({"widths": (6, 6, 6, 6)}, "widths must be None or four widths, the first 7 as the early maps have"),
        ({"loss_weights": (1.0, 0.2)}, "loss_weights must be three numbers"),
        ({"attack": "fgsm"}, "attack must be 'apgd' or 'pgd'; got 'fgsm'"),
        ({"standard": 3}, "standard must be a module, 'package.module:Class' or a timm name; got 3"),
        (
            {"standard": Small(3, classes=3), "robust": Small(4, classes=3)},
            "targets must be 0 with fewer than 4 classes",
        ),
    ],
)
def test_bad_arguments_of_the_module(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        module(**arguments)


def test_a_batch_that_cannot_be_cut_is_an_error_in_the_first_step_and_left_out_at_the_end_of_an_epoch() -> None:
    with pytest.raises(
        RecipeError, match="a batch of 5 cannot be cut into 3 parts of 2 images or more; give batches of"
    ):
        quiet().fit(module(), batches(5))
    with pytest.raises(RecipeError, match=r"a batch must be \(images, labels \(N,\)\); got tensor"):
        quiet().fit(module(), DataLoader(IMAGES, 12))
    net = module()
    trainer = quiet()
    trainer.fit(net, DataLoader(TensorDataset(IMAGES[:28], LABELS[:28]), 12))
    assert trainer.global_step == 4


# -- from the module to the callback -----------------------------------------------------------------------------------


def trained() -> AdaptiveSmoothingModule:
    net = module(std_scale=2.0, rob_scale=0.5, alpha_range=(0.3, 0.9))
    fit(net, epochs=1)
    return net.eval()


@pytest.mark.parametrize("role", ["robust", "standard"])
@pytest.mark.parametrize("how", ["object", "file", "checkpoint"])
def test_the_trained_mixture_goes_over_a_stock_module(role: str, how: str, tmp_path: Path) -> None:
    net = trained()
    recipe = net.to_callback(role)
    if how != "object":
        path = tmp_path / "mixer.pt"
        net.mixer.save(path)
        if how == "checkpoint":
            path = tmp_path / "its.ckpt"
            trainer = quiet(max_steps=0)
            trainer.strategy.connect(net)
            trainer.save_checkpoint(path)
        recipe = AdaptiveSmoothing(recipe.partner, role, None, mixer=str(path), std_scale=2.0, rob_scale=0.5)
    own = net.standard if role == "robust" else net.robust
    stock = Evaluates(own)
    found = torch.cat(quiet(callbacks=[recipe]).predict(stock, batches()))
    with torch.no_grad():
        assert torch.allclose(found, net(IMAGES), atol=1e-6)
    (values,) = quiet(callbacks=[recipe]).validate(stock, batches(), verbose=False)
    assert values["acc"] == pytest.approx(mean_of(net(IMAGES).argmax(1) == LABELS))
    assert 0.3 < values["adaptive_smoothing/alpha_mean"] < 0.9
    assert not any(part._forward_hooks for part in stock.net.modules() if part is not own) or own is stock.net


def test_the_monitor_attacks_through_the_mixing_network() -> None:
    """What it reports is an attack by hand on the mixture; one that holds alpha fast does not do so well."""
    net = trained()
    with torch.no_grad():
        labels = net(IMAGES).argmax(1)
    how = {"epsilon": 0.3, "steps": 8, "restarts": 1, "seed": 3}
    trainer = quiet(callbacks=[net.to_callback(alpha_range=(0.0, 1.0)), RobustAccuracyMonitor(**how)])
    (values,) = trainer.validate(Evaluates(net.standard), DataLoader(TensorDataset(IMAGES, labels), 48), verbose=False)
    net.mixer.structure["alpha_range"] = (0.0, 1.0)

    def held(at: Tensor) -> Tensor:
        (g, h), maps = net._ask(at)
        return mixture(g, h, net.mixer.alpha(maps).detach(), 2.0, 0.5)

    left = {}
    for name, by in (("whole", net), ("alpha held fast", held)):
        found = pgd(by, IMAGES, labels, 0.3, 8, 1, generator=generator(3, "RobustAccuracyMonitor", 0, 0))
        left[name] = F.cross_entropy(net(found), labels).item(), mean_of(net(found).argmax(1) == labels)
    assert values["robust_accuracy/pgd-8-1"] == pytest.approx(left["whole"][1])
    assert left["whole"][0] > left["alpha held fast"][0]
    beside = RobustAccuracyMonitor(**how, forward="forward")
    (same_,) = quiet(callbacks=[beside]).validate(net, DataLoader(TensorDataset(IMAGES, labels), 48), verbose=False)
    assert same_["robust_accuracy/pgd-8-1"] == pytest.approx(left["whole"][1])


def test_a_mixer_knows_its_networks(tmp_path: Path) -> None:
    net = trained()
    with pytest.raises(RecipeError, match="the partner is not the robust network that the mixer was trained with"):
        predicted(Evaluates(net.standard), AdaptiveSmoothing(Small(4, seed=8), alpha=None, mixer=net.mixer))
    with pytest.warns(UserWarning, match="the network is not the standard one that the mixer was trained with"):
        quiet(callbacks=[net.to_callback()]).predict(Evaluates(Small(3, seed=9)), batches())
    with pytest.raises(RecipeError, match="is neither a saved Mixer nor a checkpoint of AdaptiveSmoothingModule"):
        torch.save({"state_dict": {}}, tmp_path / "other.pt")
        Mixer.load(tmp_path / "other.pt")
    with pytest.raises(RecipeError, match=r"the mixer was trained on maps of .* channels; here are"):
        quiet(callbacks=[net.to_callback()]).predict(Evaluates(Small(5, seed=9)), batches())


def test_vectors_are_maps_of_one_pixel() -> None:
    net = AdaptiveSmoothingModule(
        mlp(classes=4, seed=1), mlp(classes=4, seed=2), ("1", "3"), ("1", "3"), (6,), iterations=1, targets=1, further=1
    )
    x, y = samples(16, classes=4)
    quiet().fit(net, loader(x, y, size=8))
    assert net.mixer.structure["channels"] == {"standard": [5, 5], "robust": [5, 5]}
    assert net.eval()(x).shape == (16, 4)


def test_a_bad_argument_of_the_callback_names_itself() -> None:
    for arguments, says in (
        ({"alpha": 1.5}, r"alpha must be in \[0, 1\]; got 1.5"),
        ({"alpha": None}, r"give one of alpha, gamma and mixer, the others None; got \[\]"),
        ({"gamma": 1.0}, r"give one of alpha, gamma and mixer, the others None; got \['alpha', 'gamma'\]"),
        ({"std_scale": 0.0}, "std_scale must be positive; got 0.0"),
        ({"role": "good"}, "role must be 'robust' or 'standard'; got 'good'"),
        ({"stages": ["fit"]}, "stages must be a list of 'validate', 'test' and 'predict'"),
        ({"alpha_range": (0.1, 0.2)}, "alpha_range must be None without a mixer"),
    ):
        with pytest.raises(RecipeError, match=says):
            AdaptiveSmoothing(**{"partner": ROB, **arguments})


# -- two ranks ---------------------------------------------------------------------------------------------------------


def test_two_ranks_share_the_norm_the_gradients_and_the_counts(tmp_path: Path) -> None:
    def run(rank: int) -> None:
        two = {"strategy": "ddp", "devices": 2, "plugins": [LightningEnvironment()]}
        net = module()
        quiet(max_epochs=1, **two).fit(net, batches(6))
        found = {f"net.{name}": p.detach() for name, p in net.mixer.named_parameters()}
        found |= {"net.mean": net.mixer.norm.mean, "net.var": net.mixer.norm.var}
        own = noise(8, 1)[4 * rank : 4 * rank + 4].clone().requires_grad_()
        norm = GammaNorm()
        (norm(clamped(own)) ** 3).sum().backward()
        found |= {"gradient": own.grad, "mean": norm.mean, "var": norm.var}
        recipe = AdaptiveSmoothing(ROB, alpha=0.6)
        (values,) = quiet(callbacks=[recipe], **two).validate(Evaluates(STD), loader(X, Y, size=3), verbose=False)
        found["acc"] = torch.tensor(values["adaptive_smoothing/acc"])
        torch.save(found, tmp_path / f"{rank}.pt")

    assert process(run, tmp_path, "two", ranks=2) == [0, 0], [e.read_text() for e in tmp_path.glob("*.error")]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    r = noise(8, 1).requires_grad_()
    norm = GammaNorm()
    (norm(clamped(r)) ** 3).sum().backward()
    assert torch.allclose(torch.cat([first.pop("gradient"), second.pop("gradient")]), r.grad, atol=1e-5)
    assert torch.allclose(first["var"], norm.var) and torch.allclose(first["mean"], norm.mean)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["acc"].item() == pytest.approx(mean_of(mixture(STD(X), ROB(X), 0.6).argmax(1) == Y))


# -- precision ---------------------------------------------------------------------------------------------------------


def half(kind: str) -> MixedPrecision:
    """16-mixed on the CPU, where the scaler works too, or bf16-mixed."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if kind == "16-mixed" else None
    return MixedPrecision(kind, "cpu", scaler)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_in_mixed_precision_the_mixture_gamma_and_the_attacks_are_in_fp32(precision: str) -> None:
    net, kinds = module(), []
    real = net.as_trained

    def watched(x: Tensor) -> Any:
        out, gamma = real(x)
        kinds.append((out.dtype, gamma.dtype, torch.is_autocast_enabled("cpu"), net.mixer.training))
        return out, gamma

    net.as_trained = watched
    before = weights(net)
    fit(net, epochs=1, plugins=[half(precision)])
    assert {kind[:2] for kind in kinds} == {(torch.float32, torch.float32)}
    assert {kind[2:] for kind in kinds} == {(True, True), (False, False)}  # mini-batches under autocast, attacks not
    after = weights(net)
    assert not same(before, after) and all(torch.isfinite(value).all() for value in after.values())
    stock = Evaluates(STD)
    found = predicted(stock, AdaptiveSmoothing(ROB, alpha=0.7), plugins=[half(precision)])
    assert found.dtype == torch.float32
    assert torch.allclose(found, mixture(STD(X), ROB(X), 0.7), atol=0.05)
