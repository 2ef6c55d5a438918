"""Adapters on disk: what a recipe writes, peft itself loads into a stock network, and gives the same outputs."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn

from lightning_recipes.callbacks import GLAD, PEGO, SVFit
from lightning_recipes.core import select
from lightning_recipes.core.adapter_files import load_adapter, save_adapter
from lightning_recipes.core.adapters import AdapterSpec
from lightning_recipes.core.errors import RecipeError
from tests.attention import CASES, Encoder
from tests.stock import Classifier, Watch, loader, mlp, quiet, same, samples, weights

X, Y = samples(20)
LAYERS = ["0", "2"]
RECIPES = {
    "GLAD": lambda **more: GLAD(rank=2, lora_alpha=3, **more),
    "PEGO": lambda **more: PEGO(rank=2, groups=3, scaling=0.5, weight=1e-3, **more),
    "SVFit": lambda **more: SVFit(**more),
    "SVFit, 3 values": lambda **more: SVFit(3, part="bottom", **more),
}


@pytest.fixture(params=RECIPES)
def recipe(request):
    return RECIPES[request.param]


def fit(module, *callbacks, epochs=2, data=None, **kwargs):
    trainer = quiet(callbacks=list(callbacks), max_epochs=epochs, **kwargs)
    trainer.fit(module, loader(X, Y) if data is None else data)
    return trainer


def moved(adapters, seed=3):
    """Give every trained factor a value, and what trains beside it another, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in adapters.module.named_parameters():
            if name in adapters.made or name in adapters.kept_whole:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


# -- peft reads what a recipe wrote ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", ["GLAD", "PEGO", "SVFit"])
def test_peft_loads_it_into_the_stock_network_with_the_same_outputs(case, way, tmp_path, monkeypatch):
    """Split, fused, transposed and packed attention, the head with it."""
    case = CASES[case]
    torch.manual_seed(0)
    module = case.build().eval()
    stock = {name: value.clone() for name, value in module.state_dict().items()}
    operation = surgery(way).operate(module)
    moved(operation)
    adapted = module(case.inputs())
    save_adapter(operation, tmp_path)

    fresh = case.build().eval()
    fresh.load_state_dict(stock)
    name, network = select.network(fresh)
    loaded = PeftModel.from_pretrained(network, str(tmp_path))
    fresh.set_submodule(name, loaded.base_model.model)
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", False)  # it does not ask peft's layers
    assert torch.allclose(fresh(case.inputs()), adapted, atol=1e-5)
    with loaded.disable_adapter():
        other = case.build().eval()
        other.load_state_dict(stock)
        assert torch.allclose(
            fresh(case.inputs()), other(case.inputs()), atol=1e-5
        )  # peft adds and subtracts on packed ones


def surgery(way):
    from lightning_recipes.callbacks.adapters.svfit import SingularValues

    if way == "GLAD":
        return AdapterSpec(["glad"], 2, 3.0, 0.0, "qkv")
    if way == "PEGO":
        return AdapterSpec(["g0", "g1"], 2, 1.0, 0.0, "qv")
    return SingularValues(None, None, "squares", "qv", "top", ("head",), 0)


def test_the_file_of_a_fit_is_what_merged_into_the_module(recipe, tmp_path):
    module = Classifier()
    fit(module, recipe(target_modules=LAYERS, adapter_dir=str(tmp_path / "adapter")))
    peft = PeftModel.from_pretrained(mlp(), str(tmp_path / "adapter"))
    assert torch.allclose(peft(X), module(X), atol=1e-6)
    merged = peft.merge_and_unload()
    assert merged.state_dict().keys() == module.net.state_dict().keys()
    assert all(torch.allclose(merged.state_dict()[k], v, atol=1e-6) for k, v in module.net.state_dict().items())
    assert not torch.equal(merged[0].weight, mlp()[0].weight)


def test_peft_loads_it_into_layers_that_are_there_already(recipe, tmp_path):
    module = Classifier()
    callback = recipe(target_modules=LAYERS, train_fully=(), merge_on_end=False)
    fit(module, callback)
    assert callback.save_adapter(tmp_path) == tmp_path
    net = mlp()
    inject_adapter_in_model(LoraConfig.from_pretrained(str(tmp_path)), net, "default")
    result = set_peft_model_state_dict(net, load_file(tmp_path / "adapter_model.safetensors"))
    assert not result.unexpected_keys
    assert torch.allclose(net(X), module(X), atol=1e-6)


