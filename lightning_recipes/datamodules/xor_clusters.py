"""Clusters in an XOR arrangement with flipped training labels: what no linear rule can tell apart.

Xu, Wang, Frei, Vardi, Hu, "Benign Overfitting and Grokking in ReLU Networks for XOR Cluster Data", 2024
(https://arxiv.org/abs/2310.02541; no official code). With two orthogonal means mu1, mu2 of one norm in p dimensions:

    x = centre + z,   centre uniform in {+mu1, -mu1, +mu2, -mu2},   z ~ N(0, I_p)
    clean label +1 for the centres +-mu1, -1 for +-mu2; a training label is flipped with probability eta

Everything is invariant to rotations, so mu1 and mu2 lie along the first two axes.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_recipes.core.random import generator
from lightning_recipes.core.recipe import Paper
from lightning_recipes.datamodules.base import DataModule, require
from lightning_recipes.datamodules.samplers import EpochShuffle

PAPER = Paper(
    "Benign Overfitting and Grokking in ReLU Networks for XOR Cluster Data",
    "Z. Xu, Y. Wang, S. Frei, G. Vardi, W. Hu",
    2024,
    "https://arxiv.org/abs/2310.02541",
)
FEW = 10.0
"""What of sqrt(n) |mu|^2 / sqrt(p) counts as much larger than 1."""


def fit_ratio(n: int, p: int, mu_norm: float) -> float:
    """sqrt(n) |mu|^2 / p: every sample, flipped or not, is fitted where it is below 1 (and n is far below p)."""
    return math.sqrt(n) * mu_norm**2 / p


def generalisation_ratio(n: int, p: int, mu_norm: float) -> float:
    """sqrt(n) |mu|^2 / sqrt(p): the clusters can be learnt where it is far above 1."""
    return math.sqrt(n) * mu_norm**2 / math.sqrt(p)


def balanced_draw(n: int, eta: float, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Exactly n / 4 samples of each centre and round(eta n / 4) flips inside each, in random order.

    Returns:
        centre 0 to 3 int64 ``[n]``, and whether the label is flipped, bool ``[n]``.
    """
    quarter = n // 4
    flips = torch.arange(quarter) < round(eta * quarter)
    order = torch.randperm(n, generator=draws)
    return torch.arange(4).repeat_interleave(quarter)[order], flips.repeat(4)[order]


