"""The one kind of error that recipes raise, and the one form of it for a bad argument."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class RecipeError(ValueError):
    """A recipe was asked for something it cannot do. The message names the argument and says what to do."""


def check_argument(ok: bool, owner: object, name: str, value: Any, allowed: str) -> None:
    """Raise one clear error for a bad constructor argument.

    Raises:
        RecipeError: ``<Recipe>: <name> must be <allowed>; got <value>``.
    """
    if not ok:
        raise RecipeError(f"{type(owner).__name__}: {name} must be {allowed}; got {value!r}")


@contextmanager
def speaking_for(*recipes: object) -> Iterator[None]:
    """Have an error from a socket or a shared part say which recipe asked, or which ones where all of them did."""
    names = list(dict.fromkeys(type(recipe).__name__ for recipe in recipes))
    try:
        yield
    except RecipeError as error:
        if not names or any(name in str(error) for name in names):
            raise
        raise RecipeError(f"{' and '.join(names)}: {error}") from error