def test_two_saved_adapters_switch_in_peft(tmp_path):
    modules = {}
    for seed in (0, 1):
        modules[seed] = Classifier()
        fit(modules[seed], GLAD(rank=2, target_modules=LAYERS, seed=seed, adapter_dir=str(tmp_path / str(seed))))
    peft = PeftModel.from_pretrained(mlp(), str(tmp_path / "0"), adapter_name="first")
    peft.load_adapter(str(tmp_path / "1"), adapter_name="second")
    for name, seed in (("first", 0), ("second", 1), ("first", 0)):
        peft.set_adapter(name)
        assert torch.allclose(peft(X), modules[seed](X), atol=1e-6)


# -- what stands in it -------------------------------------------------------------------------------------------------


def test_one_plain_lora_is_written_as_it_is(tmp_path):
    callback = GLAD(rank=2, lora_alpha=3, lora_dropout=0.1, target_modules=LAYERS, merge_on_end=False)
    fit(Classifier(), callback)
    callback.save_adapter(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    for i in (0, 2):
        layer = callback.operation.layers[f"net.{i}"]
        assert torch.equal(saved[f"base_model.model.{i}.lora_A.weight"], layer.lora_A["glad"].weight)
        assert torch.equal(saved[f"base_model.model.{i}.lora_B.weight"], layer.lora_B["glad"].weight)
    assert saved.keys() == {
        *(f"base_model.model.{i}.lora_{side}.weight" for i in (0, 2) for side in "AB"),
        *(f"base_model.model.4.{name}" for name in ("weight", "bias")),
    }
    config = config_of(tmp_path)
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (2, 3, 0.1)
    assert sorted(config["target_modules"]) == LAYERS
    assert config["modules_to_save"] == ["4"]
    assert config["peft_type"] == "LORA"


def test_a_group_is_one_lora_of_all_its_ranks(tmp_path):
    callback = PEGO(rank=2, groups=3, scaling=0.5, target_modules=LAYERS, merge_on_end=False)
    fit(Classifier(), callback)
    callback.save_adapter(tmp_path)
    config, saved = config_of(tmp_path), load_file(tmp_path / "adapter_model.safetensors")
    assert (config["r"], config["lora_alpha"]) == (6, 3)
    for i in (0, 2):
        layer = callback.operation.layers[f"net.{i}"]
        a, b = (saved[f"base_model.model.{i}.lora_{side}.weight"] for side in "AB")
        assert torch.equal(a, torch.cat([layer.lora_A[f"g{j}"].weight for j in range(3)]))
        assert torch.equal(b, torch.cat([layer.lora_B[f"g{j}"].weight for j in range(3)], 1))


def test_ranks_that_differ_stand_in_the_patterns(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 3))
    callback = SVFit(target_modules=["0", "2", "4"], merge_on_end=False)
    fit(Classifier(net), callback)
    callback.save_adapter(tmp_path)
    config = config_of(tmp_path)
    assert (config["r"], config["lora_alpha"]) == (4, 4)
    assert config["rank_pattern"] == config["alpha_pattern"] == {"0": 5}


