"""The norm of every sample's gradient, against a loop of plain autograd."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from lightning_recipes.core.sample_gradients import SampleGradients
from tests.stock import mlp

N, CLASSES = 7, 3
Y = torch.arange(N) % CLASSES


def loss(output, targets):
    return F.cross_entropy(output, targets, reduction="none")


def one_by_one(net, x, y=Y):
    found = []
    for i in range(len(x)):
        trained = [p for p in net.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss(net(x[i : i + 1]), y[i : i + 1])[0], trained, allow_unused=True)
        found.append(torch.cat([g.flatten() for g in gradients if g is not None]).norm())
    return torch.stack(found)


class Residual(nn.Module):
    """A block that works in place on what its layers gave."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x):
        out = self.norm(self.conv(x))
        out += x
        return out.relu_()


class Words(nn.Module):
    """Ids, some of them twice and some padding; every other layer is a sum over positions."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4, padding_idx=0)
        self.layer = nn.Linear(4, 5)
        self.norm = nn.LayerNorm([3, 5])
        self.head = nn.Linear(5, CLASSES, bias=False)

    def forward(self, ids):
        return self.head(self.norm(self.layer(self.embed(ids)).tanh()).mean(1))


class Twice(nn.Module):
    """One layer is called twice, one weight is shared, one parameter is in no layer."""

    def __init__(self):
        super().__init__()
        self.again, self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.scale = nn.Parameter(torch.ones(6))
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.head(self.second(self.first(self.again(self.again(x).tanh()))) * self.scale)


class Functional(nn.Module):
    """A layer whose weight is used beside it."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.head(F.linear(self.layer(x).tanh(), self.layer.weight))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, CLASSES)

    def forward(self, x):
        x = x[:, None] * torch.ones(3, 1)
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


def convolutions():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, 2, padding=1), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), Residual(),
        nn.Conv2d(4, 6, (3, 1), dilation=(1, 2)), nn.Conv2d(6, 6, 3, padding=1, groups=2),
        nn.Conv2d(6, 4, 3, padding="same", padding_mode="reflect"), nn.Flatten(), nn.Linear(32, CLASSES),
    )  # fmt: skip


class Activated(nn.Linear):
    """Does more than the layer that it is one of."""

    def forward(self, x):
        return super().forward(x).tanh()


def subclassed():
    return nn.Sequential(Activated(6, 5), nn.Linear(5, CLASSES))


def half_frozen():
    net = mlp()
    net[0].weight.requires_grad_(False)
    net[2].requires_grad_(False)
    net[4].bias.requires_grad_(False)
    return net


def transformer():
    name = "vit_tiny_patch16_224"
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "in_chans": 2}
    return timm.create_model(name, num_classes=CLASSES, **sizes)


X = {"vectors": (6,), "images": (2, 8, 8), "ids": (3,)}
KNOWN = {
    "mlp": (mlp, "vectors", 3),
    "frozen in part": (half_frozen, "vectors", 2),
    "convolutions": (convolutions, "images", 7),
    "words": (Words, "ids", 4),
    "twice": (Twice, "vectors", 1),
    "a weight used beside its layer": (Functional, "vectors", 1),
    "a layer that does more": (subclassed, "vectors", 1),
    "attention": (Attention, "vectors", 1),
    "a transformer": (transformer, "images", 15),
}


def network(name):
    make, kind, known = KNOWN[name]
    torch.manual_seed(0)
    net = make().eval()
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(), part.running_var.uniform_(0.5, 2)
    torch.manual_seed(1)
    x = torch.randint(0, 4, (N, 3)) if kind == "ids" else torch.randn(N, *X[kind])
    return net, x, known


@pytest.mark.filterwarnings("error:There is a performance drop")  # some operation goes sample by sample
@pytest.mark.parametrize("name", KNOWN)
def test_every_norm_is_that_of_the_samples_own_gradient(name):
    net, x, known = network(name)
    expected, before = one_by_one(net, x), x.clone()
    for chunk in (1, 3, None):
        gradients = SampleGradients(net, loss, chunk)
        assert torch.allclose(gradients.norms((x,), Y), expected, rtol=1e-4)
        assert len(gradients._layers) == known, "as many layers as can be are known"
    assert torch.allclose(SampleGradients(net, loss, 3, layers=False).norms((x,), Y), expected, rtol=1e-4)
    assert torch.equal(x, before) and all(p.grad is None for p in net.parameters())
    assert not any(part._forward_hooks for part in net.modules())


def test_positions_are_summed_in_both_ways():
    """Few positions of wide layers by their products, many of narrow ones by the gradient itself."""
    for positions, width in ((2, 40), (40, 2)):
        torch.manual_seed(0)
        layer, head = nn.Linear(width, width), nn.Linear(width, CLASSES)
        net = nn.Sequential(layer, nn.Tanh(), nn.AdaptiveAvgPool2d((1, width)), nn.Flatten(), head)
        x = torch.randn(N, positions, width)
        gradients = SampleGradients(net, loss)
        assert torch.allclose(gradients.norms((x,), Y), one_by_one(net, x), rtol=1e-4)
        assert len(gradients._layers) == 2


@pytest.mark.parametrize(("size", "channels"), [(3, 12), (12, 3)])
def test_a_convolution_is_taken_in_both_ways(size, channels):
    torch.manual_seed(0)
    layers = [nn.Conv2d(channels, channels, 3, 2), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    net, x = nn.Sequential(*layers, nn.Linear(channels, CLASSES)), torch.randn(N, channels, size, size)
    gradients = SampleGradients(net, loss)
    assert torch.allclose(gradients.norms((x,), Y), one_by_one(net, x), rtol=1e-4)
    assert len(gradients._layers) == 2


def test_what_is_shared_by_all_samples_is_not_cut():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.scale = mlp(), nn.Parameter(torch.ones(6))

        def forward(self, x, shift, times=1, mask=None):
            return self.net(x * self.scale * times + shift)

    net, x, shift = Shifted(), torch.randn(N, 6), torch.randn(6)
    found = SampleGradients(net, loss).norms((x, shift), Y, {"times": 2, "mask": None})
    assert torch.allclose(found, one_by_one(lambda_net(net, shift), x), rtol=1e-4)


def lambda_net(net, shift):
    class Bound(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net

        def forward(self, x):
            return self.inner(x, shift, times=2)

    return Bound()
