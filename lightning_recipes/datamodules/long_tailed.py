"""Long-tailed versions of any other data module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from lightning_recipes.datamodules.base import Derived, require
from lightning_recipes.datamodules.splits import keyed_permutation, long_tail


def exponential_profile(largest: float, classes: int, imbalance_ratio: float) -> np.ndarray:
    """n_c = largest * imbalance_ratio^(-c / (C - 1)) for c = 0..C-1, rounded down, at least 1 (Cui et al., CVPR 2019).

    With 5,000, 10 and 100 it is CIFAR-10-LT's 5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50.
    """
    exponents = np.arange(classes) / max(classes - 1, 1)
    # A whole number may come out a rounding error below itself.
    return np.maximum(np.floor(largest * imbalance_ratio**-exponents + 1e-6), 1).astype(int)


class LongTailedDataModule(Derived):
    """Trains on an exponentially long-tailed part of another data module's training set; validates and tests on all.

    Args:
        data: the data module to take samples from: its training set (whole, with its ``fraction``), validation set and
            test set, with their transforms. Its own loaders are not used.
        imbalance_ratio: samples of the largest class over samples of the smallest; 1 is balanced.
        largest: samples of the largest class; None for as many as all classes have enough for.
        class_order: classes from most to fewest samples: 'label' is 0, 1, 2, ... as in CIFAR-LT, 'random' a permutation
            by ``seed``, or the labels in a list.
        **kwargs: those of `DataModule`: batch_size, num_workers, seed, ... ; ``seed`` chooses the samples. A longer
            tail is part of a shorter one with the same order and ``largest``.
    """

    def __init__(
        self,
        data: LightningDataModule,
        imbalance_ratio: float = 100.0,
        largest: int | None = None,
        class_order: Literal["label", "random"] | Sequence[int] = "label",
        **kwargs: Any,
    ) -> None:
        super().__init__(data, **kwargs)
        require(imbalance_ratio >= 1, "imbalance_ratio", imbalance_ratio, "at least 1")
        require(largest is None or largest >= 1, "largest", largest, "None or an integer of at least 1")
        named = not isinstance(class_order, str) or class_order in ("label", "random")
        require(named, "class_order", class_order, "'label', 'random' or a list of all labels")
        self.imbalance_ratio = imbalance_ratio
        self.largest = largest
        self.class_order = class_order

    @property
    def class_counts(self) -> Tensor:
        """Training samples of each class by label, int64 (C,); known after ``setup``."""
        if self.train_set is None:
            raise RuntimeError(f"{type(self).__name__}: class_counts is known after setup()")
        return torch.bincount(self.train_set.labels, minlength=self.num_classes)

    def derive(self) -> None:
        source = self.data.train_set
        self.val_set, self.test_set = self.data.val_set, self.data.test_set
        order = self._order()
        there = np.bincount(source.labels.numpy(), minlength=self.num_classes)[order]
        self.train_set = source.select(long_tail(source.labels, self._counts(there), order, self.seed))

    def _order(self) -> np.ndarray:
        classes = self.num_classes
        if self.class_order == "label":
            return np.arange(classes)
        if self.class_order == "random":
            return keyed_permutation(classes, self.seed, "class order")
        order = np.asarray(self.class_order)
        every = sorted(order.tolist()) == list(range(classes))
        require(every, "class_order", list(self.class_order), f"each label from 0 to {classes - 1} once")
        return order

    def _counts(self, there: np.ndarray) -> np.ndarray:
        """Samples to take of each class, in the order of classes; `there` are those that there are."""
        share = self.imbalance_ratio ** (-np.arange(len(there)) / max(len(there) - 1, 1))
        enough = int(np.floor((there / share).min() + 1e-6))
        largest = enough if self.largest is None else self.largest
        counts = exponential_profile(largest, len(there), self.imbalance_ratio)
        short = np.flatnonzero(counts > there)
        if len(short):
            raise ValueError(
                f"largest={self.largest}, imbalance_ratio={self.imbalance_ratio}: asks for {counts[short[0]]} samples"
                f" of the class at place {short[0]}, which has {there[short[0]]}; largest may be at most {enough}"
            )
        return counts
