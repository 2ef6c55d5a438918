"""All samples of all ranks, with gradients: for losses that compare a sample with every other one.

The scaling rule. With R ranks, let every rank r compute L_r over ITS OWN anchors against everybody's features, so that
the loss of the global batch is their mean, L = (1/R) sum_r L_r. DDP averages the gradients of the ranks' parameters:

    dL/dtheta = (1/R) sum_s (sum_r dL_r/du_s) du_s/dtheta

so the gradient of rank s's own features must be the SUM over ranks of what they did with them, and nothing else. That
is what the backward of :func:`gather` does. Giving a rank only its own part of the gradient loses the pull that its
samples feel as somebody else's keys; scaling by R on top counts it twice. A mean over a subset of anchors (those that
have a positive) must be a mean over the subset of all ranks: :func:`mean_over_ranks`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_recipes.core.distributed import active, all_sum, rank_and_world


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        rank, world = rank_and_world()
        ctx.own = slice(rank * len(own), (rank + 1) * len(own))
        parts = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(world)]
        dist.all_gather(parts, own.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return all_sum(grad.contiguous())[ctx.own]


@torch.compiler.disable
def gather(own: Tensor) -> Tensor:
    """The tensors of all ranks along the first dimension, in the order of the ranks; in one process the tensor itself.

    A collective call: every rank must make it, with the same shape. Its backward is one too.

    Args:
        own: ``[n, ...]``, the same n on every rank.

    Returns:
        ``[ranks x n, ...]``.
    """
    return _Gather.apply(own) if active() else own


def first_of_own(n: int) -> int:
    """Where this rank's n rows begin in what :func:`gather` returns."""
    return rank_and_world()[0] * n


def mean_over_ranks(values: Tensor, counts: Tensor) -> Tensor:
    """This rank's share L_r of the mean of the values that count, over all ranks: the mean of L_r over ranks is it.

    0, with a gradient of 0, where nothing counts.

    Args:
        values: ``[n]``.
        counts: ``[n]`` boolean.
    """
    number = all_sum(counts.sum())
    total = torch.where(counts, values, torch.zeros_like(values)).sum()
    return total * rank_and_world()[1] / number.clamp_min(1)
