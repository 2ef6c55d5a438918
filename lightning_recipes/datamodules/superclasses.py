"""Coarser labels over any other data module: train on super-classes, and keep the classes to probe for."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule

from lightning_recipes.datamodules.base import DataModule, require


class SuperclassDataModule(DataModule):
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
        super().__init__(**kwargs)
        require(isinstance(data, DataModule), "data", data, "a data module of lightning_recipes.datamodules")
        count = len(set(superclasses))
        whole = count > 1 and set(superclasses) == set(range(count))
        require(whole, "superclasses", list(superclasses), "numbers from 0 to at least 1, none left out")
        require(names is None or len(names) == count, "names", names, f"None or {count} names")
        self.data, self.superclasses, self.names = data, superclasses, names

    def prepare_data(self) -> None:
        self.data.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        if self.train_set is not None:
            return
        self.data.setup(stage)
        classes = self.data.num_classes
        require(
            len(self.superclasses) == classes, "superclasses", len(self.superclasses), f"one of each {classes} classes"
        )
        self.class_names = range(len(set(self.superclasses))) if self.names is None else self.names
        self.collate = self.data.collate
        self.train_set, self.val_set, self.test_set = (
            self._coarse(each) for each in (self.data.train_set, self.data.val_set, self.data.test_set)
        )

    def plain(self, dataset: Any) -> Any:
        return self.data.plain(dataset)

    def _coarse(self, dataset: Any) -> Any:
        if dataset is None:
            return None
        if not isinstance(getattr(dataset, "labels", None), torch.Tensor):
            raise ValueError(f"data={type(self.data).__name__}: its {type(dataset).__name__} has no labels to replace")
        dataset = copy.copy(dataset)
        dataset.fine, dataset.labels = dataset.labels, torch.tensor(list(self.superclasses))[dataset.labels]
        return dataset
