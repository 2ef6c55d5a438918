"""Coarser labels over any other data module: train on super-classes, and keep the classes to probe for."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule

from lightning_recipes.datamodules.base import Derived, require


class SuperclassDataModule(Derived):
    """Labels every sample by the super-class of its class.

    The sets keep the classes in an attribute ``fine`` ``[n]``, for ``PrePostMonitor(labels="fine")``.

    Args:
        data: the data module to take samples from, with their splits and transforms. Its own loaders are not used.
        superclasses: super-class of each class, from 0; [0, 1, 0, 1, ...] makes digits even and odd.
        names: of the super-classes; None numbers them.
        **kwargs: those of `DataModule`: batch_size, num_workers, seed, ...
    """

    def __init__(
        self, data: LightningDataModule, superclasses: Sequence[int], names: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(data, **kwargs)
        count = len(set(superclasses))
        whole = count > 1 and set(superclasses) == set(range(count))
        require(whole, "superclasses", list(superclasses), "numbers from 0 to at least 1, none left out")
        require(names is None or len(names) == count, "names", names, f"None or {count} names")
        self.superclasses, self.names = superclasses, names

    def derive(self) -> None:
        classes = self.data.num_classes
        require(
            len(self.superclasses) == classes, "superclasses", len(self.superclasses), f"one of each {classes} classes"
        )
        self.class_names = range(len(set(self.superclasses))) if self.names is None else self.names
        self.train_set, self.val_set, self.test_set = (
            self._coarse(each) for each in (self.data.train_set, self.data.val_set, self.data.test_set)
        )

    def _coarse(self, dataset: Any) -> Any:
        if dataset is None:
            return None
        dataset = copy.copy(dataset)
        dataset.fine, dataset.labels = dataset.labels, torch.tensor(list(self.superclasses))[dataset.labels]
        return dataset
