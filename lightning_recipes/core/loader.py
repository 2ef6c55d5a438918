"""The place of a run in its training data, and going back to it in another process.

A map-style ``DataLoader`` becomes torchdata's stateful one for the length of the fit, in place: the same object with
the same attributes, so that whoever holds it sees no difference. torchdata keeps count of what was handed out and
carries each worker's state along with its batches; what it leaves out is added here: the order that a sampler drew
from random numbers, and the random state in which a worker left off. Then going back reads no sample twice.

Anything else that Lightning takes for training data (several loaders at once, an ``IterableDataset``, a loader class of
the user's own) is read again from the beginning of the epoch, with the random state of that moment, up to the place.
"""

from __future__ import annotations

import random as python_random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.data import _set_sampler_epoch, sized_len
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_recipes.core import random
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.patch import Patch


class TrainingData:
    """Where in its training data a fit stands.

    Args:
        trainer: the user's.
        place: what :meth:`place` gave in the process that is continued; None for a fit from the beginning.
    """

    def __init__(self, trainer: pl.Trainer, place: Mapping[str, Any] | None = None) -> None:
        self._loop, self._resume = trainer.fit_loop, place
        self._loader: CombinedLoader
        self._held_once = False
        self._way = "again"  # or 'skip', or 'own': how another process gets to the place
        self._began: dict[str, Any] | None = None
        self._first: dict[str, Any] | None = None

    def install(self, undo: ExitStack) -> None:
        """Take hold of every training loader that Lightning makes; leave the removal with `undo`."""
        # the one call between making a loader and iterating over it, whenever that happens
        patch = Patch(self._loop, "_load_combined_loader_states", lambda: self._take_hold(undo))
        undo.callback(patch.restore)

    def _take_hold(self, undo: ExitStack) -> None:
        loader = self._loader = self._loop._combined_loader
        first = loader.flattened[0] if len(loader.flattened) == 1 else None
        if type(first) in (DataLoader, _Resumable) and _map_style_in_order(first):
            self._way = "skip"
            if type(first) is DataLoader:
                undo.callback(_make_stateful(first))
            loader._state_dicts = list  # Lightning would save a state that a run without us cannot load
            undo.callback(loader.__dict__.pop, "_state_dicts", None)
        elif hasattr(first, "load_state_dict") and sized_len(first) is not None:
            self._way = "own"
        else:
            self._way = "again"
            undo.callback(self._watch(loader))
        if self._resume is not None and not self._held_once:  # not for one that is reloaded later
            self._check(self._resume)
            for each in loader.flattened:
                _set_sampler_epoch(each, self._resume["epoch"])
            if self._way != "again":
                first.load_state_dict(self._resume["state"])
        self._held_once = True

    def _watch(self, loader: CombinedLoader) -> Any:
        """Note the moments at which an iteration begins and at which its first batch is asked for."""
        stock, data = type(loader), self

        class Watched(stock):
            def __iter__(self) -> Any:
                data._began, data._first = _moment(self.flattened), None
                return super().__iter__()

            def __next__(self) -> Any:
                if data._first is None:
                    data._first = _moment(self.flattened)
                return super().__next__()

        loader.__class__ = Watched

        def unwatch() -> None:
            loader.__class__ = stock

        return unwatch

    # -- the place ---------------------------------------------------------------------------------------------------

    def place(self) -> dict[str, Any]:
        """Where this rank stands, as a checkpoint takes it; between two batches."""
        batches = self._loop.epoch_loop.batch_progress.current.ready
        place = {
            "way": self._way,
            "epoch": self._loop.trainer.current_epoch,
            "batches": batches,
            "of": self._shape(),
            "held": [[random.state_of(g) for g in found] for found in self._held()],
        }
        if self._way == "again":
            return {**place, "began": self._began, "first": self._first}
        return {**place, "state": self._loader._iterator.iterators[0].state_dict()}

    def _shape(self) -> list[dict[str, Any]]:
        """What must not change for a place to mean the same thing."""
        return [
            {
                "batches": sized_len(each),
                "samples": sized_len(getattr(each, "dataset", None)),
                "num_workers": getattr(each, "num_workers", 0),
            }
            for each in self._loader.flattened
        ]

    def _check(self, place: Mapping[str, Any]) -> None:
        here, there = self._shape(), place["of"]
        if len(here) != len(there) or place["way"] != self._way:
            raise RecipeError(
                f"the checkpoint was written with other training data ({len(there)} loaders, continued by"
                f" {place['way']!r}; here {len(here)}, {self._way!r})"
            )
        for mine, theirs in zip(here, there):
            for name, value in mine.items():
                if value != theirs[name]:
                    raise RecipeError(
                        f"the training data differ from the checkpoint's: {name} is {value}, there it was"
                        f" {theirs[name]}; resume with the same data, or leave ExactResume out and accept that"
                        " samples are repeated or missed"
                    )

    def catch_up(self) -> None:
        """Read again what the epoch had read, where the place cannot be reached in another way."""
        place = self._resume
        if place is None or self._way != "again" or place["first"] is None:
            return
        fetcher, batches = self._loop._data_fetcher, place["batches"]
        rank_zero_info(f"ExactResume: reading the epoch's first {batches} batches again")
        self._loader.reset()  # workers that began with another order
        _back_to(self._loader.flattened, place["began"])
        iter(fetcher)
        _back_to(self._loader.flattened, place["first"])
        for _ in range(batches):
            next(fetcher)
        fetcher.fetched -= batches  # Lightning adds them when the epoch goes on
        self._began, self._first = place["began"], place["first"]

    def settle(self) -> None:
        """Give every generator that the loaders hold the state that it had."""
        if self._resume is not None:
            for found, states in zip(self._held(), self._resume["held"]):
                for generator, state in zip(found, states):
                    random.set_state_of(generator, state)

    def _held(self) -> list[list[random.Generator]]:
        """The generators in the training loaders and in the validation loaders."""
        validation = self._loop.epoch_loop.val_loop._combined_loader
        return [random.generators_in(each.flattened) if each is not None else [] for each in (self._loader, validation)]


