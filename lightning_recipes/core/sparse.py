"""Parameters of which only chosen entries train: the free entries in a flat leaf, the dense rest frozen.

A layer keeps its parameter, frozen, under its name. Beside it stands ``<name>_free``, a flat parameter with the free
entries: the optimizer's state, gradients and DDP's messages have its size. Reading the layer's attribute writes the
leaf into the dense tensor in place and gives that tensor a gradient of its own, of which the backward pass keeps the
free entries and drops the rest as soon as the layer is through:

    W[M] <- v,   dL/dv = (dL/dW)[M]

It is done at every read, so that several forward passes before a backward, accumulation, activation checkpointing and
weights that are read without their layer (``F.multi_head_attention_forward``, tied ones) come out right. State dicts
have the stock keys with the free entries written in, so that a checkpoint loads into the stock module too.

Compiled, a pass uses a copy of the weight with the leaf put in instead, which needs no graph break and more memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.surgery import Operation

_SUFFIX = "_free"


class _Write(torch.autograd.Function):
    """The dense tensor with the leaf written in; backwards the free entries of its gradient.

    The result shares the dense tensor's memory, not its version counter: a second forward pass writes the same numbers
    again and does not break the graph of the first. Saving the leaf keeps the usual error for one that was changed
    between forward and backward.
    """

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, dense: Tensor, places: Places) -> Tensor:
        ctx.places = places
        ctx.save_for_backward(leaf, places.index)
        out = dense.data
        places.memory(out).index_copy_(0, places.index.long(), leaf)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        _, index = ctx.saved_tensors
        if grad.layout is not torch.strided:  # nn.Embedding(sparse=True)
            grad = grad.to_dense()
        return ctx.places.flat(grad).index_select(0, index), None, None


class Places:
    """Which entries of a tensor are free, in the order in which they lie in memory.

    Attributes:
        index: ``[k]`` positions in the memory of the dense tensor, ascending; int32 where that is enough.
        order: its dimensions from the slowest to the fastest, () for a contiguous one.
    """

    def __init__(self, dense: Tensor, mask: Tensor) -> None:
        slowest_first = sorted(range(dense.dim()), key=lambda d: (-dense.stride(d), d))
        self.order = () if dense.is_contiguous() else tuple(slowest_first)
        if not self._turned(dense).is_contiguous():
            raise ValueError("overlaps itself or has gaps in memory")
        index = self.flat(mask).nonzero().squeeze(1)
        self.index = index.int() if dense.numel() < 2**31 else index

    def _turned(self, dense: Tensor) -> Tensor:
        return dense.permute(self.order) if self.order else dense

    def memory(self, dense: Tensor) -> Tensor:
        """The dense tensor as it lies in memory, to write into."""
        return self._turned(dense).view(-1)

    def flat(self, other: Tensor) -> Tensor:
        """A tensor of the dense one's shape in the order of its memory; a copy where it lies otherwise."""
        return self._turned(other).reshape(-1)

    def filled(self, values: Tensor, into: Tensor) -> Tensor:
        """A copy of a tensor of the dense one's shape with `values` ``[k]`` at the free places."""
        turned = self._turned(into)
        full = turned.reshape(-1).index_copy(0, self.index.long(), values).view(turned.shape)
        return full.permute([self.order.index(d) for d in range(full.dim())]) if self.order else full


@dataclass
class Leaf:
    """The free entries of one parameter.

    Attributes:
        dense: the user's parameter, frozen.
        values: the leaf ``[k]`` that trains in its place.
        places: where its entries stand in the dense one.
    """

    dense: Parameter
    values: Parameter
    places: Places

    def at_rest(self) -> Tensor:
        """The free entries as they were last written, ``[k]``."""
        return self.places.flat(self.dense.detach()).index_select(0, self.places.index)

    @torch.no_grad()
    def write(self) -> None:
        """Write the leaf into the dense tensor now, without waiting for the next read."""
        self.places.memory(self.dense.data).index_copy_(0, self.places.index.long(), self.values.data)

    @torch.no_grad()
    def load(self) -> None:
        """Take the leaf's values from the dense tensor."""
        self.values.data.copy_(self.at_rest())

    def read(self) -> Tensor:
        """The dense tensor with the leaf in it and a gradient for the leaf alone."""
        if torch.compiler.is_compiling():
            return self.places.filled(self.values, self.dense.detach())
        return _Write.apply(self.values, self.dense, self.places)


class _Partly:
    """Comes before the class of a layer some of whose parameters have a leaf, in a class made of both."""

    _free_places: dict[str, Places]
    _parameters: dict[str, Parameter]

    def _leaf(self, name: str) -> Leaf:
        return Leaf(self._parameters[name], self._parameters[name + _SUFFIX], self._free_places[name])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        for places in self._free_places.values():
            places.index = fn(places.index)
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name in self._free_places:
            self._leaf(name).write()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._free_places:
            destination.pop(prefix + name + _SUFFIX, None)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        *rest: Any,
    ) -> None:
        missing: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, *rest)
        leaves = {prefix + name + _SUFFIX for name in self._free_places}
        missing_keys.extend(name for name in missing if name not in leaves)
        for name in self._free_places:
            self._leaf(name).load()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return (_new, (type(self).__bases__[1], tuple(self._free_places)), *super().__reduce_ex__(protocol)[2:])


