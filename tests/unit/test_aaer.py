"""AAER against the card's numbers and a training loop written out by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from lightning_recipes.callbacks import AAER
from lightning_recipes.callbacks.robustness.aaer import abnormal_statistics, regularizer
from lightning_recipes.core.random import key, uniform
from lightning_recipes.core.recipe import StepRecipe
from tests.stock import Classifier, loader, mlp, quiet, same, samples, weights

X, Y = samples()
Z0 = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 2.0], [1.0, 0.0]])
Z1 = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
ZERO = torch.zeros(4, dtype=torch.long)


def fit(module, *recipes, epochs=2, x=X, y=Y, **kwargs):
    trainer = quiet(callbacks=list(recipes), max_epochs=epochs, **kwargs)
    trainer.fit(module, loader(x, y))
    return trainer


# -- the oracle --------------------------------------------------------------------------------------------------------


def oracle(z0=Z0, z1=Z1, lambdas=(1.0, 2.5, 1.5), ce_gradient=False):
    z1 = z1.clone().requires_grad_()
    l0, l1 = (F.cross_entropy(z, ZERO, reduction="none") for z in (z0, z1))
    own = abnormal_statistics(z0, z1, l0, l1 if ce_gradient else l1.detach())
    everywhere = {name: value.detach() for name, value in own.items()}
    loss = l1.mean() + regularizer(own, everywhere, *lambdas)
    loss.backward()
    return own, loss.item(), z1.grad


def test_the_numbers_of_the_card():
    own, loss, gradient = oracle()
    assert (own["m"], own["n"]) == (2, 4)
    assert own["moved"] / 2 == 1  # V_A
    assert own["moved_normal"] / 2 == 0.5  # V_N
    assert own["fallen"].item() / 2 == pytest.approx(0.596776, abs=1e-6)  # C_A
    assert loss == pytest.approx(1.934232, abs=1e-6)
    rows = torch.tensor([[0.6828, 0.0672], [-0.1828, 0.1828], [-0.1828, -0.5672], [-0.0672, 0.0672]])
    assert torch.allclose(gradient, rows, atol=5e-5)


def test_lambda2_is_in_the_loss_and_not_in_the_gradient():
    _, with_, gradient = oracle(lambdas=(1.0, 8.5, 1.5))
    _, without, other = oracle(lambdas=(1.0, 0.0, 1.5))
    assert with_ - without == pytest.approx(8.5 * 0.5 * 0.596776, abs=1e-5)
    assert torch.equal(gradient, other)


def test_with_ce_gradient_l1_is_pushed_up():
    _, _, gradient = oracle(ce_gradient=True)
    _, _, plain = oracle()
    p = Z1.softmax(1)
    d_l1 = p - F.one_hot(ZERO, 2)  # of each sample's cross-entropy
    expected = plain.clone()
    for i in (0, 2):  # A
        expected[i] -= 2.5 / 4 * d_l1[i]
    assert torch.allclose(gradient, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("z0", "z1"),
    [
        (Z0, Z0),  # equal losses: nothing is abnormal (the comparison is strict)
        (Z0, torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [2.0, 0.0]])),  # all are
        (Z0, torch.tensor([[0.1, 0.0], [-5.0, 0.0], [0.0, 1.9], [1.0, 0.0]])),  # V_A < V_N; only C_A is left
    ],
)
def test_the_gate_leaves_the_gradient_of_plain_fgsm(z0, z1):
    _, _, gradient = oracle(z0, z1)
    z1 = z1.clone().requires_grad_()
    F.cross_entropy(z1, ZERO).backward()
    assert torch.allclose(gradient, z1.grad, atol=1e-7)


def test_ranks_share_the_gate_and_v_n():
    """Two ranks of two samples: the mean of their terms and gradients is the whole batch's."""
    _, whole, gradient = oracle()
    z1 = Z1.clone().requires_grad_()
    l0, l1 = (F.cross_entropy(z, ZERO, reduction="none") for z in (Z0, z1))
    ranks = [abnormal_statistics(Z0[p], z1[p], l0[p], l1[p].detach()) for p in (slice(0, 2), slice(2, 4))]
    everywhere = {name: sum(rank[name] for rank in ranks).detach() for name in ranks[0]}
    loss = l1.mean() + sum(regularizer(rank, everywhere, 1.0, 2.5, 1.5) for rank in ranks) / 2
    loss.backward()
    assert loss.item() == pytest.approx(whole, abs=1e-6)
    assert torch.allclose(z1.grad, gradient, atol=1e-6)


