"""A frozen network beside the module: how it is made, that it is the same again, and that nothing of it trains."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

from lightning_recipes.core.companion import Companion, fingerprint
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.weights import part_of_state
from tests.stock import Classifier, mlp, quiet, same, samples, weights

X, _ = samples()
MLP = "tests.stock:mlp"  # a function that makes a module does as well as a class


class Normed(nn.Sequential):
    def __init__(self, width: int = 6) -> None:
        super().__init__(nn.Linear(6, width), nn.BatchNorm1d(width), nn.Dropout(0.5))


NORMED = f"{__name__}:Normed"


def built(*args, stored=None, **kwargs):
    companion = Companion(*args, **kwargs)
    companion.build(quiet(), stored)
    return companion


# -- how it is made ----------------------------------------------------------------------------------------------------


def test_an_import_path_makes_the_same_random_network_for_the_same_seed_and_leaves_the_global_state_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = built(NORMED, pretrained=False, seed=1).network
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again, other = (built(NORMED, pretrained=False, seed=seed).network for seed in (1, 2))
    assert same(weights(first), weights(again))
    assert not same(weights(first), weights(other))
    torch.manual_seed(1)
    assert same(weights(first), weights(Normed()))  # as anybody would make it


def test_arguments_reach_what_makes_it():
    assert built(NORMED, pretrained=False, arguments={"width": 3}).network[0].out_features == 3


def test_a_timm_name():
    small = {"channels": (8, 8, 8, 8), "layers": (1, 1, 1, 1), "num_classes": 4}
    network = built("resnet18", pretrained=False, arguments=small, seed=3).network
    torch.manual_seed(3)
    assert same(weights(network), weights(timm.create_model("resnet18", **small)))


@pytest.mark.parametrize("kind", ["pt", "ckpt", "safetensors", "part of a module"])
def test_a_checkpoint_file(kind, tmp_path):
    from safetensors.torch import save_file

    net = mlp(seed=4)
    path = str(tmp_path / f"guide.{kind if '.' not in kind and ' ' not in kind else 'ckpt'}")
    if kind == "safetensors":
        save_file(net.state_dict(), path)
    elif kind == "part of a module":
        torch.save({"state_dict": {**Classifier(net).state_dict(), "accuracy.tp": torch.zeros(1)}}, path)
    else:
        torch.save({"state_dict": net.state_dict()} if kind == "ckpt" else net.state_dict(), path)
    assert same(weights(built(MLP, checkpoint=path).network), weights(net))


def test_a_module_is_used_as_it_is():
    net = mlp()
    assert built(net).network is net


def test_of_a_state_dict_the_part_is_taken_under_which_all_names_are_found():
    own = {"0.weight": torch.zeros(1), "1.weight": torch.zeros(1), "1.num_batches_tracked": torch.zeros(1)}
    state = {"a.0.weight": 1, "b.c.0.weight": 2, "b.c.1.weight": 3, "d": 4}
    assert part_of_state(state, own) == {"0.weight": 2, "1.weight": 3}
    for whole in ({"0.weight": 1, "x.0.weight": 2}, {"a.0.weight": 1}, {}):
        assert part_of_state(whole, own) == whole


# -- that it is the same again -----------------------------------------------------------------------------------------


def test_what_can_be_built_again_leaves_a_hash_in_a_checkpoint_and_a_module_its_weights(tmp_path):
    torch.save(mlp().state_dict(), tmp_path / "guide.pt")
    for companion in (built(NORMED, pretrained=False), built(mlp(), checkpoint=str(tmp_path / "guide.pt"))):
        assert list(companion.state()) == ["hash"]
    state = built(net := mlp()).state()
    assert state["hash"] == fingerprint(net)
    assert same(state["weights"], weights(net))


def test_a_module_of_another_process_gets_the_weights_of_the_run_that_is_resumed():
    state = copy.deepcopy(built(mlp(seed=1)).state())
    again = built(mlp(seed=2), stored=state)
    assert same(weights(again.network), weights(mlp(seed=1)))
    assert again.state()["hash"] == state["hash"]


def test_another_network_than_in_the_run_that_is_resumed_is_refused(tmp_path):
    state = built(NORMED, pretrained=False, seed=1).state()
    built(NORMED, pretrained=False, seed=1, stored=state)
    with pytest.raises(RecipeError, match=r"guide built anew is not the network of the run that is resumed: .* hash"):
        built(NORMED, pretrained=False, seed=2, stored=state)
    path = str(tmp_path / "guide.pt")
    torch.save(mlp(seed=1).state_dict(), path)
    state = built(MLP, checkpoint=path).state()
    torch.save(mlp(seed=2).state_dict(), path)
    with pytest.raises(RecipeError, match=r"guide_checkpoint='.*guide.pt' is not the network of the run"):
        built(MLP, checkpoint=path, stored=state)
    with pytest.raises(RecipeError, match="guide: the checkpoint holds the weights of another network"):
        built(mlp(width=7), stored=built(mlp()).state())


def test_the_hash_sees_every_name_type_shape_and_value():
    def hash_of(**values):
        part = nn.Module()
        for name, value in values.items():
            part.register_buffer(name, value)
        return fingerprint(part)

    one = torch.ones(4)
    several = [
        hash_of(a=one),
        hash_of(b=one),
        hash_of(a=one.reshape(2, 2)),
        hash_of(a=one.to(torch.bfloat16)),
        hash_of(a=torch.tensor([1.0, 1.0, 1.0, 1.0 + 2**-23])),
        hash_of(a=torch.ones(())),
    ]
    assert len(set(several)) == len(several)
    assert hash_of(a=torch.ones(4, 2).T) == hash_of(a=torch.ones(2, 4))


# -- that nothing of it trains -----------------------------------------------------------------------------------------


def test_it_runs_in_eval_mode_without_gradients_and_ends_in_its_own_modes():
    net = Normed()
    net[2].eval()
    companion, before = built(net), weights(net)
    x = X.clone().requires_grad_()
    with companion.held():
        assert not any(part.training for part in net.modules())
        out = companion(x)
        assert not out.requires_grad
        assert torch.equal(out, net[1](net[0](X)))
    assert [part.training for part in net.modules()] == [True, True, True, False]
    assert same(weights(net), before)
    assert companion.network is None


def test_inputs_come_in_the_type_of_its_weights_and_token_ids_as_they_are():
    companion = built(mlp().double())
    assert companion(X).dtype == torch.float64
    ids = torch.tensor([[1, 2]])
    assert built(nn.Embedding(4, 2)).__call__(ids).shape == (1, 2, 2)


def test_parameters_that_are_the_modules_too_are_refused():
    module = Classifier()
    with pytest.raises(RecipeError, match=r"shares parameters with the module \('0.weight' is its 'net.0.weight'\)"):
        built(module.net).check_apart(module)
    built(copy.deepcopy(module.net)).check_apart(module)


# -- what cannot be made -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "tests.stock:perceptron"}, r"'tests.stock:perceptron' cannot be imported \(AttributeError"),
        ({"source": "no.such.package:Net"}, r"cannot be imported \(ModuleNotFoundError"),
        ({"source": MLP}, "random weights and pretrained=True asks for trained ones: give guide_checkpoint, or pretr"),
        ({"source": "resnet_18"}, r"must be a module, an import path .*; timm has .*resnet"),
        ({"source": MLP, "arguments": {"depth": 3}}, r"could not be built with \{'depth': 3\} \(TypeError"),
        ({"source": "builtins:dict"}, "makes a dict, not a torch.nn.Module"),
        ({"source": MLP, "checkpoint": "none.pt"}, "guide_checkpoint='none.pt': no such file"),
    ],
)
def test_one_clear_error(arguments, message):
    arguments = {"pretrained": "checkpoint" in arguments or arguments["source"] == MLP, **arguments}
    if "arguments" in arguments:
        arguments["pretrained"] = False
    with pytest.raises(RecipeError, match=message):
        built(**arguments)


def test_a_file_that_does_not_fit(tmp_path):
    path = str(tmp_path / "guide.pt")
    torch.save(mlp(width=9).state_dict(), path)
    with pytest.raises(RecipeError, match=r"guide_checkpoint='.*' does not fit Sequential: other shape: 0.bias \(9,\)"):
        built(MLP, checkpoint=path)


def test_it_says_what_its_first_layer_is():
    assert built(NORMED, pretrained=False).describe() == "Normed, whose Linear '0' has weights [6, 6]"


def test_while_it_is_held_it_is_frozen_and_an_attack_goes_through_it() -> None:
    source = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    source[2].bias.requires_grad_(False)
    companion = Companion(source)
    companion.build()
    x = torch.rand(5, 3, requires_grad=True)
    with companion.held():
        assert not any(p.requires_grad for p in source.parameters()) and not source.training
        assert not companion(x).requires_grad
        (gradient,) = torch.autograd.grad(companion.attend(x).sum(), x)
        by_hand = (source[2].weight @ source[0].weight).sum(0).expand(5, 3)
        assert torch.allclose(gradient, by_hand, atol=1e-6)
    assert [p.requires_grad for p in source.parameters()] == [True, True, True, False] and source.training
    assert len(companion.hash) == 64
