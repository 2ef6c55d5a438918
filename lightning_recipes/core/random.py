"""Random numbers that do not come from the global state, so that a recipe never shifts anybody else's draws.

Two kinds. :func:`generator` gives a seeded CPU generator for one decision that all ranks must share (a CutMix box).
:func:`uniform` gives numbers that belong to a *sample*: they depend on the key and the sample's index alone, not on the
rank, the worker, the micro-batch or the device the sample happens to be on.

The global state itself is only ever read and put back: :func:`forked` around a piece of work, :func:`snapshot` for a
checkpoint, :func:`generators_in` for generators that somebody's own object holds.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def key(*parts: int | str) -> int:
    """Hash (seed, epoch, batch index, stream name, call number, ...) to a signed 64-bit key.

    The same parts give the same key on every machine and in every process.
    """
    digest = hashlib.blake2b("/".join(map(repr, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def generator(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by :func:`key`: the same draws on every rank and after every resume.

    Args:
        device: kind of device to draw on; a CPU and a GPU draw other numbers from one key.
    """
    return torch.Generator(device).manual_seed(key(*parts) & (2**63 - 1))


def uniform(parts: int, index: Tensor, shape: Sequence[int]) -> Tensor:
    """Uniform numbers in [0, 1) keyed by sample, from a counter hashed with SplitMix64 (Steele et al. 2014).

    Args:
        parts: a :func:`key`.
        index: ``[n]`` int64, one index a sample (position in the epoch's order, or a sample id), on the wanted device.
        shape: shape of one sample.

    Returns:
        float32 ``[n, *shape]`` with 24 random bits each, the same whichever other samples stand beside it.
    """
    size = math.prod(shape)
    stream = _mix(index.to(torch.int64) + parts)
    counter = torch.arange(1, size + 1, dtype=torch.int64, device=index.device) * _GOLDEN
    bits = _mix(stream[:, None] + counter)
    return (((bits >> 40) & 0xFFFFFF).to(torch.float32) / 2**24).reshape(len(index), *shape)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64; `& mask` turns torch's arithmetic right shift into a logical one."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _MIX_1
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _MIX_2
    return x ^ ((x >> 31) & (2**33 - 1))


@contextmanager
def forked(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """Leave the global random state as it was; inside, torch starts from `seed` if one is given."""
    state = states([device])
    try:
        if seed is not None:
            torch.manual_seed(seed & (2**63 - 1))
        yield
    finally:
        set_states(state)


@contextmanager
def held_left_alone(root: Any) -> Iterator[None]:
    """Leave the generators that an object holds (:func:`generators_in`) as they were."""
    held = [(each, state_of(each)) for each in generators_in(root)]
    try:
        yield
    finally:
        for each, state in held:
            set_state_of(each, state)


# -- whole states ----------------------------------------------------------------------------------------------------

Generator = torch.Generator | random.Random | np.random.RandomState | np.random.Generator


def states(devices: Iterable[torch.device] = ()) -> dict[str, Any]:
    """The global random state of Python, NumPy, torch's CPU and these devices."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
        "devices": {str(d): torch.get_device_module(d).get_rng_state(d) for d in devices if d.type != "cpu"},
    }


def set_states(state: Mapping[str, Any]) -> None:
    """Put back what :func:`states` gave."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    for name, value in state["devices"].items():
        device = torch.device(name)
        torch.get_device_module(device).set_rng_state(value, device)


def snapshot(devices: Iterable[torch.device] = ()) -> dict[str, Any]:
    """:func:`states` as a checkpoint takes them: loads with ``weights_only=True``."""
    return as_saved(states(devices))


def restore(saved: Mapping[str, Any]) -> None:
    """Put back what :func:`snapshot` gave."""
    set_states(from_saved(saved))


def state_of(generator: Generator) -> Any:
    """One generator's state, as a checkpoint takes it."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return as_saved(generator.getstate())
    numpys = isinstance(generator, np.random.RandomState)
    return as_saved(generator.get_state(legacy=False) if numpys else generator.bit_generator.state)


def set_state_of(generator: Generator, saved: Any) -> None:
    """Put back what :func:`state_of` gave."""
    state = from_saved(saved)
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(state)
    else:
        generator.bit_generator.state = state


def as_saved(state: Any) -> Any:
    """Random states with their arrays and long tuples as signed tensors, which every process can load."""
    if isinstance(state, dict):
        return {key: as_saved(value) for key, value in state.items()}
    if isinstance(state, np.ndarray):
        return {"dtype": state.dtype.name, "numbers": torch.from_numpy(state.astype(np.uint64).view(np.int64))}
    if isinstance(state, tuple):
        version, numbers, gauss = state
        return {"version": version, "numbers": torch.tensor(numbers), "gauss": gauss}
    return state


def from_saved(saved: Any) -> Any:
    """What :func:`as_saved` was given."""
    if not isinstance(saved, dict):
        return saved
    if "dtype" in saved:
        return saved["numbers"].numpy().view(np.uint64).astype(saved["dtype"])
    if "version" in saved:
        return saved["version"], tuple(saved["numbers"].tolist()), saved["gauss"]
    return {key: from_saved(value) for key, value in saved.items()}


def generators_in(root: Any, most: int = 10_000) -> list[Generator]:
    """The generators that an object holds, in an order that is the same in every process.

    Looks through attributes, dicts and short lists (a data set's transforms, a ``Subset``'s data set) at up to `most`
    objects; long lists are samples and not looked at. The global generators are not among the result.
    """
    found: list[Generator] = []
    known = {id(random._inst), id(np.random.mtrand._rand), id(torch.default_generator)}
    queue = deque([root])
    while queue and len(known) < most:
        item = queue.popleft()
        if id(item) in known:
            continue
        known.add(id(item))
        if isinstance(item, Generator):
            found.append(item)
        elif isinstance(item, (list, tuple, dict)):
            if len(item) <= 100:
                queue.extend(item.values() if isinstance(item, dict) else item)
        elif hasattr(item, "__dict__") and not isinstance(item, (type, ModuleType, FunctionType, Tensor)):
            queue.extend(vars(item).values())
    return found
