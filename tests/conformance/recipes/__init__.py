"""What the conformance tests know of every recipe: one file a card, found by itself.

A file has ``ROWS``, the settings over which every guarantee is checked; ``MEMBERS``, settings that run on the same
small network, for the pairs; ``REFUSED``, pairs of class names that are refused, with words that the error must have;
``OTHER``, another value of one argument of each class, for a resume; ``AUTOMATIC`` and ``SURGERY``, names of classes
that need automatic optimization and that change the network's structure; ``DATA``, for a class that needs data of its
own, what they are (as in a row); ``VALIDATES``, names of classes that need validation data; ``NETWORK``, for one that
cannot run on the small vision transformer, what makes another on which the other members run too; ``OPTIMIZER``, for
one that cannot train by the usual one, the name of another (as in a row); ``misuses()``, everything that can be done
wrong; and ``cannot_attach(row)``, the row on a module that it cannot take. What a card does not have is left out.
"""

from __future__ import annotations

import itertools
import pkgutil
import random
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from lightning.pytorch.callbacks import Callback
from torch import nn
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
NETWORK: dict[str, Callable[[], nn.Module]] = _all("NETWORK")
VALIDATES: list[str] = [name for card in CARDS for name in getattr(card, "VALIDATES", [])]
OPTIMIZER: dict[str, str] = _all("OPTIMIZER")
MISUSES: list[Misuse] = [each for card in CARDS if hasattr(card, "misuses") for each in card.misuses()]
CANNOT_ATTACH: list[Misuse] = [
    each for card in CARDS if hasattr(card, "cannot_attach") for row in card.ROWS for each in card.cannot_attach(row)
]


STACK = 8  # recipes in a stack: more cover the pairs in fewer runs, and say less of which two do not get on


def pairs() -> list[Row]:
    """Every two different recipes together, in an order in which they may stand."""
    return [_together(pair) for pair in itertools.combinations(MEMBERS, 2) if _class(pair[0]) != _class(pair[1])]


def stacks() -> list[Row]:
    """As few stacks as a greedy search finds in which every two recipes that compose stand together.

    All pairs of n recipes are n (n - 1) / 2 runs and soon take hours; a stack of k has k (k - 1) / 2 of them in one.
    What fails in a stack is found by running its pairs, ``python -m tests.conformance.lives FOLDER "A + B"``.
    """
    pairs_left = {
        frozenset(pair)
        for pair in itertools.combinations(MEMBERS, 2)
        if _class(pair[0]) != _class(pair[1]) and _refusal(*pair) is None
    }
    partners = {name: {other for pair in pairs_left if name in pair for other in pair - {name}} for name in MEMBERS}

    def gain(name: str, stack: list[str]) -> tuple[int, int]:
        """Pairs that stand together here for the first time; then those that it still has to meet."""
        return (
            sum(frozenset((name, other)) in pairs_left for other in stack),
            sum(name in pair for pair in pairs_left),
        )

    found = []
    while pairs_left:
        stack: list[str] = []
        while len(stack) < STACK:
            fitting = [name for name in MEMBERS if name not in stack and partners[name].issuperset(stack)]
            best = max(fitting, key=lambda name: gain(name, stack), default=None)
            if best is None or (stack and not gain(best, stack)[0]):
                break
            stack.append(best)
        pairs_left -= {frozenset(pair) for pair in itertools.combinations(stack, 2)}
        found.append(_together(stack))
    return found


def drawn(draw: random.Random, largest: int) -> Row:
    """A stack of up to so many recipes that compose two by two."""
    names, size = list(MEMBERS), draw.randint(1, largest)
    draw.shuffle(names)
    stack: list[str] = []
    for name in names:
        if len(stack) < size and all(_class(name) != _class(o) and _refusal(name, o) is None for o in stack):
            stack.append(name)
    return _together(stack)


def refusal(pair: Row) -> str | None:
    """Words that the refusal of a pair must have; None for one that composes."""
    return _refusal(*pair.name.split(" + "))


def _together(names: Sequence[str]) -> Row:
    """These members on one network, in an order in which they may stand."""
    waiting = sorted(names, key=list(MEMBERS).index)
    ordered: list[str] = []
    while waiting:
        later = {name: type(MEMBERS[name]()).comes_after for name in waiting}
        ordered.append(next(name for name in waiting if not any(_class(other) in later[name] for other in waiting)))
        waiting.remove(ordered[-1])
    data = next((DATA[_class(name)] for name in ordered if _class(name) in DATA), first_digits)
    # of several the last one's, on which the others run too
    network = [small_vit, *(NETWORK[_class(name)] for name in ordered if _class(name) in NETWORK)][-1]
    optimizer = next((OPTIMIZER[_class(name)] for name in ordered if _class(name) in OPTIMIZER), "sgd")
    validation = any(_class(name) in VALIDATES for name in ordered)
    return Row(
        " + ".join(ordered),
        lambda: [MEMBERS[name]() for name in ordered],
        network=network,
        optimizer=optimizer,
        data=data,
        validation=validation,
    )


def _refusal(a: str, b: str) -> str | None:
    a, b = _class(a), _class(b)
    return REFUSED.get((a, b), REFUSED.get((b, a)))


def _class(member: str) -> str:
    return type(MEMBERS[member]()).__name__
