"""The head and the layers in order, on networks that nobody here shaped for the purpose."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from lightning.pytorch import LightningModule
from torch import nn
from torchmetrics import MeanMetric
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    RobertaConfig,
)

from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.select import (
    convolutional_blocks,
    head,
    layers,
    names_of,
    network,
    parameters_by,
    parameters_under,
)
from lightning_recipes.modules import BalancedNet, CifarResNet, LightweightCNN, PreActResNet18, SmallCNN
from tests.stock import Classifier, mlp

SMALL = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
GPT2 = {"n_embd": 8, "n_layer": 3, "n_head": 2}


def meta(build, *args, **kwargs):
    """Without memory for the weights."""
    with torch.device("meta"):
        return Classifier(build(*args, **kwargs))


def hugging_face(auto, config):
    return meta(auto.from_config, config)


class Direct(LightningModule):
    """Layers straight on the LightningModule, a metric among them."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.seen = MeanMetric()
        self.hidden = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(1))
        self.classify = nn.Linear(4, 2)


class Nested(LightningModule):
    """A wrapper in a wrapper."""

    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.backbone = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.LayerNorm(4))
        self.model.head = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


# module, head, and where the first parameter of each layer stands
CASES = {
    "timm resnet18": (
        lambda: meta(timm.create_model, "resnet18"),
        "net.fc",
        ["net.conv1", "net.layer1", "net.layer2", "net.layer3", "net.layer4", "net.fc"],
    ),
    "timm vit": (
        lambda: meta(timm.create_model, "vit_tiny_patch16_224", depth=3),
        "net.head",
        ["net.cls_token", "net.blocks.0", "net.blocks.1", "net.blocks.2", "net.head"],
    ),
    "timm efficientnet": (
        lambda: meta(timm.create_model, "efficientnet_b0"),
        "net.classifier",
        ["net.conv_stem", *[f"net.blocks.{i}" for i in range(7)], "net.classifier"],
    ),
    "timm convnext": (
        lambda: meta(timm.create_model, "convnext_atto"),
        "net.head.fc",
        ["net.stem", *[f"net.stages.{i}" for i in range(4)], "net.head.fc"],
    ),
    "torchvision resnet18": (
        lambda: meta(torchvision.models.resnet18),
        "net.fc",
        ["net.conv1", "net.layer1", "net.layer2", "net.layer3", "net.layer4", "net.fc"],
    ),
    "torchvision vit": (
        lambda: meta(
            torchvision.models.VisionTransformer,
            image_size=8,
            patch_size=4,
            num_layers=3,
            num_heads=2,
            hidden_dim=8,
            mlp_dim=16,
        ),
        "net.heads.head",
        ["net.conv_proj", *[f"net.encoder.layers.encoder_layer_{i}" for i in range(3)], "net.heads.head"],
    ),
    "torchvision mobilenet_v2": (
        lambda: meta(torchvision.models.mobilenet_v2),
        "net.classifier.1",
        [*[f"net.features.{i}." for i in range(19)], "net.classifier.1"],
    ),
    "torchvision vgg11": (
        lambda: meta(torchvision.models.vgg11),
        "net.classifier.6",
        [
            *[f"net.features.{i}." for i in (0, 3, 6, 8, 11, 13, 16, 18)],
            *[f"net.classifier.{i}" for i in (0, 3, 6)],
        ],
    ),
    "torchvision convnext": (
        lambda: meta(torchvision.models.convnext_tiny),
        "net.classifier.2",
        [*[f"net.features.{i}." for i in range(8)], "net.classifier.2"],
    ),
    "bert": (
        lambda: hugging_face(AutoModelForSequenceClassification, BertConfig(**SMALL)),
        "net.classifier",
        [
            "net.bert.embeddings",
            *[f"net.bert.encoder.layer.{i}" for i in range(3)],
            "net.bert.pooler",
            "net.classifier",
        ],
    ),
    "roberta's head of two layers": (
        lambda: hugging_face(AutoModelForSequenceClassification, RobertaConfig(**SMALL)),
        "net.classifier",
        ["net.roberta.embeddings", *[f"net.roberta.encoder.layer.{i}" for i in range(3)], "net.classifier"],
    ),
    "gpt2 classifier": (
        lambda: hugging_face(AutoModelForSequenceClassification, GPT2Config(**GPT2)),
        "net.score",
        ["net.transformer.wte", "net.transformer.wpe", *[f"net.transformer.h.{i}" for i in range(3)], "net.score"],
    ),
    "gpt2 with its tied head": (
        lambda: hugging_face(AutoModelForCausalLM, GPT2Config(**GPT2)),
        "net.lm_head",
        ["net.transformer.wpe", *[f"net.transformer.h.{i}" for i in range(3)], "net.transformer.wte"],
    ),
    "llama": (
        lambda: hugging_face(AutoModelForCausalLM, LlamaConfig(**SMALL, num_key_value_heads=2)),
        "net.lm_head",
        ["net.model.embed_tokens", *[f"net.model.layers.{i}" for i in range(3)], "net.lm_head"],
    ),
    "sequential": (lambda: Classifier(mlp()), "net.4", ["net.0", "net.2", "net.4"]),
    "layers on the module": (Direct, "classify", ["conv", "hidden", "classify"]),
    "nested": (Nested, "model.head.2", ["model.backbone.0", "model.backbone.2", "model.head.0", "model.head.2"]),
}


