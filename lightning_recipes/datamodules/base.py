"""The data loaders that every data module here shares."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, Subset

from lightning_recipes.core.labels import labels_of
from lightning_recipes.datamodules.samplers import EpochShuffle


def require(ok: bool, name: str, value: Any, allowed: str) -> None:
    """One form for every bad argument: its name, the value given, what is allowed."""
    if not ok:
        raise ValueError(f"{name}={value!r}: must be {allowed}")


def check_shares(val_fraction: float, test_fraction: float, fraction: float) -> None:
    """The three shares that a labelled set is cut by."""
    require(0 <= val_fraction < 1, "val_fraction", val_fraction, "at least 0 and below 1")
    require(0 <= test_fraction < 1, "test_fraction", test_fraction, "at least 0 and below 1")
    require(0 < fraction <= 1, "fraction", fraction, "above 0 and at most 1")


def find(path: str | os.PathLike, name: str = "path") -> str:
    """The absolute path of a file or folder (``~`` and ``$VARIABLES`` are expanded), or one error that says where."""
    full = os.path.abspath(os.path.expandvars(os.path.expanduser(os.fspath(path))))
    if not os.path.exists(full):
        raise FileNotFoundError(f"{name}={os.fspath(path)!r}: nothing there (looked for {full})")
    return full


class DataModule(LightningDataModule):
    """Training, validation and test loaders over ``train_set``, ``val_set`` and ``test_set``.

    A subclass fills the three sets and ``class_names`` in ``setup``; an empty or missing set has no loader.
    The training loader shuffles, by (seed, ``seed_everything``'s seed, epoch): the order is the same after a resume and
    shared out between the ranks of a distributed run. Splits depend on ``seed`` alone.

    Args:
        batch_size: samples in a batch of one process.
        num_workers: worker processes of each loader.
        pin_memory: page-locked host memory; None for: where there is a CUDA device.
        persistent_workers: keep the workers between epochs (without workers it does nothing).
        drop_last: drop the last, smaller training batch.
        seed: of the splits, the shares and (together with the global seed) the order.
    """

    def __init__(
        self,
        batch_size: int = 64,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        persistent_workers: bool = True,
        drop_last: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        require(batch_size >= 1, "batch_size", batch_size, "an integer of at least 1")
        require(num_workers >= 0, "num_workers", num_workers, "an integer of at least 0")
        require(seed >= 0, "seed", seed, "an integer of at least 0")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.persistent_workers = persistent_workers
        self.drop_last = drop_last
        self.seed = seed
        self.train_set: Any = None
        self.val_set: Any = None
        self.test_set: Any = None
        self._class_names: list[str] | None = None
        self.collate: Callable[[list], Any] | None = None

    @property
    def class_names(self) -> list[str]:
        """Name of each label; known after ``setup``."""
        if self._class_names is None:
            raise RuntimeError(f"{type(self).__name__}: class_names and num_classes are known after setup()")
        return self._class_names

    @class_names.setter
    def class_names(self, names: list[str]) -> None:
        self._class_names = [str(name) for name in names]

    @property
    def num_classes(self) -> int:
        """Number of classes; known after ``setup``."""
        return len(self.class_names)

    def plain(self, dataset: Any) -> Any:
        """A set of this data module's samples with the transform that they have in an evaluation."""
        return dataset

    @property
    def plain_train_set(self) -> Any:
        """The training samples as an evaluation sees them; None before ``setup``."""
        return None if self.train_set is None else self.plain(self.train_set)

    def train_dataloader(self) -> DataLoader:
        sampler = EpochShuffle(self.train_set, shuffle=True, seed=self.order_seed, **self.shard)
        return self.training_loader(sampler, self.batch_size, self.drop_last)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        return self.evaluation_loader(self.val_set)

    def test_dataloader(self) -> DataLoader | list[DataLoader]:
        return self.evaluation_loader(self.test_set)

    def predict_dataloader(self) -> DataLoader | list[DataLoader]:
        return self.test_dataloader()

    @property
    def shard(self) -> dict[str, int]:
        """``num_replicas`` and ``rank`` of this process in the run that the module is attached to."""
        running = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return dict(running or {"num_replicas": 1, "rank": 0})

    @property
    def order_seed(self) -> int:
        """Seed of the training order: another ``seed_everything`` gives another order, as with Lightning's sampler."""
        return self.seed + int(os.environ.get("PL_GLOBAL_SEED", 0))

    def training_loader(self, sampler: Sampler, batch_size: int, drop_last: bool) -> DataLoader:
        if len(sampler) < (batch_size if drop_last else 1):
            raise ValueError(
                f"batch_size={batch_size}, drop_last={drop_last}: not one batch in the {len(sampler)} training samples "
                "of this process; take a smaller batch_size or a larger fraction"
            )
        if self.trainer is not None and hasattr(sampler, "set_epoch"):
            # Workers read before Lightning first calls set_epoch: after a resume that would be the wrong order.
            sampler.set_epoch(self.trainer.fit_loop.epoch_progress.current.processed)
        return self._loader(self.train_set, batch_size=batch_size, sampler=sampler, drop_last=drop_last)

    def evaluation_loader(self, dataset: Dataset | None) -> DataLoader | list[DataLoader]:
        """In order, every sample once; an empty list, which Lightning skips, where there is nothing to evaluate."""
        if dataset is None or len(dataset) == 0:
            return []
        return self._loader(dataset, batch_size=self.batch_size, shuffle=False)

    def _loader(self, dataset: Dataset, **kwargs: Any) -> DataLoader:
        return DataLoader(
            dataset,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available() if self.pin_memory is None else self.pin_memory,
            persistent_workers=self.persistent_workers and self.num_workers > 0,
            collate_fn=self.collate,
            **kwargs,
        )


class Part(Subset):
    """Some samples of a labelled set. The set below stays the same object, so that a sample keeps its index there
    whichever part it is read through.

    Args:
        dataset: read by index.
        indices: of the samples in it, in any order and as often as they shall come; None for all.
        labels: of the whole set, int64 ``[n]``; None for its own.
    """

    def __init__(self, dataset: Any, indices: Any = None, labels: Tensor | None = None) -> None:
        everything = labels_of(dataset) if labels is None else labels
        chosen = torch.arange(len(everything)) if indices is None else torch.as_tensor(indices, dtype=torch.int64)
        super().__init__(dataset, chosen.tolist())
        self._everything, self.labels = everything, everything[chosen]

    def select(self, indices: Any) -> Part:
        """The samples at `indices` of this part."""
        chosen = torch.tensor(self.indices)[torch.as_tensor(indices, dtype=torch.int64)]
        return Part(self.dataset, chosen, self._everything)


class OwnSets(DataModule):
    """Anybody's data sets as a data module of this package.

    Args:
        sets: training, validation and test set, read by index and with labels; None where there is none.
        collate: of a loader; None for PyTorch's.
        **kwargs: those of `DataModule`.
    """

    def __init__(self, sets: Sequence[Dataset | None], collate: Callable | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.sets, self.collate = sets, collate

    def setup(self, stage: str | None = None) -> None:
        if self.train_set is not None:
            return
        for name, dataset in zip(("train_set", "val_set", "test_set"), self.sets, strict=True):
            usable = dataset is None or (hasattr(dataset, "__getitem__") and not isinstance(dataset, IterableDataset))
            if not usable or (dataset is None and name == "train_set"):
                raise ValueError(f"{name}: a {type(dataset).__name__}, must be a data set that is read by index")
            setattr(self, name, None if dataset is None else Part(dataset))
        self.class_names = [str(c) for c in range(int(self.train_set.labels.max()) + 1)]


class OwnLoaders(OwnSets):
    """Anybody's data module as one of this package: the data sets and the collation of its loaders.

    Args:
        module: its training loader is one ``DataLoader``, and so are those for validation and test, where it has them.
        **kwargs: those of `DataModule`.
    """

    def __init__(self, module: LightningDataModule, **kwargs: Any) -> None:
        super().__init__((None, None, None), **kwargs)
        self.module = module

    def prepare_data(self) -> None:
        self.module.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        if self.train_set is not None:
            return
        for each in ("fit", "test"):
            self.module.setup(each)
        loaders = []
        for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
            there = is_overridden(name, self.module) or name == "train_dataloader"
            loader = getattr(self.module, name)() if there else None
            if not isinstance(loader, DataLoader) and not (loader is None and name != "train_dataloader"):
                raise ValueError(
                    f"{type(self.module).__name__}.{name} gives a {type(loader).__name__}, must give one DataLoader"
                )
            loaders.append(loader)
        self.sets, self.collate = [None if each is None else each.dataset for each in loaders], loaders[0].collate_fn
        super().setup(stage)


class Derived(DataModule, ABC):
    """Samples of another data module, chosen or labelled anew; its splits, transforms and collation.

    A subclass fills the three sets in :meth:`derive`. The other's own loaders are not used.

    Args:
        data: where to take samples from: a data module of this package; where `takes_any` says so also anybody's
            (the data sets of its loaders), or a pair or three of data sets: training, (validation,) test.
        **kwargs: those of `DataModule`.
    """

    needs: ClassVar[Sequence[str]] = ("train_set",)
    """Sets of ``data`` that must be there."""
    takes_any: ClassVar[bool] = False
    """Whether ``data`` may be anything with labelled samples that are read by index."""

    def __init__(self, data: LightningDataModule | Sequence[Dataset], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.takes_any and isinstance(data, LightningDataModule) and not isinstance(data, DataModule):
            data = OwnLoaders(data)
        elif self.takes_any and isinstance(data, (tuple, list)) and len(data) in (2, 3):
            train, *val, test = data
            data = OwnSets((train, val[0] if val else None, test))
        require(isinstance(data, DataModule), "data", data, "a data module of lightning_recipes.datamodules")
        self.data = data

    def plain(self, dataset: Any) -> Any:
        return self.data.plain(dataset)

    def prepare_data(self) -> None:
        self.data.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        if self.train_set is not None:
            return
        self.data.setup(stage)
        for name in ("train_set", "val_set", "test_set"):
            there = getattr(self.data, name)
            labelled = hasattr(there, "labels") and hasattr(there, "select")
            if not labelled and (there is not None or name in self.needs):
                raise ValueError(f"data={type(self.data).__name__}: has no labelled {name}")
        self.class_names, self.collate = self.data.class_names, self.data.collate
        self.derive()

    @abstractmethod
    def derive(self) -> None:
        """Fill ``train_set``, ``val_set`` and ``test_set`` from those of ``data``, which is set up; runs once."""
