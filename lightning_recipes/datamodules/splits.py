"""Which samples go where: splits, shares and shots, as pure functions from labels to indices.

Everything here is keyed by (seed, purpose, class), so a choice depends neither on the rank or worker that makes it nor
on the global random state, and a larger share contains the smaller one.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import Tensor


def keyed_generator(seed: int, purpose: str, *key: int) -> np.random.Generator:
    """Random numbers that are a function of the key alone, the same on every rank and in every worker."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), *key])


def keyed_permutation(n: int, seed: int, purpose: str, *key: int) -> np.ndarray:
    """A permutation of ``range(n)`` by :func:`keyed_generator`."""
    return keyed_generator(seed, purpose, *key).permutation(n)


def _members(labels: Tensor | np.ndarray, seed: int, purpose: str) -> dict[int, np.ndarray]:
    """For each class its sample indices in a keyed random order."""
    labels = np.asarray(labels)
    members = {int(c): np.flatnonzero(labels == c) for c in np.unique(labels)}
    return {c: index[keyed_permutation(len(index), seed, purpose, c)] for c, index in members.items()}


def stratified_split(
    labels: Tensor | np.ndarray, fraction: float, seed: int, purpose: str = "val"
) -> tuple[np.ndarray, np.ndarray]:
    """Cuts ``fraction`` of the samples off, spread over the classes; returns (kept, cut off), both ascending.

    The total is right to one sample even where a class is too small for a share of its own; every class keeps one.
    """
    members = _members(labels, seed, purpose)
    counts = np.array([len(index) for index in members.values()])
    cuts = np.diff(np.floor(np.cumsum(counts) * fraction + 0.5), prepend=0).astype(int)
    cuts = np.minimum(cuts, counts - 1)
    cut_off = [index[:cut] for index, cut in zip(members.values(), cuts, strict=True)]
    kept = [index[cut:] for index, cut in zip(members.values(), cuts, strict=True)]
    return np.sort(np.concatenate(kept)), np.sort(np.concatenate(cut_off))


def balanced_share(labels: Tensor | np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Ascending indices of the same share of every class, rounded, at least one sample each; nested in ``fraction``."""
    members = _members(labels, seed, "fraction")
    return np.sort(np.concatenate([i[: max(1, math.floor(len(i) * fraction + 0.5))] for i in members.values()]))


def few_shots(labels: Tensor | np.ndarray, shots: int, seed: int, classes: Iterable[int]) -> np.ndarray:
    """Ascending indices of ``shots`` samples of each of ``classes`` (all that a class has, where it has fewer)."""
    members = _members(labels, seed, "shots")
    chosen = [members[c][:shots] for c in classes if c in members]
    return np.sort(np.concatenate(chosen)) if chosen else np.empty(0, dtype=np.int64)


def long_tail(labels: Tensor | np.ndarray, counts: Iterable[int], order: Iterable[int], seed: int) -> np.ndarray:
    """Ascending indices of ``counts[i]`` samples of class ``order[i]``; fewer of a class are part of more of it."""
    members = _members(labels, seed, "long tail")
    return np.sort(np.concatenate([members[int(c)][:n] for c, n in zip(order, counts, strict=True)]))


def cut(
    train: Any, val: Any, test: Any, val_fraction: float, test_fraction: float, fraction: float, seed: int
) -> tuple[Any, Any, Any]:
    """Cut what is missing of validation and test off the training set, by class, then keep a share of the rest.

    Args:
        train, val, test: sets with ``labels`` and ``select(indices)``; None for a part that the source does not have.
        val_fraction, test_fraction: share of the training set for a missing part; 0 leaves it missing.
        fraction: share of each class that is kept for training.
        seed: of the cuts.
    """
    if test is None and test_fraction > 0:
        kept, held = stratified_split(train.labels, test_fraction, seed, "test")
        train, test = train.select(kept), train.select(held)
    if val is None and val_fraction > 0:
        kept, held = stratified_split(train.labels, val_fraction, seed, "val")
        train, val = train.select(kept), train.select(held)
    if fraction < 1:
        train = train.select(balanced_share(train.labels, fraction, seed))
    return train, val, test