@pytest.fixture(params=CASES)
def case(request):
    build, *expected = CASES[request.param]
    return build(), *expected


def test_the_head(case):
    module, path, _ = case
    assert head(module) == path


def test_layers_run_from_input_to_output_and_the_head_is_last(case):
    module, _, starts = case
    found = layers(module)
    assert len(found) == len(starts)
    for (_, names), start in zip(found, starts, strict=True):
        assert names[0].startswith(start), (names[0], start)
    assert found[-1][0] == "head"


def test_every_parameter_is_in_exactly_one_layer(case):
    module, _, _ = case
    grouped = [name for _, names in layers(module) for name in names]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {name for name, _ in module.named_parameters()}


def test_the_head_by_its_role(case):
    module, path, _ = case
    wanted = {id(p) for p in module.get_submodule(path).parameters()}
    parameters = dict(module.named_parameters())
    assert {id(parameters[name]) for name in parameters_under(module, ["head"], "groups")} >= wanted


def test_normalisation_belongs_to_what_it_follows():
    found = dict(layers(Direct()))
    assert {"conv.weight", "norm.weight"} <= set(next(names for names in found.values() if "conv.weight" in names))
    last = layers(CASES["timm vit"][0]())[-2][1]
    assert {"net.norm.weight", "net.blocks.2.mlp.fc2.bias"} <= set(last)
    last = layers(CASES["torchvision vit"][0]())[-2][1]
    assert "net.encoder.ln.weight" in last
    assert "net.transformer.ln_f.weight" in layers(CASES["gpt2 classifier"][0]())[-2][1]


def test_the_network_is_what_has_more_than_one_part():
    for build, path in ((Nested, "model"), (Direct, ""), (lambda: Classifier(mlp()), "net")):
        assert network(build())[0] == path


def test_a_headless_module_lists_its_parts():
    module = LightningModule()
    module.norm = nn.LayerNorm(3)
    module.other = nn.LayerNorm(3)
    with pytest.raises(RecipeError, match=r"found no head in LightningModule; its parts are \['norm', 'other'\]"):
        head(module)


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["net.4"], ["net.4.weight", "net.4.bias"]),
        (["4"], ["net.4.weight", "net.4.bias"]),  # from the network on
        (["net.2.bias"], ["net.2.bias"]),
        (["net.*.bias"], ["net.0.bias", "net.2.bias", "net.4.bias"]),
        (["head", "net.0.bias"], ["net.4.weight", "net.4.bias", "net.0.bias"]),
        (["net.4", "net.4.bias"], ["net.4.weight", "net.4.bias"]),
    ],
)
def test_patterns(patterns, expected):
    assert parameters_under(Classifier(), patterns, "groups") == expected


@pytest.mark.parametrize("pattern", ["net.1", "net.0.weigh", "et.0", "nothing", "net.9.*"])
def test_a_pattern_that_matches_nothing_lists_the_parts(pattern):
    with pytest.raises(RecipeError, match=r"never: .* matches no parameter; .*\['net', 'net\.0', 'net\.2', 'net\.4'\]"):
        parameters_under(Classifier(), [pattern], "never")


