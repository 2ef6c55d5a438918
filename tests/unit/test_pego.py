"""PEGO against the card's numbers, the dense formula, and plain peft."""

from __future__ import annotations

import warnings
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from lightning_recipes.callbacks import PEGO
from lightning_recipes.callbacks.adapters.pego import orthogonality, overlaps
from tests.stock import Classifier, Watch, loader, mlp, quiet, same, samples, weights

X, Y = samples(20)
LAYERS = ["0", "2"]


def fit(module, *callbacks, epochs=1, **kwargs):
    trainer = quiet(callbacks=list(callbacks), max_epochs=epochs, **kwargs)
    trainer.fit(module, loader(X, Y))
    return trainer


# -- the formula -----------------------------------------------------------------------------------------------------


def dense(w, a, b):
    """Both terms as written on the card, with every D_i formed."""
    d = [b_i @ a_i for a_i, b_i in zip(a, b, strict=True)]
    preserve = sum((w @ d_i.T).abs().sum() for d_i in d)
    diversify = sum(((d_i @ d_j.T).abs().sum() for d_i, d_j in combinations(d, 2)), torch.zeros(()))
    return preserve, diversify


def factors(groups=3, rank=2, out=5, width=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(out, width, generator=g)
    a = [torch.randn(rank, width, generator=g).requires_grad_() for _ in range(groups)]
    b = [torch.randn(out, rank, generator=g).requires_grad_() for _ in range(groups)]
    return w, a, b


def test_the_numbers_of_the_card():
    """D_1 = [[1, 0], [0, 0]] and D_2 = [[0, 1], [0, 1]]; comparing columns would give 6."""
    w = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    a = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
    b = [torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0], [1.0]])]
    preserve, diversify = orthogonality(w, a, b)
    assert (preserve.item(), diversify.item()) == (7, 0)
    columns = sum((w.T @ (b_i @ a_i)).abs().sum() for a_i, b_i in zip(a, b, strict=True))
    assert columns == 5  # W^T D: 1 + (0 1; 0 3)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_value_and_gradient_are_those_of_the_dense_formula(groups):
    w, a, b = factors(groups)
    preserve, diversify = orthogonality(w, a, b)
    expected = dense(w, a, b)
    assert torch.allclose(preserve, expected[0], rtol=1e-5)
    assert torch.allclose(diversify, expected[1], rtol=1e-5)
    ours = torch.autograd.grad(2 * preserve + 3 * diversify, [*a, *b])
    theirs = torch.autograd.grad(2 * expected[0] + 3 * expected[1], [*a, *b])
    assert all(torch.allclose(x, y, rtol=1e-4, atol=1e-4) for x, y in zip(ours, theirs, strict=True))


def test_the_gradient_of_the_gradient_free_product_in_double():
    from lightning_recipes.callbacks.adapters.pego import _AbsoluteSum

    g = torch.Generator().manual_seed(0)
    p, q = (torch.randn(2, n, 3, dtype=torch.double, generator=g).requires_grad_() for n in (4, 5))
    assert torch.autograd.gradcheck(_AbsoluteSum.apply, (p, q))
    assert torch.allclose(_AbsoluteSum.apply(p, q), torch.einsum("mir,mjr->mij", p, q).abs().sum((1, 2)))


def test_at_the_start_both_terms_and_their_gradients_are_0():
    w, a, b = factors()
    b = [torch.zeros_like(x).requires_grad_() for x in b]
    preserve, diversify = orthogonality(w, a, b)
    assert (preserve.item(), diversify.item()) == (0, 0)
    gradients = torch.autograd.grad(preserve + diversify, [*a, *b])
    assert all(g.count_nonzero() == 0 for g in gradients)


def test_autocast_does_not_touch_it():
    w, a, b = factors()
    with torch.autocast("cpu", torch.bfloat16):
        preserve, _ = orthogonality(w, a, b)
    assert preserve.dtype == torch.float32
    assert torch.allclose(preserve, dense(w, a, b)[0], rtol=1e-5)


