"""Frozen copies of a module's weights: a teacher, the previous epoch, the weights at the start.

A copy holds tensors and no modules. The module itself wears them for a pass: its own tensors are put aside, not written
over, so that a graph which holds them lives on; optimizer, DDP and state dict never hear of the copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lightning_recipes.core.averaging import of_rank_zero_
from lightning_recipes.core.distributed import check_whole
from lightning_recipes.core.errors import RecipeError


class FrozenCopy:
    """A copy of a module's parameters and of the buffers that its state dict holds; tied ones once.

    Args:
        module: whose weights are copied, and who wears them.

    Raises:
        RecipeError: when each process holds only a part of them.
    """

    def __init__(self, module: nn.Module) -> None:
        check_whole(module, "a copy of the weights")
        self._module = module
        self._tensors: dict[str, Tensor] = {}

    def __bool__(self) -> bool:
        """Whether a copy was taken."""
        return bool(self._tensors)

    @torch.no_grad()
    def take(self) -> None:
        """Copy the weights as they are now; buffers are those of rank 0. All ranks must call it together."""
        live = self._live()
        if {n: v.shape for n, v in live.items()} != {n: v.shape for n, v in self._tensors.items()}:
            self._tensors = {name: _frozen(value, value.detach().clone()) for name, value in live.items()}
        for name, value in live.items():
            self._tensors[name].copy_(value)
            if not isinstance(value, Parameter):
                of_rank_zero_({name: self._tensors[name]}, value.device)

    def state(self) -> dict[str, Tensor]:
        """The copy by name, for a checkpoint."""
        return {name: value.detach() for name, value in self._tensors.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take back what :meth:`state` gave.

        Raises:
            RecipeError: when the module's tensors have other names or shapes.
        """
        live = self._live()
        wrong = live.keys() ^ state.keys()
        wrong |= {name for name in live.keys() & state.keys() if live[name].shape != state[name].shape}
        if wrong:
            raise RecipeError(f"the checkpoint's copy of the weights does not fit the module at {min(wrong)!r}")
        self._tensors = {
            name: _frozen(value, state[name].to(value.device, value.dtype, copy=True)) for name, value in live.items()
        }

    def _live(self) -> dict[str, Tensor]:
        saved = self._module.state_dict(keep_vars=True)
        buffers = {name: value for name, value in self._module.named_buffers() if name in saved}
        return {**dict(self._module.named_parameters()), **buffers}

    @contextmanager
    def worn(self) -> Iterator[None]:
        """The module has the copy's weights inside, and its own again afterwards."""
        live = next(self._module.parameters(), None)
        held = next(iter(self._tensors.values()), None)
        if live is not None and held is not None and held.device != live.device:
            self._follow()
        with wearing(self._module, self._tensors):
            yield

    def _follow(self) -> None:
        """Go where the module is: a checkpoint is read before Lightning moves the module to its device."""
        for name, value in [*self._module.named_parameters(), *self._module.named_buffers()]:
            if name in self._tensors:
                self._tensors[name] = _frozen(value, self._tensors[name].detach().to(value.device))


@contextmanager
def wearing(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """The module has other parameters and buffers inside, and its own again afterwards.

    Its own are put aside, not written over: a graph that holds them lives on, and they come back bit for bit.

    Args:
        module: tied tensors change together.
        tensors: by name, on the module's device; names that the module does not have are passed over.
    """
    parts = list(module.named_modules())  # walked once a pass: it takes a few calls for every part
    of: dict[int, Tensor] = {}  # by the tensor that it stands for, which may have several names
    for path, part in parts:
        for table in (part._parameters, part._buffers):
            for name, value in table.items():
                other = tensors.get(f"{path}.{name}" if path else name)
                if other is not None and value is not None:
                    of[id(value)] = _of_kind(value, other)
    aside: list[tuple[dict[str, Tensor | None], str, Tensor]] = []
    recurrent: list[tuple[nn.RNNBase, list[Any]]] = []
    try:
        for _, part in parts:
            for table in (part._parameters, part._buffers):
                for name, value in table.items():
                    if id(value) in of:
                        aside.append((table, name, value))
                        table[name] = of[id(value)]
            if isinstance(part, nn.RNNBase):  # keeps a list of its weights
                recurrent.append((part, part._flat_weights))
                part._flat_weights = [getattr(part, name, None) for name in part._flat_weights_names]
        yield
    finally:
        for table, name, value in aside:
            table[name] = value
        for part, weights in recurrent:
            part._flat_weights = weights


def _of_kind(like: Tensor, value: Tensor) -> Tensor:
    return value if isinstance(value, Parameter) == isinstance(like, Parameter) else _frozen(like, value)


def _frozen(like: Tensor, value: Tensor) -> Tensor:
    """Of the kind of `like`: a parameter that needs no gradient, or a buffer."""
    return Parameter(value, requires_grad=False) if isinstance(like, Parameter) else value