@cache
def _partly(kind: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """A layer's class with those of its parameters read through their leaves; it goes by the same name."""
    readers = {name: property(lambda self, name=name: self._leaf(name).read()) for name in names}
    about = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    about["stands_for"] = kind
    return type(kind.__name__, (_Partly, kind), {**about, **readers})


def _new(kind: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    made = _partly(kind, names)
    return made.__new__(made)


@dataclass
class SparseLeaves(Operation):
    """Leaves that are in place.

    Attributes:
        leaves: by the name of the dense parameter in the module.
    """

    leaves: dict[str, Leaf] = field(default_factory=dict)

    def take_places(self, optimizers: Sequence[Optimizer]) -> None:
        """A leaf takes the place of its dense parameter, with the rate and decay that the user's rules gave that one.

        Rules by shape and name ('no decay for vectors and biases') would take every leaf for a vector. One whose dense
        parameter is in no optimizer stays where it is.
        """
        instead = {id(leaf.dense): leaf.values for leaf in self.leaves.values()}
        held = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
        placed = {id(values) for dense, values in instead.items() if dense in held}
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                stay = [p for p in group["params"] if id(p) not in placed]
                group["params"][:] = [instead.get(id(p), p) for p in stay]

    def remove(self, *, merge: bool) -> None:
        """Write the leaves into their parameters and give the layers their classes back."""
        for leaf in self.leaves.values():
            leaf.write()
        super().remove(merge=merge)
        self.leaves = {}


def make_sparse(
    module: pl.LightningModule, masks: Mapping[str, Tensor], spec: Any, kept_whole: list[str] | None = None
) -> SparseLeaves:
    """Let only chosen entries of parameters train.

    A layer's attribute is no parameter then but what is made of it: ``get_parameter`` does not find it, and whoever
    writes into the ones of ``named_parameters`` must say so (:func:`reload_leaves`).

    Args:
        module: the user's.
        masks: by name of a parameter in the module (``named_parameters``), True at its free entries; at least one is.
            A tied parameter has one leaf, wherever it is read.
        spec, kept_whole: as in :class:`~lightning_recipes.core.surgery.Operation`.

    Raises:
        RecipeError: for a parameter that cannot be held this way; nothing is changed then.
    """
    names = dict(module.named_parameters())
    owners: dict[int, list[tuple[nn.Module, str, str]]] = {}
    for path, owner in module.named_modules():
        for local, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), []).append((owner, local, f"{path}.{local}" if path else local))
    operation = SparseLeaves(module, spec, kept_whole=kept_whole)
    chosen: dict[nn.Module, dict[str, Leaf]] = {}
    for name, mask in masks.items():
        dense = names[name]
        for owner, local, _ in owners[id(dense)]:
            _check_owner(owner, local, name)
        try:
            places = Places(dense, mask)
        except ValueError as error:
            raise RecipeError(f"{name} {error}; make it contiguous or leave it out of target") from error
        values = Parameter(places.flat(dense.detach()).index_select(0, places.index))
        leaf = operation.leaves[name] = Leaf(dense, values, places)
        for owner, local, full in owners[id(dense)]:
            chosen.setdefault(owner, {})[local] = leaf
            operation.made.setdefault(full + _SUFFIX, values)
    for owner, leaves in chosen.items():
        operation.undo.callback(_restore, owner, type(owner))
        for local, leaf in leaves.items():
            owner.register_parameter(local + _SUFFIX, leaf.values)
        owner.__dict__["_free_places"] = {local: leaf.places for local, leaf in leaves.items()}
        owner.__class__ = _partly(type(owner), tuple(leaves))
    return operation


def reload_leaves(module: nn.Module) -> None:
    """Have the leaves take over what somebody who knows the stock names alone wrote into the dense tensors."""
    for part in module.modules():
        if isinstance(part, _Partly):
            for name in part._free_places:
                part._leaf(name).load()


def is_sparse(module: nn.Module) -> bool:
    """Whether any parameter of the module has a leaf."""
    return any(isinstance(part, _Partly) for part in module.modules())


def _check_owner(owner: nn.Module, local: str, name: str) -> None:
    kind = type(owner).__name__
    if isinstance(owner, nn.RNNBase):
        raise RecipeError(
            f"{name} belongs to a {kind}, which reads its weights from a list of its own; leave it out of target"
        )
    if isinstance(owner, torch.jit.ScriptModule):
        raise RecipeError(f"{name} belongs to a scripted module, whose code is fixed; leave it out of target")
    if isinstance(owner, _Partly):
        raise RecipeError(f"{name} belongs to a layer that has sparse parameters already; undo that first")
    if hasattr(owner, local + _SUFFIX):
        raise RecipeError(f"{name} belongs to a {kind} that has a {local + _SUFFIX} of its own; leave it out of target")


def _restore(owner: nn.Module, kind: type[nn.Module]) -> None:
    for local in owner.__dict__.pop("_free_places"):
        del owner._parameters[local + _SUFFIX]
    owner.__class__ = kind