def independent_draw(n: int, eta: float, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Centres and flips of each sample on its own; as :func:`balanced_draw`."""
    return torch.randint(4, (n,), generator=draws), torch.rand(n, generator=draws) < eta


class XORClusters(TensorDataset):
    """Samples ``(x, y)`` around the four centres +mu1, -mu1, +mu2, -mu2.

    Args:
        centres: which of them each sample belongs to, int64 ``[n]``.
        flip_mask: whether its label is flipped, bool ``[n]``.
        means: mu1 and mu2, ``[2, p]``.
        draws: of the noise.
        label_dtype: "pm1" for labels -1 and 1 in fp32, "long" for 0 and 1 in int64.
    """

    def __init__(
        self,
        centres: Tensor,
        flip_mask: Tensor,
        means: Tensor,
        draws: torch.Generator,
        label_dtype: Literal["pm1", "long"] = "pm1",
    ) -> None:
        x = torch.cat([means[:1], -means[:1], means[1:], -means[1:]])[centres]
        x = x.add_(torch.randn(x.shape, generator=draws))
        self.centres, self.flip_mask = centres, flip_mask
        labels = (centres < 2) != flip_mask
        super().__init__(x, labels.float() * 2 - 1 if label_dtype == "pm1" else labels.long())

    @property
    def labels(self) -> Tensor:
        """``[n]``, those that are trained on."""
        return self.tensors[1]


class XORClusterDataModule(DataModule):
    """XOR clusters: a noisy training set in one batch, and clean validation and test sets.

    One epoch is one step of gradient descent on all n samples, in their order. On several ranks each has its share of
    the same data, of n / ranks samples.

    Attributes:
        mu1, mu2: the means ``[p]``.
        flip_mask: which training labels are flipped, bool ``[n]``; the training set has it too. After ``setup``.

    Args:
        n: training samples.
        p: dimension.
        mu_norm: norm of the means. Outside of n << p, sqrt(n) mu_norm^2 < p and sqrt(n) mu_norm^2 >> sqrt(p) (a rule of
            thumb) there is a warning.
        eta: probability that a training label is flipped, below 1/2.
        balanced: exactly n/4 samples of each centre and round(eta n/4) flips inside each. With independent draws of
            some 200 samples about one seed in four has clusters so uneven that a linear shortcut remains.
        n_val: samples of the validation set, and of the test set.
        seed: of all draws.
        label_dtype: "pm1" for labels -1 and 1 in fp32, "long" for 0 and 1 in int64.
        num_workers: worker processes of each loader.

    Raises:
        ValueError: for bad arguments.
    """

    paper = PAPER
    does = "Draws clusters in an XOR arrangement with flipped training labels, in one batch."
    use_when = "You want to see benign overfitting and grokking, with TwoLayerReLU and GrokkingMonitor."
    costs = "4 (n + 2 n_val) p bytes of memory."
    purpose = "datamodules"

    def __init__(
        self,
        n: int = 200,
        p: int = 10_000,
        mu_norm: float = 20.0,
        eta: float = 0.15,
        balanced: bool = True,
        n_val: int = 1000,
        seed: int = 0,
        label_dtype: Literal["pm1", "long"] = "pm1",
        num_workers: int = 0,
    ) -> None:
        require(n >= 4, "n", n, "at least 4")
        super().__init__(batch_size=n, num_workers=num_workers, seed=seed)
        require(p >= 2, "p", p, "at least 2")
        require(mu_norm > 0 and math.isfinite(mu_norm), "mu_norm", mu_norm, "positive")
        require(0 <= eta < 0.5, "eta", eta, "at least 0 and below 0.5: with half of the labels flipped none is left")
        require(not balanced or n % 4 == 0, "n", n, "a multiple of 4 for a balanced draw (or balanced=False)")
        require(n_val >= 1, "n_val", n_val, "at least 1")
        require(label_dtype in ("pm1", "long"), "label_dtype", label_dtype, "'pm1' or 'long'")
        self.n, self.p, self.mu_norm, self.eta, self.balanced = n, p, mu_norm, eta, balanced
        self.n_val, self.label_dtype = n_val, label_dtype
        fit, generalise = fit_ratio(n, p, mu_norm), generalisation_ratio(n, p, mu_norm)
        if fit >= 1 or n >= p or generalise < FEW:
            rank_zero_warn(
                f"mu_norm={mu_norm:g} with n={n} and p={p}: sqrt(n) mu_norm^2 / p is {fit:.3g} and should be below 1"
                f" (for n far below p) for all labels to be fitted; sqrt(n) mu_norm^2 / sqrt(p) is {generalise:.3g} and"
                f" should be far above 1 (at least {FEW:g}) for the clusters to be learnt"
            )
        means = torch.zeros(2, p)
        means[0, 0] = means[1, 1] = mu_norm
        self.mu1, self.mu2 = means
        self.flip_mask: Tensor | None = None
        self.class_names = ["mu2", "mu1"]

    def setup(self, stage: str | None = None) -> None:
        if self.train_set is not None:
            return
        self.train_set = self._draw("train", self.n, self.eta, self.balanced)
        self.val_set, self.test_set = (self._draw(name, self.n_val, 0.0, False) for name in ("val", "test"))
        self.flip_mask = self.train_set.flip_mask

    def _draw(self, name: str, n: int, eta: float, balanced: bool) -> XORClusters:
        draws = generator(self.seed, "XOR clusters", name)
        centres, flips = (balanced_draw if balanced else independent_draw)(n, eta, draws)
        return XORClusters(centres, flips, torch.stack([self.mu1, self.mu2]), draws, self.label_dtype)

    def train_dataloader(self) -> DataLoader:
        sampler = EpochShuffle(self.train_set, shuffle=False, **self.shard)
        return self.training_loader(sampler, self.batch_size, self.drop_last)
