"""Ridge regression on features: its test error from a kernel's spectrum, and the spectrum's work from one training set.

With eigenvalues l_i and coefficients v_i of kernel and target over the population, noise variance s2, n samples, k
random features and a ridge d on the un-normalised kernel matrix K of the mean over features, the eigenframework has

    n = z + d / kappa,   k = z + k kappa / gamma,   L_i = l_i / (l_i + gamma),   z = sum L_i,   q = sum L_i^2
    E_test  = [H - a H'] / [1 - (q (k - 2 z) + z^2) / (n (k - q))],   a = kappa k / (k - q)
    H(gamma) = s2 + sum_i (1 - L_i) v_i^2,   H' = dH / dgamma = sum_i l_i / (l_i + gamma)^2 v_i^2
    E_train = (d / (n kappa))^2 E_test

E_test holds the noise: it is the error against noisy labels. Both equations have the same z, so that kappa is
gamma (1 - z/k) and one unknown is left. Without limit on k it is kernel ridge regression: kappa = gamma.

Read backwards, these turn a training set into a forecast. For any ridge, S the smoother of n samples,

    z = tr S,   kappa = d / (n - z),   E_test = n |y - S y|^2 / (n - z)^2          (generalised cross-validation)

and with k the width kappa / (1 - z/k) = gamma. A sweep of ridges so gives z, q = z + gamma dz/dgamma and H as functions
of gamma, from the gamma of min(n, k) upwards; and they, all that the first set of equations asks for, do not depend on
n, k and the ridge. Below they go on as power laws: for l_i ~ i^-alpha, v_i^2 ~ i^-beta

    z ~ gamma^(-1/alpha),   H ~ s2 + gamma^((beta - 1)/alpha)

J. B. Simon, D. Karkada, N. Ghosh, M. Belkin, "More is better in modern machine learning", ICLR 2024
(https://arxiv.org/abs/2311.14646).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.spectrum import Spectrum

USED = 0.6
"""Share of min(n, k) up to which a sweep's z is relied on: nearer to it the estimates of gamma and H are rounding."""
TAIL = 30.0
"""The law of the tail is read from gammas up to so many times the smallest."""
LEAST = 0.1
"""Where E_test is more than 1 / LEAST times the error that noise does not add to, cross-validation is not relied on."""


class Risk(NamedTuple):
    """Errors of ridge regression, and what the eigenframework has beside them; fp64, one for every ridge."""

    test: Tensor
    train: Tensor
    kappa: Tensor
    gamma: Tensor
    z: Tensor
    q: Tensor


# -- from a spectrum to the errors -------------------------------------------------------------------------------------


def rf_risk(eigvals: Tensor, coeffs: Tensor, n: float, k: float, ridge: float | Tensor, noise_var: float = 0.0) -> Risk:
    """Expected errors of ridge regression on k random features of a kernel.

    Args:
        eigvals: l_i, ``[m]``, in any order.
        coeffs: v_i, ``[m]``, or ``[m, c]`` for c targets, over which errors are summed.
        n: samples.
        k: features; infinity for the kernel itself.
        ridge: d, a number or ``[r]``; 0 is the limit.
        noise_var: s2.

    Returns:
        values without a dimension, or ``[r]``.

    Raises:
        RecipeError: for eigenvalues below 0 by more than rounding, coefficients of another length, n or k below 1, a
            negative ridge or noise, and ridge 0 where n = min(k, m): there the risk diverges.
    """
    lam, squares = _checked(eigvals, coeffs, noise_var)
    ridges = torch.as_tensor(ridge, dtype=torch.float64, device=lam.device)
    gamma, kappa, share = _solve(lam, n, k, ridges.reshape(-1))
    learned = lam / (lam + gamma[:, None])
    z, q = learned.sum(1), learned.square().sum(1)
    slope = (lam / (lam + gamma[:, None]).square()) @ squares
    left = (1 - learned) @ squares + noise_var
    test = (left - kappa / (1 - q / k) * slope) / _spread(z, q, n, k)
    train = share.square() * test
    return Risk(*(value.reshape(ridges.shape) for value in (test, train, kappa, gamma, z, q)))


