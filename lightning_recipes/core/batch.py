"""Finding and replacing the input of a batch: a tuple or list with the input first, a dict, or a bare tensor."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_recipes.core.errors import RecipeError

INPUT_KEYS = ("pixel_values", "image", "images", "input", "inputs", "x", "img", "data")


def input_key(batch: Any) -> str | int | None:
    """Where the input tensor stands: a key, an index, or None for a batch that is the tensor itself.

    Raises:
        RecipeError: says what arrived.
    """
    if isinstance(batch, Tensor):
        return None
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor):
        return 0
    if hasattr(batch, "keys"):
        for name in INPUT_KEYS:
            if name in batch and isinstance(batch[name], Tensor):
                return name
        raise RecipeError(f"no input tensor in a batch with keys {sorted(map(str, batch))}; looked for {INPUT_KEYS}")
    raise RecipeError(f"the batch must be (input, target), a dict or a tensor; got {describe(batch)}")


def get_input(batch: Any) -> Tensor:
    """The input tensor of a batch."""
    where = input_key(batch)
    return batch if where is None else batch[where]


def with_input(batch: Any, value: Tensor) -> Any:
    """The same batch with another input tensor; the original is left alone."""
    where = input_key(batch)
    if where is None:
        return value
    if isinstance(where, str):
        copy = batch.copy()
        copy[where] = value
        return copy
    items = list(batch)
    items[where] = value
    if isinstance(batch, tuple):
        return type(batch)(*items) if hasattr(batch, "_fields") else tuple(items)
    return items


def size_of(batch: Any) -> int:
    """How many samples a batch of any form holds: the length of its first tensor; 0 where there is none."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else 0
    parts = batch.values() if hasattr(batch, "values") else batch if isinstance(batch, (tuple, list)) else ()
    return next(filter(None, map(size_of, parts)), 0)


def describe(batch: Any) -> str:
    """A batch in a few words, for error messages."""
    if isinstance(batch, Tensor):
        return f"tensor {tuple(batch.shape)} {str(batch.dtype).removeprefix('torch.')}"
    if isinstance(batch, (tuple, list)):
        return f"{type(batch).__name__} of [{', '.join(describe(b) for b in batch)}]"
    if hasattr(batch, "keys"):
        return f"dict with keys {sorted(map(str, batch))}"
    return type(batch).__name__
