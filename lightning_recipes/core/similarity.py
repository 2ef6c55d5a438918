"""How alike two representations of the same samples are: linear centred kernel alignment.

Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019
(https://arxiv.org/abs/1905.00414). With A [n, p], B [n, q], H = I - 11^T/n, K = A A^T, L = B B^T:

    HSIC(K, L) = sum of (HKH) * (HLH),   CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))

which is ||A^T B||_F^2 / (||A^T A||_F ||B^T B||_F) of centred A and B, in [0, 1], and 1 for B = s A R + c with
orthogonal R. The debiased form takes the unbiased HSIC of Song et al., JMLR 2012 (equation 5), in which a sample is not
compared with itself; it can be negative.

*Of a minibatch and not of the data.* The biased estimator is near 1 for ANY two wide maps of few samples, whose Gram
matrices are both near the identity. For unrelated Gaussian maps it comes to about

    sqrt(p / (p + n) * q / (q + n))

(:func:`cka_of_unrelated`): .98 for 16 samples and 1000 features each, .94 for 64 samples and 512 and 4096 features;
1 - CKA is flat there. The debiased one is about 0 for unrelated maps at any n from 4 on, and noisier. The mean of
either over minibatches is not the CKA of all data.

Everything is computed in fp32 whatever the maps come in, the products without TF32 and outside autocast, also in the
backward pass; centring stands before the products, so that a large mean costs no digits. A map is kept as it came for
the backward pass, which centres it anew: the memory is that of the Gram matrices.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CONSTANT = 1e-6  # relative variance below which a map counts as the same for every sample
_EPS = 1e-20  # under a root, beside sums that are 1/n^2 or more where CKA is defined


class Gram(NamedTuple):
    """What CKA needs of one map.

    Attributes:
        matrix: ``[n, n]`` fp32, of the centred map divided by its Frobenius norm; 0 where the map is constant.
        varies: boolean scalar, False where the map is (all but) the same for every sample and says nothing.
    """

    matrix: Tensor
    varies: Tensor


def gram(x: Tensor) -> Gram:
    """The centred and normalised Gram matrix of a map.

    Args:
        x: ``[n, ...]``, the sample first; all else is flattened.
    """
    return Gram(*_Gram.apply(x.flatten(1)))


def linear_cka(a: Tensor, b: Tensor, debiased: bool = False) -> Tensor:
    """CKA of two maps of the same samples; 0 where one of them is constant.

    Args:
        a, b: ``[n, ...]``, the sample first; all else is flattened.
        debiased: the estimator without the bias of few samples; needs n of 4 or more.
    """
    return cka(gram(a), gram(b), debiased)


def cka(a: Gram, b: Gram, debiased: bool = False) -> Tensor:
    """CKA of two maps by what :func:`gram` gives for each."""
    k, l = (u_centred(a.matrix), u_centred(b.matrix)) if debiased else (a.matrix, b.matrix)  # noqa: E741
    return (k * l).sum() / ((k * k).sum() * (l * l).sum() + _EPS).sqrt()


def u_centred(k: Tensor) -> Tensor:
    """A Gram matrix ``[n, n]`` without its diagonal and with rows and columns of sum 0 (n of 3 or more).

    n (n - 3) times the unbiased HSIC is the sum of the product of two such matrices (Szekely, Rizzo, 2014).
    """
    n = len(k)
    off = ~torch.eye(n, dtype=torch.bool, device=k.device)
    k = torch.where(off, k, 0.0)
    rows = k.sum(1)
    return torch.where(off, k - (rows[:, None] + rows) / (n - 2) + rows.sum() / ((n - 1) * (n - 2)), 0.0)


def cka_of_unrelated(samples: int, features: int, others: int) -> float:
    """About what the biased estimator makes of two maps that have nothing in common, with so many features each."""
    return (features / (features + samples) * others / (others + samples)) ** 0.5


class _Gram(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, norm, varies = _moments(x)
        with full_precision(x.device):
            unit = _unit(x, mean, norm)
            matrix = torch.where(varies, unit @ unit.T, 0.0)
        ctx.save_for_backward(x, mean, norm, varies)
        ctx.mark_non_differentiable(varies)
        return matrix, varies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: None) -> Tensor:
        x, mean, norm, varies = ctx.saved_tensors
        with full_precision(x.device):
            unit = _unit(x, mean, norm)
            of_unit = (grad + grad.T) @ unit
            of_x = of_unit - (of_unit * unit).sum() * unit  # the norm is that of the map itself
            of_x = (of_x - of_x.mean(0)) / norm
        return torch.where(varies, of_x, 0.0).to(x.dtype)


def _moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean of each feature, Frobenius norm of the centred map (1 where it is constant), and whether it varies."""
    with torch.autocast(x.device.type, enabled=False):
        x = _wide(x)
        mean = x.mean(0)
        norm = torch.linalg.vector_norm(x - mean)
        whole = norm.square() + len(x) * mean.square().sum()
        varies = norm.square() > CONSTANT * whole  # False for a map of zeros, and of what is not finite
        return mean, torch.where(varies, norm, 1.0), varies


def _unit(x: Tensor, mean: Tensor, norm: Tensor) -> Tensor:
    return (_wide(x) - mean) / norm


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Matrix products of fp32 tensors in fp32: no autocast, no TF32 on a GPU, no bf16 on a CPU."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        of_all = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set backend by backend, which this older switch does not take part in
        of_all = None
    try:
        if of_all is not None:  # else a product would be refused, for what the two say apart
            torch.set_float32_matmul_precision("highest")
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if of_all is not None:
            torch.set_float32_matmul_precision(of_all)
        for backend, precision in zip(backends, before):
            backend.fp32_precision = precision
