"""Random numbers that do not come from the global state, so that a recipe never shifts anybody else's draws.

Two kinds. :func:`generator` gives a seeded CPU generator for one decision that all ranks must share (a CutMix box).
:func:`uniform` gives numbers that belong to a *sample*: they depend on the key and the sample's index alone, not on the
rank, the worker, the micro-batch or the device the sample happens to be on.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

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


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by :func:`key`: the same draws on every rank and after every resume."""
    return torch.Generator().manual_seed(key(*parts) & (2**63 - 1))


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


def rng_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The global random state of the CPU and, on an accelerator, of that device."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_rng_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    """Put back what :func:`rng_state` gave."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


@contextmanager
def forked(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """Leave the global random state as it was; inside, start from `seed` if one is given."""
    state = rng_state(device)
    try:
        if seed is not None:
            torch.manual_seed(seed & (2**63 - 1))
        yield
    finally:
        set_rng_state(state, device)