# -- in a fit ----------------------------------------------------------------------------------------------------------


def by_hand(
    net,
    epsilon=0.3,
    variant="rs",
    alpha=1.25,
    lambdas=(0.0, 0.0, 0.0),
    low=0.0,
    high=1.0,
    unit=1.0,
    x=X,
    epochs=2,
    ramp=lambda batch: (1.0, 1.0),
    lr=0.1,
    **criterion,
):
    """The card's ten steps in plain torch, SGD, batches of 4; returns the net, and the logged loss of each step."""
    low, high, unit = (torch.as_tensor(v) for v in (low, high, unit))
    regularizers = []
    lambda1, lambda2, lambda3 = lambdas
    for batch in range(4 * epochs):
        i, (attack, regularise) = batch % 4, ramp(batch)
        x_, y = x[4 * i : 4 * i + 4], Y[4 * i : 4 * i + 4]
        radius = epsilon * unit
        u = uniform(key(0, batch // 4, "AAER/start", 0), torch.arange(4 * i, 4 * i + 4), x.shape[1:])
        eta = {"rs": (2 * u - 1) * radius, "n": (2 * u - 1) * 2 * radius, "zero": 0 * x_}[variant]
        eta = torch.clamp(eta, low - x_, high - x_).requires_grad_()
        z0 = net(x_ + eta)
        l0 = F.cross_entropy(z0, y, reduction="none", **criterion)
        delta = eta.detach() + attack * alpha * radius * torch.autograd.grad(l0.mean(), eta)[0].sign()
        if variant != "n":
            delta = torch.clamp(delta, -attack * radius, attack * radius)
        delta = torch.clamp(delta, low - x_, high - x_)
        z1 = net(x_ + delta)
        l1 = F.cross_entropy(z1, y, reduction="none", **criterion)
        loss = F.cross_entropy(z1, y, **criterion)
        abnormal = l0.detach() > l1.detach()
        m, n, extra = abnormal.sum(), len(y), torch.tensor(0.0)
        if lambda1 and 0 < m < n:
            moved = (z1 - z0.detach()).square().sum(1)
            c_a = (l0 - l1).detach()[abnormal].mean()
            v = (moved[abnormal].mean() - moved[~abnormal].mean().detach()).clamp_min(0)
            extra = regularise * lambda1 * m / n * (lambda2 * c_a + lambda3 * v)
        regularizers.append(extra.item())
        net.zero_grad()
        (loss + extra).backward()
        with torch.no_grad():
            for p in net.parameters():
                p -= lr * p.grad
    return net, regularizers


def close(module, net, atol=1e-6):
    first, second = weights(module.net), weights(net)
    return all(torch.allclose(first[name], second[name], atol=atol) for name in second)


@pytest.mark.parametrize(("variant", "alpha"), [("rs", 1.25), ("n", 1.0), ("zero", 1.0)])
def test_lambda1_0_is_plain_fgsm_training(variant, alpha):
    module = Classifier()
    fit(module, AAER(epsilon=0.3, variant=variant, lambda1=0))
    net, _ = by_hand(mlp(), variant=variant, alpha=alpha)
    assert close(module, net)


@pytest.mark.parametrize(("variant", "alpha", "epsilon", "lr"), [("rs", 1.25, 0.3, 1.0), ("n", 1.0, 0.4, 0.5)])
def test_a_fit_equals_the_loop_by_hand(variant, alpha, epsilon, lr):
    """Large steps, so that some samples are abnormal."""
    module = Classifier(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=lr))
    logged = []
    recipe = AAER(epsilon=epsilon, variant=variant, lambda1=1.5, lambda2=0, lambda3=3.0)
    recipe.on_train_batch_end = lambda trainer, *rest: logged.append(
        trainer.callback_metrics["aaer/regularizer"].item()
    )
    fit(module, recipe, epochs=6)
    net, expected = by_hand(mlp(), epsilon, variant, alpha, (1.5, 0.0, 3.0), epochs=6, lr=lr)
    assert sum(r > 0 for r in expected) >= 2
    assert logged == pytest.approx(expected, abs=1e-4)
    assert close(module, net, atol=1e-4)
    assert not close(module, by_hand(mlp(), epsilon, variant, alpha, epochs=6, lr=lr)[0], atol=1e-3)


def test_lambda2_does_not_change_the_weights():
    first, second = Classifier(), Classifier()
    fit(first, AAER(epsilon=0.3, lambda2=0))
    fit(second, AAER(epsilon=0.3, lambda2=8.5))
    assert same(weights(first), weights(second))


def test_lambda3_0_is_plain_fgsm_training():
    first, second = Classifier(), Classifier()
    fit(first, AAER(epsilon=0.3, lambda3=0))
    fit(second, AAER(epsilon=0.3, lambda1=0))
    assert same(weights(first), weights(second))


def noisy():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3))