def krr_risk(eigvals: Tensor, coeffs: Tensor, n: float, ridge: float | Tensor, noise_var: float = 0.0) -> Risk:
    """Expected errors of kernel ridge regression: e0 [sum (1 - L_i)^2 v_i^2 + s2] with e0 = n / (n - q).

    Arguments, result and errors as of :func:`rf_risk`; `gamma` is `kappa`.
    """
    lam, squares = _checked(eigvals, coeffs, noise_var)
    ridges = torch.as_tensor(ridge, dtype=torch.float64, device=lam.device)
    kappa, _, share = _solve(lam, n, math.inf, ridges.reshape(-1))
    learned = lam / (lam + kappa[:, None])
    z, q = learned.sum(1), learned.square().sum(1)
    test = n / (n - q) * ((1 - learned).square() @ squares + noise_var)
    train = share.square() * test
    return Risk(*(value.reshape(ridges.shape) for value in (test, train, kappa, kappa, z, q)))


def _checked(eigvals: Tensor, coeffs: Tensor, noise_var: float) -> tuple[Tensor, Tensor]:
    """Positive eigenvalues in descending order, and the squares of their coefficients, summed over targets."""
    lam = torch.as_tensor(eigvals, dtype=torch.float64)
    squares = torch.as_tensor(coeffs, dtype=torch.float64, device=lam.device).square()
    if lam.dim() != 1 or not len(lam) or not bool(lam.isfinite().all()):
        raise RecipeError(f"eigvals must be finite and [m], m at least 1; got {tuple(lam.shape)}")
    if squares.dim() not in (1, 2) or len(squares) != len(lam):
        raise RecipeError(f"coeffs must be one for each of the {len(lam)} eigvals; got {tuple(squares.shape)}")
    if not noise_var >= 0:
        raise RecipeError(f"noise_var must be at least 0; got {noise_var!r}")
    largest, least = float(lam.max()), float(lam.min())
    if not largest > 0 or least < -1e-8 * largest:
        raise RecipeError(f"eigvals must be those of a kernel, none of them negative; got {least:g} to {largest:g}")
    lam, order = lam.clamp_min(0).sort(descending=True)
    return lam, (squares if squares.dim() == 1 else squares.sum(1))[order]


