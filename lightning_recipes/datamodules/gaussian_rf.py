"""Gaussian random features of a kernel with a power-law spectrum: regression of which theory knows the test error.

J. B. Simon, D. Karkada, N. Ghosh, M. Belkin, "More is Better in Modern Machine Learning", ICLR 2024
(https://arxiv.org/abs/2311.14646), as `scripts/rf-gaussian.py` of the official code has it: with M modes

    l_i = i^-alpha,   v_i^2 = i^-beta,   x ~ N(0, I_M),   y = v x + e,   e ~ N(0, noise_var)
    h_j = 1/sqrt(k) sum_i g_ji sqrt(l_i) x_i,   g_ji ~ N(0, 1)

so that <h(x), h(x')> is the kernel sum_i l_i x_i x'_i for k without bounds. What is trained on is (h, y).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_recipes.core.random import generator
from lightning_recipes.core.recipe import Paper
from lightning_recipes.datamodules.base import DataModule, require
from lightning_recipes.datamodules.samplers import EpochShuffle
from lightning_recipes.datamodules.student_teacher import Rows, _as_read

CHUNK = 1000
"""Samples whose modes are in memory at once."""


class GaussianRFDataModule(DataModule):
    """Gaussian random features: a training set in one batch, and validation and test sets of the same noise.

    Attributes:
        eigvals, coeffs: l_i and v_i, ``[n_modes]`` in fp64.

    Args:
        alpha: exponent of the kernel's eigenvalues, positive.
        beta: exponent of the squares of the target's coefficients, positive.
        noise_var: variance of the noise.
        n_modes: M.
        n: training samples.
        k: features.
        seed: of features, samples and noise.
        n_test: samples of the validation set, and of the test set.
        **kwargs: those of `DataModule`, but for batch_size.

    Raises:
        ValueError: for bad arguments.
    """

    paper = Paper(
        "More is Better in Modern Machine Learning: when Infinite Overparameterization is Optimal and Overfitting is"
        " Obligatory",
        "J. B. Simon, D. Karkada, N. Ghosh, M. Belkin",
        2024,
        "https://arxiv.org/abs/2311.14646",
        "https://github.com/dkarkada/more-is-better",
    )
    does = "Draws samples of Gaussian random features of a kernel with a power-law spectrum."
    use_when = "You want to hold a forecast of width and data against the theory that knows the test error."
    costs = "4 k (M + n + 2 n_test) bytes of memory, and 4,000 M while it draws."
    purpose = "datamodules"

    def __init__(
        self,
        alpha: float = 1.5,
        beta: float = 1.5,
        noise_var: float = 0.5,
        n_modes: int = 10_000,
        n: int = 256,
        k: int = 256,
        seed: int = 0,
        n_test: int = 1000,
        **kwargs: Any,
    ) -> None:
        require(n >= 1, "n", n, "at least 1")
        super().__init__(batch_size=n, seed=seed, **kwargs)
        for name, value in (("alpha", alpha), ("beta", beta)):
            require(value > 0 and math.isfinite(value), name, value, "positive")
        require(noise_var >= 0 and math.isfinite(noise_var), "noise_var", noise_var, "at least 0")
        for name, count in (("n_modes", n_modes), ("k", k), ("n_test", n_test)):
            require(count >= 1, name, count, "at least 1")
        self.alpha, self.beta, self.noise_var, self.n_modes = alpha, beta, noise_var, n_modes
        self.n, self.k, self.n_test = n, k, n_test
        i = torch.arange(1, n_modes + 1, dtype=torch.float64)
        self.eigvals, self.coeffs = i**-alpha, i ** (-beta / 2)
        self.collate = _as_read

    def setup(self, stage: str | None = None) -> None:
        if self.train_set is not None:
            return
        weights = torch.randn(self.n_modes, self.k, generator=generator(self.seed, "Gaussian features", "features"))
        weights *= (self.eigvals.sqrt() / self.k**0.5).float()[:, None]
        self.train_set = self._draw("train", self.n, weights)
        self.val_set, self.test_set = (self._draw(name, self.n_test, weights) for name in ("val", "test"))

    def _draw(self, name: str, samples: int, weights: Tensor) -> Rows:
        draws, v, parts = generator(self.seed, "Gaussian features", name), self.coeffs.float(), []
        for begin in range(0, samples, CHUNK):
            x = torch.randn(min(CHUNK, samples - begin), self.n_modes, generator=draws)
            noise = self.noise_var**0.5 * torch.randn(len(x), generator=draws)
            parts.append((x @ weights, x @ v + noise))
        return Rows(*(torch.cat(each) for each in zip(*parts)))

    def train_dataloader(self) -> DataLoader:
        sampler = EpochShuffle(self.train_set, shuffle=False, **self.shard)
        return self.training_loader(sampler, self.batch_size, self.drop_last)
