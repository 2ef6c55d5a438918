"""The plain perceptron of the gradient-noise paper."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightning_recipes.core.select import layers
from lightning_recipes.modules import MLP, ImageClassifier


def test_its_defaults_are_the_papers_network() -> None:
    torch.manual_seed(0)
    net = MLP()
    linear = [*net.layers, net.head]
    assert [tuple(layer.weight.shape) for layer in linear] == [(50, 784), *[(50, 50)] * 19, (10, 50)]
    weights = torch.cat([layer.weight.flatten() for layer in linear])
    assert weights.std().item() == pytest.approx(0.1, rel=0.01) and abs(weights.mean().item()) < 1e-3
    assert not any(layer.bias.any() for layer in linear)


def test_it_is_a_relu_network_on_flat_images() -> None:
    torch.manual_seed(0)
    net, x = MLP(3, 2, size=4, width=5, depth=2, init="torch"), torch.randn(6, 2, 4, 4)
    first, second = net.layers
    by_hand = F.linear(x.reshape(6, 32), first.weight, first.bias).clamp_min(0)
    by_hand = F.linear(by_hand, second.weight, second.bias).clamp_min(0)
    assert torch.allclose(net(x), F.linear(by_hand, net.head.weight, net.head.bias))
    assert [name for name, _ in layers(ImageClassifier(net))] == ["net.layers.0", "net.layers.1", "head"]


def test_from_zero_only_the_last_bias_gets_a_gradient() -> None:
    net = MLP(3, size=4, width=5, depth=2, init="zeros")
    F.cross_entropy(net(torch.rand(4, 1, 4, 4)), torch.tensor([0, 1, 1, 2])).backward()
    assert [name for name, p in net.named_parameters() if p.grad.any()] == ["head.bias"]


def test_he_keeps_the_size_of_what_passes() -> None:
    torch.manual_seed(0)
    net = MLP(size=16, width=256, depth=8, init="he")
    x = torch.randn(200, 1, 16, 16)
    assert 0.3 < net(x).square().mean() / (2 * x.square().mean()) < 3


def test_without_hidden_layers_it_is_linear() -> None:
    net = ImageClassifier(
        "mlp", num_classes=2, in_chans=1, model_args={"size": 8, "depth": 0, "init": "zeros", "bias": False}
    ).net
    assert [(name, tuple(p.shape)) for name, p in net.named_parameters()] == [("head.weight", (2, 64))]
    assert not net.head.weight.any()


@pytest.mark.parametrize(
    ("arguments", "says"), [({"depth": -1}, "depth=-1, width=50"), ({"init": "ones"}, "init='ones'")]
)
def test_bad_arguments(arguments: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        MLP(**arguments)
