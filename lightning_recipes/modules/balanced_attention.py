"""Attention on feature maps that mixes a spatial and a spectral branch by one learnable scalar.

Vir, "Balanced Multi-Task Attention for Satellite Image Classification", 2025 (https://arxiv.org/abs/2510.15527; code
https://github.com/virAditya/satellite-image-classification-eurosat, commit a01ffe4). With x of [B, C, H, W]:

    coordinate attention (Hou et al., CVPR 2021), r = 8:
        p = [mean_W x ; mean_H x]                              [B, C, H+W, 1], the second one transposed
        q = relu(BN(conv_{C -> C/r}(p))),   split into q_h of length H and q_w of length W
        CA(x) = x a_h a_w,   a_h = sigmoid(conv_{C/r -> C}(q_h)), a_w likewise
    squeeze and excitation (Hu et al., CVPR 2018), r = 16:
        SE(x) = x s,   s = sigmoid(W2 relu(W1 mean_HW x))
    balanced: alpha CA(x) + (1 - alpha) SE(x),   alpha = sigmoid(theta)

No layer but the batch norm has a bias. theta starts at 0.5, so alpha at 0.6225 and not at a half. Both branches are x
times a gate, so the whole is x G with G = alpha a_h a_w + (1 - alpha) s. Means and sigmoids are computed in at least
fp32, also under autocast. About C^2 / 2 weights at the paper's reductions, and one pass over x.

The profiles do not know where they stand: coordinate attention weighs rows and columns by what is in them.
"""

from __future__ import annotations

from typing import Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn import Parameter

Kind = Literal["balanced", "coord", "se"]
KINDS: tuple[Kind, ...] = ("balanced", "coord", "se")


def fused(a_h: Tensor, a_w: Tensor, s: Tensor, theta: Tensor) -> Tensor:
    """G = alpha a_h a_w + (1 - alpha) s with alpha = sigmoid(theta).

    Args:
        a_h: ``[B, C, H, 1]``.
        a_w: ``[B, C, 1, W]``.
        s: ``[B, C, 1, 1]``.
        theta: scalar.

    Returns:
        ``[B, C, H, W]`` in the dtype of the gates.
    """
    alpha = theta.sigmoid().to(a_h.dtype)
    return alpha * a_h * a_w + (1 - alpha) * s


def _bottleneck(owner: str, argument: str, channels: int, reduction: int) -> int:
    if channels < 1 or reduction < 1:
        raise ValueError(f"{owner}: channels={channels}, {argument}={reduction}: both must be at least 1")
    if channels < reduction:
        rank_zero_warn(f"{owner}: {channels} channels are fewer than {argument}={reduction}; the bottleneck has one")
    return max(channels // reduction, 1)


def _mean(x: Tensor, dims: int | tuple[int, ...], weight: Tensor) -> Tensor:
    """The mean over some dimensions, kept, taken in at least fp32 and given in the weight's dtype."""
    return x.mean(dims, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32)).to(weight.dtype)


def _sigmoid(z: Tensor, like: Tensor) -> Tensor:
    return z.to(torch.promote_types(z.dtype, torch.float32)).sigmoid().to(like.dtype)


