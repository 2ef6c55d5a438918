"""The place of a run in its training data, and going back to it in another process.

A map-style ``DataLoader`` becomes torchdata's stateful one for the length of the fit, in place: the same object with
the same attributes, so that whoever holds it sees no difference. torchdata keeps count of what was handed out and
carries each worker's state along with its batches; what it leaves out is added here: the order that a sampler drew from
random numbers, and the random state in which a worker left off. Then going back reads no sample twice. A sized loader
with a ``state_dict`` of its own is asked for that.

Anything else that Lightning takes for training data (several loaders at once, an ``IterableDataset``, a loader class of
the user's own) is read again from the beginning of the epoch, with the random state of that moment, up to the place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain, islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.data import _set_sampler_epoch, get_all_subclasses, sized_len
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import BatchSampler, DataLoader, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_recipes.core import random
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.patch import Patch


def when_made(loop: Any, take_hold: Callable[[CombinedLoader], None], undo: ExitStack, *, place: bool = True) -> None:
    """Have every training loader shown once Lightning has made it and before anything iterates over it.

    Args:
        loop: the Trainer's fit loop.
        take_hold: called with the loader, also with one that is reloaded later; in the order of installation.
        undo: gets the removal.
        place: False keeps Lightning from taking a loader to the place that it stored itself.
    """

    def made() -> None:
        if not place:
            loop._combined_loader_states_to_load = []
        patch.original()
        take_hold(loop._combined_loader)

    # the one call between making a loader and iterating over it, whenever that happens
    patch = Patch(loop, "_load_combined_loader_states", made)
    undo.callback(patch.restore)


class TrainingData:
    """Where in its training data a fit stands.

    Args:
        trainer: the user's.
        owner: name of the recipe that asks, for messages.
        place: what :meth:`place` gave in the process that is continued; None for a fit from the beginning.
    """

    def __init__(self, trainer: pl.Trainer, owner: str, place: Mapping[str, Any] | None = None) -> None:
        self._loop, self._owner, self._resume = trainer.fit_loop, owner, place
        self._loader: CombinedLoader
        self._held_once = False
        self._way = "again"  # or 'skip', or 'own': how another process gets to the place
        self._read: dict[str, Any] = {}  # in the way 'again': how the running epoch's data were read

    def install(self, undo: ExitStack) -> None:
        """Take hold of every training loader that Lightning makes; leave the removal with `undo`."""
        when_made(self._loop, lambda loader: self._take_hold(loader, undo), undo, place=False)

    def _take_hold(self, loader: CombinedLoader, undo: ExitStack) -> None:
        self._loader = loader
        first = loader.flattened[0] if len(loader.flattened) == 1 else None
        if type(first) in (DataLoader, StatefulDataLoader, _Resumable) and _map_style_in_order(first):
            self._way = "skip"
            if type(first) is not _Resumable:  # a reload may give the same one
                undo.callback(_make_resumable(first))
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
        """Note the moment at which an iteration begins, and the random states before batches that hang on them."""
        stock, data = type(loader), self

        class Watched(stock):
            def __iter__(self) -> Any:
                data._read = {"began": _moment(self.flattened), "states": {}, "batches": 0}
                return super().__iter__()

            def __next__(self) -> Any:
                read, number = data._read, data._read["batches"]
                alone = len(self.flattened) == 1
                if number and alone and sized_len(self) is not None:  # only its beginning draws what counts
                    batch = super().__next__()
                else:
                    states, iterators = random.states(), list(self._iterator.iterators)
                    batch = super().__next__()
                    if alone and number > 1:
                        del read["states"][number - 1]  # Lightning, one batch ahead without a length, holds the last
                    begun = any(one is not other for one, other in zip(iterators, self._iterator.iterators))
                    if alone or not number or begun:  # a shorter loader that begins again draws
                        read["states"][number] = random.as_saved(states)
                read["batches"] += 1
                return batch

        loader.__class__ = Watched

        def unwatch() -> None:
            loader.__class__ = stock

        return unwatch

    # -- the place ---------------------------------------------------------------------------------------------------

    def place(self) -> dict[str, Any]:
        """Where this rank stands, as a checkpoint takes it; between two batches."""
        place = {"way": self._way, "epoch": self._loop.trainer.current_epoch, "of": self._shape()}
        if self._way == "again":
            return {**place, **self._read, "done": self._loop._data_fetcher.done}
        if self._way == "own":
            return {**place, "state": self._loader.flattened[0].state_dict()}
        # not the loader's state: somebody else may have begun to iterate over it, a validation on the same data
        return {**place, "state": _with_indices_under_way(self._loader._iterator.iterators[0])}

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
                f"{self._owner}: the checkpoint was written with other training data: {len(there)} loaders"
                f" ({place['way']}), here {len(here)} ({self._way}); resume with the same data, or leave {self._owner}"
                " out"
            )
        for mine, theirs in zip(here, there):
            for name, value in mine.items():
                if value != theirs[name]:
                    raise RecipeError(
                        f"{self._owner}: the training data differ from the checkpoint's: {name} is {value}, there it"
                        f" was {theirs[name]}; resume with the same data, or leave {self._owner} out and accept that"
                        " samples are repeated or missed"
                    )

    def catch_up(self) -> None:
        """Read again what the epoch had read, where the place cannot be reached in another way."""
        place = self._resume
        if place is None or self._way != "again" or not place["batches"]:
            return
        loader, fetcher = self._loader, self._loop._data_fetcher
        rank_zero_info(f"{self._owner}: reading the epoch's first {place['batches']} batches again")
        loader.reset()  # workers that began with another order
        _back_to(loader.flattened, place["began"])
        fetcher.iterator = iter(loader)
        fetcher.reset()
        for number in range(place["batches"]):
            if number in place["states"]:
                random.restore(place["states"][number])
            batch = next(loader)
        self._read = {name: place[name] for name in ("began", "states", "batches")}
        fetcher.done = place["done"]
        if fetcher.length is None and not fetcher.done:
            fetcher.batches = [batch]

    def held(self) -> list[list[Any] | None]:
        """The states of all generators that the loaders hold, as a checkpoint takes them."""
        return [None if found is None else [random.state_of(g) for g in found] for found in self._held()]

    def settle(self, held: Sequence[Sequence[Any] | None]) -> None:
        """Give every generator that the loaders hold the state of :meth:`held`."""
        trainer, validation = self._loop.trainer, self._loop.epoch_loop.val_loop
        if held[1] is not None and validation._combined_loader is None:
            trainer.validating = True
            validation.setup_data()
            trainer.training = True
        for found, states in zip(self._held(), held):
            for generator, state in zip(found or (), states or ()):
                random.set_state_of(generator, state)

    def _held(self) -> list[list[random.Generator] | None]:
        """The generators in the training loaders and in the validation loaders; None for loaders not made yet."""
        loaders = (self._loader, self._loop.epoch_loop.val_loop._combined_loader)
        return [None if each is None else random.generators_in(each.flattened) for each in loaders]


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
        return _Order(super()._index_sampler, self.generator, self.num_workers * (self.prefetch_factor or 0))

    def _get_iterator(self) -> Any:
        if not self.num_workers:
            return super()._get_iterator()
        own = self.dataset
        self.__dict__["dataset"] = _InWorker(own)  # for the workers only, which are started here
        try:
            return super()._get_iterator()
        finally:
            self.__dict__["dataset"] = own


def _make_resumable(loader: DataLoader) -> Any:
    """Turn a stock loader, or torchdata's, into a resumable one in place.

    Returns:
        undoes it.
    """
    stock, before = type(loader), dict(loader.__dict__)
    loader.__class__ = _Resumable
    loader.__dict__.update(
        snapshot_every_n_steps=1, next_iter_state=None, _initial_iter_for_state_dict=False, _iterator=None
    )

    def undo() -> None:
        loader.__class__ = stock
        for name in ("snapshot_every_n_steps", "next_iter_state", "_initial_iter_for_state_dict"):
            if name in before:
                loader.__dict__[name] = before[name]
            else:
                del loader.__dict__[name]
        loader.__dict__["_iterator"] = None

    return undo


class _Order:
    """An index sampler whose dealing can be repeated.

    Args:
        sampler: the loader's batch sampler, or its sampler where it does not batch.
        generator: the loader's.
        ahead: how many indices workers may have before the training needs them.
    """

    def __init__(self, sampler: Any, generator: torch.Generator | None, ahead: int) -> None:
        self.sampler, self.ahead = sampler, ahead
        self.parts = [sampler, generator]

    def __iter__(self) -> _Dealing:
        return _Dealing(self)

    def __len__(self) -> int:
        return len(self.sampler)


class _Dealing(Iterator[Any]):
    """One iteration over a sampler.

    A sampler may draw its numbers when its iteration begins, or at its first index (as ``RandomSampler`` does, after
    the loader drew its workers' seed): that is repeated from the states of those two moments. It may also draw at
    every index; then workers hold indices that nobody can draw again, which is why they are kept.
    """

    def __init__(self, order: _Order) -> None:
        self._order, self._drawn = order, 0
        self._began, self._first = _moment(order.parts), None
        self._indices = iter(order.sampler)
        self._latest: deque[Any] = deque(maxlen=order.ahead)

    def __next__(self) -> Any:
        if self._first is None:
            self._first = _moment(self._order.parts)
        index = next(self._indices)
        self._drawn += 1
        self._latest.append(index)
        return index

    def state_dict(self, used: int | None = None) -> dict[str, Any]:
        """The place after `used` indices; those drawn since are under way. None for no such."""
        under_way = self._drawn - used if used is not None else 0
        latest = [_plain_index(index) for index in list(self._latest)[len(self._latest) - under_way :]]
        return {"began": self._began, "first": self._first, "drawn": self._drawn, "under_way": latest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._began, self._first, self._drawn = state["began"], state["first"], state["drawn"]
        _back_to(self._order.parts, self._began)
        self._indices = iter(self._order.sampler)
        if self._first is not None:
            _back_to(self._order.parts, self._first)
        next(islice(self._indices, self._drawn, self._drawn), None)
        self._drawn -= len(state["under_way"])
        self._indices = chain(state["under_way"], self._indices)


def _with_indices_under_way(iterator: Any) -> dict[str, Any]:
    """torchdata's state of an iterator; where workers are ahead, with the indices that they have been given."""
    state = iterator.state_dict()
    if "_snapshot" not in state:
        return state
    snapshot = state["_snapshot"]
    dealt = iterator._sampler_iter.state_dict(used=iterator._num_yielded)
    main = {**snapshot["_main_snapshot"], "_sampler_iter_state": dealt}
    return {**state, "_snapshot": {**snapshot, "_main_snapshot": main}}


def _plain_index(index: Any) -> Any:
    """An index without NumPy's and torch's integers, which a checkpoint would not load."""
    if isinstance(index, (list, tuple)):
        return type(index)([_plain_index(each) for each in index])
    return int(index) if hasattr(index, "__index__") else index


class StandIn:
    """Stands for a data set where a loader fetches samples, and is that data set in everything but what a subclass
    changes."""

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
        return type(self), (self._own,)


class _InWorker(StandIn):
    """A data set as workers see it: itself, and a state that is the worker's random state."""

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


def end_of_recording() -> None:
    """Give DataLoader, BatchSampler and their subclasses their own methods back after an error.

    Lightning wraps them while it asks for loaders, to record their arguments, and leaves the wrappers on, for every
    later loader of the process, when asking raises (``_replace_dunder_methods``).
    """
    for base in (DataLoader, BatchSampler):
        for cls in get_all_subclasses(base) | {base}:
            for name in ("__init__", "__setattr__", "__delattr__"):
                if f"__old{name}" in vars(cls):
                    setattr(cls, name, getattr(cls, f"__old{name}"))
                    delattr(cls, f"__old{name}")