def test_overlaps_do_not_depend_on_scale():
    w, a, b = factors()
    d = [b_i @ a_i for a_i, b_i in zip(a, b, strict=True)]
    with_w = torch.stack([(w @ x.T).abs().sum() / (w.norm() * x.norm()) for x in d]).mean()
    pairs = torch.stack([(x @ y.T).abs().sum() / (x.norm() * y.norm()) for x, y in combinations(d, 2)]).mean()
    for scale in (1.0, 7.0):
        ours = overlaps(scale * w, a, [scale * x for x in b])
        assert torch.allclose(ours[0], with_w, rtol=1e-4)
        assert torch.allclose(ours[1], pairs, rtol=1e-4)
    assert [x.item() for x in overlaps(w, a, [0 * x for x in b])] == [0, 0]


# -- limit cases -----------------------------------------------------------------------------------------------------


def plain_lora(rank, seed, names=("g0",)):
    """A module with peft's own LoRA in it, everything else but the head frozen."""
    module = Classifier(optimizer=lambda _: torch.optim.AdamW([p for p in module.parameters() if p.requires_grad]))
    torch.manual_seed(seed)
    for name in names:
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=LAYERS), module, adapter_name=name)
    module.net[4].requires_grad_(True)
    return module


def test_weight_0_and_one_group_is_bitwise_plain_lora():
    reference = plain_lora(2, seed=5)
    fit(reference, epochs=2)
    module = Classifier(optimizer=lambda parameters: torch.optim.AdamW(parameters))
    fit(module, PEGO(rank=2, groups=1, weight=0, target_modules=LAYERS, merge_on_end=False, seed=5), epochs=2)
    assert same(weights(module), weights(reference))
    assert weights(module)["net.0.lora_B.g0.weight"].abs().sum() > 0


def test_several_groups_with_weight_0_are_one_lora_of_the_stacked_rank():
    kept = {}

    def stack(trainer, module, *rest):
        for i in (0, 2):
            layer = module.net[i]
            kept[i] = torch.cat([layer.lora_A[f"g{j}"].weight.detach().clone() for j in range(3)])

    module = Classifier()
    fit(module, PEGO(rank=2, groups=3, weight=0, target_modules=LAYERS), Watch(on_train_start=stack))
    reference = plain_lora(6, seed=0)
    reference.make_optimizer = lambda _: torch.optim.SGD([p for p in reference.parameters() if p.requires_grad], lr=0.1)
    with torch.no_grad():
        for i in (0, 2):
            reference.net[i].lora_A["g0"].weight.copy_(kept[i])
    fit(reference)
    for i in (0, 2):
        merged = reference.net[i].base_layer.weight + reference.net[i].get_delta_weight("g0")
        assert torch.allclose(module.net[i].weight, merged, atol=1e-6)
    assert torch.allclose(module.net[4].weight, reference.net[4].weight, atol=1e-6)