def initialise_(module: nn.Module) -> None:
    """First weights as in the code: convolutions Kaiming-normal (fan out), linear layers from N(0, 0.01), no bias."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, 0, 0.01)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


class CoordinateAttention(nn.Module):
    """x times a gate for every row and one for every column of every channel.

    Args:
        channels: C.
        reduction: r of the bottleneck of C/r channels, which has at least one.

    Raises:
        ValueError: for sizes below 1.
    """

    def __init__(self, channels: int, reduction: int = 8) -> None:
        super().__init__()
        width = _bottleneck(type(self).__name__, "reduction", channels, reduction)
        self.conv = nn.Conv2d(channels, width, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.conv_h = nn.Conv2d(width, channels, 1, bias=False)
        self.conv_w = nn.Conv2d(width, channels, 1, bias=False)

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, C, H, W]`` to a_h ``[B, C, H, 1]`` and a_w ``[B, C, 1, W]``."""
        with torch.autocast(x.device.type, enabled=False):
            weight = self.conv.weight
            rows, columns = _mean(x, 3, weight), _mean(x, 2, weight).transpose(2, 3)
            q = self.norm(self.conv(torch.cat([rows, columns], 2))).relu()
            q_h, q_w = q.split([x.shape[2], x.shape[3]], 2)
            return _sigmoid(self.conv_h(q_h), x), _sigmoid(self.conv_w(q_w.transpose(2, 3)), x)

    def gate(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]``, between 0 and 1."""
        a_h, a_w = self.gates(x)
        return a_h * a_w

    def forward(self, x: Tensor) -> Tensor:
        a_h, a_w = self.gates(x)
        return x * a_h * a_w


class SqueezeExcitation(nn.Module):
    """x times a gate for every channel.

    Args:
        channels: C.
        reduction: r of the bottleneck of C/r channels, which has at least one.

    Raises:
        ValueError: for sizes below 1.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        width = _bottleneck(type(self).__name__, "reduction", channels, reduction)
        self.squeeze = nn.Linear(channels, width, bias=False)
        self.excite = nn.Linear(width, channels, bias=False)

    def gate(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C, 1, 1]``, between 0 and 1."""
        with torch.autocast(x.device.type, enabled=False):
            pooled = _mean(x, (2, 3), self.squeeze.weight)[:, :, 0, 0]
            return _sigmoid(self.excite(self.squeeze(pooled).relu()), x)[:, :, None, None]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class BalancedAttention(nn.Module):
    """alpha CA(x) + (1 - alpha) SE(x) with one learnable alpha; keeps the shape.

    Args:
        channels: C.
        ca_reduction: of coordinate attention.
        se_reduction: of squeeze and excitation.
        theta_init: alpha starts at its sigmoid; 0 for a half.

    Raises:
        ValueError: for sizes below 1.
    """

    def __init__(self, channels: int, ca_reduction: int = 8, se_reduction: int = 16, theta_init: float = 0.5) -> None:
        super().__init__()
        self.coord = CoordinateAttention(channels, ca_reduction)
        self.se = SqueezeExcitation(channels, se_reduction)
        self.theta = Parameter(torch.tensor(float(theta_init)))

    @property
    def alpha(self) -> Tensor:
        """The share of coordinate attention, a scalar without gradient."""
        return self.theta.detach().sigmoid()

    def gate(self, x: Tensor) -> Tensor:
        """G, ``[B, C, H, W]``, between 0 and 1."""
        return fused(*self.coord.gates(x), self.se.gate(x), self.theta)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class InsertedAttention(nn.Module):
    """Attention for a place in a network that had none: x (1 + g (G - 1)).

    With a g that is learnt and starts at 0 it is x itself at first, bitwise; without g it is the attention alone.

    Args:
        channels: C.
        kind: 'balanced', or one of its branches alone: 'coord', 'se'.
        identity_init: whether there is a g.
        ca_reduction, se_reduction, theta_init: as of :class:`BalancedAttention`.

    Raises:
        ValueError: for sizes below 1.
    """

    def __init__(
        self,
        channels: int,
        kind: Kind = "balanced",
        identity_init: bool = True,
        ca_reduction: int = 8,
        se_reduction: int = 16,
        theta_init: float = 0.5,
    ) -> None:
        super().__init__()
        self.channels = channels
        if kind == "balanced":
            self.attention: nn.Module = BalancedAttention(channels, ca_reduction, se_reduction, theta_init)
        elif kind == "coord":
            self.attention = CoordinateAttention(channels, ca_reduction)
        else:
            self.attention = SqueezeExcitation(channels, se_reduction)
        self.g = Parameter(torch.zeros(())) if identity_init else None
        initialise_(self)

    def forward(self, x: Tensor) -> Tensor:
        if self.g is None:
            return self.attention(x)
        return x * (1 + self.g.to(x.dtype) * (self.attention.gate(x) - 1))
