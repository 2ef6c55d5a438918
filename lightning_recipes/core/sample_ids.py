"""Which samples a training batch is made of: their indices in the data set, whatever sampler and workers brought them.

For the length of a fit the loader fetches from a stand-in of its data set that hands on the index with the sample, and
collates by a stand-in of its ``collate_fn`` that hands on the indices with the batch. The iterator takes them off again
as it gives the batch out. So nothing of the user's ever sees them: not the ``collate_fn``, which gets the samples, nor
any hook, which gets the batch; whoever iterates over the loader besides the fit gets plain batches too.

An index is that of the data set at the bottom of all ``Subset``s: it stays a sample's own when the fit is shown another
part of the data. It costs one 8-byte integer a sample and batch.
"""

from __future__ import annotations

import operator
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset

from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.loader import StandIn, when_made


class SampleIds:
    """Knows the ids of the samples of the batch that a fit trains on. Install it with ``plan.install``.

    Args:
        trainer: the user's.
        who: needs the ids, for messages.
        otherwise: what else the user can do, for messages.
        check: called with the size of the data set whenever Lightning makes the loader.

    Attributes:
        total: samples of the data set; ids are below it.
        most: samples that a batch has at most, where the loader says so.
    """

    def __init__(
        self, trainer: pl.Trainer, who: str, otherwise: str = "", check: Callable[[int], None] = lambda total: None
    ) -> None:
        self.total = 0
        self.most: int | None = None
        self._loop, self._who, self._otherwise, self._check = trainer.fit_loop, who, otherwise, check
        self._root: Tensor | None = None  # from the loader's index to the id; None where they are the same

    def install(self, undo: ExitStack) -> None:
        """Take hold of every training loader that Lightning makes; leave the removal with `undo`."""
        when_made(self._loop, lambda combined: self._take_hold(combined, undo), undo)

    def now(self) -> Tensor:
        """The ids of the batch that is trained on, int64 ``[n]`` on the CPU, in the batch's order.

        Raises:
            RecipeError: when the batch came without, or by something else than integers.
        """
        fetcher = self._loop._data_fetcher
        iterator = self._loop._combined_loader._iterator.iterators[0]
        kept = getattr(iterator, _KEPT, None)
        if not kept:
            raise self._error("its batches come from elsewhere than its data set")
        ahead = len(getattr(fetcher, "batches", ()))  # without a length Lightning fetches before it trains
        ids = kept[-1 - ahead]
        if isinstance(ids, str):
            raise self._error(f"its sampler gives {ids}, no integers")
        ids = torch.from_numpy(ids)
        return ids if self._root is None else self._root[ids]

    def _take_hold(self, combined: CombinedLoader, undo: ExitStack) -> None:
        loaders = combined.flattened
        if len(loaders) != 1:
            raise self._error(f"there are {len(loaders)} training loaders")
        (loader,) = loaders
        if not isinstance(loader, DataLoader):
            raise self._error(f"the training data are a {type(loader).__name__}")
        if isinstance(loader.dataset, IterableDataset):
            raise self._error(f"{type(loader.dataset).__name__} is read from one end to the other")
        self.most = loader.batch_size
        self.total, self._root = root_of(loader.dataset)
        self._check(self.total)
        if "_get_iterator" not in loader.__dict__:  # a reload may give the same one
            _number(loader, undo)

    def _error(self, why: str) -> RecipeError:
        return RecipeError(
            f"{self._who} needs a stable id per training sample; give a map-style dataset{self._otherwise} ({why})"
        )


def root_of(dataset: Any) -> tuple[int, Tensor | None]:
    """Size of the data set below all ``Subset``s, and the index there of every sample."""
    root: Tensor | None = None
    while isinstance(dataset, Subset) and _reads_as_subsets_do(type(dataset)):
        indices = torch.as_tensor(dataset.indices, dtype=torch.int64)
        root = indices if root is None else indices[root]
        dataset = dataset.dataset
    total = len(dataset)
    return total, None if root is None else torch.where(root < 0, root + total, root)


def _reads_as_subsets_do(kind: type[Subset]) -> bool:
    """Whether a kind of subset gives the samples at its indices; one that reads by rules of its own is a set itself."""
    return kind.__getitem__ is Subset.__getitem__ and kind.__getitems__ is Subset.__getitems__


_KEPT = "_lightning_recipes_sample_ids"  # on an iterator: ids of the batches that it gave out last


def _number(loader: DataLoader, undo: ExitStack) -> None:
    """Have every iterator of a loader keep the ids of what it gives out."""

    def get_iterator() -> Any:
        own = {name: loader.__dict__[name] for name in ("dataset", "collate_fn")}
        # for the iterator and its workers only, which are made here
        loader.__dict__.update(dataset=_Numbered(own["dataset"]), collate_fn=_Collate(own["collate_fn"]))
        try:
            iterator = type(loader)._get_iterator(loader)
        finally:
            loader.__dict__.update(own)
        _take_off(iterator)
        return iterator

    def back() -> None:
        del loader.__dict__["_get_iterator"]
        loader.__dict__["_iterator"] = None

    loader.__dict__.update(_get_iterator=get_iterator, _iterator=None)  # persistent workers begin anew
    undo.callback(back)


def _take_off(iterator: Any) -> None:
    """Have an iterator give out the batch and keep the ids."""
    kept: deque[Any] = deque(maxlen=2)
    weak = weakref.ref(iterator)  # in no circle: its workers end when nobody holds it

    def next_data() -> Any:
        own = weak()
        batch, ids = type(own)._next_data(own)
        kept.append(ids)
        return batch

    iterator._next_data = next_data
    setattr(iterator, _KEPT, kept)


class _Fetched(NamedTuple):
    """What a data set gave, and what it was asked for."""

    samples: Any
    indices: Sequence[Any]


class _WithIds(NamedTuple):
    """A collated batch and its ids, int64 ``[n]``; a description of the first index that is no integer instead."""

    batch: Any
    ids: np.ndarray | str


class _Numbered(StandIn):
    """A data set that hands on the indices with what it gives."""

    def __getitem__(self, index: Any) -> _Fetched:
        """Asked by a loader that does not batch: one index, or a batch of them from the sampler."""
        several = isinstance(index, (list, tuple, range, np.ndarray, Tensor)) and np.ndim(index) > 0
        return _Fetched(self._own[index], index if several else [index])

    def __getitems__(self, indices: Sequence[Any]) -> _Fetched:
        """Asked by a loader that batches."""
        several = getattr(self._own, "__getitems__", None)
        return _Fetched(several(indices) if several else [self._own[index] for index in indices], indices)


class _Collate:
    """A ``collate_fn`` that hands on the indices with the batch."""

    def __init__(self, own: Callable[[Any], Any]) -> None:
        self._own = own

    def __call__(self, fetched: _Fetched) -> _WithIds:
        return _WithIds(self._own(fetched.samples), _as_ids(fetched.indices))


def _as_ids(indices: Sequence[Any]) -> np.ndarray | str:
    found = np.empty(len(indices), np.int64)
    for place, index in enumerate(indices):
        try:
            found[place] = operator.index(index)
        except TypeError:
            return repr(index)
    return found
