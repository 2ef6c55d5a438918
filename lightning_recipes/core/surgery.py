"""The surgery socket: adapters put into the user's module by peft, and taken out or merged at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lightning_recipes.core import random, select
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.qkv import ROLES, open_projections

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


@dataclass(frozen=True)
class AdapterSpec:
    """LoRA adapters to inject; stored in checkpoints, so that the structure can be built again from it alone.

    Attributes:
        names: one LoRA a name; all of them act and train together.
        rank: r.
        alpha: the update is scaled by alpha / r.
        dropout: on the adapters' input.
        target: roles as one word ('qv', 'qkv'), or names of modules (full paths or their ends), or 'all-linear'.
        train_fully: parts beside the adapters that train as they are; 'head' finds the head.
        seed: of the adapters' first values.
    """

    names: Sequence[str]
    rank: int
    alpha: float
    dropout: float
    target: str | Sequence[str]
    train_fully: Sequence[str] = ("head",)
    seed: int = 0

    def as_structure(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {k: list(v) if isinstance(v, (tuple, list)) else v for k, v in asdict(self).items()}


@dataclass
class Adapters:
    """Adapters that are in place.

    Attributes:
        layers: peft's layers by path; ``layer.get_base_layer().weight`` is the frozen weight of exactly the adapted
            projection, also of a fused or packed one.
        made: the parameters that the injection made, by name in the module.
        kept_whole: names of the parameters that train fully beside them.
    """

    module: pl.LightningModule
    spec: AdapterSpec
    layers: dict[str, LoraLayer] = field(default_factory=dict)
    made: dict[str, Parameter] = field(default_factory=dict)
    kept_whole: list[str] = field(default_factory=list)
    _undo: ExitStack = field(default_factory=ExitStack)

    def pairs(self) -> list[tuple[Tensor, list[Tensor], list[Tensor]]]:
        """(frozen W ``[out, in]``, A of each name ``[r, in]``, B of each name ``[out, r]``) by layer."""
        return [
            (
                layer.get_base_layer().weight,
                [layer.lora_A[n].weight for n in self.spec.names],
                [layer.lora_B[n].weight for n in self.spec.names],
            )
            for layer in self.layers.values()
        ]

    def remove(self, *, merge: bool) -> None:
        """Give the module its stock layers back, with the updates folded into their weights or dropped."""
        if merge:
            for layer in self.layers.values():
                layer.merge()
        self._undo.close()
        self.layers, self.made = {}, {}


def inject(module: pl.LightningModule, spec: AdapterSpec) -> Adapters:
    """Put LoRA adapters into the module, the same on every rank and without touching the random state.

    Every ``requires_grad`` outside the adapters is as before (peft's injection freezes all of them, the head included).

    Raises:
        RecipeError: for a target that matches nothing, is already adapted, is no plain layer, or is narrower than the
            rank; nothing is changed then.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    adapters = Adapters(module, spec)
    if carries_adapters(module):
        raise RecipeError("the module already carries adapters; merge or unload them first")
    adapters.kept_whole = select.parameters_under(module, spec.train_fully, "train_fully") if spec.train_fully else []
    flags = [(p, p.requires_grad) for p in module.parameters()]
    with ExitStack() as on_error:
        on_error.callback(adapters._undo.close)
        paths = _resolve(module, spec, adapters._undo)
        for path in paths:
            parent_path, _, name = path.rpartition(".")
            parent, base = module.get_submodule(parent_path), module.get_submodule(path)
            _check_target(path, base, spec)
            adapters._undo.callback(setattr, parent, name, base)
        before = {id(p) for p in module.parameters()}
        with random.forked(module.device, spec.seed):
            for name in spec.names:
                config = LoraConfig(
                    r=spec.rank,
                    lora_alpha=spec.alpha,
                    lora_dropout=spec.dropout,
                    target_modules=[f"inner.{path}" for path in paths],
                )
                holder = nn.Module()  # peft writes its notes on the module it is given, and warns when it finds any
                holder.add_module("inner", module)
                inject_adapter_in_model(config, holder, adapter_name=name)
        on_error.pop_all()
    for path in paths:
        layer = module.get_submodule(path)
        assert isinstance(layer, LoraLayer)
        layer.set_adapter(list(spec.names))  # a second adapter leaves only the last one active
        adapters.layers[path] = layer
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    adapters.made = {name: p for name, p in module.named_parameters() if id(p) not in before}
    return adapters


def _resolve(module: pl.LightningModule, spec: AdapterSpec, undo: ExitStack) -> list[str]:
    """Paths of the layers to adapt; attention blocks are opened up where roles are asked for."""
    if isinstance(spec.target, str) and spec.target and set(spec.target) <= set(ROLES):
        return open_projections(module, spec.target, undo)
    linears = [name for name, part in module.named_modules() if isinstance(part, nn.Linear) or _is_conv1d(part)]
    if spec.target == "all-linear":
        head = select.head(module)
        return [name for name in linears if name != head and not name.startswith(head + ".")]
    wanted = [spec.target] if isinstance(spec.target, str) else list(spec.target)
    everything = [name for name, part in module.named_modules() if name and any(True for _ in part.parameters(False))]
    paths: dict[str, None] = {}
    for pattern in wanted:
        hits = [name for name in everything if name == pattern or name.endswith("." + pattern)]
        if not hits:
            raise RecipeError(f"target {pattern!r} matches no layer; the linear layers are {linears}")
        paths.update(dict.fromkeys(hits))
    return list(paths)


def _check_target(path: str, base: nn.Module, spec: AdapterSpec) -> None:
    weight = getattr(base, "weight", None)
    if weight is None or not torch.is_floating_point(weight):
        raise RecipeError(f"target {path} is a {type(base).__name__} without a floating-point weight (quantised?)")
    if not isinstance(base, (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding)) and not _is_conv1d(base):
        raise RecipeError(
            f"target {path} is a {type(base).__name__}; adapters go on linear, convolution or embedding layers"
        )
    narrowest = min(weight.shape[:2])
    if spec.rank > narrowest:
        raise RecipeError(f"rank must be at most the width of {path}, {narrowest}; got {spec.rank}")
    if (
        spec.dropout
        and ".base_layer" not in path
        and type(base).__name__ == "RowSlice"
        and base._weight_name != "weight"
    ):
        raise RecipeError(
            f"dropout must be 0 on a packed nn.MultiheadAttention ({path}), whose adapters act on the weight"
        )


def _is_conv1d(part: nn.Module) -> bool:
    return type(part).__name__ == "Conv1D"


def carries_adapters(module: nn.Module) -> bool:
    """Whether any of peft's adapters is in the module."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(part, BaseTunerLayer) for part in module.modules())


def structure_of(section: Mapping[str, Any] | None) -> AdapterSpec | None:
    """The adapters that a recipe's section of a checkpoint describes, None if it holds none."""
    stored = (section or {}).get("structure")
    return AdapterSpec(**stored) if stored else None