class Nested(nn.Module):
    """Names that are the ends of others: 'fc' of 'inner.fc', 'head' of 'overhead'."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.overhead = nn.Linear(6, 6), nn.Linear(6, 6)
        self.inner = nn.ModuleDict({"fc": nn.Linear(6, 4)})
        self.scale = nn.Parameter(torch.ones(4))
        self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.norm(self.scale * self.inner["fc"](self.overhead(self.fc(x)).relu())))


@pytest.mark.parametrize("targets", [["net.fc"], ["net.fc", "net.inner.fc"]])
def test_names_that_end_alike_are_kept_apart(targets, tmp_path):
    module = Classifier(Nested())
    recipe = SVFit(
        target_modules=targets, train_fully=["head", "norm", "scale"], adapter_dir=str(tmp_path), merge_on_end=False
    )
    fit(module, recipe)
    adapted = [name for name, part in module.named_modules() if isinstance(part, LoraLayer)]
    assert len(adapted) == (1 if len(targets) == 1 else 2)
    module.eval()
    loaded = PeftModel.from_pretrained(Nested(), str(tmp_path)).eval()
    assert torch.allclose(loaded(X), module(X), atol=1e-6)
    assert not torch.allclose(Nested().eval()(X), module(X), atol=1e-3)
    layers = [name for name, part in loaded.base_model.model.named_modules() if isinstance(part, LoraLayer)]
    assert layers == [name.removeprefix("net.") for name in adapted]
    assert config_of(tmp_path)["modules_to_save"] == ["norm"]  # 'head' would be 'overhead' too
    stock = load_adapter(Classifier(Nested()), tmp_path, merge=True).eval()
    assert torch.allclose(stock(X), module(X), atol=1e-6)
    assert torch.equal(stock.net.norm.running_mean, module.net.norm.running_mean)


@pytest.mark.parametrize("kind", ["convolution", "embedding"])
def test_convolutions_and_embeddings(kind, tmp_path):
    def build():
        torch.manual_seed(0)
        if kind == "embedding":
            return nn.Sequential(nn.Embedding(9, 8), nn.Flatten(), nn.Linear(16, 3))
        return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Flatten(), nn.Linear(16, 3))

    generator = torch.Generator().manual_seed(0)
    x = torch.rand(8, 3, 5, 5, generator=generator)
    if kind == "embedding":
        x = torch.randint(9, (8, 2), generator=generator)
    module = Classifier(build())
    operation = AdapterSpec(["one", "two"], 2, 3.0, 0.0, ["0"]).operate(module)
    moved(operation)
    save_adapter(operation, tmp_path)
    adapted = module(x)
    assert torch.allclose(PeftModel.from_pretrained(build(), str(tmp_path))(x), adapted, atol=1e-5)
    assert torch.allclose(load_adapter(Classifier(build()), tmp_path, merge=True)(x), adapted, atol=1e-5)
    assert not torch.allclose(build()(x), adapted, atol=1e-3)


def test_a_compiled_network_is_written_under_its_stock_names(tmp_path):
    module = Classifier(nn.Sequential(mlp(), nn.Linear(3, 3)))
    module.net[0] = torch.compile(module.net[0], backend="eager")
    operation = AdapterSpec(["one"], 2, 2.0, 0.0, ["_orig_mod.0"]).operate(module)
    moved(operation)
    save_adapter(operation, tmp_path)
    assert config_of(tmp_path)["target_modules"] == ["0.0"]
    torch._dynamo.reset()


# -- our own way back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merge", [False, True])
def test_loading_gives_the_module_that_was_saved(recipe, merge, tmp_path):
    module = Classifier()
    fit(module, recipe(target_modules=LAYERS, adapter_dir=str(tmp_path)))
    fresh = Classifier()
    parts = {name: id(part) for name, part in fresh.named_modules()}
    assert load_adapter(fresh, tmp_path, merge=merge) is fresh
    assert torch.allclose(fresh(X), module(X), atol=1e-6)
    assert any(isinstance(part, LoraLayer) for part in fresh.modules()) is not merge
    if merge:
        assert {name: id(part) for name, part in fresh.named_modules()} == parts
        assert fresh.state_dict().keys() == module.state_dict().keys()
        assert all(p.requires_grad for p in fresh.parameters())
        fit(fresh, epochs=1)


@pytest.mark.parametrize("case", CASES)
def test_loading_merges_into_every_layout(case, tmp_path):
    case = CASES[case]
    torch.manual_seed(0)
    module = case.build().eval()
    fresh = case.build().eval()
    fresh.load_state_dict(module.state_dict())
    keys, kinds = list(fresh.state_dict()), {name: type(part) for name, part in fresh.named_modules()}
    operation = surgery("PEGO").operate(module)
    moved(operation)
    save_adapter(operation, tmp_path)
    with torch.no_grad():
        load_adapter(fresh, tmp_path, merge=True)
        assert torch.allclose(fresh(case.inputs()), module(case.inputs()), atol=1e-5)
    assert list(fresh.state_dict()) == keys
    assert {name: type(part) for name, part in fresh.named_modules()} == kinds


def test_an_adapter_that_peft_wrote_loads_too(tmp_path):
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=LAYERS, modules_to_save=["4"], init_lora_weights=False)
    peft = get_peft_model(mlp(), config)
    peft.save_pretrained(str(tmp_path))
    assert torch.allclose(load_adapter(Classifier(), tmp_path, merge=True)(X), peft(X), atol=1e-6)


def test_an_adapter_may_be_saved_during_the_fit_and_counted_from_another_root(tmp_path):
    module, callback = Classifier(), GLAD(rank=2, target_modules=LAYERS)

    def save(trainer, module):
        callback.save_adapter(tmp_path / "net")
        callback.save_adapter(tmp_path / "module", root="")

    fit(module, callback, Watch(on_train_epoch_end=save))
    assert config_of(tmp_path / "net")["target_modules"][0] in LAYERS
    assert config_of(tmp_path / "module")["target_modules"][0] in ["net.0", "net.2"]
    loaded = PeftModel.from_pretrained(Classifier(), str(tmp_path / "module"))
    assert torch.allclose(loaded(X), module(X), atol=1e-6)
    fresh = load_adapter(Classifier(), tmp_path / "module", merge=True, root="")
    assert torch.allclose(fresh(X), module(X), atol=1e-6)


def test_every_recipe_says_how_much_it_trains(recipe):
    callback = recipe(target_modules=LAYERS, merge_on_end=False)
    trainer = fit(Classifier(), callback)
    made = sum(p.numel() for p in callback.operation.made.values())
    name = "svfit" if isinstance(callback, SVFit) else type(callback).__name__.lower()
    assert trainer.callback_metrics[f"{name}/trainable"] == made + 5 * 3 + 3


# -- errors ------------------------------------------------------------------------------------------------------------


def test_adapters_that_are_merged_cannot_be_saved(recipe, tmp_path):
    callback = recipe(target_modules=LAYERS)
    with pytest.raises(RecipeError, match="there are no adapters to save"):
        callback.save_adapter(tmp_path)
    fit(Classifier(), callback)
    with pytest.raises(
        RecipeError, match=r"no adapters to save\. .*\(merge_on_end=False\), or have .* \(adapter_dir\)"
    ):
        callback.save_adapter(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_loaded_changes_nothing(tmp_path):
    fit(Classifier(), GLAD(rank=2, target_modules=LAYERS, adapter_dir=str(tmp_path / "good")))
    good = tmp_path / "good"

    def refused(module, folder, words):
        before, kinds = weights(module), [type(part) for part in module.modules()]
        flags = [p.requires_grad for p in module.parameters()]
        with pytest.raises(RecipeError, match=words):
            load_adapter(module, folder)
        assert same(weights(module), before)
        assert [type(part) for part in module.modules()] == kinds
        assert [p.requires_grad for p in module.parameters()] == flags

    refused(Classifier(), tmp_path, "holds no adapter: it has no adapter_model.safetensors and no adapter_config.json")
    refused(Classifier(nn.Sequential(nn.Linear(6, 3))), good, "is for '2', which the module has not; name its network")
    refused(Classifier(mlp(width=7)), good, r"holds '4\.weight' as \[3, 5\]; the module's is \[3, 7\]")
    wide = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3))
    refused(Classifier(wide), good, "is of other sizes than the module")
    carrying = load_adapter(Classifier(), good)
    refused(carrying, good, "already carries adapters; merge or unload them first")
    encoder = Classifier(Encoder())
    save_adapter(surgery("PEGO").operate(encoder), tmp_path / "encoder")
    refused(
        Classifier(Encoder()), tmp_path / "encoder", r"encoder\.layers\.0 is an nn\.TransformerEncoderLayer, .* merge="
    )
    (good / "adapter_config.json").write_text(json.dumps({**config_of(good), "peft_type": "IA3"}))
    refused(Classifier(), good, "only LoRA can be loaded")


def test_a_root_that_does_not_hold_everything_is_refused(tmp_path):
    operation = AdapterSpec(["one"], 2, 2.0, 0.0, LAYERS).operate(Classifier())
    with pytest.raises(RecipeError, match=r"net\.0 is adapted or trained and stands outside 'net\.0'"):
        save_adapter(operation, tmp_path, root="net.0")