def _moment(parts: Any) -> dict[str, Any]:
    """All that decides an iteration which begins now: random states and the samplers' own counters."""
    return {
        "random": random.snapshot(),
        "held": [random.state_of(generator) for generator in random.generators_in(parts)],
        "counters": [_counters(sampler) for sampler in _samplers(parts)],
    }


def _back_to(parts: Any, moment: Mapping[str, Any]) -> None:
    """Put back what :func:`_moment` gave."""
    random.restore(moment["random"])
    for generator, state in zip(random.generators_in(parts), moment["held"]):
        random.set_state_of(generator, state)
    for sampler, counters in zip(_samplers(parts), moment["counters"]):
        for name, value in counters.items():
            setattr(sampler, name, value)


def _samplers(parts: Any) -> list[Any]:
    """The samplers in loaders or samplers, each with those that it draws from."""
    found, queue = [], list(parts)
    while queue:
        part = queue.pop(0)
        if part is not None and all(part is not other for other in found):
            found.append(part)
            queue += [getattr(part, "batch_sampler", None), getattr(part, "sampler", None)]
    return [part for part in found if not isinstance(part, DataLoader) and hasattr(part, "__dict__")]


def _counters(sampler: Any) -> dict[str, Any]:
    """A sampler's plain attributes, an epoch counter above all."""
    return {name: v for name, v in vars(sampler).items() if isinstance(v, (bool, int, float, str))}


def _map_style_in_order(loader: DataLoader) -> bool:
    return not isinstance(loader.dataset, IterableDataset) and getattr(loader, "in_order", True)


# -- the stateful loader ---------------------------------------------------------------------------------------------


class _Resumable(StatefulDataLoader):
    """A stateful loader whose sampler and workers take their random states along."""

    @property
    def _index_sampler(self) -> Any:
        return _Order(super()._index_sampler, self.generator, self.num_workers > 0)

    def _get_iterator(self) -> Any:
        if not self.num_workers:
            return super()._get_iterator()
        own = self.dataset
        self.__dict__["dataset"] = _InWorker(own)  # for the workers only, which are started here
        try:
            return super()._get_iterator()
        finally:
            self.__dict__["dataset"] = own


