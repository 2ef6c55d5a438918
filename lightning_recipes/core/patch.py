"""Replacing one method on one object, and taking the replacement off again."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch


class Patch:
    """A wrapper in an object's ``__dict__`` under the name of one of its methods.

    What stood there before (nothing, or a compiled step) comes back with :meth:`restore`. A deepcopy of the owner gets
    its own plain method in the place of the wrapper.

    Args:
        owner: the object.
        name: the method's name.
        function: called in its place; ``self.original`` is what it replaces.
        compiled: False keeps torch.compile out of the wrapper (a graph break instead of a traced wrapper).
    """

    def __init__(self, owner: Any, name: str, function: Callable[..., Any], *, compiled: bool = True) -> None:
        original = getattr(owner, name)
        functools.update_wrapper(self, original)  # first: it copies the attributes of a Patch that it wraps
        self.owner, self.name = owner, name
        self.original: Callable[..., Any] = original
        self._stood_before = owner.__dict__.get(name)
        self._function = function if compiled else torch.compiler.disable(function)
        # Lightning looks one `__wrapped__` deep for the signature, and a compiled step hides it one level further down.
        self.__wrapped__ = inspect.unwrap(self.original)
        owner.__dict__[name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = memo.get(id(self.owner))
        return self.original if twin is None else getattr(type(twin), self.name).__get__(twin)

    def restore(self) -> None:
        """Put back what stood there; if somebody wrapped the wrapper since, it stays in the chain and does nothing."""
        self._function = self.original
        if self.owner.__dict__.get(self.name) is not self:
            return
        if self._stood_before is None:
            del self.owner.__dict__[self.name]
        else:
            self.owner.__dict__[self.name] = self._stood_before
