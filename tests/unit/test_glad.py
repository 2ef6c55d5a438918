"""GLAD against the card's numbers, a textbook SAM, and plain fits."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from lightning_recipes.callbacks import GLAD
from lightning_recipes.callbacks.adapters.glad import ascent, measures, mixed
from tests.stock import Classifier, Watch, loader, mlp, quiet, same, samples, weights

X, Y = samples(24)
LAYERS = ["0", "2"]


def fit(module, *callbacks, epochs=2, size=4, **kwargs):
    trainer = quiet(callbacks=list(callbacks), max_epochs=epochs, **kwargs)
    trainer.fit(module, loader(X, Y, size=size))
    return trainer


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01)


def close(first, second, atol):
    return all(torch.allclose(first[name], second[name], atol=atol, rtol=0) for name in second)


# -- the rule ------------------------------------------------------------------------------------------------------


def test_the_numbers_of_the_card():
    """L = (t1^2 + 10 t2^2) / 2 at (1, 1), rho 0.1, mix 0.5."""
    curvature = torch.tensor([1.0, 10.0])
    t = torch.ones(2)
    g = curvature * t
    assert g.norm().item() == pytest.approx(10.04988, abs=1e-5)
    (e,) = ascent([g], 0.1)
    sharp = curvature * (t + e)
    assert torch.allclose(sharp, torch.tensor([1.0099504, 10.995037]))
    (g_f,) = mixed([g], [sharp], 0.5)
    assert torch.allclose(g_f, torch.tensor([1.0049752, 10.497519]))
    # exact on a quadratic: g + c rho H g / ||g||
    assert torch.allclose(g_f, g + 0.5 * 0.1 * curvature * g / g.norm())


def test_one_norm_over_all_tensors():
    parts = [torch.tensor([3.0]), torch.tensor([[0.0, 4.0]])]
    first, second = ascent(parts, 0.5)
    assert torch.allclose(first, torch.tensor([0.3]))
    assert torch.allclose(second, torch.tensor([[0.0, 0.4]]))
    assert all(e.abs().sum() == 0 for e in ascent([torch.zeros(2)], 0.5))  # 0 / 1e-12


def test_mix_0_and_1_are_exact():
    g, s = torch.rand(100), torch.rand(100) * 1e6
    assert torch.equal(mixed([g], [s], 0.0)[0], g)
    assert torch.equal(mixed([g], [s], 1.0)[0], s)


def test_measures():
    values = measures(
        [torch.tensor([3.0, 0.0]), torch.tensor([4.0])], [torch.tensor([0.0, 2.0]), torch.tensor([1.0])], 7
    )
    assert values["glad/grad_norm"].item() == 5
    assert values["glad/sam_grad_norm"].item() == pytest.approx(math.sqrt(5))
    assert values["glad/cosine"].item() == pytest.approx(4 / (5 * math.sqrt(5)))
    assert values["glad/sharpness"] == 7


class Quadratic(Classifier):
    def __init__(self):
        super().__init__(nn.Module(), lambda parameters: torch.optim.SGD(parameters, lr=1.0))
        self.t = nn.Parameter(torch.ones(2))

    def training_step(self, batch, batch_idx):
        return (self.t[0] ** 2 + 10 * self.t[1] ** 2) / 2


def test_the_numbers_of_the_card_in_a_fit():
    module = Quadratic()
    trainer = fit(module, GLAD(mix=0.5, rho=0.1, rank=None), epochs=1, limit_train_batches=1)
    assert torch.allclose(module.t, 1 - torch.tensor([1.0049752, 10.497519]))
    rise = ((1.0 + 0.1 / 10.04988) ** 2 + 10 * (1 + 1 / 10.04988) ** 2 - 11) / 2
    assert trainer.callback_metrics["glad/sharpness"].item() == pytest.approx(rise, rel=1e-5)
    assert trainer.callback_metrics["glad/grad_norm"].item() == pytest.approx(10.04988, rel=1e-5)
    assert trainer.callback_metrics["glad/sam_grad_norm"].item() == pytest.approx(
        math.hypot(1.0099504, 10.995037), rel=1e-5
    )


def test_a_linear_loss_has_one_gradient():
    class Linear(Quadratic):
        def training_step(self, batch, batch_idx):
            return 3 * self.t[0] - 2 * self.t[1]

    for mix in (0.3, 1.0):
        module = Linear()
        fit(module, GLAD(mix=mix, rho=0.5, rank=None), epochs=1, limit_train_batches=1)
        assert torch.allclose(module.t, torch.tensor([-2.0, 3.0]))


# -- limit cases ------------------------------------------------------------------------------------------------------


def sam(net, rho, mix=1.0, accumulate=1, epochs=2):
    """The textbook: two passes over the same batches, momentum SGD on the second gradient."""
    optimizer = momentum(net.parameters())
    for _ in range(epochs):
        for window in torch.arange(6).split(accumulate):
            rows = torch.cat([torch.arange(4 * i, 4 * i + 4) for i in window.tolist()])
            plain = torch.autograd.grad(F.cross_entropy(net(X[rows]), Y[rows]), list(net.parameters()))
            norm = torch.stack([g.norm() for g in plain]).norm()
            at = [p.detach().clone() for p in net.parameters()]
            with torch.no_grad():
                for p, g in zip(net.parameters(), plain, strict=True):
                    p += rho * g / (norm + 1e-12)
            sharp = torch.autograd.grad(F.cross_entropy(net(X[rows]), Y[rows]), list(net.parameters()))
            with torch.no_grad():
                for p, a, g, s in zip(net.parameters(), at, plain, sharp, strict=True):
                    p.copy_(a)
                    p.grad = (1 - mix) * g + mix * s
            optimizer.step()
    return weights(net)


def test_mix_1_is_sam():
    module = Classifier(optimizer=momentum)
    fit(module, GLAD(mix=1.0, rho=0.3, rank=None))
    expected = sam(mlp(), 0.3)
    assert close(weights(module.net), expected, 1e-7 * 3)
    assert not close(weights(module.net), sam(mlp(), 0.0), 1e-3)


def test_a_mixture_is_between():
    module = Classifier(optimizer=momentum)
    fit(module, GLAD(mix=0.4, rho=0.3, rank=None))
    assert close(weights(module.net), sam(mlp(), 0.3, mix=0.4), 5e-7)


@pytest.mark.parametrize("accumulate", [2, 3])
def test_accumulated_batches_are_one_batch(accumulate):
    module = Classifier(optimizer=momentum)
    fit(module, GLAD(mix=0.7, rho=0.3, rank=None), accumulate_grad_batches=accumulate)
    assert close(weights(module.net), sam(mlp(), 0.3, mix=0.7, accumulate=accumulate), 1e-6)
    large = Classifier(optimizer=momentum)
    fit(large, GLAD(mix=0.7, rho=0.3, rank=None), size=4 * accumulate)
    assert close(weights(module), weights(large), 1e-6)


def test_clipping_sees_the_mixture():
    module = Classifier(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0))
    fit(module, GLAD(mix=1.0, rho=0.3, rank=None), epochs=1, limit_train_batches=1, gradient_clip_val=1e-2)
    net = mlp()
    moved = torch.cat([(a - b).flatten() for a, b in zip(module.net.parameters(), net.parameters(), strict=True)])
    assert moved.norm().item() == pytest.approx(1e-2, rel=1e-3)


def noisy():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3))


def seeded(module, *recipes, **kwargs):
    torch.manual_seed(1)
    fit(module, *recipes, **kwargs)
    return weights(module)


def test_mix_0_without_adapters_is_bitwise_the_plain_fit():
    plain, neutral = Classifier(noisy(), momentum), Classifier(noisy(), momentum)
    assert same(seeded(plain), seeded(neutral, GLAD(mix=0, rank=None)))


def test_mix_0_with_adapters_is_bitwise_plain_lora():
    reference = Classifier(
        optimizer=lambda _: torch.optim.AdamW([p for p in reference.parameters() if p.requires_grad])
    )
    torch.manual_seed(5)
    inject_adapter_in_model(
        LoraConfig(r=2, lora_alpha=8, lora_dropout=0.3, target_modules=LAYERS), reference, adapter_name="glad"
    )
    reference.net[4].requires_grad_(True)
    module = Classifier(optimizer=lambda parameters: torch.optim.AdamW(parameters))
    recipe = GLAD(mix=0, rank=2, lora_dropout=0.3, target_modules=LAYERS, merge_on_end=False, seed=5)
    assert same(seeded(module, recipe), seeded(reference))


def test_a_vanishing_radius_is_the_plain_fit():
    plain, module = Classifier(noisy(), momentum), Classifier(noisy(), momentum)
    assert close(seeded(module, GLAD(mix=1, rho=1e-8, rank=None)), seeded(plain), 1e-6)


def test_the_weights_are_restored_exactly():
    module = Classifier(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    fit(module, GLAD(rho=0.37, rank=None))
    assert same(weights(module.net), weights(mlp()))


def test_the_weights_are_restored_when_the_second_pass_fails():
    class Fails(Classifier):
        runs = 0

        def training_step(self, batch, batch_idx):
            self.runs += 1
            if self.runs == 2:
                raise RuntimeError("user's own")
            return super().training_step(batch, batch_idx)

    module = Fails()
    with pytest.raises(RuntimeError, match="user's own"):
        fit(module, GLAD(rank=None))
    assert same(weights(module.net), weights(mlp()))


def test_only_adapters_may_be_perturbed():
    """The head then follows the plain gradient; at the start B = 0, so A has none and B is all that is moved."""
    kept = {}

    def start(trainer, module):
        kept.update({name: p.detach().clone() for name, p in module.named_parameters()})

    module = Classifier(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    recipe = GLAD(mix=1, rho=0.5, rank=2, target_modules=LAYERS, params="adapters", merge_on_end=False)
    fit(module, recipe, Watch(on_train_start=start), epochs=1, limit_train_batches=1)
    net = mlp()
    F.cross_entropy(net(X[:4]), Y[:4]).backward()
    assert torch.allclose(module.net[4].weight, net[4].weight - 0.1 * net[4].weight.grad, atol=1e-6)

    # B of both layers, scaled by alpha / r = 4, moved by one norm over the two; the gradient there by the chain rule
    a = {i: kept[f"net.{i}.lora_A.glad.weight"] for i in (0, 2)}
    plain = {i: 4 * net[i].weight.grad @ a[i].T for i in a}
    norm = torch.stack([g.norm() for g in plain.values()]).norm()
    moved = {i: 0.5 * g / norm for i, g in plain.items()}
    there = mlp()
    with torch.no_grad():
        for i in a:
            there[i].weight += 4 * moved[i] @ a[i]
    F.cross_entropy(there(X[:4]), Y[:4]).backward()
    for i in a:
        assert torch.allclose(module.net[i].lora_B["glad"].weight, -0.1 * 4 * there[i].weight.grad @ a[i].T, atol=1e-6)
        d_a = 4 * moved[i].T @ there[i].weight.grad
        assert torch.allclose(module.net[i].lora_A["glad"].weight, a[i] - 0.1 * d_a, atol=1e-6)


def test_it_merges_at_the_end():
    module = Classifier()
    fit(module, GLAD(rank=2, target_modules=LAYERS))
    assert weights(module.net).keys() == weights(mlp()).keys()
    assert not torch.equal(module.net[0].weight, mlp()[0].weight)
    assert torch.equal(module.net[0].bias, mlp()[0].bias)


class Queue(Classifier):
    """A step that must not run twice."""

    def __init__(self):
        super().__init__()
        self.entered = 0

    def training_step(self, batch, batch_idx):
        self.entered += len(batch[0])
        return self.loss(batch)

    def loss(self, batch):
        return F.cross_entropy(self(batch[0]), batch[1])


def test_a_named_loss_replaces_the_second_run():
    first, second = Queue(), Queue()
    fit(first, GLAD(rank=None, replay="loss"))
    fit(second, GLAD(rank=None))
    assert (first.entered, second.entered) == (48, 96)
    assert same(weights(first), weights(second))
