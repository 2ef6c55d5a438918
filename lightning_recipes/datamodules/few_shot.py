"""Base-to-novel few-shot learning over any other data module (the protocol of CoOp and of its successors)."""

from __future__ import annotations

from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from lightning_recipes.datamodules.base import Derived, require
from lightning_recipes.datamodules.splits import few_shots


class FewShotDataModule(Derived):
    """Trains on a few images of the first half of the classes, tests on all test images of both halves.

    The classes 0 to ceil(C/2) - 1 are base, the rest novel; labels stay those of ``data``. There are two test loaders,
    base then novel; `lightning_recipes.modules.BaseToNovelAccuracy` scores them together. Validation has base classes
    only, since novel ones must not be chosen by.

    Args:
        data: the data module to take images from: its training set (whole, with its ``fraction``), validation set and
            test set, with their transforms. Its own loaders are not used.
        shots: training images of each base class; a class that has fewer gives all.
        val_shots: validation images of each base class; None for min(shots, 4), 0 for no validation.
        **kwargs: those of `DataModule`: batch_size, num_workers, seed, ... ; ``seed`` chooses the shots.
    """

    needs = ("train_set", "test_set")

    def __init__(self, data: LightningDataModule, shots: int = 16, val_shots: int | None = None, **kwargs: Any) -> None:
        super().__init__(data, **kwargs)
        require(shots >= 1, "shots", shots, "an integer of at least 1")
        require(val_shots is None or val_shots >= 0, "val_shots", val_shots, "None or an integer of at least 0")
        self.shots = shots
        self.val_shots = min(shots, 4) if val_shots is None else val_shots
        self.base_set: Any = None
        self.novel_set: Any = None

    @property
    def num_base(self) -> int:
        """Number of base classes, ceil(C/2)."""
        return -(-self.num_classes // 2)

    def derive(self) -> None:
        require(self.data.num_classes >= 2, "data", f"{self.data.num_classes} class(es)", "of at least two classes")
        base = range(self.num_base)

        def pick(dataset: Any, shots: int) -> Any:
            return dataset.select(few_shots(dataset.labels, shots, self.seed, base))

        if self.data.val_set is not None and self.val_shots > 0:
            self.val_set = pick(self.data.val_set, self.val_shots)
        is_base = self.data.test_set.labels.numpy() < self.num_base
        self.base_set = self.data.test_set.select(np.flatnonzero(is_base))
        self.novel_set = self.data.test_set.select(np.flatnonzero(~is_base))
        self.test_set = self.data.test_set
        self.train_set = pick(self.data.train_set, self.shots)

    def test_dataloader(self) -> list[DataLoader]:
        return [self.evaluation_loader(self.base_set), self.evaluation_loader(self.novel_set)]
