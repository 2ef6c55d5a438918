"""The tangent kernel of the last layers: against hand-written Jacobians, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.tangents import LastLayers, layer_kernel


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().double().eval()


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def kernel_of(net: nn.Sequential, x: Tensor) -> tuple[Tensor, LastLayers]:
    """By :class:`LastLayers`; the readout is the last of the network."""
    head = str(len(net) - 1)
    last = LastLayers(net, head)
    last.find(lambda: net(x[:2]))
    with last.watched():
        net(x)
        kept = last.take()
    return last.kernel(net[:-1](x).detach(), kept), last


def by_autograd(net: nn.Module, x: Tensor, *layers: nn.Module) -> Tensor:
    """J J^T of one sample and one output after the other, averaged over outputs."""
    parameters = [p for layer in layers for p in layer.parameters()]
    flags = [p.requires_grad for p in parameters]
    for p in parameters:
        p.requires_grad_(True)
    rows = [
        torch.stack(
            [torch.cat([g.flatten() for g in torch.autograd.grad(net(one[None])[0, c], parameters)]) for c in outs]
        )
        for one in x
        for outs in [range(net(one[None]).shape[1])]
    ]
    for p, flag in zip(parameters, flags):
        p.requires_grad_(flag)
    jacobian = torch.stack(rows)  # [n, C, parameters]
    return torch.einsum("icp,jcp->ij", jacobian, jacobian) / jacobian.shape[1]


def test_the_readout_alone_has_the_features_kernel_and_one_for_its_bias() -> None:
    net = seeded(lambda: nn.Sequential(nn.Linear(4, 3)))
    x = inputs(5, 4)
    last = LastLayers(net, "0")
    assert torch.allclose(last.kernel(x, {}), x @ x.T + 1, atol=1e-12)
    assert torch.allclose(last.kernel(x, {}), by_autograd(net, x, net[0]), atol=1e-12)
    net[0].register_parameter("bias", None)
    assert torch.allclose(last.kernel(x, {}), x @ x.T, atol=1e-12)


def test_two_layers_have_the_kernel_that_is_written_by_hand() -> None:
    """f = v . relu(W x + b) + e: df/dv = h, df/de = 1, df/dW = (v * [h > 0]) x^T, df/db = v * [h > 0]."""
    net = seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1)))
    x = inputs(7, 4)
    before = x @ net[0].weight.T + net[0].bias
    h, back = before.relu(), (before > 0) * net[2].weight
    expected = h @ h.T + 1 + (x @ x.T + 1) * (back @ back.T)
    found, last = kernel_of(net, x)
    assert last.names == ["0"] and torch.allclose(found, expected.detach(), atol=1e-12)
    assert torch.allclose(by_autograd(net, x, net[0], net[2]), expected.detach(), atol=1e-12)
    assert last.passes(7) == 7 * 2 + round(7**2 * (4 + 6) / (24 + 6)), (
        "by the products of all pairs, over those of a pass"
    )


def test_the_cost_of_a_convolution_is_its_jacobians_and_their_products() -> None:
    """54 weights at 4 places and 3 biases, a norm of 6 and 36 weights of the readout; 3 outputs."""
    net = seeded(NETWORKS["a convolution and a norm"][0])
    _, last = kernel_of(net, inputs(5, 2, 5, 5))
    work = 54 * 4
    assert last.passes(5) == 5 * 4 + round(3 * 5 * (5 * 57 + work + 5 * 6) / (work + 36))
    n = 10**6  # more than are held: the Jacobian of each piece is made again for half of the others
    again = 1 + n / (2**25 // 57 // 2) / 2
    assert last.passes(n) == n * 4 + round(3 * n * (n * 57 + round(again * work) + n * 6) / (work + 36))


class Block(nn.Module):
    """A residual block without parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x).relu_())


NETWORKS: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...], list[str]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)), (7, 4), ["0"]),
    "a convolution and a norm": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, stride=2), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(12, 3)
        ),
        (5, 2, 5, 5),
        ["0", "1"],
    ),
    "tokens": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.LayerNorm(6), nn.Flatten(), nn.Linear(18, 2)),
        (5, 3, 4),
        ["0", "2"],
    ),
    "a residual block": (lambda: nn.Sequential(nn.Linear(4, 4), Block(), nn.Linear(4, 3)), (6, 4), ["1.second"]),
    "a parametrized layer": (
        lambda: nn.Sequential(weight_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 2)),
        (5, 4),
        ["0"],
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("frozen", [False, True], ids=["all train", "the readout alone trains"])
def test_the_kernel_of_other_layers_is_that_of_autograd_sample_by_sample(name: str, frozen: bool) -> None:
    make, shape, names = NETWORKS[name]
    net, x = seeded(make), inputs(*shape)
    for p in net[:-1].parameters():
        p.requires_grad_(not frozen)
    found, last = kernel_of(net, x)
    assert last.names == names
    expected = by_autograd(net, x, *(net.get_submodule(each) for each in names), net[-1])
    assert torch.allclose(found, expected, atol=1e-10)
    assert last.size == sum(
        n_in + last.outputs * n_out
        for n_in, n_out in ((each.input.numel(), each.output.numel()) for each in last._layers)
    )


