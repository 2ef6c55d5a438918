"""DropBlock: squares of the feature maps of a convolutional network are left out in training, more in deeper layers.

Ghiasi, Lin, Le, "DropBlock: A regularization method for convolutional networks", NeurIPS 2018
(https://arxiv.org/abs/1810.12890), with the depth schedule of Vir, "Balanced Multi-Task Attention for Satellite Image
Classification", 2025 (https://arxiv.org/abs/2510.15527; code
https://github.com/virAditya/satellite-image-classification-eurosat, commit a01ffe4). In the middle of every residual
block, between its first two convolutions, with p linear in depth:

    keep = 1 - maxpool_b(seeds),   seeds ~ Bernoulli(gamma),   gamma = p / b^2
    y    = x keep numel(keep) / sum(keep)

The equations, the original gamma and what is really dropped stand in ``lightning_recipes/modules/drop_block.py``; this
file puts them into any network by hooks, which are gone when the fit is over. The paper's "progressive" is in depth;
a rise in time is an option of ours.

Masks belong to a sample's place in the epoch, so they are the same on one rank or several and after a resume; the sum
is over the samples of all ranks. Costs one random number and one max-pooling a pixel of one channel of every map, and
on several ranks a message of two numbers a map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_recipes.core.distributed import active, all_sum
from lightning_recipes.core.errors import RecipeError, check_argument
from lightning_recipes.core.features import Edits, Side, feature_maps, named_part
from lightning_recipes.core.prepare import Plan
from lightning_recipes.core.recipe import Paper, StepRecipe
from lightning_recipes.core.step import Step, running
from lightning_recipes.modules.drop_block import (
    GAMMAS,
    Gamma,
    fitting_block,
    kept,
    rates,
    seed_rate,
    warn_of_small_map,
)

_LAYERS = ("DropBlock2d", "DropBlock2D", "DropBlock")  # ours, timm's and torchvision's, and others' by their name


def ramp(epochs_done: float, ramp_epochs: int) -> float:
    """Factor on p in time: from 0 linearly to 1 after so many epochs; 1 throughout without them."""
    return min(1.0, epochs_done / ramp_epochs) if ramp_epochs else 1.0


class DropBlock(StepRecipe):
    """Leave out squares of a stock network's feature maps in training, for all channels alike.

    In evaluation, and in passes that are not part of a training step, nothing is left out. Replays of a step (an
    attack, a second pass) meet the step's own masks.

    Args:
        drop_prob: p, or its values at the first and the last depth; stages of residual blocks are one depth each. 0
            switches the recipe off.
        block_size: edge b of the squares in pixels of the map, odd; a smaller map has squares of its own size.
        where: 'auto' for the middle of every residual block, or else the output of every convolutional stage; or the
            parts whose output is taken, by name and in order of depth.
        gamma: 'paper_code' (p / b^2) or 'dropblock', the original with its correction for the border.
        ramp_epochs: let p rise linearly from 0 in the first epochs.
        seed: of the masks.

    Raises:
        RecipeError: for bad arguments; in setup without feature maps, for names that are no part, or a network with
            DropBlock of its own; in the first step for a part that gives no maps [n, channels, height, width].
    """

    paper = Paper(
        "DropBlock: A regularization method for convolutional networks",
        "G. Ghiasi, T.-Y. Lin, Q. V. Le",
        2018,
        "https://arxiv.org/abs/1810.12890",
        "https://github.com/virAditya/satellite-image-classification-eurosat",
    )
    does = "Leaves out squares of feature maps in training, more of them in deeper layers of a convolutional network."
    use_when = "A convolutional network trained from scratch overfits and dropout of single pixels does not help."
    works_sharded = True
    costs = "A random number and a max-pooling a pixel of one channel of every map; nothing after training."
    log_prefix = "dropblock"
    couples_samples: ClassVar[bool] = True

    def __init__(
        self,
        drop_prob: float | tuple[float, float] = (0.05, 0.20),
        block_size: int = 7,
        where: Literal["auto"] | Sequence[str] = "auto",
        gamma: Gamma = "paper_code",
        ramp_epochs: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        one = isinstance(drop_prob, (int, float))
        ends = [drop_prob] if one else list(drop_prob)
        usable = len(ends) == (1 if one else 2) and all(0 <= p < 1 for p in ends)
        check_argument(usable, self, "drop_prob", drop_prob, "in [0, 1), or a pair of such")
        odd = block_size >= 1 and block_size % 2 == 1
        check_argument(odd, self, "block_size", block_size, "odd, or its squares would not stand on their middles")
        named = where == "auto" or (not isinstance(where, str) and len(where) > 0)
        check_argument(named, self, "where", where, "'auto' or names of at least one part")
        check_argument(gamma in GAMMAS, self, "gamma", gamma, "'paper_code' or 'dropblock'")
        check_argument(ramp_epochs >= 0, self, "ramp_epochs", ramp_epochs, "at least 0")
        self.drop_prob = drop_prob if one else tuple(drop_prob)
        self.block_size, self.where, self.gamma, self.ramp_epochs = block_size, where, gamma, ramp_epochs
        self.seed = seed
        self._p: dict[str, float] = {}  # by path of the part
        self._forget()
        self._warned: set[str] = set()

    @property
    def neutral(self) -> bool:
        return self.drop_prob in (0, (0, 0))

    def declare(self, plan: Plan) -> None:
        super().declare(plan)
        if not plan.fitting:
            return
        own = [name for name, part in plan.module.named_modules() if _drops_blocks(part)]
        if own:
            raise RecipeError(
                f"the network has DropBlock of its own, the first at {own[0]}; switch it off there (drop_prob=0), or"
                " leave the recipe out"
            )
        places: list[tuple[str, Side, int]]
        if self.where == "auto":
            places = feature_maps(plan.module, "middle", "where")
        else:
            places = [(named_part(plan.module, path), "output", depth) for depth, path in enumerate(self.where)]
        of_depth = rates(self.drop_prob, 1 + max(depth for _, _, depth in places))
        self._p = {path: of_depth[depth] for path, _, depth in places}
        self._warned = set()
        plan.install(Edits(plan.module, {path: (path, side) for path, side, _ in places}, self._drop))
        plan.at_end(self._forget)

    def _forget(self) -> None:
        self._step: Step | None = None
        self._factors: dict[str, list[Tensor | None]] = {}  # of the step, by path, one a call
        self._kept: dict[str, Tensor] = {}

    def _drop(self, path: str, part: nn.Module, x: Tensor) -> Tensor:
        if not part.training:
            return x
        factor = self._factor(path, x)
        return x if factor is None else x * factor

    @torch.compiler.disable  # its keys are other numbers in every step, which a graph could not hold
    def _factor(self, path: str, x: Tensor) -> Tensor | None:
        """keep numel / sum, ``[n, 1, H, W]``; None where nothing is left out."""
        if torch._C._current_graph_task_id() != -1:
            return self._of_the_forward(path)  # activation checkpointing runs a part again, in the backward pass
        step = running()
        if step is None:
            return None
        if step is not self._step:
            self._step, self._factors = step, {}
        factor = self._draw(step, path, x)
        self._factors.setdefault(path, []).append(factor)
        return factor

    def _of_the_forward(self, path: str) -> Tensor | None:
        factors = self._factors.get(path, [None])
        if len(factors) > 1:
            raise RecipeError(
                f"DropBlock: {path} is under activation checkpointing and was called {len(factors)} times in the step,"
                " so that it cannot be told which call is run again; name other parts with where="
            )
        return factors[0]

    @torch.no_grad()
    def _draw(self, step: Step, path: str, x: Tensor) -> Tensor | None:
        if x.dim() != 4:
            raise RecipeError(
                f"DropBlock: {path} has {list(x.shape)} where maps [n, channels, height, width] were expected; name"
                " other parts with where="
            )
        height, width = x.shape[2:]
        block = fitting_block(self.block_size, height, width)
        if block < self.block_size and path not in self._warned:
            self._warned.add(path)
            warn_of_small_map(f"DropBlock at {path}", self.block_size, height, width, block)
        p = self._p[path] * ramp(step.epochs_done, self.ramp_epochs)
        if p == 0:
            return None
        uniform = step.uniform(self, self.seed, path, x[:, :1])
        keep = kept((uniform < seed_rate(p, block, height, width, self.gamma)).float(), block)
        left, total = keep.sum(), keep.new_full((), keep.numel())
        if active():
            left, total = all_sum(torch.stack([left, total]))
        self._kept[path] = left / total
        return (keep * (total / left.clamp_min(1))).to(x.dtype)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object) -> None:
        if self._kept:
            self.log("dropblock/kept", torch.stack(list(self._kept.values())).mean())


def _drops_blocks(part: nn.Module) -> bool:
    p = getattr(part, "drop_prob", getattr(part, "p", None))
    return type(part).__name__ in _LAYERS and p != 0
