"""Adapters on real architectures: in, trained, merged, out again."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_recipes.core.adapters import AdapterSpec, carries_adapters, inject
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.recipe import Recipe
from lightning_recipes.core.surgery import as_structure, rebuilt, stored_in
from tests.attention import CASES, Case, D, Encoder, bert, gpt2, timm_vit
from tests.stock import Classifier, loader, mlp, quiet

SPEC = AdapterSpec(names=["one", "two"], rank=2, alpha=3.0, dropout=0.0, target="qv", seed=7)
SCALE = 3.0 / 2


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


def out(module: nn.Module, case: Case, grad: bool = False) -> Tensor:
    with torch.set_grad_enabled(grad):  # without gradients nn.TransformerEncoderLayer takes its fast path
        return module(case.inputs())


def move(adapters, seed=3):
    """Give every B a value, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapters.layers.values():
            for name in adapters.spec.names:
                weight = layer.lora_B[name].weight
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)


def by_hand(module: LightningModule, adapters, case: Case) -> LightningModule:
    """A stock twin with sum_i (alpha / r) B_i A_i added to the q and v rows of each block, and to nothing else."""
    factors = {
        path: [(layer.lora_B[n].weight.detach(), layer.lora_A[n].weight.detach()) for n in adapters.spec.names]
        for path, layer in adapters.layers.items()
    }
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for block in case.blocks:
            for role, place in case.adapted.items():
                for b, a in factors[f"{block}.{place}"]:
                    case.projection(twin.get_submodule(block), role).add_(SCALE * b @ a)
    return twin


@pytest.mark.parametrize("grad", [True, False])
def test_the_output_at_injection_is_bitwise_the_frozen_model(module, case, grad):
    before = out(module, case, grad)
    inject(module, SPEC)
    assert torch.equal(out(module, case, grad), before)
    module.train()
    assert module(case.inputs()).requires_grad


def test_only_the_q_and_v_projections_are_adapted(module, case):
    adapters = inject(module, SPEC)
    assert list(adapters.layers) == [f"{block}.{place}" for block in case.blocks for place in case.adapted.values()]
    assert len(adapters.made) == 2 * 2 * len(adapters.layers)
    assert all("lora_A" in name or "lora_B" in name for name in adapters.made)
    assert {tuple(p.shape) for p in adapters.made.values()} == {(2, D), (D, 2)}
    assert adapters.kept_whole == [name for name, _ in module.named_parameters() if name.startswith(f"{case.head}.")]


def test_the_frozen_weight_of_each_pair_is_the_projection(module, case):
    stock = copy.deepcopy(module)
    adapters = inject(module, SPEC)
    wanted = [case.projection(stock.get_submodule(b), role) for b in case.blocks for role in case.adapted]
    for (w, a, b), expected in zip(adapters.pairs(), wanted, strict=True):
        assert torch.equal(w, expected)
        assert [x.shape for x in (*a, *b)] == [(2, D), (2, D), (D, 2), (D, 2)]


@pytest.mark.parametrize("grad", [True, False])
def test_moved_adapters_add_b_a_to_the_q_and_v_rows(module, case, grad):
    stock = copy.deepcopy(module)
    adapters = inject(module, SPEC)
    move(adapters)
    expected = out(by_hand(stock, adapters, case), case, grad)
    assert torch.allclose(out(module, case, grad), expected, atol=1e-5)
    assert not torch.allclose(expected, out(stock, case), atol=1e-4)


def test_the_merged_model_has_the_stock_keys_and_the_same_output(module, case):
    keys, parts = list(module.state_dict()), dict(module.named_modules())
    stock = copy.deepcopy(module)
    adapters = inject(module, SPEC)
    move(adapters)
    twin, adapted = by_hand(stock, adapters, case), out(module, case)
    adapters.remove(merge=True)
    assert list(module.state_dict()) == keys
    assert {name: id(part) for name, part in module.named_modules()} == {name: id(p) for name, p in parts.items()}
    assert torch.allclose(out(module, case), adapted, atol=1e-5)
    for name, value in twin.state_dict().items():
        assert torch.allclose(module.state_dict()[name], value, atol=1e-6), name
    assert not carries_adapters(module)


def test_removing_without_merging_gives_back_the_very_same_modules_and_weights(module, case):
    parts = {name: id(part) for name, part in module.named_modules()}
    parameters = {name: (id(p), p.detach().clone()) for name, p in module.named_parameters()}
    adapters = inject(module, SPEC)
    move(adapters)
    adapters.remove(merge=False)
    assert {name: id(part) for name, part in module.named_modules()} == parts
    assert {name: id(p) for name, p in module.named_parameters()} == {n: i for n, (i, _) in parameters.items()}
    assert all(torch.equal(p, parameters[name][1]) for name, p in module.named_parameters())


