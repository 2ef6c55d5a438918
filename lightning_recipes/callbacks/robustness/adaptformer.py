"""AdaptFormer: a small branch beside the MLP of every transformer block, the rest frozen.

Chen et al., "AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition", NeurIPS 2022
(https://arxiv.org/abs/2205.13535), as in LIFT (Shi et al., ICML 2024, https://arxiv.org/abs/2309.10019) and in stage 1
of Chen et al., "Rethinking the Bias of Foundation Model under Long-tailed Distribution", ICML 2025
(https://arxiv.org/abs/2501.15955; code https://github.com/JiahaoChen1/Pre-train-Imbalance, commit f5ec404).

With z the residual stream before the MLP of a block, D its width and r the bottleneck:

    z <- z + MLP(LN2(z)) + s * up(relu(down(LN(z)))),    down: D -> r,  up: r -> D

LN, down, up and the scalar s train, and so does the head. down starts Kaiming-normal (a = sqrt 5), `up` and all biases
at 0 and s at 1, so the network's outputs are at first what they were.

Costs 2 r D + r + 3 D + 1 weights a block in training and afterwards: the branch is not linear, so it cannot be folded
into the stock weights. It stays in the module when the fit is over: the result of the fit is the module with it. The
stock parts keep their names in the state dict, beside ``blocks.i.adapter.*``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import lightning.pytorch as pl
from torch import nn

from lightning_recipes.core import random, select
from lightning_recipes.core.diagnostics import log_values
from lightning_recipes.core.errors import RecipeError, check_argument
from lightning_recipes.core.features import head_input
from lightning_recipes.core.prepare import Plan
from lightning_recipes.core.recipe import Paper, Recipe
from lightning_recipes.core.step import prefix
from lightning_recipes.core.surgery import Operation


def bottleneck_width(classes: int, layers: int) -> int:
    """2^max(0, floor(log2(classes / (2 layers)))): 32 for 1,000 classes and 12 layers, 4 for 100."""
    return 2 ** max(0, math.floor(math.log2(classes / (2 * layers))))


@dataclass(frozen=True)
class ParallelBranches:
    """The surgery: branches beside the MLPs.

    Attributes:
        bottleneck: their width; None for :func:`bottleneck_width`.
        num_classes: for that; None for the width of the head.
        blocks: which blocks, by index; None for all.
        train_fully: parts that train beside them.
        seed: of the first values.
    """

    what: ClassVar[str] = "AdaptFormer branches"
    on_weights: ClassVar[bool] = False

    bottleneck: int | None
    num_classes: int | None
    blocks: Sequence[int] | None
    train_fully: Sequence[str]
    seed: int

    def present(self, module: pl.LightningModule) -> bool:
        from lightning_recipes.modules.adapted_block import AdaptedBlock

        return any(isinstance(part, AdaptedBlock) for part in module.modules())

    def operate(self, module: pl.LightningModule) -> Operation:
        from timm.models.vision_transformer import Block

        from lightning_recipes.modules.adapted_block import AdaptedBlock, ParallelAdapter

        found = {name: part for name, part in module.named_modules() if type(part) in (Block, AdaptedBlock)}
        if not found:
            kinds = sorted({type(part).__name__ for part in module.modules() if "Block" in type(part).__name__})
            raise RecipeError(
                "needs a vision transformer of timm, with blocks that are timm.models.vision_transformer.Block; the"
                f" module's blocks are {kinds or 'none'}"
            )
        names, depth = list(found), len(found)
        chosen = range(depth) if self.blocks is None else self.blocks
        outside = [i for i in chosen if not 0 <= i < depth]
        if outside:
            raise RecipeError(f"blocks must be indices from 0 to {depth - 1}; got {outside[0]}")
        width = self.bottleneck or bottleneck_width(self._classes(module), depth)
        kept_whole = select.parameters_under(module, self.train_fully, "train_fully") if self.train_fully else []
        operation = Operation(module, replace(self, bottleneck=width, blocks=list(chosen)), kept_whole=kept_whole)
        there = [i for i, name in enumerate(names) if type(found[name]) is AdaptedBlock]
        if there:
            _check_kept(found, names, there, list(chosen), width)
        with random.forked(module.device, self.seed):
            for i in chosen:
                block = found[names[i]]
                if i not in there:
                    like = block.norm2.weight if hasattr(block.norm2, "weight") else next(block.parameters())
                    block.adapter = ParallelAdapter(_width(block), width, like)
                    block.__class__ = AdaptedBlock
                    operation.undo.callback(_take_out, block, Block)
        operation.made = {
            f"{names[i]}.adapter.{name}": p for i in chosen for name, p in found[names[i]].adapter.named_parameters()
        }
        return operation

    def _classes(self, module: pl.LightningModule) -> int:
        return self.num_classes or head_input(module)[1].out_features


def _width(block: nn.Module) -> int:
    return block.mlp.fc1.in_features


def _take_out(block: nn.Module, stock: type[nn.Module]) -> None:
    block.__class__ = stock
    del block.adapter


def _check_kept(found: dict[str, Any], names: list[str], there: list[int], chosen: list[int], width: int) -> None:
    """Branches of an earlier fit go on training, if they are those that are asked for."""
    widths = {found[names[i]].adapter.down.out_features for i in there}
    if there != sorted(chosen) or widths != {width}:
        raise RecipeError(
            f"the module already carries AdaptFormer branches of width {sorted(widths)} in blocks {there}, and width"
            f" {width} in blocks {sorted(chosen)} is asked for; ask for the same to train them on, or begin with a new"
            " module"
        )


class AdaptFormer(Recipe):
    """Freeze a timm vision transformer and train a small branch beside the MLP of its blocks, and the head.

    The branches stay in the module when the fit is over; a second fit with the same arguments trains them on. For
    validate, test and predict from a checkpoint give the recipe too, so that they are built before weights load. Beside
    LoRA recipes (GLAD, PEGO, SVFit) both kinds of adapters train; schedules of layers open a block's branch with it.

    Args:
        bottleneck: width of the branches; None for 2^floor(log2(classes / (2 layers))), at least 1, as in the papers.
        num_classes: for that width; None for the width of the head.
        blocks: indices of the blocks that get one; None for all.
        train_fully: what trains beside them; 'head' finds the head.
        seed: of the first values.

    Raises:
        RecipeError: for bad arguments; in setup without blocks of timm, for an index that is no block, no head, a
            frozen head, or branches of another width from an earlier fit.
    """

    paper = Paper(
        "AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition",
        "S. Chen, C. Ge, Z. Tong, J. Wang, Y. Song, J. Wang, P. Luo",
        2022,
        "https://arxiv.org/abs/2205.13535",
        "https://github.com/ShoufaChen/AdaptFormer",
    )
    does = "Freezes a vision transformer and trains a small branch beside the MLP of every block."
    use_when = "You fine-tune a large vision transformer on few data, or on a long tail, and full training overfits."
    costs = "About 2 r D weights a block, in training and afterwards: the branch cannot be merged and stays."
    owns_training_set = True
    merge_on_end: ClassVar[bool] = False

    def __init__(
        self,
        bottleneck: int | None = None,
        num_classes: int | None = None,
        blocks: Sequence[int] | None = None,
        train_fully: Sequence[str] = ("head",),
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_argument(bottleneck is None or bottleneck >= 1, self, "bottleneck", bottleneck, "None or at least 1")
        check_argument(num_classes is None or num_classes >= 2, self, "num_classes", num_classes, "None or at least 2")
        distinct = blocks is None or (len(blocks) > 0 and len(set(blocks)) == len(blocks))
        check_argument(distinct, self, "blocks", blocks, "None or at least one index of a block, each once")
        check_argument(not isinstance(train_fully, str), self, "train_fully", train_fully, "a list of names")
        self.bottleneck, self.num_classes, self.blocks = bottleneck, num_classes, blocks
        self.train_fully, self.seed = train_fully, seed

    def declare(self, plan: Plan) -> None:
        plan.surgery(
            ParallelBranches(self.bottleneck, self.num_classes, self.blocks, list(self.train_fully), self.seed)
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainable = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        log_values(trainer, {f"{prefix(self)}/trainable": trainable})
