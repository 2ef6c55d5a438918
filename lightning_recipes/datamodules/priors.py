"""Priors over data sets: what a network that predicts from a context is trained on.

A prior draws whole data sets at once: inputs x ``[T, B, F]`` and targets y ``[T, B]``, each of the B columns from a
function of its own, noise included. Those of Mueller et al., ICLR 2022 (https://arxiv.org/abs/2112.10510):

    GPPrior          y ~ N(0, K + noise I), K the RBF or Matern-5/2 kernel, x uniform on [0, 1]^F
    SampledGPPrior   the same with lengthscale, outputscale and noise drawn for every data set
    LinearPrior      y = w.x + b + noise, w and b Gaussian: Bayesian ridge regression
    MLPPrior         y of a random network with Gaussian weights: a Bayesian neural network

The first and the third are Gaussian with known covariance, so the posterior predictive is known exactly
(:meth:`GaussianPrior.posterior`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor

from lightning_recipes.core.errors import RecipeError, check_argument

JITTER = 1e-6
"""On the diagonal where a covariance is factorised in single precision, on a device without fast fp64."""


class Prior(ABC):
    """Base of all priors; a subclass implements :meth:`sample` and may be named in YAML by its ``class_path``.

    Those here are dataclasses, so that a checkpoint can tell one from another. A prior holds no random state: all draws
    come from the generator that it is given.
    """

    closed_form: ClassVar[bool] = False
    """Whether :meth:`posterior` is there."""

    @abstractmethod
    def sample(
        self, n_tokens: int, batch: int, num_features: int, generator: Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw data sets.

        Args:
            n_tokens: T, samples of each.
            batch: B, how many data sets.
            num_features: F.
            generator: where all numbers come from.

        Returns:
            x float ``[T, B, F]`` and y float ``[T, B]``.
        """

    def posterior(self, x: Tensor, y: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        """The exact posterior predictive, a normal distribution of every query alone.

        Args:
            x: inputs of the context, ``[n, B, F]``; n may be 0.
            y: its targets ``[n, B]``.
            queries: ``[m, B, F]``.

        Returns:
            mean and variance of the targets (noise included), float64 ``[m, B]``.

        Raises:
            RecipeError: for a prior without a closed form.
        """
        raise RecipeError(f"{type(self).__name__} has no posterior in closed form")

    def nll(self, x: Tensor, y: Tensor, n_context: int) -> Tensor:
        """What the exact posterior predictive loses on the targets after the first n: negative log likelihoods
        ``[T - n, B]``, float64."""
        mean, variance = self.posterior(x[:n_context], y[:n_context], x[n_context:])
        return ((y[n_context:].double() - mean).square() / variance + (2 * math.pi * variance).log()) / 2


def draw(prior: Prior, n_tokens: int, batch: int, num_features: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Data sets of a prior, checked.

    Raises:
        RecipeError: when it gives other shapes, what is not finite, or targets that are all the same.
    """
    x, y = prior.sample(n_tokens, batch, num_features, generator)
    name, shapes = type(prior).__name__, (tuple(x.shape), tuple(y.shape))
    wanted = ((n_tokens, batch, num_features), (n_tokens, batch))
    if shapes != wanted:
        turned = (batch, n_tokens, num_features) == shapes[0] and batch != n_tokens
        raise RecipeError(
            f"{name}.sample must give x and y of shapes {wanted[0]} and {wanted[1]} (tokens, data sets, features); got"
            f" {shapes[0]} and {shapes[1]}" + (": tokens come first, then data sets" if turned else "")
        )
    if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
        raise RecipeError(f"{name}.sample gave numbers that are not finite")
    if y.numel() > 1 and (y == y.flatten()[0]).all():
        raise RecipeError(f"{name}.sample gave the same target {float(y.flatten()[0]):g} everywhere: nothing to learn")
    return x, y


class GaussianPrior(Prior):
    """Functions from a Gaussian process with known kernel, and Gaussian noise. A subclass says the kernel and the x."""

    closed_form = True
    noise: float
    """Variance of the noise on the targets."""

    @abstractmethod
    def kernel(self, a: Tensor, b: Tensor) -> Tensor:
        """Covariance of function values: ``[B, n, F]`` and ``[B, m, F]`` to ``[B, n, m]``."""

    def inputs(self, shape: tuple[int, ...], generator: Generator | None) -> Tensor:
        """x, float64 of that shape; uniform on [0, 1)."""
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    def sample(
        self, n_tokens: int, batch: int, num_features: int, generator: Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        x = self.inputs((batch, n_tokens, num_features), generator)
        y = correlated(self.kernel(x, x), self.noise, generator)
        return x.transpose(0, 1).float(), y.T.float()

    def posterior(self, x: Tensor, y: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        x, y, queries = x.double().transpose(0, 1), y.double().T[..., None], queries.double().transpose(0, 1)
        prior = self.variances(queries)
        if not x.shape[1]:
            return torch.zeros_like(prior).T, (prior + self.noise).T
        eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        factor = torch.linalg.cholesky(self.kernel(x, x) + self.noise * eye)
        cross = torch.linalg.solve_triangular(factor, self.kernel(x, queries), upper=False)
        whitened = torch.linalg.solve_triangular(factor, y, upper=False)
        mean = (cross.transpose(1, 2) @ whitened)[..., 0]
        return mean.T, (prior + self.noise - cross.square().sum(1)).T

    def variances(self, x: Tensor) -> Tensor:
        """The kernel of every input with itself: ``[B, n, F]`` to ``[B, n]``."""
        return self.kernel(x.reshape(-1, 1, x.shape[-1]), x.reshape(-1, 1, x.shape[-1])).view(x.shape[:2])


def correlated(covariance: Tensor, noise: Tensor | float, generator: Generator | None) -> Tensor:
    """Draws of N(0, covariance + noise I): ``[B, T, T]`` to ``[B, T]``."""
    noise = torch.as_tensor(noise, dtype=covariance.dtype).reshape(-1, 1, 1)
    floor = 1e-10 if covariance.dtype == torch.float64 else JITTER
    diagonal = noise.clamp_min(floor) * torch.eye(covariance.shape[-1], dtype=covariance.dtype)
    normal = torch.randn(covariance.shape[:2], generator=generator, dtype=covariance.dtype)
    return (torch.linalg.cholesky(covariance + diagonal) @ normal[..., None])[..., 0]


def rbf(a: Tensor, b: Tensor, lengthscale: Tensor | float) -> Tensor:
    """exp(-|a - b|^2 / (2 l^2)), ``[B, n, F]`` and ``[B, m, F]`` to ``[B, n, m]``."""
    return torch.exp(-(torch.cdist(a, b, compute_mode=_EXACT) / lengthscale).square() / 2)


def matern52(a: Tensor, b: Tensor, lengthscale: Tensor | float) -> Tensor:
    """(1 + s + s^2 / 3) exp(-s) with s = sqrt(5) |a - b| / l."""
    s = math.sqrt(5) * torch.cdist(a, b, compute_mode=_EXACT) / lengthscale
    return (1 + s + s.square() / 3) * torch.exp(-s)


_EXACT = "donot_use_mm_for_euclid_dist"  # the other way loses what a covariance near 1 needs
KERNELS = {"rbf": rbf, "matern52": matern52}


@dataclass
class GPPrior(GaussianPrior):
    """A Gaussian process with fixed hyper-parameters, x uniform on [0, 1]^F; the paper's for Figure 3.

    Args:
        lengthscale: l of the kernel.
        outputscale: factor on the kernel, the variance of the functions.
        noise: variance of the noise.
        kernel_name: 'rbf' or 'matern52'.
    """

    lengthscale: float = 0.6
    outputscale: float = 1.0
    noise: float = 1e-4
    kernel_name: Literal["rbf", "matern52"] = "rbf"

    def __post_init__(self) -> None:
        for name in ("lengthscale", "outputscale", "noise"):
            check_argument(getattr(self, name) > 0, self, name, getattr(self, name), "positive")
        check_argument(self.kernel_name in KERNELS, self, "kernel_name", self.kernel_name, "'rbf' or 'matern52'")

    def kernel(self, a: Tensor, b: Tensor) -> Tensor:
        return self.outputscale * KERNELS[self.kernel_name](a, b, self.lengthscale)


@dataclass
class LinearPrior(GaussianPrior):
    """Bayesian ridge regression: y = w.x + b + noise with w ~ N(0, weight_std^2), b ~ N(0, bias_std^2).

    Args:
        weight_std: standard deviation of each weight.
        bias_std: of the intercept; 0 for none.
        noise_std: of the noise.
        low, high: x is uniform between them.
    """

    weight_std: float = 0.1
    bias_std: float = 0.0
    noise_std: float = 0.1
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        check_argument(self.weight_std > 0, self, "weight_std", self.weight_std, "positive")
        check_argument(self.bias_std >= 0, self, "bias_std", self.bias_std, "at least 0")
        check_argument(self.noise_std > 0, self, "noise_std", self.noise_std, "positive")
        check_argument(self.low < self.high, self, "high", self.high, f"above low ({self.low})")

    @property
    def noise(self) -> float:
        return self.noise_std**2

    def inputs(self, shape: tuple[int, ...], generator: Generator | None) -> Tensor:
        return self.low + (self.high - self.low) * super().inputs(shape, generator)

    def sample(
        self, n_tokens: int, batch: int, num_features: int, generator: Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        x = self.inputs((batch, n_tokens, num_features), generator)
        weights = self.weight_std * _normal((batch, num_features, 1), generator)
        bias = self.bias_std * _normal((batch, 1), generator)
        y = (x @ weights)[..., 0] + bias + self.noise_std * _normal((batch, n_tokens), generator)
        return x.transpose(0, 1).float(), y.T.float()

    def kernel(self, a: Tensor, b: Tensor) -> Tensor:
        return self.weight_std**2 * a @ b.transpose(1, 2) + self.bias_std**2


@dataclass
class SampledGPPrior(Prior):
    """A Gaussian process whose hyper-parameters differ from data set to data set, each from a gamma distribution.

    Args:
        lengthscale, outputscale, noise: (concentration, rate) of each.
        kernel_name: 'matern52' or 'rbf'.
    """

    lengthscale: tuple[float, float] = (3.0, 6.0)
    outputscale: tuple[float, float] = (0.5, 0.15)
    noise: tuple[float, float] = (1.1, 0.05)
    kernel_name: Literal["rbf", "matern52"] = "matern52"

    def __post_init__(self) -> None:
        for name in ("lengthscale", "outputscale", "noise"):
            given = getattr(self, name)
            both = len(given) == 2 and min(given) > 0
            check_argument(both, self, name, given, "a concentration and a rate, both positive")
        check_argument(self.kernel_name in KERNELS, self, "kernel_name", self.kernel_name, "'rbf' or 'matern52'")

    def sample(
        self, n_tokens: int, batch: int, num_features: int, generator: Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        x = torch.rand((batch, n_tokens, num_features), generator=generator, dtype=torch.float64)
        lengthscale, outputscale, noise = (
            gamma(concentration, 1 / rate, (batch, 1, 1), generator)
            for concentration, rate in (self.lengthscale, self.outputscale, self.noise)
        )
        covariance = outputscale * KERNELS[self.kernel_name](x, x, lengthscale.clamp_min(1e-3))
        # a covariance of any size, with noise that may be next to nothing beside it
        y = correlated(covariance, torch.maximum(noise, 1e-8 * outputscale), generator)
        return x.transpose(0, 1).float(), y.T.float()


@dataclass
class MLPPrior(Prior):
    """A Bayesian neural network: y of a random MLP with tanh, whose sizes and scales differ from data set to data set.

    x is Gaussian, the unused features are 0; both x and y are standardised over each data set.

    Args:
        num_layers: linear layers.
        max_hidden: width of the hidden layers is 2 + Beta(2, 4), scaled to at most this.
        weight_std: (shape, scale) of the gamma distribution of the weights' standard deviation.
        noise_std: the same of the noise after every layer.
        weight_dropout: share of the weights that are 0; the others are scaled up to keep the variance.
        vary_features: draw how many features each data set uses, 2 + Beta(1, 1.6), scaled; else all.
        binary: targets are 0 or 1: below and above the median of the data set.
    """

    num_layers: int = 3
    max_hidden: int = 150
    weight_std: tuple[float, float] = (3.62, 0.0677)
    noise_std: tuple[float, float] = (1.87, 0.0528)
    weight_dropout: float = 0.0
    vary_features: bool = False
    binary: bool = False

    def __post_init__(self) -> None:
        check_argument(self.num_layers >= 2, self, "num_layers", self.num_layers, "at least 2")
        check_argument(self.max_hidden >= 2, self, "max_hidden", self.max_hidden, "at least 2")
        for name in ("weight_std", "noise_std"):
            given = getattr(self, name)
            both = len(given) == 2 and min(given) > 0
            check_argument(both, self, name, given, "a shape and a scale, both positive")
        check_argument(0 <= self.weight_dropout < 1, self, "weight_dropout", self.weight_dropout, "in [0, 1)")

    def sample(
        self, n_tokens: int, batch: int, num_features: int, generator: Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        used = self._counts(num_features, 1.0, 1.6, batch, generator) if self.vary_features else num_features
        hidden = self._counts(self.max_hidden, 2.0, 4.0, batch, generator)
        weight_std = gamma(*self.weight_std, (batch, 1, 1), generator)
        noise_std = gamma(*self.noise_std, (batch, 1, 1), generator)
        x = _standardised(_normal((batch, n_tokens, num_features), generator), 1)
        x = x * (torch.arange(num_features) < used)  # [B, 1, F] where they differ
        y = x
        widths = [num_features, *[self.max_hidden] * (self.num_layers - 1), 1]
        for layer, (fan_in, fan_out) in enumerate(pairwise(widths)):
            weights = weight_std * _normal((batch, fan_in, fan_out), generator)
            if self.weight_dropout:
                kept = torch.rand(weights.shape, generator=generator) >= self.weight_dropout
                weights = weights * kept / math.sqrt(1 - self.weight_dropout)
            y = y @ weights
            if layer < self.num_layers - 1:
                y = torch.tanh(y) * (torch.arange(fan_out) < hidden)
            y = y + noise_std * _normal(y.shape, generator)
            if layer < self.num_layers - 1:
                y = y * (torch.arange(fan_out) < hidden)
        y = _standardised(y[..., 0], 1)
        if self.binary:
            y = (y > y.median(1, keepdim=True).values).double()
        return x.transpose(0, 1).float(), y.T.float()

    def _counts(self, most: int, a: float, b: float, batch: int, generator: Generator | None) -> Tensor:
        """2 + Beta(a, b) scaled to at most `most`, a whole number for each data set: ``[B, 1, 1]``."""
        first, second = (gamma(shape, 1.0, (batch, 1, 1), generator) for shape in (a, b))
        least = min(2, most)
        return (least + (first / (first + second)) * (most - least)).round()


def gamma(shape: float, scale: float, size: tuple[int, ...], generator: Generator | None) -> Tensor:
    """Gamma variates, float64."""
    return scale * torch._standard_gamma(torch.full(size, shape, dtype=torch.float64), generator=generator)


def _normal(size: Any, generator: Generator | None) -> Tensor:
    return torch.randn(size, generator=generator, dtype=torch.float64)


def _standardised(values: Tensor, dim: int) -> Tensor:
    spread = values.std(dim, keepdim=True) if values.shape[dim] > 1 else torch.ones(())
    return (values - values.mean(dim, keepdim=True)) / spread.clamp_min(1e-12)
