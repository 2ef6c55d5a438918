"""The linear student whose training and test error are known at every step.

Advani, Saxe, Sompolinsky, 2020 (https://arxiv.org/abs/1710.03667), as `StudentTeacherDataModule` has it. By full-batch
gradient descent at a constant rate eta on the mean squared error of P samples, step k is at time t = 2 eta k / P of
the theory (callbacks/diagnostics/generalization_dynamics.py), stable below eta = P / l_max.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_recipes.core.random import generator
from lightning_recipes.core.recipe import Paper
from lightning_recipes.modules.on_pairs import OnPairs


def true_test_error(weight: Tensor, teacher: Tensor, noise: float = 1.0) -> float:
    """The expected squared error on new samples, noise + |w - w'|^2 / N: for inputs of N entries of variance 1/N.

    Args:
        weight, teacher: ``[N]`` or ``[1, N]``.
        noise: variance of the labels' noise.
    """
    return noise + float((weight.reshape(-1).double() - teacher.reshape(-1).double()).square().mean())


class LinearStudent(OnPairs):
    """y = w x without a bias, by plain SGD on the mean squared error.

    Batches are (x ``[n, N]``, y ``[n]``). Logs train/loss and, for val and test, loss.

    Args:
        n_features: N.
        init_std: standard deviation of the first weights; its square over the noise is the INR.
        lr: eta, below P / l_max, for P samples and the largest eigenvalue of X X^T (some (1 + sqrt(P/N))^2).
        seed: of the first weights.

    Raises:
        ValueError: for bad arguments.
    """

    paper = Paper(
        "High-dimensional dynamics of generalization error in neural networks",
        "M. S. Advani, A. M. Saxe, H. Sompolinsky",
        2020,
        "https://arxiv.org/abs/1710.03667",
    )
    does = "Trains a linear student of a noisy linear teacher, whose errors theory knows at every step."
    use_when = "You want to see overtraining, early stopping and frozen weights where all of it can be computed."
    costs = "One matrix-vector product a step."
    purpose = "modules"

    def __init__(self, n_features: int = 100, init_std: float = 0.0, lr: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        for name, value, ok, allowed in (
            ("n_features", n_features, n_features >= 1, "at least 1"),
            ("init_std", init_std, init_std >= 0 and math.isfinite(init_std), "at least 0"),
            ("lr", lr, lr > 0, "positive"),
        ):
            if not ok:
                raise ValueError(f"{name}={value!r}: must be {allowed}")
        self.save_hyperparameters()
        self.lr = lr
        self.readout = nn.Linear(n_features, 1, bias=False, device="meta")  # without its own draws
        draws = generator(seed, "LinearStudent")
        self.readout.weight = nn.Parameter(init_std * torch.randn(1, n_features, generator=draws))

    def forward(self, x: Tensor) -> Tensor:
        """``[n, N]`` to ``[n]``."""
        return self.readout(x)[:, 0]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)
