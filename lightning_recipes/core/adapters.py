"""LoRA adapters as a surgery: put into the user's module by peft, and taken out or merged at the end.

And what all recipes with adapters share: their arguments for the end of the fit, their file, the count of what trains.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_recipes.core import random, select
from lightning_recipes.core.diagnostics import log_values
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.qkv import ROLES, open_projections
from lightning_recipes.core.recipe import Recipe
from lightning_recipes.core.step import prefix
from lightning_recipes.core.surgery import Operation

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

    what: ClassVar[str] = "adapters"
    on_weights: ClassVar[bool] = True

    names: Sequence[str]
    rank: int
    alpha: float
    dropout: float
    target: str | Sequence[str]
    train_fully: Sequence[str] = ("head",)
    seed: int = 0

    def operate(self, module: pl.LightningModule) -> Adapters:
        return inject(module, self)

    def present(self, module: pl.LightningModule) -> bool:
        return carries_adapters(module)


@dataclass
class Adapters(Operation):
    """Adapters that are in place.

    Attributes:
        names: of the adapters on each layer.
        layers: peft's layers by path; ``layer.get_base_layer().weight`` is the frozen weight of exactly the adapted
            projection, also of a fused or packed one.
    """

    names: list[str] = field(default_factory=list)
    layers: dict[str, LoraLayer] = field(default_factory=dict)

    def pairs(self) -> list[tuple[Tensor, list[Tensor], list[Tensor]]]:
        """(frozen W ``[out, in]``, A of each name ``[r, in]``, B of each name ``[out, r]``) by layer."""
        return [
            (
                layer.get_base_layer().weight,
                [layer.lora_A[n].weight for n in self.names],
                [layer.lora_B[n].weight for n in self.names],
            )
            for layer in self.layers.values()
        ]

    def remove(self, *, merge: bool) -> None:
        """Give the module its stock layers back, with the updates folded into their weights or dropped."""
        if merge:
            for layer in self.layers.values():
                layer.merge()
        super().remove(merge=merge)
        self.layers = {}


def inject(
    module: pl.LightningModule, spec: AdapterSpec, rank_of: Callable[[str, nn.Module], int] | None = None
) -> Adapters:
    """Put LoRA adapters into the module, the same on every rank and without touching the random state.

    Every ``requires_grad`` outside the adapters is as before (peft's injection freezes all of them, the head included).

    Args:
        rank_of: from a layer's path and the layer to its rank, for ranks that differ; the scale alpha / r stays that of
            the spec. May raise for a layer that it cannot take.

    Raises:
        RecipeError: for a target that matches nothing, is already adapted, is no plain layer, has a weight that is tied
            to another part's, or is narrower than the rank; nothing is changed then.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    adapters = Adapters(module, spec, names=list(spec.names))
    if carries_adapters(module):
        raise RecipeError("the module already carries adapters; merge or unload them first")
    adapters.kept_whole = select.parameters_under(module, spec.train_fully, "train_fully") if spec.train_fully else []
    flags = [(p, p.requires_grad) for p in module.parameters()]
    with ExitStack() as on_error:
        on_error.callback(adapters.undo.close)
        paths = _resolve(module, spec, adapters.undo)
        ranks: dict[str, int] = {}
        for path in paths:
            parent_path, _, name = path.rpartition(".")
            parent, base = module.get_submodule(parent_path), module.get_submodule(path)
            _check_target(module, path, base, spec)
            adapters.undo.callback(setattr, parent, name, base)
            if rank_of is not None:
                ranks[re.escape(f"inner.{path}")] = rank_of(path, base)
        before = {id(p) for p in module.parameters()}
        with random.forked(module.device, spec.seed):
            for name in spec.names:
                config = LoraConfig(
                    r=spec.rank,
                    lora_alpha=spec.alpha,
                    lora_dropout=spec.dropout,
                    target_modules=[f"inner.{path}" for path in paths],
                    rank_pattern=ranks,
                    alpha_pattern={path: rank * spec.alpha / spec.rank for path, rank in ranks.items()},
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
            near = difflib.get_close_matches(pattern, everything, 5, 0.5) or linears[:5]
            raise RecipeError(f"target {pattern!r} matches no layer; the nearest are {near}")
        paths.update(dict.fromkeys(hits))
    return list(paths)


def _check_target(module: nn.Module, path: str, base: nn.Module, spec: AdapterSpec) -> None:
    weight = getattr(base, "weight", None)
    if weight is None or not torch.is_floating_point(weight):
        raise RecipeError(f"target {path} is a {type(base).__name__} without a floating-point weight (quantised?)")
    if not isinstance(base, (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding)) and not _is_conv1d(base):
        raise RecipeError(
            f"target {path} is a {type(base).__name__}; adapters go on linear, convolution or embedding layers"
        )
    names = [name for name, p in module.named_parameters(remove_duplicate=False) if p is weight]
    tied = [name for name in names if name != f"{path}.weight"]
    if tied:
        raise RecipeError(f"the weight of target {path} is tied to {tied[0]}, which merging would change too")
    shape = list(weight.shape)
    width = min(shape[:2])
    if spec.rank > width:
        raise RecipeError(f"rank must be at most the width of {path}, {width} (its weight is {shape}); got {spec.rank}")
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


class AdapterRecipe(Recipe):
    """What all recipes that train adapters have in common.

    Attributes:
        merge_on_end: fold the adapters into the stock weights when the fit ends.
        adapter_dir: folder that gets the adapters as they are then, in peft's format.
    """

    free_on_resume = frozenset({"merge_on_end", "adapter_dir"})

    operation: Adapters | None = None
    merge_on_end: bool = True
    adapter_dir: str | None = None

    def save_adapter(self, folder: str | Path, root: str | None = None) -> Path:
        """Write the adapters, and what trains beside them, in peft's format.

        Rank 0 writes; the other ranks may call it too. See :func:`~lightning_recipes.core.adapter_files.save_adapter`.

        Raises:
            RecipeError: when there are none: before a fit, or after one that merged them.
        """
        from lightning_recipes.core.adapter_files import save_adapter

        self.check_saves()
        return save_adapter(self.operation, folder, root)

    def check_saves(self) -> None:
        """Raise where there are no adapters to save."""
        if self.operation is None or not self.operation.layers:
            raise RecipeError(
                f"{type(self).__name__}: there are no adapters to save. Call it during the fit, keep them in the module"
                " (merge_on_end=False), or have them written when the fit ends (adapter_dir)"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.operation is not None:
            count = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
            log_values(trainer, {f"{prefix(self)}/trainable": count})

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.adapter_dir is not None and self.operation is not None:
            self.save_adapter(self.adapter_dir)
