"""Gradient descent on a linear student of a noisy linear teacher: its errors over time, in closed form.

M. Advani, A. Saxe, H. Sompolinsky, "High-dimensional dynamics of generalization error in neural networks", Neural
Networks 132, 2020 (https://arxiv.org/abs/1710.03667). P samples x of N entries of variance 1/N, a teacher y = w' x + e
with w'_i ~ N(0, s_w), e ~ N(0, s_e), and a student that starts at w_i ~ N(0, s_0) and descends the squared error. With
alpha = P/N, SNR = s_w/s_e, INR = s_0/s_e and the eigenvalues l_i of X X^T (not divided by P) every mode goes on its
own:

    w_i(t) = w_i(0) d_i + (w'_i + e_i / sqrt(l_i)) (1 - d_i),    d_i = exp(-l_i t),  or (1 - l_i t/k)^k after k steps

    E_test(t)  = 1 + 1/N sum_i [(SNR + INR) d_i^2 + (1 - d_i)^2 / l_i]          in units of the noise s_e
    E_train(t) = 1/P sum_{l_i > 0} [l_i (SNR + INR) + 1] d_i^2 + share of the samples beyond the rank

A mode with l = 0 is frozen: it keeps its start for ever and costs SNR + INR. For large N the sums are integrals over
the law of Marchenko and Pastur,

    rho(l) = sqrt((l+ - l)(l - l-)) / (2 pi l),   l+- = (sqrt(alpha) +- 1)^2,   and a mass max(0, 1 - alpha) at 0

*Stopping*: t* = argmin E_test. *Overtraining*: E_test(now) - E_test(t*), worst at alpha = 1, where E_test grows without
bound. *Ridge*: the penalty 1/SNR is the best, and little better than t*. *Time* of k steps at a rate eta on the mean
squared error: t = c eta k / P, c = 2, and 1 for half of it; with momentum beta, eta / (1 - beta).

SNR is the most likely one: with v_i . y the targets along the modes, and z those beyond them,

    v_i . y ~ N(0, l_i s_w + s_e),   z ~ N(0, s_e)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_recipes.core.spectrum import Spectrum

SOFT = 0.1
"""A mode whose l t is below this has hardly begun to move."""


class Law(NamedTuple):
    """A distribution of eigenvalues of X X^T over the N directions of weight space.

    Attributes:
        values: ``[m]`` fp64, with 0 among them for frozen directions.
        mass: shares of the directions, ``[m]``, of sum 1.
    """

    values: Tensor
    mass: Tensor


def edges(alpha: float) -> tuple[float, float]:
    """The ends of the bulk of Marchenko and Pastur's law: (sqrt(alpha) -+ 1)^2."""
    return (math.sqrt(alpha) - 1) ** 2, (math.sqrt(alpha) + 1) ** 2


def marchenko_pastur(alpha: float, points: int = 2000) -> Law:
    """The law of the eigenvalues for large N, as nodes of a quadrature.

    With l = 1 + alpha + 2 sqrt(alpha) cos(theta) the square roots at the edges disappear, and the midpoint rule is
    exact to rounding.

    Args:
        alpha: samples a parameter, above 0.
        points: of the quadrature; at alpha = 1 a time t needs more than sqrt(t).
    """
    theta = (torch.arange(points, dtype=torch.float64) + 0.5) * math.pi / points
    half = 2 * math.sqrt(alpha)
    values = 1 + alpha + half * theta.cos()
    mass = (half * theta.sin()).square() / (2 * math.pi * values) * math.pi / points
    return Law(torch.cat([values, values.new_zeros(1)]), torch.cat([mass, mass.new_tensor([max(0.0, 1 - alpha)])]))


def empirical(eigenvalues: Tensor, features: int, tolerance: float = 0.0) -> Law:
    """The law of eigenvalues that were found.

    Args:
        eigenvalues: ``[m]``, some or all of those that are not 0.
        features: N, in how many directions there are weights.
        tolerance: share of the largest at or below which one counts as 0.
    """
    values = eigenvalues.double()
    values = values[values > tolerance * values.max()] if len(values) else values
    mass = torch.full_like(values, 1 / features)
    return Law(
        torch.cat([values, values.new_zeros(1)]), torch.cat([mass, mass.new_tensor([1 - len(values) / features])])
    )


def left(t: float | Tensor, eigenvalues: Tensor, steps: int | None = None) -> Tensor:
    """d: the share of its start that is left in a mode at time t, ``[..., m]`` for times ``[...]``.

    Args:
        t: time, in units of tau; infinity is allowed.
        eigenvalues: ``[m]``.
        steps: of gradient descent at one rate that this time took; None for the flow.
    """
    return 1 - _learned(t, eigenvalues, steps)