def test_epsilon_0_is_bitwise_the_plain_fit():
    plain, neutral = Classifier(noisy()), Classifier(noisy())
    for module, recipes in ((plain, []), (neutral, [AAER(epsilon=0)])):
        torch.manual_seed(1)
        fit(module, *recipes)
    assert same(weights(plain), weights(neutral))


def test_normalised_inputs_are_attacked_in_pixels():
    """Images of 2 channels of 3 pixels; radius, step and box are per channel."""
    mean, std = [0.4, 0.6], [0.2, 0.5]
    m, s = (torch.tensor(v).reshape(2, 1) for v in (mean, std))
    x = (X.reshape(-1, 2, 3) - m) / s
    build = lambda: nn.Sequential(nn.Flatten(), *mlp())  # noqa: E731
    module = Classifier(build())
    fit(module, AAER(epsilon=0.3, lambda1=0, mean=mean, std=std), x=x)
    net, _ = by_hand(build(), x=x, low=(0 - m) / s, high=(1 - m) / s, unit=1 / s)
    assert close(module, net)


def test_the_modules_label_smoothing_and_class_weights_are_attacked_too():
    options = {"weight": torch.tensor([0.5, 2.0, 1.0]), "label_smoothing": 0.2}

    class Weighted(Classifier):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1], **options)

    module = Weighted(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0))
    fit(module, AAER(epsilon=0.3, lambda1=1.5, lambda2=2.5, lambda3=3.0), epochs=6)
    net, regularizers = by_hand(mlp(), lambdas=(1.5, 2.5, 3.0), epochs=6, lr=1.0, **options)
    assert any(regularizers)
    assert close(module, net, atol=1e-4)


def test_warm_up_ramps_step_projection_and_regulariser():
    """Batch b of 4 in an epoch: min(b / (4 epochs), 1)."""
    module = Classifier(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0))
    recipe = AAER(epsilon=0.3, lambda1=1.5, lambda2=2.5, lambda3=3.0, attack_warmup_epochs=1.5, reg_warmup_epochs=4)
    fit(module, recipe, epochs=6)
    ramp = lambda batch: (min(batch / 6, 1), min(batch / 16, 1))  # noqa: E731
    net, _ = by_hand(mlp(), lambdas=(1.5, 2.5, 3.0), epochs=6, lr=1.0, ramp=ramp)
    assert close(module, net, atol=1e-4)


@pytest.mark.parametrize(("mode", "updates"), [("train", 8), ("eval", 4)])
def test_batch_norm_statistics_move_twice_a_step_or_once(mode, updates):
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    fit(Classifier(net), AAER(epsilon=0.1, attack_mode=mode), epochs=1)
    assert net[1].num_batches_tracked == updates


def test_it_logs_what_the_paper_plots():
    trainer = fit(Classifier(), AAER(epsilon=0.3))
    assert {"aaer/abnormal_fraction", "aaer/ce_variation", "aaer/l2_variation", "aaer/regularizer"} <= set(
        trainer.callback_metrics
    )


def test_soft_targets_of_another_recipe_are_attacked():
    class Smooth(StepRecipe):
        def transform_targets(self, step, logits, targets):
            return F.one_hot(targets, 3) * 0.8 + 0.2 / 3

    module = Classifier()
    fit(module, Smooth(), AAER(epsilon=0.3, lambda1=0))
    net, _ = by_hand(mlp(), label_smoothing=0.2)
    assert close(module, net)


def test_dict_batches():
    class Dict(Classifier):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch["image"]), batch["label"])

    module = Dict()
    data = [{"image": X[i : i + 4], "label": Y[i : i + 4]} for i in range(0, 16, 4)]
    quiet(callbacks=[AAER(epsilon=0.3, lambda1=0)], max_epochs=2).fit(module, DataLoader(data, batch_size=None))
    assert close(module, by_hand(mlp())[0])


# -- what is allowed (its misuses stand in tests/conformance/misuses.py) -----------------------------------------------


def test_a_wider_input_range_allows_a_wider_radius():
    AAER(epsilon=1.5, input_range=(-1.0, 1.0))


def test_a_mixing_recipe_may_stand_before_it():
    class Mixup(StepRecipe):
        def transform_batch(self, step, batch):
            return batch

    fit(Classifier(), Mixup(), AAER())
