"""A density made of bars: a regression that predicts a whole distribution with a softmax over buckets of the target.

From Mueller et al., "Transformers Can Do Bayesian Inference", ICLR 2022 (https://arxiv.org/abs/2112.10510), who call it
the Riemann distribution. With borders b_0 < ... < b_K, widths w_j = b_{j+1} - b_j and p = softmax(logits):

    density(y) = p_j / w_j    for y in bucket j, and 0 beyond b_0 and b_K
    full support: bucket 0 is b_1 - |d| and bucket K-1 is b_{K-1} + |d|, d ~ N(0, s^2), s = w / 0.67449: half of what
                  such a bucket has lies within its width, and no target is impossible

Everything else (cdf, quantiles, moments, expected improvement) is that density's own, without approximation. The code
of 2021 takes a wrong bucket for quantiles within the first one, and counts a bucket as improving as a whole or not at
all; here both are exact, as in the maintained successor (https://github.com/automl/PFNs). Quantiles in the outer
buckets are those of the half-normals too, where the successor goes on in a straight line.

Borders at quantiles of the targets (:func:`quantile_borders`) give every bucket the same share of them, so that uniform
probabilities are their distribution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_recipes.core.errors import RecipeError

QUARTILE = 0.6744897501960817  # half of |N(0, 1)| lies below it
_MEAN = math.sqrt(2 / math.pi)  # of |N(0, 1)|
_SQRT2 = math.sqrt(2)


def quantile_borders(values: Tensor, num_buckets: int) -> Tensor:
    """Borders between which lie equally many of some values.

    Values that are too many to share out evenly are left out, the last ones. An inner border lies half-way between the
    last value of one bucket and the first of the next, the outer ones at the least and the largest value.

    Args:
        values: a sample of the targets, any shape.
        num_buckets: K.

    Returns:
        ``[K + 1]``, ascending; equal neighbours where values repeat.

    Raises:
        RecipeError: for fewer values than buckets, or fewer than two buckets.
    """
    values, each = values.flatten(), values.numel() // max(num_buckets, 1)
    if num_buckets < 2 or each < 1:
        raise RecipeError(f"num_buckets must be at least 2 and at most the {values.numel()} values; got {num_buckets}")
    ordered = values[: each * num_buckets].sort().values
    inner = (ordered[each - 1 : -1 : each] + ordered[each::each]) / 2
    return torch.cat([ordered[:1], inner, ordered[-1:]])


def check_borders(borders: Tensor) -> None:
    """Refuse borders that make no buckets.

    Raises:
        RecipeError: says which are wrong and how.
    """
    if borders.dim() != 1 or len(borders) < 3:
        raise RecipeError(f"borders must be at least 3 numbers, for 2 buckets; got shape {tuple(borders.shape)}")
    if not torch.isfinite(borders).all():
        raise RecipeError(f"borders must be finite; got {int((~torch.isfinite(borders)).sum())} that are not")
    widths = borders.diff()
    if (widths < 0).any():
        place = int((widths < 0).nonzero()[0])
        raise RecipeError(
            f"borders must ascend; got {borders[place]:g} before {borders[place + 1]:g} at index {place + 1}"
        )
    if (widths == 0).any():
        place = int((widths == 0).nonzero()[0])
        raise RecipeError(
            f"borders must differ, or a bucket has no width; got {borders[place]:g} twice from index {place} on: are"
            " the targets constant or repeated? Take fewer buckets"
        )


class BarDistribution(nn.Module):
    """The distribution and its loss; a head for any regressor whose last layer has an output for every bucket.

    Logits ``[..., K]`` may be of any dtype; everything is computed in the borders' (float32 or float64).

    Args:
        borders: b, K + 1 ascending numbers, as of :func:`quantile_borders`.
        full_support: give the outer buckets tails; without them a target beyond the borders is refused, which waits
            for the device at every loss.

    Raises:
        RecipeError: for fewer than two buckets, borders that do not ascend, or NaN.
    """

    def __init__(self, borders: Tensor | Sequence[float], full_support: bool = True) -> None:
        super().__init__()
        borders = torch.as_tensor(borders)
        borders = borders if borders.is_floating_point() else borders.float()
        check_borders(borders)
        self.full_support = full_support
        self.register_buffer("borders", borders.detach().clone())

    def extra_repr(self) -> str:
        return f"{self.num_buckets} buckets, full_support={self.full_support}"

    @property
    def num_buckets(self) -> int:
        """K."""
        return len(self.borders) - 1

    num_outputs = num_buckets

    @property
    def widths(self) -> Tensor:
        """w ``[K]``."""
        return self.borders.diff()

    def set_borders(self, borders: Tensor) -> None:
        """Take other borders, as many as before.

        Raises:
            RecipeError: as the constructor.
        """
        check_borders(borders)
        if borders.shape != self.borders.shape:
            raise RecipeError(f"borders must be {len(self.borders)} numbers, as they were; got {len(borders)}")
        self.borders.copy_(borders)

    # -- likelihood --------------------------------------------------------------------------------------------------

    def forward(self, logits: Tensor, y: Tensor) -> Tensor:
        """Negative log likelihood of each target: logits ``[..., K]``, y ``[...]`` to ``[...]``.

        Raises:
            RecipeError: without full support, for targets beyond the borders.
        """
        logits, y = logits.to(self.borders.dtype), y.to(self.borders.dtype)
        if not self.full_support:
            self._check_inside(y)
        bucket = self.bucket(y)
        log_p = logits.log_softmax(-1).gather(-1, bucket[..., None])[..., 0]
        log_density = -self.widths.log()[bucket]
        if self.full_support:
            for inside, distance, scale in self._tails(y):
                log_density = torch.where(inside, _log_half_normal(distance, scale), log_density)
        return -(log_p + log_density)

    def bucket(self, y: Tensor) -> Tensor:
        """Index of the bucket of each target, int64; targets beyond the borders belong to the outer ones."""
        return (torch.searchsorted(self.borders, y.to(self.borders.dtype).contiguous()) - 1).clamp(
            0, self.num_buckets - 1
        )

    def outside(self, y: Tensor) -> Tensor:
        """Whether each target lies beyond the borders."""
        return (y < self.borders[0]) | (y > self.borders[-1])

    def _check_inside(self, y: Tensor) -> None:
        if self.outside(y).any():
            raise RecipeError(
                f"targets from {y.min():g} to {y.max():g} reach beyond the borders {self.borders[0]:g} and"
                f" {self.borders[-1]:g}, where a bar distribution without full support has no density; use"
                " full_support=True, or standardise the targets"
            )

    def _tails(self, y: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """For either tail: whether y is in it, the distance from where it begins, its scale."""
        b, scale = self.borders, self._scales()
        left, right = b[1] - y, y - b[-2]
        bucket = self.bucket(y)
        return [
            (bucket == 0, left.clamp_min(0), scale[0]),
            (bucket == self.num_buckets - 1, right.clamp_min(0), scale[1]),
        ]

    def _scales(self) -> Tensor:
        """s of the left tail and of the right one."""
        return self.widths[[0, -1]] / QUARTILE

    # -- distribution function ---------------------------------------------------------------------------------------

    def probabilities(self, logits: Tensor) -> Tensor:
        """p ``[..., K]``."""
        return logits.to(self.borders.dtype).softmax(-1)

    def cdf(self, logits: Tensor, y: Tensor) -> Tensor:
        """P(Y <= y): logits ``[..., K]``, y ``[...]`` to ``[...]``."""
        p = self.probabilities(logits)
        y = y.to(p.dtype).expand(torch.broadcast_shapes(y.shape, p.shape[:-1]))
        p = p.expand(*y.shape, -1)
        bucket = self.bucket(y)
        own = p.gather(-1, bucket[..., None])[..., 0]
        before = (p.cumsum(-1) - p).gather(-1, bucket[..., None])[..., 0]
        share = ((y - self.borders[bucket]) / self.widths[bucket]).clamp(0, 1)
        if self.full_support:
            (in_left, left, s_left), (in_right, right, s_right) = self._tails(y)
            share = torch.where(in_left, torch.special.erfc(left / (s_left * _SQRT2)), share)
            share = torch.where(in_right, torch.special.erf(right / (s_right * _SQRT2)), share)
        return (before + own * share).clamp(0, 1)

    def icdf(self, logits: Tensor, q: float | Tensor) -> Tensor:
        """The y with P(Y <= y) = q: logits ``[..., K]``, q a number or ``[...]``, to ``[...]``.

        With full support 0 and 1 give infinities.

        Raises:
            RecipeError: for a number that is no probability.
        """
        p = self.probabilities(logits)
        if not isinstance(q, Tensor):
            if not 0 <= q <= 1:
                raise RecipeError(f"q must be a probability in [0, 1]; got {q}")
            q = p.new_full((), q)
        q = q.to(p.dtype).expand(p.shape[:-1])[..., None]
        cumulated = p.cumsum(-1)
        bucket = torch.searchsorted(cumulated, q.contiguous()).clamp_max(self.num_buckets - 1)
        tiny = torch.finfo(p.dtype).tiny
        own = p.gather(-1, bucket).clamp_min(tiny)
        before = (cumulated - p).gather(-1, bucket)
        y = self.borders[bucket] + self.widths[bucket] * ((q - before) / own).clamp(0, 1)
        if self.full_support:
            scale = self._scales()
            # from the small side of each tail, where a float is precise
            left = self.borders[1] + scale[0] * torch.special.ndtri((q / own).clamp(0, 1) / 2)
            right = self.borders[-2] - scale[1] * torch.special.ndtri(((1 - q) / own).clamp(0, 1) / 2)
            y = torch.where(bucket == 0, left, y)
            y = torch.where(bucket == self.num_buckets - 1, right, y)
        return y[..., 0]

    def quantile(self, logits: Tensor, centre: float = 0.682) -> Tensor:
        """The central interval that holds so much of the mass: ``[..., 2]``, its lower and upper end."""
        tail = (1 - centre) / 2
        return torch.stack([self.icdf(logits, tail), self.icdf(logits, 1 - tail)], -1)

    def median(self, logits: Tensor) -> Tensor:
        """``[...]``."""
        return self.icdf(logits, 0.5)

    def sample(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One draw from each: ``[...]``."""
        shape = logits.shape[:-1]
        return self.icdf(logits, torch.rand(shape, generator=generator, dtype=self.borders.dtype, device=logits.device))

    # -- moments and more --------------------------------------------------------------------------------------------

    def _centres(self) -> Tensor:
        """The mean of each bucket, ``[K]``."""
        centres = (self.borders[:-1] + self.borders[1:]) / 2
        if self.full_support:
            scale = self._scales()
            centres[0] = self.borders[1] - scale[0] * _MEAN
            centres[-1] = self.borders[-2] + scale[1] * _MEAN
        return centres

    def mean(self, logits: Tensor) -> Tensor:
        """``[...]``."""
        return (self.probabilities(logits) * self._centres()).sum(-1)

    def variance(self, logits: Tensor) -> Tensor:
        """``[...]``."""
        spread = self.widths.square() / 12  # within each bucket
        if self.full_support:
            spread[[0, -1]] = self._scales().square() * (1 - 2 / math.pi)
        p, centres = self.probabilities(logits), self._centres()
        mean = (p * centres).sum(-1, keepdim=True)
        return (p * (spread + (centres - mean).square())).sum(-1)

    def mode(self, logits: Tensor) -> Tensor:
        """Where the density is highest: the middle of a bucket, or where a tail begins. ``[...]``."""
        peak, place = 1 / self.widths, (self.borders[:-1] + self.borders[1:]) / 2
        if self.full_support:
            peak[[0, -1]] = _MEAN / self._scales()
            place[0], place[-1] = self.borders[1], self.borders[-2]
        return place[(self.probabilities(logits) * peak).argmax(-1)]

    def entropy(self, logits: Tensor) -> Tensor:
        """Differential entropy in nats, ``[...]``."""
        within = self.widths.log()
        if self.full_support:
            within[[0, -1]] = 0.5 + (self._scales() / _MEAN).log()
        log_p = logits.to(self.borders.dtype).log_softmax(-1)
        return (log_p.exp() * (within - log_p)).sum(-1)

    def ei(self, logits: Tensor, best: float | Tensor, maximize: bool = True) -> Tensor:
        """Expected improvement over the best value so far, E max(Y - best, 0), or E max(best - Y, 0): ``[...]``.

        Args:
            logits: ``[..., K]``.
            best: a number or ``[...]``.
            maximize: whether larger is better.
        """
        p = self.probabilities(logits)
        best = torch.as_tensor(best, dtype=p.dtype, device=p.device).expand(p.shape[:-1])[..., None]
        low, high = (self.borders[:-1] - best).clamp_min(0), (self.borders[1:] - best).clamp_min(0)
        gain = (high.square() - low.square()) / (2 * self.widths)
        if self.full_support:
            scale = self._scales()
            left = _gain_below(self.borders[1] - best, scale[0])
            right = _gain_above(best - self.borders[-2], scale[1])
            gain = torch.cat([left, gain[..., 1:-1], right], -1)
        above = (p * gain).sum(-1)
        return above if maximize else above - self.mean(logits) + best[..., 0]


def _log_half_normal(distance: Tensor, scale: Tensor) -> Tensor:
    return math.log(_MEAN) - scale.log() - (distance / scale).square() / 2


def _gain_above(t: Tensor, scale: Tensor) -> Tensor:
    """E max(|d| - t, 0) of d ~ N(0, scale^2)."""
    z = t.clamp_min(0) / scale
    beyond = scale * _MEAN * torch.exp(-z.square() / 2) - t * torch.special.erfc(z / _SQRT2)
    return torch.where(t > 0, beyond, scale * _MEAN - t)


def _gain_below(t: Tensor, scale: Tensor) -> Tensor:
    """E max(t - |d|, 0) of d ~ N(0, scale^2)."""
    t = t.clamp_min(0)
    z = t / scale
    return t * torch.special.erf(z / _SQRT2) + scale * _MEAN * torch.expm1(-z.square() / 2)