def _learned(t: float | Tensor, eigenvalues: Tensor, steps: int | None = None) -> Tensor:
    """1 - d, exact where it is small."""
    t = torch.as_tensor(t, dtype=torch.float64, device=eigenvalues.device)[..., None]
    x = torch.where(eigenvalues > 0, eigenvalues * t, 0.0)
    if steps is None:
        return -torch.expm1(-x)
    if steps == 0:
        return torch.zeros_like(x)
    x = x / steps
    small = -torch.expm1(steps * torch.log1p(-x.clamp_max(0.5)))
    return torch.where(x <= 0.5, small, 1 - (1 - x) ** steps)


def mode_weights(t: float | Tensor, eigenvalues: Tensor, start: Tensor, teacher: Tensor, noise: Tensor) -> Tensor:
    """w_i(t) of every mode under gradient flow, ``[..., m]``; frozen modes keep their start.

    Args:
        t: times ``[...]``.
        eigenvalues, start, teacher, noise: ``[m]``: l_i, w_i(0), w'_i and e_i, of the noise v_i . e.
    """
    learned = _learned(t, eigenvalues)
    end = teacher + torch.where(eigenvalues > 0, noise * eigenvalues.clamp_min(1e-300).rsqrt(), 0.0)
    return start * (1 - learned) + end * learned


def expected_test_error(t: float | Tensor, law: Law, snr: float, inr: float = 0.0, steps: int | None = None) -> Tensor:
    """E_test at times t, ``[...]``, in units of the noise.

    Args:
        t: ``[...]``; infinity is allowed.
        law: of the eigenvalues.
        snr, inr: signal and first weights, both over the noise.
        steps: as in :func:`left`.
    """
    learned = _learned(t, law.values, steps)
    noise = torch.where(law.values > 0, learned.square() / law.values.clamp_min(1e-300), 0.0)
    return 1 + (((snr + inr) * (1 - learned).square() + noise) * law.mass).sum(-1)


def expected_train_error(
    t: float | Tensor, law: Law, alpha: float, snr: float, inr: float = 0.0, steps: int | None = None
) -> Tensor:
    """E_train at times t, ``[...]``, in units of the noise; as :func:`expected_test_error`."""
    there = law.values > 0
    kept = left(t, law.values, steps).square()
    modes = (torch.where(there, (law.values * (snr + inr) + 1) * kept, 0.0) * law.mass).sum(-1)
    return modes / alpha + max(0.0, 1 - float(law.mass[there].sum()) / alpha)


def final_test_error(alpha: float, snr: float, inr: float = 0.0) -> float:
    """E_test without end, for large N: alpha / (alpha - 1) above 1, (1 - alpha)(SNR + INR) + 1 / (1 - alpha) below.

    How large the first weights are matters for ever exactly where alpha < 1. At alpha = 1 it is infinite.
    """
    if alpha == 1:
        return math.inf
    return alpha / (alpha - 1) if alpha > 1 else (1 - alpha) * (snr + inr) + 1 / (1 - alpha)


def ridge_test_error(law: Law, penalty: float, snr: float) -> float:
    """E_test of ridge regression with this penalty; 1 / SNR is the best one."""
    values, mass = law
    total = (snr * penalty**2 + values) / (values + penalty).square()
    return 1 + float((total * mass).sum())


def optimal_stopping_time(law: Law, snr: float, inr: float = 0.0) -> float:
    """t*, at which E_test is least; 0 where learning only harms, infinite where it never ceases to help."""
    positive = law.values[(law.values > 0) & (law.mass > 0)]
    if not len(positive):
        return 0.0

    def error(times: Tensor) -> Tensor:
        return expected_test_error(times, law, snr, inr)

    low, high = -3 - math.log10(float(positive.max())), 3 - math.log10(float(positive.min()))
    for _ in range(3):  # each 50 times as fine as the one before
        times = torch.logspace(low, high, 200, dtype=torch.float64)
        best = int(error(times).argmin())
        low, high = (math.log10(float(times[i])) for i in (max(best - 2, 0), min(best + 2, 199)))
    found = times[best]
    ends = error(torch.tensor([0.0, math.inf], dtype=torch.float64)).tolist()
    least = float(error(found))
    if ends[0] <= least:
        return 0.0
    return math.inf if ends[1] <= least * (1 + 1e-12) else float(found)


def best_test_error(law: Law, snr: float, inr: float = 0.0) -> float:
    """E_test at t*."""
    return float(expected_test_error(optimal_stopping_time(law, snr, inr), law, snr, inr))


def correlated(largest: float, alpha: float) -> bool:
    """Whether the largest eigenvalue is far beyond that of features without correlations."""
    return largest > 2 * edges(alpha)[1]


