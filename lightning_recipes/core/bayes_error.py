"""How much of a labelled set no classifier can get right: the Bayes error, estimated by local averaging of labels.

With features z_1..z_N, labels y and a similarity s_ij (s_ii = 0: a sample is no neighbour of its own)

    s_ij = exp(-||z_i - z_j||^2 / (2 sigma^2))   or   sigmoid(z_i . z_j)
    Z_i = sum_j s_ij + 1e-8,   p_ic = (1 / Z_i) sum over j with y_j = c of s_ij,   e_i = 1 - max_c p_ic

and the estimate is the mean of e_i. The maximum is over the classes and not the p of the sample's own label: a sample
that stands in the middle of another class is wrong but predictable, and adds no Bayes error. A sample whose neighbours
are all far beyond sigma has e_i near 1, since 1e-8 outweighs them.

The gradient is in closed form, so that nothing of size N x N is kept. With c_i the class of the maximum, N_i its sum of
similarities, q_ij = (1[y_j = c_i] Z_i - N_i) / Z_i^2 (minus the derivative of e_i by s_ij), g_i the incoming gradient:

    W_ij = g_i q_ij s_ij / sigma^2:         dL/dz = (W 1 + W^T 1) * z - (W + W^T) z
    W_ij = -g_i q_ij s_ij (1 - s_ij):       dL/dz = (W + W^T) z          for the sigmoid

which is matrix products only, in blocks of rows: time O(N^2 d), memory of a block times N. Features are centred before
the products, as distances by products lose small ones to cancellation, and the products are in full fp32 (fp64 for
features in fp64), without TF32 and outside autocast.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.similarity import full_precision

Kernel = Literal["rbf", "sigmoid"]
EPS = 1e-8
"""Beside the sum of a sample's similarities."""


def max_abs_scaled(features: Tensor) -> Tensor:
    """Features over the largest absolute value in them, so that a width of the kernel means the same for any network.

    The gradient flows through the maximum. Features of zeros stay so.

    Args:
        features: ``[n, d]``.
    """
    return features / features.abs().amax().clamp_min(torch.finfo(features.dtype).tiny)


def check_tell_apart(features: Tensor) -> None:
    """Refuse features that say nothing about the samples.

    Args:
        features: ``[n, d]``.

    Raises:
        RecipeError: when they are not finite, or equal for all samples.
    """
    if not bool(features.isfinite().all()):
        raise RecipeError("the features are not finite: the network that gave them has diverged")
    if bool((features == features[:1]).all()):
        raise RecipeError("the features are the same for all samples, so they say nothing about the labels")


def bayes_error(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    sigma: float = 0.3,
    kernel: Kernel = "rbf",
    chunk_size: int = 512,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """The estimated Bayes error of a labelled set, differentiable in the features.

    Args:
        features: ``[n, d]``; of width sigma, so scale them (:func:`max_abs_scaled`).
        labels: ``[n]`` integers from 0 to num_classes - 1.
        num_classes: classes.
        sigma: width of the 'rbf' kernel.
        kernel: 'rbf', or 'sigmoid' of the inner product.
        chunk_size: rows of the kernel in memory at a time.
        reduction: 'mean', or 'none' for the error of each sample.

    Returns:
        a scalar in [0, 1], or ``[n]``; in fp32, or in fp64 for such features.

    Raises:
        RecipeError: for fewer than 2 samples, other shapes, and labels that are no such integers.
    """
    if not (features.dim() == 2 and features.is_floating_point() and len(features) >= 2):
        raise RecipeError(
            f"features must be floating [n, d] of at least 2 samples; got {features.dtype} {tuple(features.shape)}"
        )
    if labels.shape != features.shape[:1] or labels.is_floating_point() or labels.dtype == torch.bool:
        raise RecipeError(
            f"labels must be integers [n], one a sample; got {labels.dtype} {tuple(labels.shape)} for"
            f" {len(features)} samples"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise RecipeError(f"labels must be in [0, num_classes={num_classes}); they are from {low} to {high}")
    for name, value, ok in (("sigma", sigma, sigma > 0), ("chunk_size", chunk_size, chunk_size >= 1)):
        if not ok:
            raise RecipeError(f"{name} must be positive; got {value!r}")
    if kernel not in ("rbf", "sigmoid"):
        raise RecipeError(f"kernel must be 'rbf' or 'sigmoid'; got {kernel!r}")
    errors = _Errors.apply(features, labels.long(), num_classes, sigma, kernel, chunk_size)
    return errors.mean() if reduction == "mean" else errors


class _Errors(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: Tensor, labels: Tensor, num_classes: int, sigma: float, kernel: Kernel, chunk_size: int
    ) -> Tensor:
        z = _prepared(features, kernel)
        classes = F.one_hot(labels, num_classes).to(z)
        totals, largest, chosen = z.new_empty(len(z)), z.new_empty(len(z)), torch.empty_like(labels)
        with full_precision(z.device):
            for rows, similar in _blocks(z, sigma, kernel, chunk_size):
                by_class = similar @ classes
                totals[rows] = by_class.sum(1) + EPS
                largest[rows], chosen[rows] = by_class.max(1)
        ctx.save_for_backward(features, labels, totals, largest, chosen)
        ctx.settings = sigma, kernel, chunk_size
        return 1 - largest / totals

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        features, labels, totals, largest, chosen = ctx.saved_tensors
        sigma, kernel, chunk_size = ctx.settings
        z = _prepared(features, kernel)
        found = torch.zeros_like(z)
        with full_precision(z.device):
            for rows, similar in _blocks(z, sigma, kernel, chunk_size):
                total = totals[rows, None]
                weights = torch.where(labels == chosen[rows, None], total - largest[rows, None], -largest[rows, None])
                weights *= grad[rows, None] / total.square() * similar
                if kernel == "rbf":
                    weights /= sigma**2
                    found[rows] += weights.sum(1, keepdim=True) * z[rows] - weights @ z
                    found += weights.sum(0)[:, None] * z - weights.T @ z[rows]
                else:
                    weights *= similar - 1
                    found[rows] += weights @ z
                    found += weights.T @ z[rows]
        return found.to(features.dtype), None, None, None, None, None


def _prepared(features: Tensor, kernel: Kernel) -> Tensor:
    """In fp32 or more; for distances about their mean, which they do not depend on."""
    z = features.detach().to(torch.promote_types(features.dtype, torch.float32))
    return z - z.mean(0) if kernel == "rbf" else z


def _blocks(z: Tensor, sigma: float, kernel: Kernel, chunk_size: int) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows of the similarities ``[block, n]``, without a sample's own."""
    squares = z.square().sum(1)
    for begin in range(0, len(z), chunk_size):
        rows = slice(begin, min(begin + chunk_size, len(z)))
        products = z[rows] @ z.T
        if kernel == "rbf":
            distances = products.mul_(-2).add_(squares).add_(squares[rows, None]).clamp_min_(0)
            similar = distances.mul_(-1 / (2 * sigma**2)).exp_()
        else:
            similar = products.sigmoid_()
        similar.diagonal(begin).zero_()
        yield rows, similar