@pytest.mark.parametrize("held", [1, 60, 130])
def test_chunks_change_nothing(held: int) -> None:
    """28 parameters: one sample at once, two (so that one is held twice), and four."""
    layer = seeded(lambda: nn.Conv1d(3, 4, 2))
    a, g = inputs(5, 3, 6), inputs(5, 2, 4, 5)
    assert torch.allclose(layer_kernel(layer, a, g, held), layer_kernel(layer, a, g), atol=1e-12)


def test_integers_go_into_an_embedding() -> None:
    net = seeded(lambda: nn.Sequential(nn.Embedding(9, 3), nn.Flatten(), nn.Linear(6, 2)))
    x = torch.tensor([[0, 1], [1, 2], [8, 8]])
    assert torch.allclose(kernel_of(net, x)[0], by_autograd(net, x, net[0], net[2]), atol=1e-12)


def test_hooks_gradients_and_parameters_are_as_they_were() -> None:
    net = seeded(NETWORKS["a convolution and a norm"][0])
    calls: list[torch.dtype] = []
    net[0].register_forward_hook(lambda part, args, out: calls.append(out.dtype))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    kernel_of(net, inputs(5, 2, 5, 5))
    assert len(calls) == 3, "find, the pass, and the features of this test: nobody's hook sees the layer's copy"
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert [len(part._forward_hooks) for part in net] == [1, 0, 0, 0, 0]


# -- what it refuses ---------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A readout of what a function of a network and its input gives."""

    def __init__(self, body: nn.Module, run: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.run, self.head = body, run, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.run(self.body, x))


def refused(body: nn.Module, run: Callable[[nn.Module, Tensor], Tensor], x: Tensor | None = None) -> str:
    net = Net(body, run).eval()
    x = torch.rand(3, 4) if x is None else x
    with pytest.raises(RecipeError) as error:
        LastLayers(net, "head").find(lambda: net(x))
    assert str(error.value).endswith(("use kernel='features'", "which is the kernel of the readout alone"))
    assert not any(part._forward_hooks for part in net.modules())
    return str(error.value)


def without_gradient(body: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return body(x)


class Stairs(torch.autograd.Function):
    """Without a derivative."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.round()


def test_what_cannot_be_differentiated_is_refused_by_its_name() -> None:
    layer = nn.Linear(4, 4)
    says = refused(nn.ReLU(), lambda body, x: body(x))
    assert says.startswith("kernel='ntk' needs a layer with parameters before the readout head, and none is called")
    assert "have no gradient there (body): the network runs under torch.no_grad" in refused(layer, without_gradient)
    assert "(body): the network" in refused(layer, lambda body, x: body(x).detach())
    says = refused(layer, lambda body, x: Stairs.apply(body(x)))
    assert "cannot differentiate the outputs of head with respect to the layers before it (" in says


class Asks(nn.Linear):
    """What it does depends on what it gets, which ``vmap`` cannot know."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if bool(x.sum() > 0) else x


def test_a_layer_that_cannot_be_called_sample_by_sample_is_refused_by_its_name() -> None:
    assert "cannot call body (Asks) sample by sample (" in refused(Asks(4, 4), lambda body, x: body(x))


def test_layers_that_are_not_called_once_on_one_tensor_are_refused_by_their_name() -> None:
    layer = nn.Linear(4, 4)
    assert "body (Linear) is called 2 times" in refused(layer, lambda body, x: body(body(x)))
    says = refused(nn.Bilinear(4, 4, 4), lambda body, x: body(x, x))
    assert "takes layers from one tensor with a sample a row to another; body (Bilinear) is none" in says
    says = refused(layer, lambda body, x: body(x) + nn.functional.linear(x, body.weight))
    assert "takes layers whose parameters act in one call alone; body.weight has another gradient than that" in says


def test_a_network_that_is_called_otherwise_later_is_said() -> None:
    net = seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Flatten(), nn.Linear(6, 1)))
    last = LastLayers(net, "3")
    last.find(lambda: net(inputs(2, 4)))
    with last.watched(), pytest.raises(RecipeError, match="the layers before 3 are called otherwise than before"):
        net(inputs(5, 1, 4))
        last.take()
    del net[0]  # the others move up, and the readout is '2'
    with pytest.raises(RecipeError, match="3 is no longer part of the network"), last.watched():
        pass