def test_gradients_reach_the_adapters_as_by_hand(module, case):
    """d loss / d B_i = (alpha / r) dL/dW A_i^T and d loss / d A_i = (alpha / r) B_i^T dL/dW, on the rows of W."""
    stock = copy.deepcopy(module)
    adapters = inject(module, SPEC)
    move(adapters)
    twin = by_hand(stock, adapters, case)
    out(twin, case, grad=True).square().sum().backward()
    gradients = {name: p.grad for name, p in twin.named_parameters()}
    for name, p in twin.named_parameters():
        p.data.copy_(torch.zeros_like(p) if gradients[name] is None else gradients[name])
    out(module, case, grad=True).square().sum().backward()
    places = [(block, role) for block in case.blocks for role in case.adapted]
    for (_, a, b), (block, role) in zip(adapters.pairs(), places, strict=True):
        dw = case.projection(twin.get_submodule(block), role)
        for a_i, b_i in zip(a, b, strict=True):
            assert torch.allclose(b_i.grad, SCALE * dw @ a_i.T, atol=1e-4, rtol=1e-4)
            assert torch.allclose(a_i.grad, SCALE * b_i.T @ dw, atol=1e-4, rtol=1e-4)


def test_injection_leaves_the_random_state_and_the_flags_alone(module):
    first = next(iter(module.parameters())).requires_grad_(False)
    flags = {name: p.requires_grad for name, p in module.named_parameters()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    adapters = inject(module, SPEC)
    assert torch.equal(torch.get_rng_state(), state)
    assert not first.requires_grad
    assert all(p.requires_grad for p in adapters.made.values())
    # names change under adapters, so compare what is left when they are gone
    adapters.remove(merge=False)
    assert {name: p.requires_grad for name, p in module.named_parameters()} == flags


def test_the_same_seed_gives_the_same_adapters_and_another_seed_others(module):
    values = []
    for seed in (7, 7, 8):
        torch.manual_seed(len(values))
        adapters = inject(module, replace(SPEC, seed=seed))
        values.append({name: p.detach().clone() for name, p in adapters.made.items()})
        adapters.remove(merge=False)
    assert all(torch.equal(values[0][name], values[1][name]) for name in values[0])
    a = [name for name in values[0] if "lora_A" in name]
    assert not any(torch.equal(values[0][name], values[2][name]) for name in a)
    assert len({values[0][name].sum().item() for name in a}) == len(a)  # no two alike
    assert all(values[0][name].count_nonzero() == 0 for name in values[0] if "lora_B" in name)


def test_a_deepcopy_of_the_adapted_module_stands_on_its_own(module, case):
    adapters = inject(module, SPEC)
    move(adapters)
    before = out(module, case)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert torch.equal(out(module, case), before)
    assert out(twin, case).abs().sum() == 0


# -- in a fit --------------------------------------------------------------------------------------------------------


class Adapts(Recipe):
    def __init__(self, spec=SPEC, merge_on_end=True):
        super().__init__()
        self.spec, self.merge_on_end = spec, merge_on_end

    def declare(self, plan):
        plan.surgery(self.spec)

    def on_train_start(self, trainer, module):
        self.training = {name for name, p in module.named_parameters() if p.requires_grad}

    def on_train_end(self, trainer, module):
        self.last = copy.deepcopy(module).eval()


class Adapts2(Adapts):
    pass


def data(case):
    x, y = case.inputs(), torch.tensor([0, 1, 2])
    batch = {"input_ids": x, "labels": y} if case.build in (bert, gpt2) else (x, y)
    return DataLoader([batch] * 3, batch_size=None)


def test_a_fit_trains_adapters_and_head_alone_and_merges(module, case):
    before = {name: value.clone() for name, value in module.state_dict().items()}
    recipe = Adapts()
    quiet(callbacks=[recipe]).fit(module, data(case))
    module.eval()
    head = {name for name in before if name.startswith(f"{case.head}.")}
    made = {name for name, _ in recipe.last.named_parameters() if "lora_" in name}
    assert recipe.training == head | made
    after = module.state_dict()
    assert list(after) == list(before)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert head <= moved
    rest = moved - head
    assert rest and all(any(name.startswith(block) for block in case.blocks) for name in rest)
    for block in case.blocks:  # the k rows did not move
        for name in rest:
            if name.startswith(block) and "weight" in name and len(before[name]) == 3 * D:
                assert torch.equal(before[name][D : 2 * D], after[name][D : 2 * D])
    assert torch.allclose(out(module, case), out(recipe.last, case), atol=1e-5)
    assert all(p.requires_grad for p in module.parameters())


def test_adapters_may_stay(module, case):
    recipe = Adapts(merge_on_end=False)
    quiet(callbacks=[recipe]).fit(module, data(case))
    module.eval()
    assert carries_adapters(module)
    assert torch.equal(out(module, case), out(recipe.last, case))


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (replace(SPEC, target=["nowhere"]), r"'nowhere' matches no layer; the nearest are \['net"),
        (replace(SPEC, target=["fc3"]), r"'fc3' matches no layer; the nearest are \[.*mlp\.fc1"),
        (
            replace(SPEC, target=["patch_embed.proj"], rank=9),
            r"at most the width of .*, 3 \(its weight is \[8, 3, 4, 4\]\); got 9",
        ),
        (replace(SPEC, rank=9), r"rank must be at most the width of .*, 8 \(its weight is \[8, 8\]\); got 9"),
        (replace(SPEC, target=["blocks.0.norm1"]), r"blocks\.0\.norm1 is a LayerNorm; adapters go on"),
        (replace(SPEC, train_fully=["nowhere"]), "train_fully: 'nowhere' matches no parameter"),
    ],
)
def test_bad_targets_are_errors_and_change_nothing(spec, message):
    module = timm_vit()
    parts = {name: id(part) for name, part in module.named_modules()}
    with pytest.raises(RecipeError, match=message):
        inject(module, spec)
    assert {name: id(part) for name, part in module.named_modules()} == parts
    assert all(p.requires_grad for p in module.parameters())


