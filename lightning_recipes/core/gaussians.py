"""One Gaussian a class over features, small enough to keep for a thousand classes.

Statistics are taken in fp64 and stored in fp32. What a class needs, D wide:

    kind        stored                                             bytes a class     D = 768    1,000 classes
    'full'      mean and the Cholesky factor's lower half          2 D (D + 3)       1.18 MB    1.18 GB
    'low_rank'  mean, r directions, the standard deviations left   4 D (r + 2)       104 kB     104 MB  (r = 32)
    'diag'      mean and standard deviations                       8 D               6.1 kB     6.1 MB

A low-rank covariance is F F^T + diag(s^2) with the r largest eigenvectors in F and what they leave of every variance in
s, so that all variances are those of the data; at r >= n - 1, n being the samples of the class, it is the full one.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_recipes.core.errors import RecipeError

Kind = Literal["full", "low_rank", "diag"]


@dataclass(frozen=True)
class Gaussian:
    """The features of one class.

    Attributes:
        mean: ``[D]``.
        scale: 'full': the Cholesky factor's lower half by rows, ``[D (D + 1) / 2]``; else standard deviations ``[D]``.
        factor: F of 'low_rank', ``[D, r]``.
    """

    mean: Tensor
    scale: Tensor
    factor: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """What it takes, in memory and in a checkpoint."""
        return sum(t.nbytes for t in (self.mean, self.scale, self.factor) if t is not None)

    def covariance(self) -> Tensor:
        """Sigma, ``[D, D]`` in fp64."""
        if len(self.scale) != len(self.mean):
            lower = unpack(self.scale.double(), len(self.mean))
            return lower @ lower.mT
        rest = self.scale.double().square().diag()
        return rest if self.factor is None else rest + self.factor.double() @ self.factor.double().mT

    def draw(self, count: int, generator: torch.Generator, shrink: float = 1.0) -> Tensor:
        """Samples of N(shrink x mean, Sigma), ``[count, D]`` in fp32.

        Args:
            count: of samples.
            generator: a CPU generator, so that every device gives the same numbers.
            shrink: factor on the mean.
        """
        width, device = len(self.mean), self.mean.device
        z = torch.randn(count, width, generator=generator).to(device)
        if len(self.scale) != width:
            z = z @ unpack(self.scale, width).mT
        else:
            z = z * self.scale
            if self.factor is not None:
                more = torch.randn(count, self.factor.shape[1], generator=generator).to(device)
                z = z + more @ self.factor.mT
        return z.add_(self.mean, alpha=shrink)

    def to(self, device: torch.device | str) -> Gaussian:
        """The same on another device."""
        return Gaussian(*(t if t is None else t.to(device) for t in (self.mean, self.scale, self.factor)))

    def state(self) -> dict[str, Tensor]:
        """Tensors for a checkpoint; ``Gaussian(**state)`` gives it back."""
        parts = {"mean": self.mean, "scale": self.scale, "factor": self.factor}
        return {name: value.cpu() for name, value in parts.items() if value is not None}


def fit(features: Tensor, kind: Kind = "full", eps: float = 1e-4, rank: int = 32) -> Gaussian:
    """Mean and covariance (unbiased, plus eps I) of the features of one class.

    Args:
        features: ``[n, D]`` of any precision; n may be less than D.
        kind: which part of the covariance to keep.
        eps: added to the diagonal.
        rank: r of 'low_rank'.

    Raises:
        RecipeError: for fewer than two samples, and where the covariance is not positive definite.
    """
    count, width = features.shape
    if count < 2:
        raise RecipeError(f"a covariance needs at least 2 samples; got {count}")
    x = features.double()
    mean = x.mean(0)
    x = x - mean
    if kind == "full":
        lower, failed = torch.linalg.cholesky_ex(
            x.mT @ x / (count - 1) + eps * torch.eye(width, device=x.device).double()
        )
        if failed.any():
            raise RecipeError(f"its covariance has no Cholesky factor with cov_eps={eps:g}; take a larger cov_eps")
        return Gaussian(mean.float(), pack(lower).float())
    variance = x.square().sum(0) / (count - 1)
    if kind == "diag":
        return Gaussian(mean.float(), (variance + eps).sqrt().float())
    factor = _largest(x, min(rank, width)) / (count - 1) ** 0.5
    rest = (variance - factor.square().sum(1)).clamp_min(0)
    return Gaussian(mean.float(), (rest + eps).sqrt().float(), factor.float())


def _largest(x: Tensor, rank: int) -> Tensor:
    """The `rank` largest right singular vectors of ``[n, D]``, each times its singular value: ``[D, rank]``."""
    if len(x) <= x.shape[1]:
        _, values, vectors = torch.linalg.svd(x, full_matrices=False)
        values, vectors = values[:rank], vectors[:rank].mT
    else:
        squares, vectors = torch.linalg.eigh(x.mT @ x)
        values, vectors = squares.clamp_min(0).sqrt().flip(0)[:rank], vectors.flip(1)[:, :rank]
    return vectors * values


def pack(lower: Tensor) -> Tensor:
    """The lower half of ``[D, D]`` by rows, ``[D (D + 1) / 2]``."""
    return lower.reshape(-1)[_lower_half(len(lower)).to(lower.device)]


def unpack(half: Tensor, width: int) -> Tensor:
    """What :func:`pack` was given, zeros above the diagonal."""
    whole = half.new_zeros(width * width)
    whole[_lower_half(width).to(half.device)] = half
    return whole.view(width, width)


@functools.lru_cache(maxsize=2)
def _lower_half(width: int) -> Tensor:
    """Places of the lower half in the flat matrix."""
    rows, columns = torch.tril_indices(width, width)
    return rows * width + columns


def from_state(state: Mapping[str, Any]) -> Gaussian:
    """What :meth:`Gaussian.state` gave."""
    return Gaussian(state["mean"], state["scale"], state.get("factor"))
