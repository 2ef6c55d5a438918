"""SVFit against the card's numbers, the dense formula, and the weight's own decomposition."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrize

from lightning_recipes.callbacks import GLAD, SVFit
from lightning_recipes.callbacks.adapters.svfit import (
    SingularValues,
    decompose,
    fingerprint,
    load_values,
    merged,
    part_of,
    rank_for,
    shares,
)
from lightning_recipes.core.adapters import AdapterSpec
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.surgery import as_structure, rebuilt
from tests.attention import CASES, D
from tests.stock import Classifier, Watch, loader, mlp, quiet, same, samples, weights

X, Y = samples(20)
LAYERS = ["0", "2"]


def fit(module, *callbacks, epochs=1, data=None, **kwargs):
    trainer = quiet(callbacks=list(callbacks), max_epochs=epochs, **kwargs)
    trainer.fit(module, loader(X, Y) if data is None else data)
    return trainer


def spec(**arguments):
    settings = {"rank": None, "energy": None, "energy_of": "squares", "target": LAYERS, "part": "top"}
    return SingularValues(**{**settings, "train_fully": ("head",), "seed": 0, **arguments})


def deltas(operation):
    return [layer.lora_B["svfit"].parametrizations.weight.original for layer in operation.layers.values()]


def move(operation, seed=3):
    """Give every delta a value, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for delta in deltas(operation):
            delta.copy_(torch.randn(delta.shape, generator=generator) * 0.3)


# -- the formula -----------------------------------------------------------------------------------------------------


