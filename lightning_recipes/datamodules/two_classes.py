"""Two classes of any other data module, as many samples of each as one likes."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule

from lightning_recipes.datamodules.base import Derived, require
from lightning_recipes.datamodules.splits import keyed_permutation


class TwoClassDataModule(Derived):
    """Tells two classes of another data module apart; labels are 0 and 1.

    Args:
        data: the data module to take samples from: its training set (whole, with its ``fraction``), validation set and
            test set, with their transforms. Its own loaders are not used.
        classes: the two, label 0 first.
        samples: training samples of each; None takes all. Validation and test have all that there are.
        **kwargs: those of `DataModule`: batch_size, num_workers, seed, ... ; ``seed`` chooses the samples.
    """

    def __init__(
        self,
        data: LightningDataModule,
        classes: tuple[int, int],
        samples: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(data, **kwargs)
        two = len(classes) == 2 and classes[0] != classes[1]
        require(two, "classes", classes, "two different labels")
        some = samples is None or (len(samples) == 2 and min(samples) >= 1)
        require(some, "samples", samples, "None or two numbers of at least 1")
        self.classes, self.samples = classes, samples

    def derive(self) -> None:
        count = self.data.num_classes
        require(min(self.classes) >= 0 and max(self.classes) < count, "classes", self.classes, f"labels below {count}")
        self.class_names = [self.data.class_names[c] for c in self.classes]
        self.train_set = self._two(self.data.train_set, self.samples)
        self.val_set, self.test_set = (
            None if each is None else self._two(each) for each in (self.data.val_set, self.data.test_set)
        )

    def _two(self, dataset: Any, samples: tuple[int, int] | None = None) -> Any:
        kept = []
        for place, c in enumerate(self.classes):
            there = torch.nonzero(dataset.labels == c).flatten()
            wanted = len(there) if samples is None else samples[place]
            require(wanted <= len(there), "samples", self.samples, f"at most {len(there)} of class {c}")
            kept.append(there[torch.from_numpy(keyed_permutation(len(there), self.seed, "two classes", c))[:wanted]])
        chosen = dataset.select(torch.cat(kept).sort().values)
        chosen.labels = (chosen.labels == self.classes[1]).long()
        return chosen
