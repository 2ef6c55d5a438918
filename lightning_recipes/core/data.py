"""Which samples of a user's own loaders a fit sees: chosen ones for good, or some classes from a boundary on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    WeightedRandomSampler,
)

from lightning_recipes.core.distributed import active, rank_and_world
from lightning_recipes.core.errors import RecipeError, speaking_for
from lightning_recipes.core.labels import labels_of
from lightning_recipes.core.patch import Patch


class ClassesShown:
    """Shows a fit only some classes of its training and validation data, whatever loaders it has.

    Acts on loaders when Lightning asks for them: what is set afterwards counts from the next reload on.

    Args:
        trainer: the user's.
        owner: the recipe that asks, for messages.
        check: called with the labels of the whole training set, once, before anything is trained.

    Attributes:
        training, evaluation: the classes to show; None shows all.
    """

    def __init__(
        self, trainer: pl.Trainer, owner: object, check: Callable[[Tensor], None] = lambda labels: None
    ) -> None:
        self.trainer, self._owner, self._check = trainer, owner, check
        self.training: Iterable[int] | None = None
        self.evaluation: Iterable[int] | None = None
        self._labels: dict[int, tuple[Any, Tensor]] = {}  # by data set, which is kept so that its id stays its own

    def install(self, undo: ExitStack) -> None:
        """Take hold of both sources of loaders; leave the removal with `undo`."""
        fit = self.trainer.fit_loop
        for source, training in ((fit._data_source, True), (fit.epoch_loop.val_loop._data_source, False)):
            patch = Patch(source, "dataloader", lambda: None)
            patch._function = lambda patch=patch, training=training: self._asked(patch, training)
            undo.callback(patch.restore)

    def _asked(self, patch: Patch, training: bool) -> Any:
        loaders = patch.original()
        with speaking_for(self._owner):
            return self._shown(loaders, training)

    def _shown(self, loaders: Any, training: bool) -> Any:
        classes = self.training if training else self.evaluation
        if classes is None or loaders is None:
            return loaders
        if isinstance(loaders, Mapping):
            return {name: self._shown(loader, training) for name, loader in loaders.items()}
        if isinstance(loaders, (list, tuple)):
            return [self._shown(loader, training) for loader in loaders]
        check_can_be_cut(loaders)
        labels = self._labels_of(loaders.dataset, training)
        kept = torch.isin(labels, torch.tensor(sorted(classes))).nonzero().flatten()
        return only(loaders, kept.tolist())

    def _labels_of(self, dataset: Any, training: bool) -> Tensor:
        if id(dataset) not in self._labels:
            labels = labels_of(dataset)
            if training:
                self._check(labels)
            self._labels[id(dataset)] = dataset, labels
        return self._labels[id(dataset)][1]


def check_can_be_cut(loader: Any) -> None:
    """Refuse a loader of which no share can be taken.

    Raises:
        RecipeError: says what it is.
    """
    if not _can_be_cut(loader):
        raise RecipeError(
            f"the classes of a {_kind_of(loader)} cannot be shown one after the other; give a plain DataLoader"
            " over a data set that is read by index, or a ClassIncrementalDataModule"
        )


def _can_be_cut(loader: Any) -> bool:
    stock = type(loader) is DataLoader and (type(loader.batch_sampler) is BatchSampler or loader.batch_sampler is None)
    return stock and not isinstance(loader.dataset, IterableDataset)


def _kind_of(loader: Any) -> str:
    of = f" of {type(loader.dataset).__name__}" if isinstance(loader, DataLoader) else ""
    return f"{type(loader).__name__}{of}"


class SamplesKept:
    """Has a fit train on some samples of its training set alone, whatever loader has them. Install it with
    ``plan.install``: then it is in place before anybody asks how many steps the fit has.

    Args:
        trainer: the user's.
        owner: the recipe that asks, for messages.
        choose: from the whole training set to the ascending indices to keep; called whenever Lightning asks for the
            loader, on every rank, and must answer the same on all of them.
    """

    def __init__(self, trainer: pl.Trainer, owner: object, choose: Callable[[Any], Sequence[int]]) -> None:
        self.trainer, self._owner, self._choose = trainer, owner, choose

    def install(self, undo: ExitStack) -> None:
        """Take hold of the source of training loaders; leave the removal with `undo`."""
        fit = self.trainer.fit_loop
        patch = Patch(fit._data_source, "dataloader", lambda: self._kept(patch.original()))
        undo.callback(patch.restore)
        fit._combined_loader = None  # of a module that has asked for its data already

    def _kept(self, loaders: Any) -> Any:
        with speaking_for(self._owner):
            if isinstance(loaders, (list, tuple)) and len(loaders) == 1:
                return [self._kept(loaders[0])]
            if isinstance(loaders, Mapping) and len(loaders) == 1:
                return {name: self._kept(loader) for name, loader in loaders.items()}
            if not _can_be_cut(loaders):
                several = isinstance(loaders, (list, tuple, Mapping))
                raise RecipeError(
                    f"no part of {'several loaders' if several else f'a {_kind_of(loaders)}'} can be taken; give one"
                    " plain DataLoader over a data set that is read by index"
                )
            return only(loaders, list(self._choose(loaders.dataset)))


def only(loader: DataLoader, kept: list[int]) -> DataLoader:
    """The same loader over some samples of its data set.

    Stock samplers stay what they are; one that draws by weight draws as large a share of what is left. Any other must
    go once over the data set an epoch, on all ranks together; then the ranks' orders are joined, what is not kept is
    left out, and the rest is dealt to the ranks in turn.

    Args:
        loader: a plain DataLoader.
        kept: indices of the samples, ascending.
    """
    dataset, sampler = Subset(loader.dataset, kept), loader.sampler
    once = type(sampler) is RandomSampler and not sampler.replacement and sampler._num_samples is None
    if once and kept:
        sampler = RandomSampler(dataset, generator=sampler.generator)
    elif type(sampler) is SequentialSampler or not kept:
        sampler = SequentialSampler(dataset)
    elif type(sampler) is WeightedRandomSampler:
        draws = max(round(sampler.num_samples * len(kept) / len(loader.dataset)), 1)
        weights = torch.as_tensor(sampler.weights)[kept]
        sampler = WeightedRandomSampler(weights, draws, sampler.replacement, sampler.generator)
    else:
        sampler = _Rest(sampler, len(loader.dataset), kept)
    return DataLoader(
        dataset,
        batch_size=loader.batch_size,
        sampler=sampler,
        drop_last=loader.drop_last,
        **{name: getattr(loader, name) for name in _KEPT},
    )


_KEPT = (
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
    "persistent_workers",
    "in_order",
)


class _Rest(Sampler[int]):
    """What a sampler's order leaves when some samples are taken out; places in the smaller set."""

    def __init__(self, sampler: Any, size: int, kept: list[int]) -> None:
        self.sampler, self.size = sampler, size
        self.place = {index: place for place, index in enumerate(kept)}

    def set_epoch(self, epoch: int) -> None:
        """For samplers that shuffle by the epoch."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return -(-len(self.place) // rank_and_world()[1])

    def __iter__(self) -> Iterator[int]:
        rank, world = rank_and_world()
        own = list(self.sampler)
        orders: list[Any] = [own]
        if active():
            orders = [None] * world
            dist.all_gather_object(orders, own)
        joined = [index for turn in itertools.zip_longest(*orders) for index in turn if index is not None]
        rest = [self.place[index] for index in joined[: self.size] if index in self.place]
        if len(set(rest)) != len(self.place) or len(rest) != len(self.place):
            raise RecipeError(
                f"{type(self.sampler).__name__} does not go once over the {self.size} training samples, so its order"
                " cannot be cut; use another sampler (for classes in turn a ClassIncrementalDataModule will do)"
            )
        rest += rest[: -len(rest) % world]
        return iter(rest[rank::world])