def test_a_prefix_of_a_name_is_not_its_parent():
    module = LightningModule()
    module.layer1, module.layer10 = nn.Linear(2, 2), nn.Linear(2, 2)
    assert parameters_under(module, ["layer1"], "groups") == ["layer1.weight", "layer1.bias"]


def test_names_down_to_a_depth():
    assert names_of(Nested()) == ["model", "model.backbone", "model.head"]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("head", ["net.4.weight", "net.4.bias"]),
        (["2", "*.0.bias"], ["net.2.weight", "net.2.bias", "net.0.bias"]),
        (lambda name, p: p.dim() == 1 and "4" not in name, ["net.0.bias", "net.2.bias"]),
    ],
)
def test_parameters_are_chosen_by_one_pattern_by_several_or_by_a_function(wanted, expected):
    assert parameters_by(Classifier(), wanted, "parameters") == expected


@pytest.mark.parametrize(
    ("wanted", "says"),
    [("nothing", "parameters: 'nothing' matches no"), (lambda n, p: False, "parameters: the function chooses no")],
)
def test_a_choice_of_no_parameter_lists_the_parts(wanted, says):
    with pytest.raises(RecipeError, match=rf"{says} parameter; the module's parts are \['net', 'net.0'"):
        parameters_by(Classifier(), wanted, "parameters")


# -- residual blocks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "count", "first", "last"),
    [
        (
            lambda: timm.create_model("resnet18"),
            8,
            ("net.layer1.0", ["net.layer1.0.conv1", "net.layer1.0.conv2"], "net.layer1.0.bn2"),
            "net.layer4.1.bn2",
        ),
        (
            lambda: timm.create_model("resnet50"),
            16,
            ("net.layer1.0", [f"net.layer1.0.conv{i}" for i in (1, 2, 3)], "net.layer1.0.bn3"),
            "net.layer4.2.bn3",
        ),
        (
            lambda: torchvision.models.resnet18(),
            8,
            ("net.layer1.0", ["net.layer1.0.conv1", "net.layer1.0.conv2"], "net.layer1.0.bn2"),
            "net.layer4.1.bn2",
        ),
        (
            lambda: CifarResNet(8),
            3,
            ("net.layer1.0", ["net.layer1.0.conv1", "net.layer1.0.conv2"], "net.layer1.0.bn2"),
            "net.layer3.0.bn2",
        ),
        (  # its batch norms stand before the convolutions
            lambda: PreActResNet18(),
            8,
            ("net.layer1.0", ["net.layer1.0.conv1", "net.layer1.0.conv2"], "net.layer1.0.conv2"),
            "net.layer4.1.conv2",
        ),
        (
            lambda: BalancedNet(widths=(16, 32), depths=(1, 2)),
            3,
            (
                "net.stages.0.0",
                ["net.stages.0.0.conv1", "net.stages.0.0.conv2"],
                "net.stages.0.0.bn2",
            ),
            "net.stages.1.1.bn2",
        ),
        (
            lambda: timm.create_model("mobilenetv2_035"),
            17,
            ("net.blocks.0.0", ["net.blocks.0.0.conv_dw", "net.blocks.0.0.conv_pw"], "net.blocks.0.0.bn2"),
            "net.blocks.6.0.bn3",
        ),
    ],
)
def test_residual_blocks_of_convolutional_networks(make, count, first, last):
    found = convolutional_blocks(meta(make))
    path, convolutions, gives = first
    assert found[path] == (convolutions, gives)
    assert list(found.values())[-1][1] == last
    assert len(found) == count


@pytest.mark.parametrize(
    "make",
    [
        lambda: timm.create_model("vit_tiny_patch16_224", depth=2),
        lambda: SmallCNN(),
        lambda: LightweightCNN(size=28),
        lambda: torchvision.models.vgg11_bn(),
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(8, 2)),
    ],
)
def test_networks_without_residual_blocks_have_none(make):
    assert convolutional_blocks(meta(make)) == {}