def overtraining(t: float, law: Law, snr: float, inr: float = 0.0) -> float:
    """E_test at t over E_test at t*: what was lost by not stopping, in units of the noise."""
    return float(expected_test_error(t, law, snr, inr)) - best_test_error(law, snr, inr)


def more_data(law: Law, factor: float = 2.0, short_of_samples: bool = False) -> Law:
    """About the law with so many times the samples: eigenvalues grow with the samples, and directions thaw.

    It gains less than more samples do: they also move the small eigenvalues away from 0, which nothing tells of
    features with correlations. Of those without, the law is known: :func:`marchenko_pastur`.

    Args:
        short_of_samples: whether directions are frozen because there were no more samples: then as many thaw as there
            are new ones, with the least eigenvalue that there was.
    """
    values, mass = law.values * factor, law.mass.clone()
    frozen = law.values == 0
    thawed = 0.0
    if short_of_samples and not bool(frozen.all()):
        thawed = min(float(mass[frozen].sum()), (factor - 1) * float(mass[~frozen].sum()))
        mass[frozen] *= 1 - thawed / max(float(mass[frozen].sum()), 1e-300)
        values = torch.cat([values, law.values[~frozen].min()[None]])
        mass = torch.cat([mass, mass.new_tensor([thawed])])
    return Law(values, mass)


def flow_time(rate: float, samples: int, loss_factor: float = 2.0, momentum: float = 0.0) -> float:
    """The time that a step of gradient descent takes: c eta / P, with momentum eta / (1 - beta) for eta.

    Args:
        rate: eta of one step, or the sum of those of several.
        samples: P, of the whole training set, also where a step sees a part of it.
        loss_factor: c: 2 for the mean of squares, 1 for half of it, either divided by the outputs that it averages.
    """
    return loss_factor * rate / (1 - momentum) / samples


def stable_rate(largest: float, samples: int, loss_factor: float = 2.0) -> float:
    """Rate from which on plain gradient descent diverges: 2 P / (c l_max)."""
    return 2 * samples / (loss_factor * largest)


def signal_and_noise(found: Spectrum) -> tuple[float, float]:
    """The most likely s_w and s_e, each on average over the columns of the targets.

    For a given ratio r = s_w / s_e the likelihood is greatest at s_e = mean of (v_i . y)^2 / (1 + r l_i) over all
    samples, so only r is searched for, from 1e-4 to 1e8.

    Returns:
        (s_w, s_e) for features of the spectrum's scale; s_e is above 0 unless all targets are 0.
    """
    rank = found.rank()
    values, squares = found.eigenvalues[:rank], found.targets[:rank].square()
    ratios = torch.logspace(-4, 8, 2401, dtype=torch.float64, device=values.device)
    spread = 1 + ratios[:, None] * values
    n = max(found.samples - int(found.centred), rank)
    tiny = torch.finfo(torch.float64).tiny
    noise = (spread.reciprocal() @ squares + (found.rest if n > rank else 0.0)) / n
    likelihood = -0.5 * (n * noise.clamp_min(tiny).log() + spread.log().sum(1)[:, None])
    best = likelihood.argmax(0)
    s_e = noise.gather(0, best[None])[0]
    return float((ratios[best] * s_e).mean()), float(s_e.mean())


def frozen_share(t: float, law: Law, below: float = SOFT) -> float:
    """The share of directions that have hardly moved by t: l t below a bound; frozen ones are among them."""
    return float(law.mass[law.values * t < below].sum())


def outside_share(change: Tensor, inputs: Spectrum) -> float:
    """||dW (I - Pi)|| / ||dW||: what of a layer's change lies outside of the span of its inputs; 0 without a change.

    Args:
        change: W(t) - W(0), ``[out, in]``.
        inputs: the spectrum of the layer's inputs as they are, not centred.
    """
    whole = float(change.double().norm())
    return float(inputs.outside(change).norm()) / whole if whole > 0 else 0.0


def complexity(weights: Tensor, inputs: Spectrum, tolerance: float = 1e-6) -> float:
    """B sqrt(sum l) / P with B^2 the squares of the weights along directions that are not frozen: a bound on the gap
    between training and test error by Rademacher complexity, up to constants.

    Args:
        weights: ``[out, N]``, for features of the spectrum's scale.
        inputs: their spectrum.
        tolerance: share of the largest eigenvalue below which a direction is frozen.
    """
    rank = inputs.rank(tolerance)
    along = weights.to(inputs.directions) @ inputs.directions[:, :rank]
    return float(along.norm() * inputs.eigenvalues[:rank].sum().sqrt()) / inputs.samples