def _solve(lam: Tensor, n: float, k: float, ridges: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """gamma, kappa and d / (n kappa) for every ridge, ``[r]`` each.

    z + d / (gamma (1 - z/k)) falls in gamma wherever z < k, so that bisection finds where it is n.

    Raises:
        RecipeError: for n or k below 1, a ridge below 0, and where there is no solution.
    """
    for name, value in (("n", n), ("k", k)):
        if not value >= 1 or (name == "n" and math.isinf(n)):
            raise RecipeError(f"{name} must be at least 1{' and finite' if name == 'n' else ''}; got {value!r}")
    if bool((ridges < 0).any()) or not bool(ridges.isfinite().all()):
        raise RecipeError(f"ridge must be at least 0 and finite; got {float(ridges.min()):g}")
    modes = int((lam > 0).sum())
    positive = ridges > 0
    gamma, kappa, share = torch.zeros_like(ridges), torch.zeros_like(ridges), torch.zeros_like(ridges)
    if bool((~positive).any()):
        most = min(k, modes)
        if n == most:
            what = "k" if k <= modes else "the number of eigenvalues"
            raise RecipeError(
                f"n = {what} = {n:g} with ridge 0: the risk diverges at the interpolation threshold; give a ridge"
            )
        if min(n, k) < modes:
            at = _bisect(lambda g: _learned(lam, g) - min(n, k), lam.sum()[None] * 0 + 1e-30, lam.sum()[None])
            gamma[~positive] = at
            kappa[~positive] = at * (1 - n / k) if n < k else 0.0
        share[~positive] = max(0.0, 1 - most / n)
    if bool(positive.any()):
        d = ridges[positive]

        def excess(g: Tensor) -> Tensor:
            z = _learned(lam, g)
            free = 1 - z / k
            return torch.where(free > 0, z + d / (g * free.clamp_min(1e-300)) - n, math.inf)

        high = torch.maximum(2 * lam.sum() / min(n, k), 4 * d / n)
        found = _bisect(excess, d / n, high)
        gamma[positive] = found
        z = _learned(lam, found)
        # Where z is close to k, 1 - z/k is rounding, and d / (n - z) is not.
        kappa[positive] = torch.where(z < 0.5 * n, d / (n - z).clamp_min(1e-300), found * (1 - z / k))
        share[positive] = torch.where(z < 0.5 * n, 1 - z / n, d / (n * kappa[positive].clamp_min(1e-300)))
    return gamma, kappa, share


def _learned(lam: Tensor, gamma: Tensor) -> Tensor:
    """z, ``[r]`` of gammas ``[r]``."""
    return (lam / (lam + gamma[:, None])).sum(1)


def _bisect(falls: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """Where a function that falls in its positive argument is 0, on a log scale, to rounding."""
    low, high = low.log(), high.log()
    for _ in range(70):
        middle = (low + high) / 2
        above = falls(middle.exp()) > 0
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return ((low + high) / 2).exp()


def _spread(z: Tensor, q: Tensor, n: float, k: float) -> Tensor:
    """1 - [q (k - 2 z) + z^2] / [n (k - q)]: its inverse is by how much noise, and what acts like it, adds up.

    Where all features are used up, z = q = k, it is 1 - k/n.
    """
    free = 1 - q / k
    taken = torch.where(free > 1e-9, (q * (1 - 2 * z / k) + z * z / k) / free.clamp_min(1e-300), z)
    return 1 - taken / n


def optimal_fitting_ratio(alpha: float, beta: float, noise: float = 0.0) -> float:
    """Train MSE over test MSE at the best ridge, for many samples, where l_i ~ i^-alpha and v_i^2 ~ i^-beta.

    Args:
        alpha, beta: exponents.
        noise: variance of the noise over the test error without noise and ridge.

    Raises:
        RecipeError: outside of alpha > 1 and 1 < beta < 2 alpha + 1, where the theorem holds, and for negative noise.
    """
    if not (alpha > 1 and 1 < beta < 2 * alpha + 1):
        raise RecipeError(
            f"alpha={alpha:g}, beta={beta:g} are outside the power-law theorem: it needs alpha > 1 and"
            " 1 < beta < 2 alpha + 1"
        )
    if not noise >= 0:
        raise RecipeError(f"noise must be at least 0; got {noise!r}")

    def slope(r: float) -> float:
        return alpha - beta - (alpha - 1) * beta * r + alpha * (alpha - 1) * noise * (1 - r) ** beta

    if slope(0.0) <= 0:
        return 0.0
    low, high = 0.0, 1.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return low**2


def kernel_spectrum(kernel: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and coefficients of a kernel and a target on a pool of samples that stands for the population.

    A forecast for n samples of the pool itself is then (M E_test - n E_train) / (M - n) on the pool's others.

    Args:
        kernel: ``[M, M]``, symmetric.
        y: ``[M]`` or ``[M, c]``.

    Returns:
        l_i, the largest first, ``[M]``; v_i ``[M]`` or ``[M, c]``; fp64.
    """
    values, vectors = torch.linalg.eigh(kernel.double())
    m = len(values)
    return values.flip(0) / m, vectors.flip(1).T @ y.double() / m**0.5


def relu_nngp(x: Tensor) -> Tensor:
    """The kernel of infinitely many random ReLU features, one hidden layer without limit on its width:

        K(x, x') = E relu(w . x) relu(w . x') = |x| |x'| / (2 pi) [sin t + (pi - t) cos t],   w ~ N(0, 1)

    with t the angle of x and x' (the arc-cosine kernel of order 1 over 2: Y. Cho, L. Saul, "Kernel Methods for Deep
    Learning", NeurIPS 2009). Weights of variance 1 and no biases: another variance multiplies K, and ridges with it.

    Args:
        x: inputs of the features, ``[n, p]``.

    Returns:
        ``[n, n]``, fp64.
    """
    x = x.double()
    size = x.norm(dim=1)
    scale = size.outer(size)
    cosine = (x @ x.T / scale.clamp_min(torch.finfo(torch.float64).tiny)).clamp(-1, 1)
    cosine.fill_diagonal_(1.0)
    angle = cosine.acos()
    return scale * (angle.sin() + (math.pi - angle) * cosine) / (2 * math.pi)


# -- from a training set to the errors ---------------------------------------------------------------------------------


def default_ridges(found: Spectrum, count: int = 31) -> Tensor:
    """Evenly on a log scale from 1e-6 to 1e2 times the mean diagonal of K, ``[count]``."""
    return torch.logspace(-6, 2, count, dtype=torch.float64) * float(found.eigenvalues.sum() / found.samples)


class Sweep(NamedTuple):
    """What one training set tells of ridge regression on it; ``[r]`` each, averaged over targets.

    Attributes:
        ridges: d.
        test: E_test, by generalised cross-validation.
        train: E_train.
        z: tr S, without the mean's.
        kappa: d / (n - z).
    """

    ridges: Tensor
    test: Tensor
    train: Tensor
    z: Tensor
    kappa: Tensor


def sweep(found: Spectrum, ridges: Tensor) -> Sweep:
    """Errors of ridge regression on samples of which the spectrum is known; a mean that was taken off costs a sample.

    Args:
        found: with the targets.
        ridges: positive, ``[r]``.
    """
    values, d = found.eigenvalues, ridges.to(found.eigenvalues)[:, None]
    n, targets = found.samples, found.targets.shape[1]
    left = d / (values + d)
    free = n - int(found.centred) - len(values) + left.sum(1)  # n - z, exact where it is small
    off = (left.square() @ found.targets.square().sum(1) + found.rest.sum()) / targets
    return Sweep(d[:, 0], n * off / free.square(), off / n, len(values) - left.sum(1), d[:, 0] / free)


def ridge_readout(found: Spectrum, ridge: float) -> Tensor:
    """Weights of ridge regression, ``[k, p]`` in fp64: (X^T X + d)^-1 X^T y; at ridge 0 those of least norm.

    Args:
        found: with the targets; of the features' own scale.
        ridge: d, at least 0.
    """
    values = found.eigenvalues
    along = torch.where(values > 0, values.sqrt() / (values + ridge).clamp_min(1e-300), 0.0)
    return (found.directions @ (along[:, None] * found.targets)).T / found.scale


def _at_gamma(found: Spectrum, swept: Sweep, width: float) -> tuple[Tensor, Tensor, Tensor]:
    """gamma and q of every ridge, ``[r]``, and whether they are more than rounding."""
    values, d, kappa = found.eigenvalues, swept.ridges, swept.kappa
    dz = -(values / (values + d[:, None]).square()).sum(1)
    dkappa = kappa / d * (1 + kappa * dz)
    free = 1 - swept.z / width
    gamma = kappa / free
    dgamma = (dkappa + gamma * dz / width) / free
    q = swept.z + gamma * dz / dgamma
    return gamma, q, (free > 0) & (dgamma > 0) & (q >= 0)


def trusted(found: Spectrum, swept: Sweep, width: float) -> Tensor:
    """Where cross-validation can be relied on, ``[r]``: not where samples and features are nearly as many and the ridge
    is small, so that noise adds up without bounds.

    Args:
        found, swept: of the same samples.
        width: features.
    """
    _, q, sound = _at_gamma(found, swept, width)
    return sound & (_spread(swept.z, q, found.samples - int(found.centred), width) > LEAST)


def best_ridge(found: Spectrum, swept: Sweep, width: float) -> int:
    """Place in a sweep of the ridge of least error by cross-validation, among those for which that can be relied on.

    Raises:
        RecipeError: when there is none.
    """
    reliable = trusted(found, swept, width)
    if not bool(reliable.any()):
        raise RecipeError("no ridge is large enough for cross-validation to be relied on; give larger ones")
    return int(torch.where(reliable, swept.test, math.inf).argmin())


class Best(NamedTuple):
    """The best ridge for so many samples and features.

    Attributes:
        error: E_test.
        ridge: d.
        train: E_train.
        beyond: whether it lies beyond what the data tell, on the tail's law.
    """

    error: float
    ridge: float
    train: float
    beyond: bool


@dataclass(frozen=True)
class Task:
    """Kernel and target behind a training set, as far as it tells of them: z, q and H over gamma, ``[g]`` each.

    Attributes:
        gamma: rising; the first `tail` of them are on the law of the tail, below what the data tell.
        z, q: of the kernel.
        left: H, of the target, noise included; averaged over targets.
        slope: gamma H'.
        alpha, beta: exponents of the tail.
        noise: s2: what no number of samples and features would learn.
        tail: how many.
        centred: whether one sample goes into the mean.
    """

    gamma: Tensor
    z: Tensor
    q: Tensor
    left: Tensor
    slope: Tensor
    alpha: float
    beta: float
    noise: float
    tail: int
    centred: bool

    def best(self, n: float, k: float) -> Best:
        """The best ridge for n samples and k features, and its errors."""
        mean = int(self.centred)
        n_free = n - mean
        there = (self.z < n_free) & (self.z < k)
        gamma, z, q, left, slope = (each[there] for each in (self.gamma, self.z, self.q, self.left, self.slope))
        over = n / n_free
        free = 1 - z / k
        error = ((left - free / (1 - q / k) * slope) / _spread(z, q, n_free, k)).clamp_min(self.noise) * over
        ridge = gamma * free * (n_free - z)
        train = ((1 - z / n_free).square() * error) / over**2
        at = int(torch.where(_spread(z, q, n_free, k) > LEAST, error, math.inf).argmin())
        beyond = bool(gamma[at] < self.gamma[self.tail])
        return Best(float(error[at]), float(ridge[at]), float(train[at]), beyond)

    def relative_noise(self, n: float, k: float) -> float:
        """s2 over the error that there would be without noise and ridge; infinite for noise alone."""
        n = n - int(self.centred)
        there = self.z < USED * min(n, k)  # next to n = k no ridge at all is never good
        at = int(there.nonzero()[0])
        z, q = self.z[at], self.q[at]
        learnable = self.left[at] - self.noise - (1 - z / k) / (1 - q / k) * self.slope[at]
        error = float(learnable / _spread(z, q, n, k))
        return self.noise / error if error > 0 else math.inf


def task_of(found: Spectrum, width: float) -> Task:
    """Read the task behind a training set off its spectrum.

    Args:
        found: with the targets.
        width: k, the features that the kernel's random features are; infinity to take the features as they are for all
            there is.

    Raises:
        RecipeError: for features that do not vary, and for too few samples or features to tell anything.
    """
    values = found.eigenvalues[: found.rank()]
    n = found.samples - int(found.centred)
    if not len(values):
        raise RecipeError("the features do not vary, so there is nothing to learn from them")
    low, high = 1e-6 * float(values.sum()) / n, 1e3 * float(values[0])
    ridges = torch.logspace(math.log10(low), math.log10(high), 240, dtype=torch.float64, device=values.device)
    swept = sweep(found, ridges)
    gamma, q, sound = _at_gamma(found, swept, width)
    z = swept.z
    used = (z < USED * min(n, width)) & sound
    if int(used.sum()) < 16:
        raise RecipeError(f"{found.samples} samples of {found.features} features tell too little of the task")
    first = int(used.nonzero()[0])
    gamma, z, q = gamma[first:], z[first:], q[first:].clamp_min(0)
    share = n / found.samples  # the part of the error that is not the mean's
    reached = swept.test[first:] * share * _spread(z, q, n, width)  # H - a H'
    left, slope = _unfolded(gamma, reached, (1 - q / width) / (1 - z / width))
    near = gamma <= TAIL * gamma[0]
    decay = float(((z - q) / z)[near].mean().clamp(1e-3, 0.999))  # 1 / alpha
    noise, power = _tail(gamma[near], left[near])
    below = torch.logspace(-5, 0, 161, dtype=torch.float64, device=gamma.device)[:-1]
    z_below = z[0] * below**-decay
    left_below = noise + (left[0] - noise) * below**power
    return Task(
        torch.cat([below * gamma[0], gamma]),
        torch.cat([z_below, z]),
        torch.cat([z_below * (1 - decay), q]),
        torch.cat([left_below, left]),
        torch.cat([power * (left_below - noise), slope]),
        1 / decay,
        1 + power / decay,
        noise,
        len(below),
        found.centred,
    )


def _unfolded(gamma: Tensor, reached: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
    """H and gamma H' from H - a H' over gamma, with gamma / a = rate.

    Downwards from the largest gamma, where nothing is learnt and both are the same, what was wrong at first fades.
    """
    steps = gamma.log().diff()
    fades = (-steps * (rate[1:] + rate[:-1]) / 2).exp().tolist()
    means = ((reached[1:] + reached[:-1]) / 2).tolist()
    left = [float(reached[-1])]
    for fade, mean in zip(reversed(fades), reversed(means)):
        left.append(left[-1] * fade + (1 - fade) * mean)
    found = reached.new_tensor(left[::-1])
    return found, (found - reached) * rate


def _tail(gamma: Tensor, left: Tensor) -> tuple[float, float]:
    """s2 and the power p of H ~ s2 + c gamma^p that fit best, over a grid of s2."""
    shares = torch.linspace(0, 0.995, 200, dtype=torch.float64, device=left.device)
    noise = shares * left.min().clamp_min(0)
    y = (left - noise[:, None]).clamp_min(1e-300).log()
    x = gamma.log()
    x_off, y_mean = x - x.mean(), y.mean(1, keepdim=True)
    power = ((y - y_mean) @ x_off) / x_off.square().sum()
    fitted = (y_mean + power[:, None] * x_off).exp() + noise[:, None]
    best = int((fitted / left - 1).square().sum(1).argmin())
    return float(noise[best]), max(float(power[best]), 1e-3)
