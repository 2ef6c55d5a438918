"""Taps: they see what the network computes, in every call, and leave nothing behind. Finding what to tap; pooling."""

from __future__ import annotations

import copy
import pickle
from contextlib import ExitStack

import pytest
import timm
import torch
import torchvision
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_recipes.core.dry_run import FewSamples, a_few_samples, arguments_of, first_tensor
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.features import (
    Edits,
    Taps,
    blocks,
    feature_maps,
    head_input,
    how_to_pool,
    named_part,
    pooled,
)
from lightning_recipes.core.recipe import Recipe
from lightning_recipes.modules import CifarResNet, SmallCNN
from tests.attention import CASES
from tests.stock import Classifier, loader, mlp, quiet, samples

X, Y = samples()


# -- taps ------------------------------------------------------------------------------------------------------------


def test_a_tap_keeps_the_input_or_the_output_of_the_last_call_with_its_graph():
    net = mlp()
    with Taps(net, {"first": ("1", "output"), "features": ("4", "input")}) as taps:
        for x in (X[:3], X[3:8]):
            net(x)
            assert torch.equal(taps["first"], net[:2](x))
            assert torch.equal(taps.values["features"], net[:4](x))
        assert taps["features"].grad_fn is not None
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())
    assert taps.values == {}


def test_a_tap_sees_the_input_of_a_part_that_is_called_by_keyword():
    class Names(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 2)

        def forward(self, x):
            return self.inner(input=x)

    net = Names()
    with Taps(net, {"x": ("inner", "input")}) as taps:
        net(X)
        assert taps["x"] is X


def test_as_a_part_of_a_fit_it_is_taken_off_with_the_rest():
    net = mlp()
    with ExitStack() as undo:
        Taps(net, {"a": ("0", "output")}).install(undo)
        assert net[0]._forward_hooks
    assert not net[0]._forward_hooks


@pytest.mark.parametrize("make", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"])
def test_a_copy_of_a_tapped_network_writes_nowhere(make):
    net = mlp()
    with Taps(net, {"a": ("4", "output"), "b": ("4", "input")}) as taps:
        net(X)
        before, twin = taps["a"], make(net)
        assert torch.equal(twin(X + 1), net[4](net[:4](X + 1)))
        taps.values["a"] = before
        twin(X)
        assert taps["a"] is before


@pytest.mark.parametrize("inside", [True, False], ids=["network", "in place"])
def test_taps_that_are_in_place_before_the_first_call_see_every_compiled_call(inside):
    torch._dynamo.reset()
    net = mlp()
    with Taps(net, {"a": ("1", "output")}) as taps:
        if inside:
            run = torch.compile(net, backend="aot_eager")
        else:
            net.compile(backend="aot_eager")
            run = net
        for x in (X[:4], X[4:8], X[8:12]):
            run(x)
            assert torch.allclose(taps["a"], nn.functional.linear(x, net[0].weight, net[0].bias).relu(), atol=1e-6)


def test_errors_of_taps_name_the_part():
    net = mlp()
    with pytest.raises(RecipeError, match=r"'5' is no part of Sequential; its parts are \['0', '1', '2', '3', '4'\]"):
        Taps(net, {"a": ("5", "output")})
    with (
        Taps(net, {"a": ("0", "output")}) as taps,
        pytest.raises(RecipeError, match="0 was not called in the last forward pass"),
    ):
        taps["a"]

    class Odd(nn.Module):
        def forward(self, x):
            return {"other": 1}

    with Taps(odd := nn.Sequential(Odd()), {"a": ("0", "output")}) as taps:
        odd(X)
        with pytest.raises(RecipeError, match="0 gave a dict, which holds no tensor"):
            taps["a"]


def test_the_features_of_a_tuple_or_a_hugging_face_output_are_its_tensor():
    model = CASES["gpt2"].build().model
    with Taps(model, {"body": ("transformer", "output"), "block": ("transformer.h.0", "output")}) as taps:
        model(input_ids=CASES["gpt2"].inputs())
        assert taps["body"].shape == (3, 5, 8)
        assert taps["block"].shape == (3, 5, 8)


# -- what to tap -----------------------------------------------------------------------------------------------------


HEADS = {
    "timm vit": "net.head",
    "torchvision vit": "net.heads.head",
    "encoder layers": "net.head",
    "bert": "model.classifier",
    "gpt2": "model.score",
}
BLOCKS = {
    "timm vit": ["net.blocks.0", "net.blocks.1"],
    "torchvision vit": ["net.encoder.layers.encoder_layer_0", "net.encoder.layers.encoder_layer_1"],
    "encoder layers": ["net.encoder.layers.0", "net.encoder.layers.1"],
    "bert": ["model.bert.encoder.layer.0", "model.bert.encoder.layer.1"],
    "gpt2": ["model.transformer.h.0", "model.transformer.h.1"],
}


@pytest.mark.parametrize("name", HEADS)
def test_head_and_blocks_are_found(name):
    module = CASES[name].build()
    path, linear = head_input(module)
    assert path == HEADS[name]
    assert linear is module.get_submodule(path)
    assert blocks(module) == BLOCKS[name]


@pytest.mark.parametrize(
    ("build", "head", "found"),
    [
        (lambda: timm.create_model("resnet18", channels=(8, 8, 8, 8)), "fc", [f"layer{i}" for i in range(1, 5)]),
        (
            lambda: timm.create_model("convnext_atto", dims=(8, 8, 8, 8), depths=(1, 1, 1, 1)),
            "head.fc",
            [f"stages.{i}" for i in range(4)],
        ),
        (lambda: torchvision.models.resnet18(num_classes=3), "fc", [f"layer{i}" for i in range(1, 5)]),
        # A bare layer goes with the activation that follows it.
        (mlp, "4", ["1", "3"]),
        (
            lambda: nn.Sequential(
                nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3)
            ),
            "5",
            ["2", "3"],
        ),
    ],
    ids=["timm resnet", "timm convnext", "torchvision resnet", "mlp", "plain convolutions"],
)
def test_head_and_blocks_of_other_networks(build, head, found):
    net = build()
    assert head_input(net)[0] == head
    assert blocks(net) == found


