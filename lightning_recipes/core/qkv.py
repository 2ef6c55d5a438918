"""Query, key and value projections, whichever way an attention block keeps them.

split: one Linear each (``q_proj``, ``query`` ...). fused: one Linear for all three (timm's ``qkv``, GPT-2's
``c_attn``). packed: ``nn.MultiheadAttention``, one weight and no submodule. The last two are opened up: a wrapper keeps
the original layer as it is and gives each projection a module of its own, a view of its rows, that an adapter can
wrap. Taking the wrapper off gives the original layer back, merged rows included.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_recipes.core.errors import RecipeError

ROLES = ("q", "k", "v")
SPLIT_NAMES = {
    "q": ("q_proj", "query", "q", "q_lin", "wq", "to_q", "query_proj"),
    "k": ("k_proj", "key", "k", "k_lin", "wk", "to_k", "key_proj"),
    "v": ("v_proj", "value", "v", "v_lin", "wv", "to_v", "value_proj"),
}
FUSED_NAMES = ("qkv", "c_attn", "Wqkv", "in_proj", "qkv_proj", "to_qkv")
INTERLEAVED_NAMES = ("query_key_value",)


def open_projections(module: nn.Module, roles: Sequence[str], undo: ExitStack) -> list[str]:
    """Make the named projections of every attention block addressable and say where they are.

    Args:
        module: searched for attention blocks.
        roles: of 'q', 'k', 'v'.
        undo: receives what takes the wrappers off again.

    Returns:
        dotted paths of Linear modules, one a block and role.

    Raises:
        RecipeError: when there is no attention block, or one whose layout is not known; lists what was found.
    """
    paths: list[str] = []
    for path, part in list(module.named_modules()):
        if isinstance(part, nn.MultiheadAttention):
            paths += _open(module, path, _packed(path, part), roles, undo)
        elif (name := path.rpartition(".")[2]) in FUSED_NAMES and _is_linear(part):
            if _width(part)[1] != 3 * _width(part)[0]:
                raise RecipeError(
                    f"{path} fuses projections of different sizes ({_width(part)[0]} to {_width(part)[1]}); name the"
                    " modules to adapt instead"
                )
            paths += _open(module, path, FusedProjections(part), roles, undo)
        elif name in INTERLEAVED_NAMES and _is_linear(part):
            raise RecipeError(f"{path} interleaves q, k and v by head; name the modules to adapt instead")
        else:
            children = dict(part.named_children())
            found = {r: next((n for n in SPLIT_NAMES[r] if _is_linear(children.get(n))), None) for r in ROLES}
            if all(found.values()):
                paths += [f"{path}.{found[r]}" if path else found[r] for r in ROLES if r in roles]
    if not paths:
        linears = [name for name, part in module.named_modules() if _is_linear(part)]
        raise RecipeError(
            f"found no attention block with query and value projections in {type(module).__name__}; its linear layers"
            f" are {linears}: name those to adapt"
        )
    return paths


class RowSlice(nn.Linear):
    """One projection's rows of a larger weight, as the base layer of an adapter.

    It owns no parameter: ``weight`` and ``bias`` are views of the source's. As a layer it adds nothing; the wrapper
    that holds it has already computed these rows with the fused layer.

    Args:
        source: holder of the weight.
        weight_name, bias_name: the attributes in it.
        rows: which output rows.
        transposed: the weight is kept as ``[in, out]``.
    """

    def __init__(
        self, source: nn.Module, weight_name: str, bias_name: str, rows: slice, transposed: bool = False
    ) -> None:
        nn.Module.__init__(self)
        self.__dict__["_source"] = source  # by the back door: a registered submodule would own the weight twice
        self._weight_name, self._bias_name, self._rows, self._transposed = weight_name, bias_name, rows, transposed
        self.out_features, self.in_features = self.weight.shape

    @property
    def weight(self) -> Tensor:
        weight = getattr(self._source, self._weight_name).detach()
        return (weight.T if self._transposed else weight)[self._rows]

    @property
    def bias(self) -> Tensor | None:
        bias = getattr(self._source, self._bias_name)
        return None if bias is None else bias.detach()[self._rows]

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(())


class FusedProjections(nn.Module):
    """A fused qkv layer whose projections can be adapted one by one; the frozen product stays one product.

    Shapes: ``[..., d] -> [..., 3 d]``, as the layer it wraps.
    """

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        self.base_layer = fused
        self.width = width = _width(fused)[0]
        transposed = not isinstance(fused, nn.Linear)
        for i, role in enumerate(ROLES):
            rows = slice(i * width, (i + 1) * width)
            self.add_module(role, RowSlice(fused, "weight", "bias", rows, transposed))

    def forward(self, x: Tensor) -> Tensor:
        fused = self.base_layer(x)
        parts = list(fused.split(self.width, -1))
        for i, role in enumerate(ROLES):
            projection = getattr(self, role)
            if not isinstance(projection, RowSlice):
                parts[i] = parts[i] + _update(projection, x).to(fused.dtype)
        return torch.cat(parts, -1)


def _update(projection: nn.Module, x: Tensor) -> Tensor:
    """What a peft layer over a :class:`RowSlice` adds: the sum over its active adapters of s B A x.

    peft runs one adapter after the other; several plain ones with one scale are the same sum as one of all their ranks.
    """
    names = projection.active_adapters
    plain = not (
        projection.disable_adapters
        or projection.merged
        or projection.lora_variant
        or any(projection.lora_bias.values())
    )
    if len(names) < 2 or not plain or not isinstance(projection.lora_A, nn.ModuleDict):
        return projection(x)
    scales = {projection.scaling[name] for name in names}
    if len(scales) > 1 or any(not isinstance(projection.lora_dropout[name], nn.Identity) for name in names):
        return projection(x)
    a = torch.cat([projection.lora_A[name].weight for name in names])
    b = torch.cat([projection.lora_B[name].weight for name in names], 1)
    return scales.pop() * F.linear(F.linear(x.to(a.dtype), a), b)


class PackedProjections(nn.Module):
    """An ``nn.MultiheadAttention`` whose projections can be adapted one by one.

    The attention runs with the packed weight plus the adapters' updates, so its masks, fast paths and arguments stay
    its own. Attributes that an enclosing layer reads (``batch_first``, ``in_proj_weight`` ...) are the attention's; the
    packed weight is the one with the updates.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.base_layer = attention
        width = attention.embed_dim
        for i, role in enumerate(ROLES):
            rows = slice(i * width, (i + 1) * width)
            self.add_module(role, RowSlice(attention, "in_proj_weight", "in_proj_bias", rows))

    @property
    def in_proj_weight(self) -> Tensor:
        weight, parts = self.base_layer.in_proj_weight, []
        for role in ROLES:
            projection = getattr(self, role)
            delta = None
            if not isinstance(projection, RowSlice) and not projection.merged:
                for name in projection.active_adapters:
                    update = projection.get_delta_weight(name)
                    delta = update if delta is None else delta + update
            parts.append(delta)
        if all(p is None for p in parts):
            return weight
        rows = weight.split(self.base_layer.embed_dim)
        return torch.cat([r if p is None else r + p.to(r.dtype) for r, p in zip(rows, parts)])

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(self.base_layer, {"in_proj_weight": self.in_proj_weight}, args, kwargs)


def _packed(path: str, attention: nn.MultiheadAttention) -> PackedProjections:
    if attention.in_proj_weight is None:
        raise RecipeError(f"{path} has keys and values of other sizes (kdim, vdim); packed projections must be square")
    return PackedProjections(attention)


def _open(module: nn.Module, path: str, wrapper: nn.Module, roles: Sequence[str], undo: ExitStack) -> list[str]:
    parent_path, _, name = path.rpartition(".")
    parent = module.get_submodule(parent_path)
    undo.callback(setattr, parent, name, getattr(parent, name))
    setattr(parent, name, wrapper)
    return [f"{path}.{role}" for role in ROLES if role in roles]


def _is_linear(part: nn.Module | None) -> bool:
    return isinstance(part, nn.Linear) or type(part).__name__ == "Conv1D"


def _width(part: nn.Module) -> tuple[int, int]:
    """Input and output width of a Linear or of transformers' Conv1D."""
    if isinstance(part, nn.Linear):
        return part.in_features, part.out_features
    return part.weight.shape[0], part.weight.shape[1]
