"""Maps of any network in order of execution, the parts that give them, and passes that leave no trace in the taps."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lightning_recipes.core.dry_run import FewSamples, eager_and_silent
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.features import Map, Taps, maps_in_order
from lightning_recipes.core.recipe import StepRecipe
from lightning_recipes.core.select import parts_named, parts_of_types
from lightning_recipes.core.silence import silent
from lightning_recipes.core.sparse import _partly
from tests.stock import Classifier, loader, mlp, quiet, samples

X, Y = samples()


def names(maps):
    return [each.name for each in maps]


# -- parts -------------------------------------------------------------------------------------------------------------


def test_parts_of_a_type_are_those_of_the_class_and_no_subclass():
    class Own(nn.Linear):
        pass

    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), Own(2, 2), nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
    assert parts_of_types(net, [nn.Linear]) == ["0", "3.0"]
    assert parts_of_types(net, [nn.Linear, nn.LayerNorm]) == ["0", "3.0", "3.1"]
    assert parts_of_types(net, []) == []


def test_a_layer_with_an_adapter_or_a_parametrization_is_the_layer():
    from peft import LoraConfig, inject_adapter_in_model

    net = mlp()
    parametrizations.weight_norm(net[0])
    inject_adapter_in_model(LoraConfig(r=1, target_modules=["2"]), net)
    net[4].__class__ = _partly(nn.Linear, ("weight",))
    assert parts_of_types(net, [nn.Linear]) == ["0", "2", "4"]


def test_names_with_stars_count_from_the_module_or_from_its_network():
    module = Classifier(timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=12, num_heads=1, depth=2))
    attention = ["net.blocks.0.attn", "net.blocks.1.attn"]
    assert parts_named(module, ["net.blocks.*.attn"], "layers") == attention
    assert parts_named(module, ["blocks.*.attn", "blocks.0.attn"], "layers") == attention
    assert parts_named(module, ["blocks.?"], "layers") == ["net.blocks.0", "net.blocks.1"]
    with pytest.raises(
        RecipeError, match=r"layers: 'blocks.0.atn' is no part of Classifier; near it are \['net.blocks.0.at"
    ):
        parts_named(module, ["blocks.0.atn"], "layers")
    with pytest.raises(RecipeError, match=r"'zzz' is no part of Sequential; its parts are \['0', '1', '2', '3', '4'\]"):
        parts_named(mlp(), ["zzz"], "layers")


# -- maps --------------------------------------------------------------------------------------------------------------


def test_maps_come_in_order_of_execution_and_not_of_registration():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first, self.never = nn.Linear(4, 2), nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, x):
            return self.last(self.first(x))

    net = Backwards()
    maps = maps_in_order(net, ["last", "first", "never"], lambda n: net(X[:n]), 4)
    assert maps == [Map("first", None, 0), Map("last", None, 0)]


def test_resnet_18_has_20_convolutions_and_a_pooling_before_its_logits():
    """The card's example; torchvision's pooling layer is what the code sees."""
    import torchvision

    net = torchvision.models.resnet18(num_classes=5).eval()
    x = torch.rand(4, 3, 32, 32)
    paths = parts_of_types(net, [nn.Conv2d, nn.Linear, nn.AdaptiveAvgPool2d])
    maps = maps_in_order(net, paths, lambda n: net(x[:n]), 4)
    assert len(maps) == 22
    assert names(maps)[0] == "conv1" and names(maps)[-2:] == ["avgpool", "fc"]
    assert names(maps)[6:8] == ["layer2.0.conv2", "layer2.0.downsample.0"]


def test_the_batch_axis_is_the_one_that_follows_the_number_of_samples():
    """Also where another is as long, and where it is not the first; what has none, two or a merged one gives no map."""

    class Shapes(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleDict({name: nn.Identity() for name in ("second", "square", "none", "two", "merged")})
            self.ids = nn.Identity()

        def forward(self, x):
            self.parts["second"](x.T)
            self.parts["square"](x[:, :4])
            self.parts["none"](x.sum(0))
            self.parts["two"](x @ x.T)
            self.parts["merged"](x.reshape(-1, 2))
            self.ids(torch.zeros(len(x), 2, dtype=torch.long))

    net = Shapes()
    maps = maps_in_order(net, [*(f"parts.{n}" for n in net.parts), "ids"], lambda n: net(X[:n]), 4)
    assert maps == [Map("parts.second", None, 1), Map("parts.square", None, 0)]
    with Taps(net, {"parts.second": ("parts.second", "output")}) as taps:
        net(X)
        assert torch.equal(maps[0].of(taps.values), X)


def test_of_a_tuple_every_element_is_a_map_and_of_a_recurrent_layer_all_but_the_state():
    attention, lstm = nn.MultiheadAttention(6, 1), nn.LSTM(6, 3)
    net = nn.ModuleDict({"attention": attention, "rnn": nn.RNN(6, 3, batch_first=True), "lstm": lstm})
    tokens = torch.rand(5, 4, 6)  # time first

    def run(n):
        x = tokens[:, :n]
        net["attention"](x, x, x)
        net["rnn"](x.transpose(0, 1))
        net["lstm"](x)

    maps = maps_in_order(net, ["attention", "rnn", "lstm"], run, 4)
    assert [(each.name, each.axis) for each in maps] == [
        ("attention[0]", 1),
        ("attention[1]", 0),
        ("rnn[0]", 0),
        ("lstm[0]", 1),
    ]


def test_a_part_that_is_no_longer_called_is_an_error():
    with pytest.raises(RecipeError, match="first was not called in this pass, and it was in the dry run"):
        Map("first", None, 0).of({})
    with pytest.raises(RecipeError, match="first gave a dict, and in the dry run something else"):
        Map("first", None, 0).of({"first": {}})


# -- taps of the training pass -----------------------------------------------------------------------------------------


def training_taps(net):
    return Taps(net, {"a": ("0", "output"), "b": ("4", "input")}, training=True)


def test_taps_of_the_training_pass_see_nothing_of_a_pass_without_gradients():
    net = mlp()
    with training_taps(net) as taps:
        with torch.no_grad():
            net(X)
        assert taps.values == {}
        net(X)
        assert list(taps.take()) == ["a", "b"]
        assert taps.values == {}


def test_they_see_nothing_of_a_silent_pass_and_keep_what_they_had():
    module = Classifier()
    with training_taps(module.net) as taps:
        module(X[:3])
        before = taps["a"]
        with silent(module):
            module(X)
            assert len(taps["a"]) == 16, "inside they do"
        assert taps["a"] is before
    with silent(module):
        module(X)
    assert taps.values == {}
    with training_taps(module.net) as again:
        module(X)
        assert len(again["a"]) == 16


def test_other_taps_keep_what_a_silent_pass_computed():
    module = Classifier()
    with Taps(module.net, {"a": ("0", "output")}) as taps:
        with silent(module):
            module(X)
        assert len(taps["a"]) == 16


def test_after_all_recipes_had_their_passes_the_taps_hold_the_modules_own():
    """One replays before the module's step, one in its loss, one after it."""
    seen = []

    class Replays(StepRecipe):
        needs_criterion = True

        def transform_batch(self, step, batch):
            step.replay((batch[0] + 1, batch[1]))
            return batch

        def transform_targets(self, step, logits, targets):
            if not step.replaying:
                step.replay(step.batch)
            return targets

        def extra_loss(self, step):
            step.replay(step.batch)
            with step.second_pass():
                assert taps["logits"] is not step.outputs
            seen.append(taps["logits"] is step.outputs)
            return {}

    module = Classifier()
    with Taps(module.net, {"logits": ("4", "output")}, training=True) as taps:
        quiet(callbacks=[Replays()]).fit(module, loader(X, Y))
    assert seen == [True] * 4