def one_layer(weight):
    """A module whose only layer to adapt has that weight, and no bias."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.clone())
    return Classifier(nn.Sequential(layer, nn.ReLU(), nn.Linear(weight.shape[0], 2)))


def test_the_numbers_of_the_card():
    """W = diag(3, 1), r = 1, dL/dW = [[1, 2], [3, 4]]: dL/dsigma = 1, and a step of 0.1 gives diag(2.9, 1)."""
    module = one_layer(torch.diag(torch.tensor([3.0, 1.0])))
    operation = spec(rank=1, target=["0"]).operate(module)
    layer = operation.layers["net.0"]
    (layer.get_delta_weight("svfit") * torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum().backward()
    (delta,) = deltas(operation)
    assert delta.grad.tolist() == pytest.approx([1.0])
    with torch.no_grad():
        delta -= 0.1 * delta.grad
    operation.remove(merge=True)
    assert torch.allclose(module.net[0].weight, torch.diag(torch.tensor([2.9, 1.0])))


def test_the_energies_of_the_card():
    values = torch.tensor([3.0, 1.0])
    assert shares(values, "squares").tolist() == pytest.approx([0.9, 0.1])
    assert shares(values, "sums").tolist() == pytest.approx([0.75, 0.25])
    assert [rank_for(values, e, "squares") for e in (0.5, 0.9, 0.91, 1.0)] == [1, 1, 2, 2]
    assert [rank_for(values, e, "sums") for e in (0.5, 0.75, 0.76, 1.0)] == [1, 1, 2, 2]
    assert shares(torch.zeros(4)).tolist() == [0.25] * 4
    assert rank_for(torch.zeros(4), 1.0) == 4


def test_the_rank_for_an_energy_is_the_smallest_that_holds_it():
    _, values, _ = decompose(torch.randn(12, 9, generator=torch.Generator().manual_seed(0)))
    squares = values.double().square()
    for energy in torch.linspace(0.05, 1, 20).tolist():
        r = rank_for(values, energy)
        assert squares[:r].sum() >= (energy - 1e-12) * squares.sum()
        assert r == 1 or squares[: r - 1].sum() < energy * squares.sum()


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_the_gradient_is_u_dw_v_and_flipping_signs_changes_nothing(shape):
    g = torch.Generator().manual_seed(0)
    w, dw = torch.randn(shape, generator=g), torch.randn(shape, generator=g)
    u, values, vt = decompose(w)
    assert torch.allclose(merged(torch.zeros(shape), u, values, vt), w, atol=1e-5)
    delta = torch.zeros(min(shape), requires_grad=True)
    (merged(w, u, delta, vt) * dw).sum().backward()
    by_hand = torch.stack([u[:, i] @ dw @ vt[i] for i in range(min(shape))])
    assert torch.allclose(delta.grad, by_hand, atol=1e-5)
    sign = torch.tensor([-1.0, 1.0, -1.0, 1.0, -1.0])[: min(shape)]
    step = torch.randn(min(shape), generator=g)
    assert torch.equal(merged(w, u * sign, step, sign[:, None] * vt), merged(w, u, step, vt))


def test_which_values_are_trained():
    def part(name, seed=0):
        return part_of(6, 2, name, torch.Generator().manual_seed(seed)).tolist()

    assert part("top") == [0, 1]
    assert part("bottom") == [4, 5]
    assert part("random") == part("random") == sorted(part("random"))
    assert len({tuple(part("random", seed)) for seed in range(20)}) > 3


def test_half_precision_weights_are_decomposed_in_fp32():
    w = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    u, values, vt = decompose(w)
    assert {x.dtype for x in (u, values, vt)} == {torch.float32}
    assert torch.allclose(u @ torch.diag(values) @ vt, w.float(), atol=1e-5)
    assert decompose(w.double())[1].dtype == torch.float64


def test_the_parameter_count_of_the_card():
    """On square layers LoRA of rank 8 has exactly sixteen times as many."""
    square = [mlp(width=32)[2], nn.Linear(32, 32), nn.Linear(32, 32)]
    count, lora = {}, AdapterSpec(["lora"], 8, 8, 0.0, "all-linear")
    for name, surgery in {"svfit": spec(target="all-linear"), "lora": lora}.items():
        made = surgery.operate(Classifier(nn.Sequential(*copy.deepcopy(square), nn.Linear(32, 3)))).made
        count[name] = sum(p.numel() for p in made.values())
    assert count == {"svfit": 3 * 32, "lora": 16 * 3 * 32}


# -- on real architectures -------------------------------------------------------------------------------------------


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture
def module(case):
    torch.manual_seed(0)
    built = case.build().eval()
    with torch.no_grad():  # some heads start at zero
        for p in built.get_submodule(case.head).parameters():
            p.normal_()
    return built


def test_it_starts_bitwise_as_the_stock_model_trains_only_delta_and_merges_into_stock_layers(module, case):
    stock = copy.deepcopy(module)
    kinds = {name: (id(part), type(part)) for name, part in module.named_modules()}
    operation = spec(target="qv").operate(module)
    with torch.no_grad():
        assert torch.equal(module(case.inputs()), stock(case.inputs()))
    assert torch.equal(module(case.inputs()), stock(case.inputs()))
    assert list(operation.layers) == [f"{b}.{place}" for b in case.blocks for place in case.adapted.values()]
    assert [p.shape for p in operation.made.values()] == [(D,)] * 4
    assert all(p is module.get_parameter(name) for name, p in operation.made.items())
    assert operation.weight_decay == dict.fromkeys(operation.made, 0.0)

    move(operation)
    with torch.no_grad():
        adapted = module(case.inputs())
        for block in case.blocks:
            for role, place in case.adapted.items():
                weight = case.projection(stock.get_submodule(block), role)
                layer = operation.layers[f"{block}.{place}"]
                part = layer.lora_B["svfit"].parametrizations.weight
                u, values, vt = decompose(weight)
                assert torch.equal(part[0].u.abs(), u.abs())
                weight.copy_(merged(weight, part[0].u, part.original, layer.lora_A["svfit"].weight))
                assert torch.allclose(
                    part[0].u @ part[0].values.diag() @ layer.lora_A["svfit"].weight, (u * values) @ vt, atol=1e-6
                )
        assert torch.allclose(stock(case.inputs()), adapted, atol=1e-5)
        operation.remove(merge=True)
        assert torch.allclose(module(case.inputs()), adapted, atol=1e-5)
    assert {name: (id(part), type(part)) for name, part in module.named_modules()} == kinds
    for name, value in stock.state_dict().items():
        assert torch.allclose(module.state_dict()[name], value, atol=1e-6), name


def test_what_a_checkpoint_describes_is_built_without_a_decomposition(module, case, monkeypatch):
    twin = copy.deepcopy(module)
    operation = spec(target="qv", rank=3, part="bottom").operate(module)
    move(operation)
    stored = as_structure(operation.spec)
    assert set(stored["spec"]["ranks"].values()) == {3}
    monkeypatch.setattr(torch.linalg, "svd", None)
    again = rebuilt(spec(target="qv", rank=3, part="bottom"), stored).operate(twin)
    assert again.made.keys() == operation.made.keys()
    twin.load_state_dict(module.state_dict())
    with torch.no_grad():
        assert torch.equal(twin(case.inputs()), module(case.inputs()))
    assert as_structure(again.spec) == stored


# -- in a fit ----------------------------------------------------------------------------------------------------------


def test_top_and_bottom_are_one_family_at_full_rank():
    modules = [Classifier(), Classifier()]
    for module, part in zip(modules, ("top", "bottom")):
        fit(module, SVFit(target_modules=LAYERS, part=part), epochs=2)
    assert same(*(weights(module) for module in modules))
    assert not torch.equal(modules[0].net[0].weight, mlp()[0].weight)


@pytest.mark.parametrize("rank", [None, 2])
def test_a_fit_equals_the_loop_by_hand(rank):
    """AdamW with decay on the head and none on the values, as the difference form needs."""
    module = Classifier(optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.5))
    fit(module, SVFit(rank, target_modules=LAYERS), epochs=3)

    net = mlp()
    factors = {i: tuple(x.detach() for x in decompose(net[i].weight)) for i in (0, 2)}
    values = {i: torch.zeros(rank or 5, requires_grad=True) for i in factors}
    groups = [{"params": list(values.values()), "weight_decay": 0.0}, {"params": list(net[4].parameters())}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.5)

    def weight(i):
        u, _, vt = factors[i]
        return merged(net[i].weight.detach(), u[:, : rank or 5], values[i], vt[: rank or 5])

    for _ in range(3):
        for x, y in loader(X, Y):
            for i in factors:
                x = F.linear(x, weight(i), net[i].bias.detach()).relu()
            optimizer.zero_grad()
            F.cross_entropy(net[4](x), y).backward()
            optimizer.step()
    for i in factors:
        assert torch.allclose(module.net[i].weight, weight(i), atol=1e-5)
        assert torch.equal(module.net[i].bias, net[i].bias)
    assert torch.allclose(module.net[4].weight, net[4].weight, atol=1e-5)


def test_it_logs_what_trains_the_energies_and_the_change():
    module, kept = Classifier(), {}
    recipe = SVFit(2, target_modules=LAYERS)

    def look(trainer, module):
        parts = [layer.lora_B["svfit"].parametrizations.weight for layer in recipe.operation.layers.values()]
        change = torch.cat([part.original.detach() for part in parts]).norm()
        kept["change"] = (change / torch.cat([part[0].values for part in parts]).norm()).item()

    trainer = fit(module, recipe, Watch(on_train_epoch_end=look))
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    net = mlp()
    held = [shares(decompose(net[i].weight)[1])[:2].sum().item() for i in (0, 2)]
    assert metrics["svfit/trainable"] == 2 + 2 + 5 * 3 + 3
    assert metrics["svfit/energy_min"] == pytest.approx(min(held))
    assert metrics["svfit/energy_mean"] == pytest.approx(sum(held) / 2)
    assert 0 < metrics["svfit/relative_change"] == pytest.approx(kept["change"], rel=1e-5)


def test_an_energy_chooses_a_rank_for_each_layer():
    torch.manual_seed(0)
    net = mlp()
    with torch.no_grad():
        net[0].weight.copy_(torch.outer(torch.randn(5), torch.randn(6)) + 0.01 * torch.randn(5, 6))
    recipe = SVFit(energy=0.9, target_modules=LAYERS, merge_on_end=False)
    fit(Classifier(net), recipe)
    ranks = recipe.operation.spec.ranks
    assert ranks["net.0"] == 1 < ranks["net.2"]
    assert {path: delta.numel() for path, delta in zip(ranks, deltas(recipe.operation))} == ranks
    assert all(0.9 <= held <= 1 for held in recipe.operation.spec.energies.values())


def test_an_energy_that_takes_everything_is_warned_of():
    with pytest.warns(UserWarning, match=r"SVFit: energy=1\.0 takes all singular values of every layer"):
        fit(Classifier(), SVFit(energy=1.0, target_modules=LAYERS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=Warning, message="(?!SVFit)")
        fit(Classifier(), SVFit(energy=0.5, target_modules=LAYERS))
        fit(Classifier(), SVFit(target_modules=LAYERS))


def test_bf16_layers_are_adapted_in_fp32_and_keep_their_dtype():
    module = Classifier(mlp().bfloat16())
    x = X.bfloat16()
    before = module(x)
    operation = spec(rank=2).operate(module)
    assert {p.dtype for layer in operation.layers.values() for n, p in layer.named_parameters() if "lora_" in n} == {
        torch.float32
    }
    assert torch.equal(module(x), before)
    move(operation)
    adapted = module(x)
    assert adapted.dtype == torch.bfloat16
    operation.remove(merge=True)
    assert torch.allclose(module(x), adapted, atol=0.02)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_what_trains_stays_in_fp32(precision):
    seen = {}

    def look(trainer, module, *rest):
        seen.update({n: (p.dtype, p.grad.dtype) for n, p in module.named_parameters() if p.grad is not None})

    module = Classifier()
    fit(module, SVFit(target_modules=LAYERS), Watch(on_before_zero_grad=look), precision=precision)
    assert len(seen) == 4
    assert set(seen.values()) == {(torch.float32, torch.float32)}
    assert not torch.equal(module.net[0].weight, mlp()[0].weight)


def test_true_half_precision_is_refused():
    with pytest.raises(RecipeError, match=r"SVFit .* need fp32; precision='bf16-true' .* use the mixed one"):
        fit(Classifier(), SVFit(target_modules=LAYERS), precision="bf16-true")


def test_factors_never_train_and_are_no_buffers():
    """DDP would send buffers from rank 0 in every step."""
    kept = {}

    def keep(trainer, module):
        kept.update(weights(module))

    recipe = SVFit(3, target_modules=LAYERS, merge_on_end=False)
    module = Classifier()
    fit(module, recipe, Watch(on_train_start=keep), epochs=2)
    assert not list(module.buffers())
    moved = {name for name, value in module.state_dict().items() if not torch.equal(value, kept[name])}
    assert moved == {*recipe.operation.made, "net.4.weight", "net.4.bias"}


def test_a_kept_adapter_copies_compiles_and_opens_into_an_ordinary_lora():
    recipe = SVFit(target_modules=LAYERS, merge_on_end=False)
    module = Classifier()
    fit(module, recipe, epochs=2)
    with torch.no_grad():
        adapted = module(X)
        twin = copy.deepcopy(module)
        assert torch.equal(twin(X), adapted)
        assert all(p is not q for p, q in zip(twin.parameters(), module.parameters(), strict=True))
        compiled = torch.compile(module.net, backend="aot_eager", fullgraph=True)
        assert torch.allclose(compiled(X), adapted, atol=1e-6)
        torch._dynamo.reset()
        for layer in twin.modules():
            if isinstance(layer, LoraLayer):
                parametrize.remove_parametrizations(layer.lora_B["svfit"], "weight")
                assert type(layer.lora_B["svfit"]) is nn.Linear
        assert torch.equal(twin(X), adapted)


def test_with_delta_frozen_it_is_training_of_the_head():
    def freeze(trainer, module):
        for delta in deltas(recipe.operation):
            delta.requires_grad_(False)

    module, recipe = Classifier(), SVFit(target_modules=LAYERS)
    fit(module, recipe, Watch(on_train_start=freeze), epochs=2)
    reference = Classifier()
    reference.net[:4].requires_grad_(False)
    fit(reference, epochs=2)
    assert same(weights(module), weights(reference))


# -- the compact file --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [{}, {"rank": 2, "part": "bottom"}, {"energy": 0.8}])
def test_the_compact_file_holds_two_numbers_a_value_and_gives_the_merged_module(arguments, tmp_path):
    module, recipe = Classifier(), SVFit(target_modules=LAYERS, **arguments)
    fit(module, recipe, Watch(on_train_epoch_end=lambda *_: recipe.save_values(tmp_path / "values")), epochs=3)
    tensors = load_file(tmp_path / "values")
    ranks = [tensors[f"delta/net.{i}"].numel() for i in (0, 2)]
    assert sum(x.numel() for x in tensors.values()) == 2 * sum(ranks) + 5 * 3 + 3
    fresh = Classifier()
    names = list(fresh.state_dict())
    assert load_values(fresh, tmp_path / "values") is fresh
    assert list(fresh.state_dict()) == names
    assert all(torch.allclose(fresh.state_dict()[n], v, atol=1e-6) for n, v in module.state_dict().items())


def test_other_singular_vectors_than_the_file_s_are_refused(tmp_path):
    module, recipe = Classifier(), SVFit(target_modules=LAYERS, merge_on_end=False)
    fit(module, recipe)
    recipe.save_values(tmp_path / "values")
    other = Classifier(mlp(seed=1))
    before = weights(other)
    with pytest.raises(RecipeError, match=r"other singular vectors of net\.0: .* peft's format \(adapter_dir\)"):
        load_values(other, tmp_path / "values")
    assert same(weights(other), before)
    assert not any(isinstance(part, LoraLayer) for part in other.modules())


def test_a_fingerprint_tells_vectors_apart_and_not_their_joint_sign():
    u, _, vt = decompose(torch.randn(8, 6, generator=torch.Generator().manual_seed(0)))
    sign = torch.tensor([-1.0, 1.0, 1.0, -1.0, 1.0, -1.0])
    assert torch.equal(fingerprint(u * sign, sign[:, None] * vt), fingerprint(u, vt))
    turn = torch.eye(6)
    turn[:2, :2] = torch.tensor([[0.6, -0.8], [0.8, 0.6]])  # another pair for two equal values
    moved = (fingerprint(u @ turn, turn.T @ vt) - fingerprint(u, vt)).abs()
    assert moved[:2].min() > 0.05 and moved[2:].max() < 1e-5


# -- what it cannot take (more in tests/conformance/recipes/svfit.py) --------------------------------------------------


def test_two_adapters_on_one_module_are_refused_and_nothing_is_left():
    module = Classifier()
    before = weights(module)
    with pytest.raises(RecipeError, match="SVFit and GLAD cannot share a Trainer: both adapt"):
        fit(module, SVFit(target_modules=["0"]), GLAD(target_modules=["2"]))
    assert same(weights(module), before)


def test_a_tied_weight_is_refused():
    module = Classifier()
    module.net[2] = nn.Linear(5, 5)
    module.net.append(nn.Linear(5, 5))
    module.net[5].weight = module.net[2].weight
    with pytest.raises(RecipeError, match=r"weight of target net\.2 is tied to net\.5\.weight, which merging would"):
        spec(target=["2"], train_fully=("4",)).operate(module)
    assert not any(isinstance(part, LoraLayer) for part in module.modules())
