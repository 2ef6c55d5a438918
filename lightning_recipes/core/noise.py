"""Gaussian noise on many tensors at once, the same on every rank and after every resume."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_recipes.core import random

_AT_ONCE = 2**22  # numbers drawn at once

Deviation = float | Tensor
"""A standard deviation; a scalar tensor where it is known on the device alone."""


@torch.no_grad()
def add_noise_(tensors: Sequence[Tensor], sigma: Deviation | Sequence[Deviation], *key: int | str) -> None:
    """Add N(0, sigma^2) to every element, in place.

    Drawn in fp32 at least, one after the other in the order given.

    Args:
        tensors: dense, of any devices and dtypes.
        sigma: standard deviation, or one a tensor.
        key: of the draws: the same key, order, shapes and kind of device give the same numbers.
    """
    each = isinstance(sigma, Sequence)
    deviations = dict(zip(map(id, tensors), sigma, strict=True)) if each else {}
    for number, group in enumerate(_alike(tensors)):
        generator = random.generator(*key, number, device=group[0].device)
        for some in _portions(group):
            noise = normal_like(some, generator)
            if each:
                own = [deviations[id(t)] for t in some]
                if any(isinstance(s, Tensor) for s in own):
                    own = [torch.as_tensor(s, dtype=t.dtype, device=t.device) for s, t in zip(own, some)]
                torch._foreach_mul_(noise, own)
                torch._foreach_add_(some, noise)
            else:
                torch._foreach_add_(some, noise, alpha=sigma)


def normal_like(tensors: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Standard normal numbers of the shapes, the device and the dtype of these tensors, in one draw."""
    first, sizes = tensors[0], [t.numel() for t in tensors]
    wide = torch.promote_types(first.dtype, torch.float32)
    drawn = torch.randn(sum(sizes), generator=generator, device=first.device, dtype=wide).to(first.dtype)
    return [part.view(t.shape) for part, t in zip(drawn.split(sizes), tensors)]


def _alike(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Groups of one device and dtype, in the order of their first members."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for t in tensors:
        groups.setdefault((t.device, t.dtype), []).append(t)
    return list(groups.values())


def _portions(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors in turn, as many together as :data:`_AT_ONCE` elements hold, or one that is larger."""
    some, size = [], 0
    for t in tensors:
        if some and size + t.numel() > _AT_ONCE:
            yield some
            some, size = [], 0
        some.append(t)
        size += t.numel()
    if some:
        yield some
