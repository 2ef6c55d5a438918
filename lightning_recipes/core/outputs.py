"""What comes out of a network while it evaluates: anybody may look, one owner may replace it.

A stock module's ``validation_step``, ``test_step`` and ``predict_step`` call the module itself, or a part of it that
takes the batch's inputs. The socket wraps the ``forward`` of that part on the instance. Under DDP the strategy routes a
whole step through the module's ``forward`` by putting its own in the instance's place for that one call; what is
wrapped here is the inner call, never the step's return value.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from copy import copy
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.patch import Patch

Replace = Callable[[Tensor, tuple[Any, ...], dict[str, Any]], Tensor]
"""From logits ``[n, classes]`` and the arguments of the call to the logits in their place."""

_PLACES: weakref.WeakKeyDictionary[nn.Module, _Place] = weakref.WeakKeyDictionary()


def part_of(module: pl.LightningModule, name: str) -> nn.Module:
    """The module itself for 'forward', else its submodule of that dotted name.

    Raises:
        RecipeError: when there is none; lists the parts.
    """
    if name == "forward":
        return module
    try:
        return module.get_submodule(name)
    except AttributeError:
        parts = [child for child, _ in module.named_children()]
        raise RecipeError(
            f"forward must be 'forward' or the name of a submodule of {type(module).__name__} (it has {parts}); got"
            f" {name!r}"
        ) from None


def logits_in(output: Any) -> Tensor | None:
    """The logits ``[n, classes]`` of an output: the floating-point tensor itself or under 'logits'; None if neither."""
    if isinstance(output, Mapping):
        output = output.get("logits")
    return output if isinstance(output, Tensor) and output.is_floating_point() and output.dim() == 2 else None


class _Place:
    """The wrapped forward of one part."""

    def __init__(self, part: nn.Module) -> None:
        self.owner: str | None = None
        self.replace: Replace | None = None
        self.instead: Callable[..., Any] | None = None
        self.watchers: list[Callable[[Tensor], None]] = []
        self._inside = False
        self._patch = Patch(part, "forward", self._call, compiled=False)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if self.instead is None or self._inside:
            output = self._patch.original(*args, **kwargs)
        else:
            self._inside = True
            try:
                output = self.instead(*args, **kwargs)
            finally:
                self._inside = False
        logits = logits_in(output)
        if logits is None or self._inside:
            return output
        if self.replace is not None:
            self._inside = True
            try:
                replaced = self.replace(logits, args, kwargs)
            finally:
                self._inside = False
            if replaced is not logits:
                logits, output = replaced, with_logits(output, replaced)
        for watch in self.watchers:
            watch(logits)
        return output

    @property
    def idle(self) -> bool:
        return self.owner is None and not self.watchers

    def restore(self) -> None:
        self._patch.restore()


def with_logits(output: Any, logits: Tensor) -> Any:
    """A copy of an output in which :func:`logits_in` finds other logits."""
    if isinstance(output, Tensor):
        return logits
    replaced = copy(output)  # a dict, or an output class of Hugging Face
    replaced["logits"] = logits
    return replaced


def replace_outputs(
    part: nn.Module, owner: str, replace: Replace | None, instead: Callable[..., Any] | None = None
) -> Callable[[], None]:
    """Replace the logits that come out of a part, for everybody that calls it, until the returned function is called.

    Args:
        part: the module, or what :func:`part_of` finds in it.
        owner: who replaces them, for messages.
        replace: called with logits ``[n, classes]`` and the arguments of the call; outputs without such logits pass.
            None leaves them.
        instead: called with the arguments in the place of the part's own forward, which runs only if this calls the
            part.

    Raises:
        RecipeError: when somebody else replaces them already.
    """
    place = _place(part)
    if place.owner is not None:
        raise RecipeError(f"{place.owner} and {owner} both replace the outputs of the network; use one of them")
    place.owner, place.replace, place.instead = owner, replace, instead

    def undo() -> None:
        place.owner = place.replace = place.instead = None
        _leave(part, place)

    return undo


def watch_outputs(part: nn.Module, watch: Callable[[Tensor], None]) -> Callable[[], None]:
    """See the logits ``[n, classes]`` that come out of a part, replaced ones included, until the returned function is
    called."""
    place = _place(part)
    place.watchers.append(watch)

    def undo() -> None:
        if watch in place.watchers:
            place.watchers.remove(watch)
        _leave(part, place)

    return undo


def _place(part: nn.Module) -> _Place:
    if part not in _PLACES:
        _PLACES[part] = _Place(part)
    return _PLACES[part]


def _leave(part: nn.Module, place: _Place) -> None:
    if place.idle and _PLACES.get(part) is place:
        place.restore()
        del _PLACES[part]
