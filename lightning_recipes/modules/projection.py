"""Projection heads: what stands between the representation z that is kept and the loss that shapes it.

Xue et al., "Investigating the Benefits of Projection Head for Representation Learning", ICLR 2024
(https://arxiv.org/abs/2403.11391; code https://github.com/jiayini1119/projection-head-experiments, commit a145e06).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_recipes.core.recipe import Paper

PAPER = Paper(
    "Investigating the Benefits of Projection Head for Representation Learning",
    "Y. Xue, E. Gan, J. Ni, S. Joshi, B. Mirzasoleiman",
    2024,
    "https://arxiv.org/abs/2403.11391",
    "https://github.com/jiayini1119/projection-head-experiments",
)
CHILD = "projection"  # a head's name inside the linear classifier that it stands before
SMALLEST = torch.finfo(torch.float32).tiny  # the smallest normal number


def reweighting(p: int, kappa: float) -> Tensor:
    """kappa^(-i) for i = 0..p-1, fp32 ``[p]``, rounded once from fp64.

    Raises:
        ValueError: where a kappa below 1 grows beyond fp32.
    """
    weights = torch.tensor(float(kappa), dtype=torch.float64) ** -torch.arange(p, dtype=torch.float64)
    if weights[-1] > torch.finfo(torch.float32).max:
        raise ValueError(f"kappa={kappa!r}: kappa^-{p - 1} is {float(weights[-1]):.3g}, beyond fp32; take a larger one")
    return weights.float()


def dead_coordinates(p: int, kappa: float) -> int:
    """How many of p coordinates have a weight below the smallest normal fp32 number."""
    return int((reweighting(p, kappa) < SMALLEST).sum())


class FixedReweighting(nn.Module):
    """u_i = z_i kappa^(-i) for i = 0..p-1, without parameters.

    It forces an order: early coordinates are cheap to use for the loss and late ones must grow to count, so z keeps
    features that the loss would otherwise let shrink. The weights are a buffer in fp32 whatever precision the module
    is in, and the product is computed in it. Standardised features are the same before and after.

    Args:
        p: width of z.
        kappa: decay per coordinate, above 1; 1 does nothing.

    Raises:
        ValueError: for a bad argument.
    """

    weights: Tensor

    def __init__(self, p: int, kappa: float = 1.05) -> None:
        super().__init__()
        if p < 1:
            raise ValueError(f"p={p!r}: must be at least 1")
        if not kappa > 0:
            raise ValueError(f"kappa={kappa!r}: must be positive")
        self.p, self.kappa = p, kappa
        self.register_buffer("weights", reweighting(p, kappa))
        dead = dead_coordinates(p, kappa)
        if dead:
            rank_zero_warn(
                f"FixedReweighting: with kappa={kappa!r} {dead} of {p} coordinates are dead: kappa^-{p - 1} is below"
                f" the smallest normal fp32 number {SMALLEST:.3g}; take a kappa of at most"
                f" {SMALLEST ** (-1 / (p - 1)):.4g}"
            )

    def forward(self, z: Tensor) -> Tensor:
        """z ``[..., p]`` to u in fp32 (fp64 for a z in fp64)."""
        return z * self.weights

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FixedReweighting:
        super()._apply(fn, recurse)  # to another device; half precision has no room for the late weights
        if self.weights.dtype != torch.float32:
            self.weights = reweighting(self.p, self.kappa).to(self.weights.device)
        return self

    def extra_repr(self) -> str:
        return f"p={self.p}, kappa={self.kappa}"


class SymmetricReLU(nn.Module):
    """s_b(a) = relu(a - b) - relu(-a - b) with one learnable threshold b; the identity at b = 0."""

    def __init__(self) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.zeros(()))

    def forward(self, a: Tensor) -> Tensor:
        return F.relu(a - self.threshold) - F.relu(-a - self.threshold)


class MLPHead(nn.Sequential):
    """Linear(p, hidden), ReLU, then Linear(hidden, out); with `layers` hidden layers.

    Args:
        p: width of z.
        hidden: of the hidden layers; None for p.
        out: width of u; None for p.
        layers: hidden layers.
    """

    def __init__(self, p: int, hidden: int | None = None, out: int | None = None, layers: int = 1) -> None:
        hidden, out = p if hidden is None else hidden, p if out is None else out
        for name, value in (("p", p), ("hidden", hidden), ("out", out), ("layers", layers)):
            if value < 1:
                raise ValueError(f"{name}={value!r}: must be at least 1")
        widths = [p] + [hidden] * layers
        parts: list[nn.Module] = []
        for before, after in pairwise(widths):
            parts += [nn.Linear(before, after), nn.ReLU()]
        super().__init__(*parts, nn.Linear(hidden, out))


class IdentityHead(nn.Sequential):
    """Linear(p, p), symmetric ReLU, Linear(p, p), which starts as the exact identity.

    Args:
        p: width of z and of u.
        threshold: with the symmetric ReLU between the layers; without it the head stays linear.
    """

    def __init__(self, p: int, threshold: bool = True) -> None:
        first, second = nn.Linear(p, p), nn.Linear(p, p)
        for layer in (first, second):
            nn.init.eye_(layer.weight)
            nn.init.zeros_(layer.bias)
        super().__init__(first, SymmetricReLU() if threshold else nn.Identity(), second)


def path_of_head(module: nn.Module) -> str | None:
    """Path of the head inside a linear classifier of the module, None without one."""
    heads = MLPHead, IdentityHead, FixedReweighting
    inside = ((path, part) for path, part in module.named_modules() if isinstance(part, nn.Linear))
    return next((f"{path}.{CHILD}" for path, part in inside if isinstance(getattr(part, CHILD, None), heads)), None)