def test_a_module_that_carries_adapters_already_is_refused():
    module = timm_vit()
    inject(module, SPEC)
    with pytest.raises(RecipeError, match="already carries adapters"):
        inject(module, SPEC)


def test_a_quantised_layer_is_refused():
    module = Classifier(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)))
    module.net[0].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(RecipeError, match="without a floating-point weight"):
        inject(module, replace(SPEC, target=["net.0"]))


def test_dropout_on_a_packed_attention_is_refused():
    module = Classifier(Encoder())
    attention = module.net.encoder.layers[0].self_attn
    with pytest.raises(RecipeError, match="dropout must be 0 on a packed"):
        inject(module, replace(SPEC, dropout=0.1))
    assert module.net.encoder.layers[0].self_attn is attention


def test_two_adapter_recipes_are_refused_and_the_module_is_stock():
    module = Classifier(mlp())
    spec = replace(SPEC, target=["0"])
    parts = {name: id(part) for name, part in module.named_modules()}
    x, y = torch.rand(4, 6), torch.arange(4) % 3
    with pytest.raises(RecipeError, match="Adapts and Adapts2 both adapt"):
        quiet(callbacks=[Adapts(spec), Adapts2(spec)]).fit(module, loader(x, y))
    assert {name: id(part) for name, part in module.named_modules()} == parts


def test_a_head_that_the_user_froze_is_refused():
    module = timm_vit()
    module.net.head.requires_grad_(False)
    with pytest.raises(RecipeError, match=r"'net\.head\.weight' is to train beside the adapters .* froze"):
        quiet(callbacks=[Adapts()]).fit(module, data(CASES["timm vit"]))
    assert not carries_adapters(module)


def test_all_linear_leaves_the_head_out():
    module = Classifier(mlp())
    assert list(inject(module, replace(SPEC, target="all-linear")).layers) == ["net.0", "net.2"]


def test_named_layers_of_other_kinds():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 3))
    module, x = Classifier(net), torch.rand(2, 3, 3, 3)
    before = module(x)
    adapters = inject(module, replace(SPEC, target=["net.0"]))
    assert torch.equal(module(x), before)
    F.cross_entropy(module(x), torch.tensor([0, 1])).backward()
    assert all(layer.lora_B["one"].weight.grad.abs().sum() > 0 for layer in adapters.layers.values())


def test_the_structure_survives_a_checkpoint():
    stored = stored_in({"structure": as_structure(SPEC)})
    assert stored["what"] == "adapters"
    assert rebuilt(AdapterSpec((), 1, 1.0, 0.0, "v"), stored) == replace(SPEC, train_fully=["head"])
    assert inject(Classifier(mlp()), replace(rebuilt(SPEC, stored), target=["0"])).made.keys()
    assert stored_in({"structure": None}) is None
    assert stored_in(None) is None
