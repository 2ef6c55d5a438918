"""The gradient of a product of factors is that of a dense weight in its place."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.product_gradients import ProductGradients
from lightning_recipes.core.silence import is_silent, silent
from lightning_recipes.modules import FactorProduct
from tests.stock import Classifier, quiet


class Factored(nn.Module):
    """2 (B A) h, of which `down` holds A and `up` holds B."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.down, self.up = nn.Linear(5, 2, bias=False), nn.Linear(2, 3, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        return 2 * self.up(self.down(h))


def watched(module: nn.Module, **pairs: tuple[str, str]) -> tuple[ProductGradients, object]:
    from contextlib import ExitStack

    found, undo = ProductGradients(module, pairs), ExitStack()
    found.install(undo)
    return found, undo


def dense_gradient(net: Factored, h: Tensor) -> Tensor:
    weight = (net.up.weight @ net.down.weight).detach().requires_grad_()
    (2 * h @ weight.T).square().sum().backward()
    return weight.grad


@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 5)])
def test_it_is_the_gradient_of_the_dense_weight_summed_over_samples_tokens_and_passes(shape):
    net, h = Factored(), torch.randn(*shape)
    found, undo = watched(net, x=("down", "up"))
    with undo:
        for _ in range(2):
            net(h).square().sum().backward()
        q = found.take(quiet())["x"]
        assert torch.allclose(q, 2 * dense_gradient(net, h), rtol=1e-5)
        assert torch.allclose(net.up.weight.grad, q @ net.down.weight.T, rtol=1e-5), "dL/dB = Q A^T"
        assert torch.allclose(net.down.weight.grad, net.up.weight.T @ q, rtol=1e-5), "dL/dA = B^T Q"
        assert found.take(quiet()) == {}, "taken once"
    net(h).sum().backward()
    assert found.sums == {}, "off again"
    assert not net.down._forward_pre_hooks and not net.up._forward_hooks


def test_a_part_that_puts_out_the_product_is_read_at_its_output():
    product, u, v = FactorProduct(), torch.randn(4, 2, requires_grad=True), torch.randn(3, 2, requires_grad=True)
    found, undo = watched(product, x=("", ""))
    weight = torch.randn(4, 3)
    with undo:
        (product(u, v) * weight).sum().backward()
        assert torch.equal(found.take(quiet())["x"], weight)


def test_silent_passes_and_those_without_gradients_do_not_count():
    module = Classifier(Factored())
    found, undo = watched(module, x=("net.down", "net.up"))
    h = torch.randn(4, 5)
    with undo:
        with torch.no_grad():
            module(h)
        with silent(module):
            assert is_silent()
            replay = module(h).sum()
        assert not is_silent()
        replay.backward()  # an attack asks for its gradient after the replay
        assert found.sums == {}
        twin = copy.deepcopy(module)
        twin(h).sum().backward()
        assert found.sums == {}, "a copy writes nowhere"
        module(h).sum().backward()
        assert found.sums.keys() == {"x"}


def test_half_precision_gradients_are_summed_in_fp32():
    net = Factored()
    found, undo = watched(net, x=("down", "up"))
    with undo:
        h = torch.randn(8, 5)
        with torch.autocast("cpu", torch.bfloat16):
            out = net(h)
        assert out.dtype == torch.bfloat16
        out.float().sum().backward()
        q = found.take(quiet())["x"]
        assert q.dtype == torch.float32
        assert torch.allclose(q, 2 * h.sum(0).expand(3, 5), rtol=0.02, atol=0.02)


def test_a_path_that_is_no_part_is_an_error():
    with pytest.raises(RecipeError, match="'nothing' is no part of Factored"):
        ProductGradients(Factored(), {"x": ("nothing", "up")})
