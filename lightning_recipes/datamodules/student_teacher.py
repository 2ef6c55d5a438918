"""Samples of a noisy linear teacher: regression in which the number of parameters is comparable to that of samples.

Advani, Saxe, Sompolinsky, "High-dimensional dynamics of generalization error in neural networks", 2020
(https://arxiv.org/abs/1710.03667):

    x ~ N(0, I / N),   w' ~ N(0, SNR I),   y = w' x + e,   e ~ N(0, 1),   P = alpha N samples
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_recipes.core.random import generator
from lightning_recipes.core.recipe import Paper
from lightning_recipes.datamodules.base import DataModule, require
from lightning_recipes.datamodules.samplers import EpochShuffle


class Rows(TensorDataset):
    """Tensors that are read a batch at a time."""

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, ...]:
        chosen = torch.as_tensor(indices)
        return tuple(tensor[chosen] for tensor in self.tensors)


def _as_read(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return batch


class StudentTeacherDataModule(DataModule):
    """A noisy linear teacher: a training set in one batch, and validation and test sets of the same noise.

    One epoch is one step of gradient descent on all samples, in their order. On several ranks each has its share of
    the same data.

    Attributes:
        teacher: w', ``[n_features]``.
        samples: P, alpha x n_features to the nearest whole number.

    Args:
        n_features: N.
        alpha: samples a parameter, P / N. Overtraining is worst at 1.
        snr: variance of the teacher's weights, over that of the noise, which is 1.
        seed: of teacher, samples and noise.
        n_test: samples of the validation set, and of the test set.
        **kwargs: those of `DataModule`, but for batch_size.

    Raises:
        ValueError: for bad arguments.
    """

    paper = Paper(
        "High-dimensional dynamics of generalization error in neural networks",
        "M. S. Advani, A. M. Saxe, H. Sompolinsky",
        2020,
        "https://arxiv.org/abs/1710.03667",
    )
    does = "Draws samples of a noisy linear teacher, as many as parameters or fewer or more."
    use_when = "You want to see overtraining with LinearStudent and GeneralizationMonitor, or test a method on it."
    costs = "4 (alpha N + 2 n_test) N bytes of memory."
    purpose = "datamodules"

    def __init__(
        self,
        n_features: int = 100,
        alpha: float = 1.0,
        snr: float = 5.0,
        seed: int = 0,
        n_test: int = 1000,
        **kwargs: Any,
    ) -> None:
        require(n_features >= 1, "n_features", n_features, "at least 1")
        require(alpha > 0 and math.isfinite(alpha), "alpha", alpha, "positive")
        self.samples = max(1, round(alpha * n_features))
        super().__init__(batch_size=self.samples, seed=seed, **kwargs)
        require(snr >= 0 and math.isfinite(snr), "snr", snr, "at least 0")
        require(n_test >= 1, "n_test", n_test, "at least 1")
        self.n_features, self.alpha, self.snr, self.n_test = n_features, alpha, snr, n_test
        draws = generator(seed, "student and teacher", "teacher")
        self.teacher = snr**0.5 * torch.randn(n_features, generator=draws)
        self.collate = _as_read

    def setup(self, stage: str | None = None) -> None:
        if self.train_set is not None:
            return
        self.train_set = self._draw("train", self.samples)
        self.val_set, self.test_set = (self._draw(name, self.n_test) for name in ("val", "test"))

    def _draw(self, name: str, samples: int) -> Rows:
        draws = generator(self.seed, "student and teacher", name)
        x = torch.randn(samples, self.n_features, generator=draws) / self.n_features**0.5
        return Rows(x, x @ self.teacher + torch.randn(samples, generator=draws))

    def train_dataloader(self) -> DataLoader:
        sampler = EpochShuffle(self.train_set, shuffle=False, **self.shard)
        return self.training_loader(sampler, self.batch_size, self.drop_last)
