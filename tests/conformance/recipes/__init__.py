"""What the conformance tests know of every recipe: one file a card, found by itself.

A file has ``ROWS``, the settings over which every guarantee is checked; ``MEMBERS``, settings that run on the same
small network, for the pairs; ``REFUSED``, pairs of class names that are refused, with words that the error must have;
``OTHER``, another value of one argument of each class, for a resume; ``AUTOMATIC`` and ``SURGERY``, names of classes
that need automatic optimization and that change the network's structure; ``DATA``, for a class that needs data of its
own, what they are (as in a row); ``misuses()``, everything that can be done
wrong; and ``cannot_attach(row)``, the row on a module that it cannot take. What a card does not have is left out.
"""

from __future__ import annotations

import itertools
import pkgutil
from collections.abc import Callable
from importlib import import_module
from typing import Any

from lightning.pytorch.callbacks import Callback
from torch.utils.data import TensorDataset

from ..misuse import Misuse
from ..table import Row, first_digits, small_vit

CARDS = [import_module(f"{__name__}.{each.name}") for each in pkgutil.iter_modules(__path__)]


def _all(name: str) -> dict[Any, Any]:
    return {key: value for card in CARDS for key, value in getattr(card, name, {}).items()}


ROWS: list[Row] = [row for card in CARDS for row in getattr(card, "ROWS", [])]
MEMBERS: dict[str, Callable[[], Callback]] = _all("MEMBERS")
REFUSED: dict[tuple[str, str], str] = _all("REFUSED")
OTHER: dict[str, dict[str, Any]] = _all("OTHER")
AUTOMATIC: list[str] = [name for card in CARDS for name in getattr(card, "AUTOMATIC", [])]
SURGERY: list[str] = [name for card in CARDS for name in getattr(card, "SURGERY", [])]
DATA: dict[str, Callable[[int], TensorDataset]] = _all("DATA")
MISUSES: list[Misuse] = [each for card in CARDS if hasattr(card, "misuses") for each in card.misuses()]
CANNOT_ATTACH: list[Misuse] = [
    each for card in CARDS if hasattr(card, "cannot_attach") for row in card.ROWS for each in card.cannot_attach(row)
]


def pairs() -> list[Row]:
    """Every two different recipes together, in an order in which they may stand."""
    found = []
    for a, b in itertools.combinations(MEMBERS, 2):
        first, second = type(MEMBERS[a]()), type(MEMBERS[b]())
        if first is second:
            continue
        if second.__name__ in first.comes_after:
            a, b = b, a
        data = DATA.get(first.__name__) or DATA.get(second.__name__, first_digits)
        found.append(Row(f"{a} + {b}", lambda a=a, b=b: [MEMBERS[a](), MEMBERS[b]()], network=small_vit, data=data))
    return found


def refusal(pair: Row) -> str | None:
    """Words that the refusal of a pair must have; None for one that composes."""
    a, b = (type(recipe).__name__ for recipe in pair.recipes())
    return REFUSED.get((a, b), REFUSED.get((b, a)))
