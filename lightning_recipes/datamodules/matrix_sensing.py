"""Measurements of a low-rank matrix, some of them grossly wrong.

Ma, Fattahi, 2022 (https://arxiv.org/abs/2202.08788), as ``LowRankRecovery`` fits them:

    y_i = <A_i, X*> + s_i,   A_i with N(0, 1) entries,   X* = W W^T with orthonormal W [d, r], so ||X*||_F = sqrt(r)
    s_i: N(0, outlier_std^2) with probability outlier_prob (else 0), plus N(0, noise_std^2)
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_recipes.core.random import generator
from lightning_recipes.datamodules.base import DataModule, require
from lightning_recipes.datamodules.samplers import EpochShuffle
from lightning_recipes.modules.low_rank_recovery import PAPER, check_measurements, measure

FEW = 10
"""Measurements in a batch for each of the d rows below which signs are mostly noise."""


def low_rank(d: int, r: int, draws: torch.Generator) -> Tensor:
    """A random projection of rank r: W W^T with orthonormal columns, ``[d, d]`` of norm sqrt(r)."""
    basis = torch.linalg.qr(torch.randn(d, r, generator=draws, dtype=torch.float64))[0]
    return (basis @ basis.T).float()


class Measurements(TensorDataset):
    """Pairs (A_i ``[d, d]``, y_i), gone through `passes` times and read as whole batches."""

    def __init__(self, a: Tensor, y: Tensor, passes: int = 1) -> None:
        super().__init__(a, y)
        self.passes = passes

    def __len__(self) -> int:
        return self.passes * len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        a, y = self.tensors
        return a[index % len(a)], y[index % len(a)]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        a, y = self.tensors
        if indices[0] % len(a) == 0 and indices == list(range(indices[0], indices[0] + len(a))):
            return a, y  # all of them in their order, which need not be copied
        rows = torch.tensor(indices) % len(a)
        return a[rows], y[rows]


class MatrixSensingDataModule(DataModule):
    """Draws a low-rank matrix and its measurements. The validation and test data are the matrix itself.

    By default a batch holds all measurements, and an epoch is one step of sub-gradient descent. On several ranks each
    has its share of the same measurements, of m / ranks.

    Attributes:
        truth: X*, ``[d, d]``.
        measurements: (A ``[m, d, d]``, y ``[m]``).

    Args:
        d: X* is d x d.
        r: its rank.
        m: measurements.
        outlier_prob: share of them (each on its own) that carry an outlier.
        outlier_std: standard deviation of the outliers.
        noise_std: of noise on every measurement.
        batch_size: measurements in a batch of one process; None for all of this process's.
        passes: how often an epoch goes through the measurements.
        shuffle: in an order drawn anew every epoch; matters for smaller batches.
        seed: of all draws.
        num_workers: worker processes of each loader.
        drop_last: drop the last, smaller training batch.

    Raises:
        ValueError: for bad arguments.
    """

    paper = PAPER
    does = "Draws linear measurements of a low-rank matrix, with outliers, noise or both."
    use_when = "You want to see robust recovery against the truth, with LowRankRecovery and SubGM."
    costs = "4 m d^2 bytes of memory."
    purpose = "datamodules"

    def __init__(
        self,
        d: int = 20,
        r: int = 3,
        m: int = 600,
        outlier_prob: float = 0.1,
        outlier_std: float = 10.0,
        noise_std: float = 0.0,
        batch_size: int | None = None,
        passes: int = 1,
        shuffle: bool = False,
        seed: int = 0,
        num_workers: int = 0,
        drop_last: bool = False,
    ) -> None:
        require(m >= 1, "m", m, "at least 1")
        require(batch_size is None or batch_size >= 1, "batch_size", batch_size, "None or at least 1")
        super().__init__(batch_size or m, num_workers, drop_last=drop_last, seed=seed)
        require(d >= 1, "d", d, "at least 1")
        require(1 <= r <= d, "r", r, f"at least 1 and at most d={d}")
        require(0 <= outlier_prob < 1, "outlier_prob", outlier_prob, "at least 0 and below 1")
        require(outlier_std >= 0, "outlier_std", outlier_std, "at least 0")
        require(noise_std >= 0, "noise_std", noise_std, "at least 0")
        require(passes >= 1, "passes", passes, "at least 1")
        self.d, self.r, self.m, self.passes, self.shuffle = d, r, m, passes, shuffle
        self.outlier_prob, self.outlier_std, self.noise_std = outlier_prob, outlier_std, noise_std
        self.whole = batch_size is None
        if min(self.batch_size, m) < FEW * d:
            rank_zero_warn(
                f"batches of {min(self.batch_size, m)} measurements for d={d}: below about {FEW} d = {FEW * d} the"
                " signs of the residuals are mostly noise; take larger batches, or more measurements"
            )
        self.truth: Tensor | None = None
        self.measurements: tuple[Tensor, Tensor] | None = None
        self.collate = _as_it_is

    def setup(self, stage: str | None = None) -> None:
        if self.train_set is not None:
            return
        draws = generator(self.seed, "matrix sensing")
        self.truth = low_rank(self.d, self.r, draws)
        a = torch.randn(self.m, self.d, self.d, generator=draws)
        y = measure(a, self.truth)
        hit = torch.rand(self.m, generator=draws) < self.outlier_prob
        y = y + hit * self.outlier_std * torch.randn(self.m, generator=draws)
        y = y + self.noise_std * torch.randn(self.m, generator=draws)
        check_measurements(a, y, (self.d, self.d))
        self.measurements = a, y
        self.train_set = Measurements(a, y, self.passes)
        self.val_set = self.test_set = Measurements(self.truth[None], torch.zeros(1))

    def train_dataloader(self) -> DataLoader:
        sampler = EpochShuffle(self.train_set, shuffle=self.shuffle, seed=self.order_seed, **self.shard)
        size = -(-self.m // sampler.num_replicas) if self.whole else self.batch_size
        return self.training_loader(sampler, size, self.drop_last)


def _as_it_is(batch: Any) -> Any:
    return batch
