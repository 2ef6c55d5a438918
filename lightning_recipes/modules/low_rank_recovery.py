"""Recovery of a low-rank matrix from linear measurements, with factors of a rank that is set too high.

Ma, Fattahi, "Global Convergence of Sub-gradient Method for Robust Matrix Recovery: Small Initialization, Noisy
Measurements, and Over-parameterization", JMLR 2023 (https://arxiv.org/abs/2202.08788; no official code).

    f(U) = (1/m) sum_i |<A_i, X> - y_i|,   X = U U^T (symmetric) or U V^T

Train it with ``SubGM``, which makes the first factors small and sets the rate; alone it is what the paper warns of.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_recipes.core.random import generator
from lightning_recipes.core.recipe import Paper

PAPER = Paper(
    "Global Convergence of Sub-gradient Method for Robust Matrix Recovery: Small Initialization, Noisy Measurements,"
    " and Over-parameterization",
    "J. Ma, S. Fattahi",
    2022,
    "https://arxiv.org/abs/2202.08788",
)


class FactorProduct(nn.Module):
    """X = U V^T, ``[d1, r]`` and ``[d2, r]`` to ``[d1, d2]``, as a part, so that dL/dX can be read at its output.

    In fp32 at least, also under autocast: from a small start its entries are products of two small numbers.
    """

    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        wide = torch.promote_types(u.dtype, torch.float32)
        with torch.autocast(u.device.type, enabled=False):
            return u.to(wide) @ v.to(wide).T


def measure(a: Tensor, x: Tensor) -> Tensor:
    """<A_i, X>, ``[m, d1, d2]`` and ``[d1, d2]`` to ``[m]``, outside autocast."""
    with torch.autocast(x.device.type, enabled=False):
        return a.flatten(1).to(x.dtype) @ x.flatten()


def check_measurements(a: Tensor, y: Tensor, shape: tuple[int, int] | None = None) -> None:
    """Refuse measurements that cannot be those of one matrix.

    Args:
        a, y: matrices and values, one a measurement.
        shape: of X; None for any square one.

    Raises:
        ValueError: says what is wrong; of a y that is not finite, its index.
    """
    d1, d2 = shape if shape is not None else (a.shape[-1], a.shape[-1])
    if y.dim() != 1 or len(y) == 0:
        raise ValueError(f"y must be [m] with at least one measurement; got {list(y.shape)}")
    if a.dim() != 3 or tuple(a.shape) != (len(y), d1, d2):
        raise ValueError(f"A must be [m, {d1}, {d2}] with m={len(y)} as y has it; got {list(a.shape)}")
    bad = (~torch.isfinite(y)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"y[{bad[0]}] is {y[bad[0]].item()}, and measurements must be finite ({len(bad)} are not)")


class LowRankRecovery(LightningModule):
    """Fits X = U U^T (or U V^T) to measurements by (sub-)gradient descent on the factors.

    Batches are (A ``[m, d, d]``, y ``[m]``), as of MatrixSensingDataModule; for validation and test the true X
    ``[1, d, d]``. Logs train/loss, and val/error and test/error, ||X - X*||_F.

    Args:
        d: X is d x d.
        rank: r', columns of the factors; None for d.
        symmetric: X = U U^T; otherwise X = U V^T.
        loss: "l1", mean absolute error, or "mse", mean squared error.
        lr: rate of plain SGD, without SubGM.
        init_scale: of the first factors, whose entries are N(0, init_scale^2 / d), without SubGM.
        balance: weight of ||U^T U - V^T V||_F^2 / 4 where X = U V^T (ours); 0 for none.
        seed: of the first factors.

    Raises:
        ValueError: for bad arguments; in the first step for measurements that are not of X.
    """

    paper = PAPER
    does = "Fits an over-parameterised low-rank matrix to measurements of which some are grossly wrong."
    use_when = "You want to see SubGM at work in the setting of its theory."
    costs = "Two products of all measurements with a d x d matrix a step."
    purpose = "modules"

    def __init__(
        self,
        d: int = 20,
        rank: int | None = None,
        symmetric: bool = True,
        loss: Literal["l1", "mse"] = "l1",
        lr: float = 0.01,
        init_scale: float = 1.0,
        balance: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        rank = d if rank is None else rank
        for name, value, ok, allowed in (
            ("d", d, d >= 1, "at least 1"),
            ("rank", rank, rank >= 1, "None or at least 1"),
            ("loss", loss, loss in ("l1", "mse"), "'l1' or 'mse'"),
            ("lr", lr, lr > 0, "positive"),
            ("init_scale", init_scale, init_scale > 0, "positive: zero is a saddle and never moves"),
            ("balance", balance, balance == 0 or (balance > 0 and not symmetric), "0, or positive for X = U V^T"),
        ):
            if not ok:
                raise ValueError(f"{name}={value!r}: must be {allowed}")
        self.save_hyperparameters()
        self.d, self.lr, self.loss, self.balance = d, lr, loss, balance
        draws = generator(seed, "LowRankRecovery")
        first = lambda: nn.Parameter(init_scale * torch.randn(d, rank, generator=draws) / d**0.5)  # noqa: E731
        self.U = first()
        if not symmetric:
            self.V = first()
        self.product = FactorProduct()
        self._checked = False

    def forward(self) -> Tensor:
        """X, ``[d, d]``."""
        return self.product(self.U, getattr(self, "V", self.U))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        a, y = batch
        if not self._checked:
            check_measurements(a, y, (self.d, self.d))
            self._checked = True
        found = measure(a, self())
        y = y.to(found.dtype)
        loss = F.l1_loss(found, y) if self.loss == "l1" else F.mse_loss(found, y)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(y))
        if self.balance:
            loss = loss + self.balance * (self.U.T @ self.U - self.V.T @ self.V).square().sum() / 4
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: Any) -> None:
        truth = batch[0] if isinstance(batch, (tuple, list)) else batch
        error = torch.linalg.norm(self() - truth.reshape(self.d, self.d))
        self.log(f"{stage}/error", error, prog_bar=True, batch_size=1, sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """X, whatever the batch."""
        return self()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)
