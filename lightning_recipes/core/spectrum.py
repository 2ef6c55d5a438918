"""The spectrum of features over samples: what linear regression on them can learn, how fast, and with which noise.

With features X ``[n, p]`` (one row a sample) of singular value decomposition X = V sqrt(L) U^T:

    X X^T = V L V^T  [n, n],     X^T X = U L U^T  [p, p],     v_i . y = u_i . (X^T y) / sqrt(l_i)

so either Gram matrix gives the same eigenvalues, the directions u_i in feature space and the targets along v_i, and the
smaller one is taken. Least squares, ridge and gradient descent are all functions of these: the weights along u_i are
f(l_i) (v_i . y) / sqrt(l_i), with f = 1, l / (l + g), 1 - exp(-l t).

Everything is in fp64: an eigenvalue is a square, and fp32 would lose all those below 1e-7 of the largest. Centring and
scaling happen to the Gram matrix, after the sums. Where there are more samples than features they need not be kept:
:class:`Sums` adds batches up, and over ranks in one message.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_recipes.core.distributed import all_sum
from lightning_recipes.core.errors import RecipeError

WIDEST = 8192
"""Side of the largest Gram matrix: 512 MB, and minutes for its eigenvalues."""
ROUNDING = 1e-11
"""Share of the largest eigenvalue below which one is what fp32 left of the features in rounding."""


@dataclass(frozen=True)
class Spectrum:
    """Features in the coordinates in which linear regression on them decouples; everything fp64, on one device.

    Attributes:
        eigenvalues: of X X^T, ``[m]`` with m = min(n, p), the largest first; not divided by n.
        directions: u_i as columns ``[p, m]``; 0 where an eigenvalue is 0.
        targets: v_i . y, ``[m, k]``; 0 where an eigenvalue is 0.
        rest: squares of the targets that are along none of the v_i, ``[k]``.
        samples, features: n and p.
        scale: that the features were divided by; 1 for features as they came.
        centred: whether features and targets had their means taken off: one mode less to fit.
    """

    eigenvalues: Tensor
    directions: Tensor
    targets: Tensor
    rest: Tensor
    samples: int
    features: int
    scale: float = 1.0
    centred: bool = False

    def rank(self, share: float = ROUNDING) -> int:
        """How many eigenvalues are above this share of the largest."""
        return int((self.eigenvalues > share * self.eigenvalues[:1]).sum())

    def scaled(self) -> Spectrum:
        """The spectrum of the features divided by sqrt(mean squared entry x p): entries of variance 1 / p.

        Raises:
            RecipeError: for features that do not vary.
        """
        scale = float((self.eigenvalues.sum() / self.samples).sqrt())  # squares of all entries are the trace
        if not scale > 0:
            raise RecipeError("the features do not vary, so there is nothing to learn from them")
        return replace(self, eigenvalues=self.eigenvalues / scale**2, scale=self.scale * scale)

    def outside(self, rows: Tensor, share: float = ROUNDING) -> Tensor:
        """What of some rows lies outside of the span of the samples: ``[r, p]`` of ``[r, p]``, in fp64."""
        rows, within = rows.to(self.directions), self.directions[:, : self.rank(share)]
        return rows - (rows @ within) @ within.T


def spectrum(x: Tensor, y: Tensor | None = None, centred: bool = True) -> Spectrum:
    """The spectrum of features that are at hand.

    Args:
        x: ``[n, p]``.
        y: targets ``[n, k]``; None for none.
        centred: whether to take the means off both.

    Raises:
        RecipeError: for values that are not finite, and where the smaller of n and p is above `WIDEST`.
    """
    n, p = x.shape
    y = x.new_zeros(n, 0) if y is None else y
    if n >= p:
        return Sums(p, y.shape[1], x.device).add(x, y).spectrum(centred)
    _check_side(n)
    x, y = x.double(), y.double()
    size = x.square().sum()
    if centred:
        x, y = x - x.mean(0), y - y.mean(0)
    _check_finite(x)
    values, vectors = _eigen(x @ x.T, size)
    root = _inverse_root(values)
    targets = torch.where(root[:, None] > 0, vectors.T @ y, 0.0)
    directions = (x.T @ vectors) * root
    rest = (y.square().sum(0) - targets.square().sum(0)).clamp_min(0)
    return Spectrum(values, directions, targets, rest, n, p, centred=centred)


def spectrum_of_kernel(kernel: Tensor, y: Tensor, centred: bool = True) -> Spectrum:
    """The spectrum of features that are known by their products alone: a kernel matrix K in place of X X^T.

    There is no feature space that directions could be in: `directions` is ``[0, n]``, and `features` is n.

    Args:
        kernel: ``[n, n]``, symmetric.
        y: targets ``[n, k]``.
        centred: whether to take the means off features and targets.

    Raises:
        RecipeError: for values that are not finite, and where n is above `WIDEST`.
    """
    n = len(kernel)
    _check_side(n)
    kernel, y = kernel.double(), y.double()
    size = kernel.trace()
    if centred:
        rows = kernel.mean(1)
        kernel, y = kernel - rows - rows[:, None] + rows.mean(), y - y.mean(0)
    _check_finite(kernel)
    values, vectors = _eigen(kernel, size)
    targets = torch.where(_inverse_root(values)[:, None] > 0, vectors.T @ y, 0.0)
    rest = (y.square().sum(0) - targets.square().sum(0)).clamp_min(0)
    return Spectrum(values, kernel.new_zeros(0, n), targets, rest, n, n, centred=centred)


class Sums:
    """What a spectrum needs of samples that need not be kept, in fp64: sums over them, batch by batch.

    Args:
        features: p.
        targets: k.
        device: one that has fp64.

    Attributes:
        xx, xy, x: sums of x x^T ``[p, p]``, x y^T ``[p, k]`` and x ``[p]``; ``yy``, ``y``: of y^2 and y ``[k]``.
        count: samples.

    Raises:
        RecipeError: for more features than `WIDEST`.
    """

    def __init__(self, features: int, targets: int = 0, device: torch.device | str = "cpu") -> None:
        _check_side(features)
        self.features, self.targets = features, targets
        shapes = {"xx": (features, features), "xy": (features, targets), "x": (features,), "yy": (targets,)}
        shapes |= {"y": (targets,), "count": ()}
        self._flat = torch.zeros(sum(torch.Size(s).numel() for s in shapes.values()), dtype=torch.float64)
        self._flat = self._flat.to(device)
        parts = self._flat.split([torch.Size(shape).numel() for shape in shapes.values()])
        self.xx, self.xy, self.x, self.yy, self.y, self.count = (
            part.view(shape) for part, shape in zip(parts, shapes.values())
        )

    def add(self, x: Tensor, y: Tensor | None = None) -> Sums:
        """Count in some samples: ``[b, p]``, and their targets ``[b, k]``."""
        x = x.detach().to(self._flat)
        self.xx.addmm_(x.T, x)
        self.x += x.sum(0)
        self.count += len(x)
        if y is not None:
            y = y.detach().to(self._flat)
            self.xy.addmm_(x.T, y)
            self.yy += y.square().sum(0)
            self.y += y.sum(0)
        return self

    def over_ranks(self) -> Sums:
        """The sums over the samples of all ranks, in one message; the same on each of them."""
        total = Sums(self.features, self.targets, self._flat.device)
        total._flat.copy_(all_sum(self._flat))
        return total

    def spectrum(self, centred: bool = True) -> Spectrum:
        """The spectrum of all samples so far.

        With fewer samples than features it has eigenvalues that are 0; use :func:`spectrum` there.

        Args:
            centred: whether to take the means off features and targets.

        Raises:
            RecipeError: for values that are not finite.
        """
        n = int(self.count)
        xx, xy, yy = self.xx, self.xy, self.yy
        if centred:
            mean = self.x / n
            xx, xy, yy = xx - n * mean.outer(mean), xy - mean.outer(self.y), yy - self.y.square() / n
        _check_finite(xx)
        values, vectors = _eigen(xx, self.xx.trace())
        values, vectors = values[: min(n, self.features)], vectors[:, : min(n, self.features)]
        root = _inverse_root(values)
        targets = (vectors.T @ xy) * root[:, None]
        directions = torch.where(root > 0, vectors, 0.0)
        rest = (yy - targets.square().sum(0)).clamp_min(0)
        return Spectrum(values, directions, targets, rest, n, self.features, centred=centred)


def effective_rank(x: Tensor) -> Tensor:
    """exp of the entropy of the shares that the principal components have of the variance; between 1 and p.

    Args:
        x: features ``[n, p]``.

    Returns:
        a scalar in fp64; 1 for features that do not vary.
    """
    x = x.double()
    x = x - x.mean(0)
    gram = x.mT @ x if x.shape[1] <= x.shape[0] else x @ x.mT
    variance = torch.linalg.eigvalsh(gram).clamp_min(0)
    share = variance / variance.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return torch.special.entr(share).sum().exp()


def _eigen(gram: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, the largest first, and their vectors as columns.

    Args:
        size: sum of the squares that the matrix is made of, before centring; what is below its rounding is 0.
    """
    values, columns = torch.linalg.eigh(gram)
    values = torch.where(values > 8 * torch.finfo(values.dtype).eps * size, values, 0.0)
    return values.flip(0), columns.flip(1)


def _inverse_root(values: Tensor) -> Tensor:
    """1 / sqrt(l), and 0 for those that are rounding."""
    there = values > ROUNDING * values[:1]
    return torch.where(there, values.clamp_min(torch.finfo(values.dtype).tiny).rsqrt(), 0.0)


def _check_side(side: int) -> None:
    if side > WIDEST:
        raise RecipeError(f"the spectrum of features needs a matrix of side {side}, and {WIDEST} is the most")


def _check_finite(values: Tensor) -> None:
    if not bool(values.isfinite().all()):
        raise RecipeError("the features are not all finite")