@pytest.mark.parametrize(("track", "moved"), [(False, 1), (True, 2)])
def test_a_second_pass_moves_batch_norm_only_if_asked_and_leaves_the_random_state(track, moved):
    class Twice(StepRecipe):
        def extra_loss(self, step):
            before = torch.get_rng_state()
            with step.second_pass(track_statistics=track) as loss:
                assert loss.requires_grad
            assert torch.equal(torch.get_rng_state(), before)
            return {}

    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3))
    quiet(callbacks=[Twice()], max_steps=1).fit(Classifier(net), loader(X, Y))
    assert net[1].num_batches_tracked == moved


# -- samples for a dry run ---------------------------------------------------------------------------------------------


class Shown(Classifier):
    """Notes the batches that its step gets."""

    def __init__(self, example=None):
        super().__init__()
        self.example_input_array, self.batches, self.inputs = example, [], []

    def forward(self, x):
        self.inputs.append(x)
        return super().forward(x)

    def training_step(self, batch, batch_idx):
        self.batches.append(batch)
        return super().training_step(batch, batch_idx)


class DryRun(StepRecipe):
    def __init__(self, run):
        self.run = run

    def declare(self, plan):
        with eager_and_silent(plan.module):
            self.run(FewSamples(plan.module))


def test_the_first_samples_are_a_smaller_batch_of_the_training_data():
    def run(samples):
        assert (samples.count, samples.is_example) == (4, False)
        for count in (3, 4, 6):
            samples.run(samples.first(count))

    module = Shown()
    quiet(callbacks=[DryRun(run)], max_steps=1).fit(module, loader(X, Y, size=8))
    for batch, count in zip(module.batches, (3, 4, 6)):
        assert torch.equal(batch[0], torch.cat([X[:4], X[:4]])[:count])
        assert torch.equal(batch[1], torch.cat([Y[:4], Y[:4]])[:count])


def test_an_example_takes_the_place_of_data_and_comes_again_where_it_is_one_sample():
    module = Shown(X[:1])
    quiet(callbacks=[DryRun(lambda samples: samples.run(samples.first(3)))], max_steps=1).fit(module, loader(X, Y))
    assert torch.equal(module.inputs[0], X[:1].expand(3, 6))