def test_a_head_without_a_linear_layer_is_an_error_that_lists_them():
    net = nn.Sequential(nn.Linear(6, 4), nn.Conv1d(4, 3, 1))
    with pytest.raises(RecipeError, match=r"head '1' is a Conv1d and no linear layer; .* one of \['0'\]"):
        head_input(net)
    assert head_input(net, "0")[0] == "0"
    with pytest.raises(RecipeError, match="'7' is no part"):
        head_input(net, "7")


# -- pooling ---------------------------------------------------------------------------------------------------------


def test_pooling_by_hand():
    tokens = torch.tensor([[[1.0, 10], [2, 20], [6, 60]], [[3, 30], [5, 50], [7, 70]]])  # [2, 3, 2]
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])  # padded on the right; on the left
    assert pooled(tokens, 2, "cls").tolist() == [[1, 10], [3, 30]]
    assert pooled(tokens, 2, "mean").tolist() == [[3, 30], [5, 50]]
    assert pooled(tokens, 2, "mean", mask).tolist() == [[1.5, 15], [6, 60]]
    assert pooled(tokens, 2, "last").tolist() == [[6, 60], [7, 70]]
    assert pooled(tokens, 2, "last", mask).tolist() == [[2, 20], [7, 70]]
    assert pooled(tokens, 2, "avg").tolist() == [[5.5, 11, 33], [16.5, 27.5, 38.5]]  # as [n, d, places]
    images = torch.arange(16.0).reshape(1, 2, 2, 4)
    assert pooled(images, 1, "avg").tolist() == [[3.5, 11.5]]
    assert pooled(images, 1, "mean").tolist() == [[6.0, 7.0, 8.0, 9.0]]  # channels last
    assert torch.equal(pooled(tokens[0], 3, "last"), tokens[0])


@pytest.mark.parametrize(
    ("shape", "pool"), [((3, 4, 2, 2), "cls"), ((5, 3, 4), "mean"), ((3,), "avg"), ((3, 2, 2, 2, 2), "last")]
)
def test_a_shape_that_cannot_be_pooled_is_an_error_that_gives_it(shape, pool):
    with pytest.raises(RecipeError, match=f"the block gave float32 .* for 3 samples, which pool='{pool}' does not"):
        pooled(torch.zeros(shape), 3, pool)


def test_a_network_shows_how_it_pools():
    assert how_to_pool(CASES["timm vit"].build()) == "cls"
    assert how_to_pool(CASES["torchvision vit"].build()) == "cls"
    assert how_to_pool(CASES["bert"].build().model) == "cls"
    assert how_to_pool(CASES["gpt2"].build().model) == "last"
    assert how_to_pool(CASES["encoder layers"].build()) == "mean"
    assert how_to_pool(timm.create_model("mixer_s32_224", num_classes=3)) == "mean"