def _make_stateful(loader: DataLoader) -> Any:
    """Turn a stock loader into a stateful one, in place.

    Returns:
        undoes it.
    """
    loader.__class__ = _Resumable
    loader.__dict__.update(
        snapshot_every_n_steps=1, next_iter_state=None, _initial_iter_for_state_dict=False, _iterator=None
    )

    def undo() -> None:
        loader.__class__ = DataLoader
        loader.__dict__.update(_iterator=None)
        for name in ("snapshot_every_n_steps", "next_iter_state", "_initial_iter_for_state_dict"):
            loader.__dict__.pop(name, None)

    return undo


class _Order:
    """An index sampler whose dealing can be repeated.

    Args:
        sampler: the loader's batch sampler, or its sampler where it does not batch.
        generator: the loader's.
        ahead: whether workers ask for indices before the training needs them.
    """

    def __init__(self, sampler: Any, generator: torch.Generator | None, ahead: bool) -> None:
        self.sampler, self.ahead = sampler, ahead
        self.parts = [sampler, generator]

    def __iter__(self) -> _Dealing:
        return _Dealing(self)

    def __len__(self) -> int:
        return len(self.sampler)


class _Dealing(Iterator[Any]):
    """One iteration over a sampler.

    A sampler may draw when its iteration begins, at its first index (as ``RandomSampler`` does, after the loader drew
    its workers' seed), or at every index. The first two are repeated from the states of those moments. For the third
    the state after each draw is kept too where workers ask ahead: the indices under way are then drawn again alike.
    """

    def __init__(self, order: _Order) -> None:
        self._order, self._drawn = order, 0
        self._began, self._first, self._after = _moment(order.parts), None, None
        self._indices = iter(order.sampler)

    def __next__(self) -> Any:
        if self._first is None:
            self._first = _moment(self._order.parts)
        before = _globally() if self._order.ahead and self._drawn else None
        index = next(self._indices)
        self._drawn += 1
        if before is not None and (self._after is not None or before != _globally()):
            self._after = _moment(self._order.parts)
        return index

    def state_dict(self) -> dict[str, Any]:
        return {"began": self._began, "first": self._first, "after": self._after, "drawn": self._drawn}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._began, self._first, self._after, self._drawn = (state[k] for k in ("began", "first", "after", "drawn"))
        _back_to(self._order.parts, self._began)
        self._indices = iter(self._order.sampler)
        if self._first is not None:
            _back_to(self._order.parts, self._first)
        next(islice(self._indices, self._drawn, self._drawn), None)
        if self._after is not None:
            _back_to(self._order.parts, self._after)


def _globally() -> tuple[Any, ...]:
    """The global random state in a form that is quick to compare."""
    _, numbers, *rest = np.random.get_state()
    return python_random.getstate(), numbers.tobytes(), rest, torch.get_rng_state().numpy().tobytes()


class _InWorker:
    """A data set as workers see it: itself, and a state that is the worker's random state."""

    def __init__(self, dataset: Any) -> None:
        self.__dict__["_own"] = dataset

    def __getitem__(self, index: Any) -> Any:
        return self._own[index]

    def __len__(self) -> int:
        return len(self._own)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_own"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._own, name, value)

    def __reduce__(self) -> Any:
        return _InWorker, (self._own,)

    def _held(self) -> list[random.Generator]:
        if "_found" not in self.__dict__:  # once a worker: a data set may be large
            self.__dict__["_found"] = random.generators_in(self._own)
        return self.__dict__["_found"]

    def state_dict(self) -> dict[str, Any]:
        own = self._own.state_dict() if hasattr(self._own, "load_state_dict") else None
        held = [random.state_of(generator) for generator in self._held()]
        return {"random": random.snapshot(), "held": held, "own": own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["own"] is not None:
            self._own.load_state_dict(state["own"])
        for generator, saved in zip(self._held(), state["held"]):
            random.set_state_of(generator, saved)
        random.restore(state["random"])