# -- in a fit ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(("preserve", "diversify"), [(True, True), (True, False), (False, True)])
def test_a_fit_equals_the_dense_loop(preserve, diversify, accumulate):
    """lambda L_o counts once a step, also in a short last window (where Lightning divides the loss by 3 too)."""
    values = {}

    def copy_values(trainer, module):
        values.update({name: p.detach().clone() for name, p in module.named_parameters()})

    module = Classifier()
    recipe = PEGO(
        rank=2, groups=2, weight=0.01, target_modules=LAYERS, preserve=preserve, diversify=diversify, scaling=2.0
    )
    fit(module, recipe, Watch(on_train_start=copy_values), epochs=2, accumulate_grad_batches=accumulate)

    free = {n: v.requires_grad_() for n, v in values.items() if "lora_" in n or n.startswith("net.4")}

    def forward(x):
        terms = []
        for i in (0, 2):
            w, bias = values[f"net.{i}.base_layer.weight"], values[f"net.{i}.base_layer.bias"]
            a = [free[f"net.{i}.lora_A.g{j}.weight"] for j in range(2)]
            b = [free[f"net.{i}.lora_B.g{j}.weight"] for j in range(2)]
            terms.append(dense(w, a, b))
            x = F.linear(x, w + 2.0 * sum(b_j @ a_j for a_j, b_j in zip(a, b, strict=True)), bias).relu()
        penalty = sum(preserve * p + diversify * d for p, d in terms)
        return F.linear(x, free["net.4.weight"], free["net.4.bias"]), penalty

    for _ in range(2):
        for window in torch.arange(5).split(accumulate):
            loss = 0
            for i in window.tolist():
                logits, penalty = forward(X[4 * i : 4 * i + 4])
                loss = loss + F.cross_entropy(logits, Y[4 * i : 4 * i + 4]) / accumulate
            gradients = torch.autograd.grad(loss + 0.01 * penalty, list(free.values()))
            with torch.no_grad():
                for p, g in zip(free.values(), gradients, strict=True):
                    p -= 0.1 * g
    for i in (0, 2):
        delta = sum(free[f"net.{i}.lora_B.g{j}.weight"] @ free[f"net.{i}.lora_A.g{j}.weight"] for j in range(2))
        assert torch.allclose(module.net[i].weight, values[f"net.{i}.base_layer.weight"] + 2 * delta, atol=1e-5)
    assert torch.allclose(module.net[4].weight, free["net.4.weight"], atol=1e-5)
    assert torch.equal(module.net[0].bias, mlp()[0].bias)


def test_it_logs_its_terms_and_overlaps():
    trainer = fit(Classifier(), PEGO(rank=1, groups=2, target_modules=LAYERS))
    names = {"orthogonal_loss", "preserve", "diversify", "overlap_with_w", "overlap_of_pairs"}
    assert {f"pego/{name}" for name in names} <= set(trainer.callback_metrics)
    metrics = {name: trainer.callback_metrics[f"pego/{name}"].item() for name in names}
    assert metrics["preserve"] > 0
    assert metrics["orthogonal_loss"] == pytest.approx(1e-3 * (metrics["preserve"] + metrics["diversify"]), rel=1e-4)


def test_the_logged_loss_does_not_depend_on_accumulation():
    trainer = fit(Classifier(), PEGO(rank=1, groups=2, target_modules=LAYERS), accumulate_grad_batches=2, epochs=2)
    metrics = {name: trainer.callback_metrics[f"pego/{name}"].item() for name in ("orthogonal_loss", "preserve")}
    diversify = trainer.callback_metrics["pego/diversify"].item()
    assert metrics["orthogonal_loss"] == pytest.approx(1e-3 * (metrics["preserve"] + diversify), rel=1e-4)


def test_nothing_is_computed_at_weight_0():
    trainer = fit(Classifier(), PEGO(rank=1, groups=2, weight=0, target_modules=LAYERS))
    assert "pego/preserve" not in trainer.callback_metrics


# -- warnings (its errors stand in tests/conformance/misuses.py) -----------------------------------------------------


def test_batch_norm_statistics_are_warned_of():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    with pytest.warns(UserWarning, match="PEGO freezes weights, not batch-norm statistics"):
        fit(Classifier(net), PEGO(rank=1, target_modules=["0"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=UserWarning, message="(?!PEGO)")
        warnings.filterwarnings("ignore", category=Warning, module="torch|lightning")
        fit(Classifier(), PEGO(rank=1, target_modules=LAYERS))


def test_a_weight_that_dominates_is_warned_of_after_50_steps():
    with pytest.warns(UserWarning, match=r"PEGO: weight x L_o is .* against a loss of .* after 50 steps"):
        module = Classifier(optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.1))
        fit(module, PEGO(rank=2, target_modules=LAYERS, weight=1e4), epochs=11)
