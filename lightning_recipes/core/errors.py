"""The one kind of error that recipes raise, and the one form of it for a bad argument."""

from __future__ import annotations

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