# -- a dry run -------------------------------------------------------------------------------------------------------


class Counts(LightningModule):
    """Preprocesses, and counts in its step what must not be reached."""

    def __init__(self):
        super().__init__()
        self.net, self.norm, self.dropout = mlp(), nn.BatchNorm1d(6), nn.Dropout(0.5)
        self.losses = 0

    def training_step(self, batch, batch_idx):
        logits = self.net(self.dropout(self.norm(batch["x"] * 2)))
        self.losses += 1
        return nn.functional.cross_entropy(logits, batch["y"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class AsDicts(torch.utils.data.Dataset):
    def __init__(self):
        self.generator, self.read = torch.Generator().manual_seed(3), 0

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        self.read += 1
        return {"x": X[i] + 0 * torch.rand(1, generator=self.generator), "y": Y[i]}


def inside_a_fit(module, data, look):
    """Calls `look` where surgery takes place."""
    found = []

    class Peek(Recipe):
        def declare(self, plan):
            found.append(look(plan.module))

    quiet(callbacks=[Peek()], limit_train_batches=1).fit(module, data)
    return found[0]


def test_a_dry_run_finds_a_parts_arguments_in_the_modules_own_step_and_leaves_no_trace():
    data, module = AsDicts(), Counts()
    statistics = module.norm.running_mean.clone()

    def look(module):
        before, held, modes = torch.get_rng_state(), data.generator.get_state(), [p.training for p in module.modules()]
        args, kwargs = arguments_of(module, module.net)
        assert torch.equal(before, torch.get_rng_state())
        assert torch.equal(held, data.generator.get_state())
        assert [p.training for p in module.modules()] == modes
        return args, kwargs, module.losses, data.read

    args, kwargs, losses, read = inside_a_fit(module, DataLoader(data, 8, shuffle=True), look)
    assert kwargs == {}
    assert torch.allclose(args[0], 2 * X[:4], atol=1e-4), "in eval mode: the dropout and the batch's mean are not in it"
    assert (losses, read) == (0, 4)
    assert torch.equal(statistics, torch.zeros(6))
    assert module.losses == 1


def test_a_dry_run_is_where_the_weights_are_and_not_where_the_fit_will_move_them():
    def look(module):
        few = FewSamples(module)
        module._device = torch.device("meta")  # as Lightning sets it before it moves them
        batch = few.first()
        module._device = torch.device("cpu")
        return first_tensor(batch).device.type

    assert inside_a_fit(Counts(), DataLoader(AsDicts(), 8), look) == "cpu"


class Shuffled:
    """An iterable of one's own, with a generator."""

    def __init__(self):
        self.order = torch.Generator().manual_seed(1)

    def __iter__(self):
        for chosen in torch.randperm(len(X), generator=self.order).split(5):
            yield X[chosen], Y[chosen]


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter([(X[5], Y[5]), (X[6], Y[6])])


@pytest.mark.parametrize(
    ("data", "first"),
    [
        (lambda: loader(X, Y, size=8), X[:4]),
        (lambda: loader(X, Y, size=2), X[:2]),
        (lambda: DataLoader(TensorDataset(X[None], Y[None]), batch_size=None), X),
        (lambda: DataLoader(Stream(), 2), X[5:7]),
        (Shuffled, X[torch.randperm(len(X), generator=torch.Generator().manual_seed(1))[:5]]),
    ],
    ids=["more than enough", "less", "whole batches", "a stream", "an iterable"],
)
def test_samples_of_loaders_of_every_kind(data, first):
    assert torch.equal(inside_a_fit(Classifier(), data(), a_few_samples)[0], first)


def test_a_look_at_an_iterable_does_not_move_its_generator_on():
    data = Shuffled()
    state = data.order.get_state()
    assert inside_a_fit(Classifier(), data, lambda m: (a_few_samples(m), torch.equal(state, data.order.get_state())))[1]


def test_a_collection_of_loaders_gives_one_of_batches():
    class Two(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["b"], batch_idx)

    batch = inside_a_fit(Two(), {"a": loader(X, Y, size=2), "b": loader(X, Y)}, a_few_samples)
    assert (len(batch["a"][0]), len(batch["b"][0])) == (2, 4)


def test_an_example_input_needs_no_data():
    module = Classifier()
    module.example_input_array = X[:2]
    args, _ = inside_a_fit(module, loader(X, Y), lambda m: arguments_of(m, m.net))
    assert torch.equal(args[0], X[:2])


def test_a_dry_run_that_cannot_be_made_says_what_to_do():
    class Breaks(Classifier):
        def training_step(self, batch, batch_idx):
            raise KeyError("ids")

    class Elsewhere(Classifier):
        def __init__(self):
            super().__init__()
            self.other = mlp()

    with pytest.raises(
        RecipeError, match=r"failed on 4 samples before training \(KeyError: 'ids'\).*example_input_array"
    ):
        inside_a_fit(Breaks(), loader(X, Y), lambda m: arguments_of(m, m.net))
    with pytest.raises(RecipeError, match="never calls its Sequential"):
        inside_a_fit(Elsewhere(), loader(X, Y), lambda m: arguments_of(m, m.other))
    once = iter(loader(X, Y))
    with pytest.raises(RecipeError, match="an iterator that goes through once"):
        inside_a_fit(Classifier(), once, a_few_samples)


# -- edits -------------------------------------------------------------------------------------------------------------


def test_an_edit_changes_what_goes_in_or_comes_out_and_is_gone_afterwards():
    module, seen = Classifier(), []

    def edit(name, part, x):
        seen.append((name, type(part).__name__))
        return 2 * x if name == "in" else x + 1

    plain, halves = module(X), nn.Sequential(*module.net[:2])
    undo = ExitStack()
    Edits(module, {"in": ("net.2", "input"), "out": ("net.4", "output")}, edit).install(undo)
    expected = module.net[3](nn.functional.linear(2 * halves(X), module.net[2].weight, module.net[2].bias))
    expected = nn.functional.linear(expected, module.net[4].weight, module.net[4].bias) + 1
    assert torch.allclose(module(X), expected)
    assert seen == [("in", "Linear"), ("out", "Linear")]
    twin, again = copy.deepcopy(module), pickle.loads(pickle.dumps(module.net))
    assert torch.equal(twin(X), plain) and torch.equal(again(X), plain)
    undo.close()
    assert torch.equal(module(X), plain)
    assert not module.net[2]._forward_pre_hooks and not module.net[4]._forward_hooks


def test_an_edit_of_what_is_no_tensor_says_where():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    module = Classifier(nn.Sequential(nn.Linear(6, 3), Pair()))
    Edits(module, {"out": ("net.1", "output")}, lambda name, part, x: x).install(ExitStack())
    with pytest.raises(RecipeError, match=r"the output of net\.1 is a tuple of .* and no tensor; name another part"):
        module(X)
    with pytest.raises(RecipeError, match=r"'net\.7' is no part of Classifier"):
        Edits(module, {"out": ("net.7", "output")}, lambda name, part, x: x)


# -- feature maps ------------------------------------------------------------------------------------------------------


def test_feature_maps_of_residual_blocks_are_as_deep_as_their_stage():
    module = Classifier(CifarResNet(14))
    middle, end = feature_maps(module, "middle", "where"), feature_maps(module, "end", "where")
    assert [depth for *_, depth in middle] == [depth for *_, depth in end] == [0, 0, 1, 1, 2, 2]
    assert middle[0] == ("net.layer1.0.conv2", "input", 0) and end[3] == ("net.layer2.1.bn2", "output", 1)


def test_feature_maps_of_a_plain_network_come_out_of_its_convolutional_stages():
    assert feature_maps(Classifier(SmallCNN()), "middle", "where") == [
        (f"net.stages.{i}", "output", i) for i in range(3)
    ]
    vgg = feature_maps(Classifier(torchvision.models.vgg11()), "end", "where")
    assert vgg[0] == ("net.features.2", "output", 0), "behind the activation and the pooling"
    assert len(vgg) == 8


def test_a_transformer_has_no_feature_maps_and_the_error_says_what_was_looked_for():
    vit = timm.create_model("vit_tiny_patch16_224", depth=2)
    with pytest.raises(RecipeError, match=r"found no feature maps in Classifier: no residual blocks .*with after="):
        feature_maps(Classifier(vit), "end", "after")


def test_a_part_is_named_from_the_module_or_from_its_network():
    module = Classifier(SmallCNN())
    assert named_part(module, "stages.1") == named_part(module, "net.stages.1") == "net.stages.1"
    with pytest.raises(RecipeError, match=r"'stages\.9' is no part of Classifier; its parts are"):
        named_part(module, "stages.9")
