"""InsertAttention: balanced attention put into a convolutional network that has none.

Vir, "Balanced Multi-Task Attention for Satellite Image Classification", 2025 (https://arxiv.org/abs/2510.15527; code
https://github.com/virAditya/satellite-image-classification-eurosat, commit a01ffe4). The block and its equations stand
in ``lightning_recipes/modules/balanced_attention.py``. Behind the last batch norm of every residual block, with G the
gate of the attention:

    x <- x G                          (the paper: identity_init=False)
    x <- x (1 + g (G - 1)),  g = 0    (the default: a pre-trained network is at first what it was, bitwise)

In the paper weight decay acts on theta, the parameter of alpha = sigmoid(theta), and it alone moves alpha from 0.62 to
the 0.57 that is reported: with a gradient of 0, rate 1e-3 and decay 0.05, by a factor of 1 - 5e-5 a step. So an alpha
near 0.57 says nothing about a balance. Here theta does not decay unless `decay_alpha` asks for it, and its gradient is
logged.

Costs about C^2 / 2 weights a block and one more pass over its map, in training and afterwards: a gate that depends on
the input cannot be folded into the stock weights. The blocks stay in the module when the fit is over, as children of
the parts that they stand behind; the stock keys stay what they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from lightning_recipes.core import random
from lightning_recipes.core.errors import RecipeError, check_argument
from lightning_recipes.core.features import feature_maps, named_part
from lightning_recipes.core.prepare import Plan
from lightning_recipes.core.recipe import Paper, Recipe
from lightning_recipes.core.select import SHORTCUTS
from lightning_recipes.core.surgery import Operation
from lightning_recipes.modules.balanced_attention import KINDS, BalancedAttention, InsertedAttention, Kind

CHILD = "attention"  # the block's name inside the part that it stands behind


class Attend:
    """The hook that sends a part's output through the attention that is its child; a copy uses its own part's.

    Args:
        path: of the part, for errors.
        spec: of the surgery that put it there.
    """

    def __init__(self, path: str, spec: AttentionBlocks) -> None:
        self.path, self.spec = path, spec

    def __call__(self, part: nn.Module, args: tuple[Any, ...], x: Any) -> Tensor:
        block = getattr(part, CHILD)
        if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[1] != block.channels:
            got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise RecipeError(
                f"InsertAttention: {self.path} gives {got} where maps [n, {block.channels}, height, width] were"
                " expected; name other parts with after="
            )
        return block(x)


@dataclass
class Attention(Operation):
    """Blocks in their places.

    Attributes:
        blocks: by the path that each part had; another surgery may have moved it since.
    """

    blocks: dict[str, InsertedAttention] = field(default_factory=dict)


@dataclass(frozen=True)
class AttentionBlocks:
    """The surgery; arguments as those of :class:`InsertAttention`."""

    what: ClassVar[str] = "attention blocks"
    on_weights: ClassVar[bool] = False

    after: Literal["auto"] | Sequence[str] = "auto"
    kind: Kind = "balanced"
    identity_init: bool = True
    decay_alpha: bool = False
    ca_reduction: int = 8
    se_reduction: int = 16
    theta_init: float = 0.5
    seed: int = 0

    def present(self, module: pl.LightningModule) -> bool:
        return bool(inserted(module))

    def operate(self, module: pl.LightningModule) -> Attention:
        kept = inserted(module)
        paths = self._same_as(module, kept) if kept else self._places(module)
        operation = Attention(module, replace(self, after=paths))
        with random.forked(module.device, self.seed):
            for path in paths:
                part = module.get_submodule(path)
                if path not in kept:
                    self._put_behind(module, path, part)
                operation.undo.callback(_take_out, part)
                operation.blocks[path] = getattr(part, CHILD)
        for path, block in operation.blocks.items():
            operation.made.update({f"{path}.{CHILD}.{name}": p for name, p in block.named_parameters()})
        if not self.decay_alpha:
            operation.weight_decay = {name: 0.0 for name in operation.made if name.endswith(".theta")}
        return operation

    def _places(self, module: pl.LightningModule) -> list[str]:
        """Paths of the parts behind which a block shall stand.

        Raises:
            RecipeError: for a network that has attention of this kind already, or parts that are taken.
        """
        own = [name for name, part in module.named_modules() if isinstance(part, BalancedAttention)]
        if own:
            raise RecipeError(f"the network has balanced attention of its own, the first at {own[0]}")
        if self.after == "auto":
            paths = [path for path, _, _ in feature_maps(module, "end", "after")]
        else:
            paths = [named_part(module, path) for path in self.after]
        paths = list(dict.fromkeys(_last_in_sequence(module, path) for path in paths))
        taken = [path for path in paths if hasattr(module.get_submodule(path), CHILD)]
        if taken:
            raise RecipeError(f"{taken[0]} has a part named {CHILD!r} already; name other parts with after=")
        return paths

    def _put_behind(self, module: pl.LightningModule, path: str, part: nn.Module) -> None:
        like = _layer_at(module, path)
        channels = like.num_features if isinstance(like, _BatchNorm) else like.out_channels
        block = InsertedAttention(
            channels, self.kind, self.identity_init, self.ca_reduction, self.se_reduction, self.theta_init
        )
        floats = [t for t in (*like.parameters(), *like.buffers()) if t.is_floating_point()]
        if floats:
            block.to(floats[0])
        part.add_module(CHILD, block.train(part.training))
        # first of all hooks: whoever looks at the part's output sees what the network goes on with
        part.register_forward_hook(Attend(path, self), prepend=True)

    def _same_as(self, module: pl.LightningModule, kept: dict[str, AttentionBlocks]) -> list[str]:
        """The places of an earlier fit, whose blocks go on training.

        Raises:
            RecipeError: when others are asked for now.
        """
        paths = list(kept)
        if self.after != "auto":
            paths = [_last_in_sequence(module, named_part(module, path)) for path in self.after]
        there = next(iter(kept.values()))
        free = {"after": there.after, "seed": there.seed, "decay_alpha": there.decay_alpha}
        if set(paths) != set(kept) or replace(self, **free) != there:
            raise RecipeError(
                f"the module carries other attention blocks from an earlier fit ({there}, behind {list(kept)}); use its"
                " arguments, or a module without them"
            )
        return list(kept)


def inserted(module: nn.Module) -> dict[str, AttentionBlocks]:
    """The attention blocks in a module: the surgery that made it, by path of the part that it stands behind."""
    found = {path: _hook_of(part) for path, part in module.named_modules()}
    return {path: hook.spec for path, hook in found.items() if hook is not None}


def remove_attention(module: nn.Module) -> list[str]:
    """Take the attention blocks that a fit kept out of a module; what is left was trained with them.

    Returns:
        the paths that they stood behind.
    """
    paths = list(inserted(module))
    for path in paths:
        _take_out(module.get_submodule(path))
    return paths


def _hook_of(part: nn.Module) -> Attend | None:
    return next((hook for hook in part._forward_hooks.values() if isinstance(hook, Attend)), None)


def _take_out(part: nn.Module) -> None:
    key = next((key for key, hook in part._forward_hooks.items() if isinstance(hook, Attend)), None)
    if key is not None:
        del part._forward_hooks[key]
        delattr(part, CHILD)


def _last_in_sequence(module: nn.Module, path: str) -> str:
    """The last part of a sequence, which gives its output; a child of the sequence itself would be run by it."""
    part = module.get_submodule(path)
    while isinstance(part, nn.Sequential) and type(part).forward is nn.Sequential.forward and len(part):
        name, part = list(part.named_children())[-1]
        path = f"{path}.{name}"
    return path


def _layer_at(module: nn.Module, path: str) -> nn.Module:
    """The convolution or batch norm that decides how many channels come out of a part: the last one in it, or the last
    one before it.

    Raises:
        RecipeError: where there is none.
    """
    last, entered = None, False
    for name, part in module.named_modules():
        inside = name == path or name.startswith(path + ".")
        if entered and not inside:
            break
        entered = entered or inside
        beside = any(word in name for word in SHORTCUTS)
        if isinstance(part, (nn.Conv2d, nn.BatchNorm2d)) and not beside:
            last = part
    if last is None:
        raise RecipeError(f"{path} has no convolution in it or before it; name other parts with after=")
    return last


class InsertAttention(Recipe):
    """Put balanced attention, or one of its branches, into a stock convolutional network.

    The blocks stay in the module when the fit is over; a second fit with the same arguments trains them on, and
    ``remove_attention`` takes them out. For validate, test and predict from a checkpoint give the recipe too, so that
    they are built before weights load. Coordinate attention has a batch norm, whose statistics are those of each rank,
    as with any other; ``Trainer(sync_batchnorm=True)`` makes them the global ones.

    Args:
        after: 'auto' for the end of every residual block, before the shortcut is added, or else the output of every
            convolutional stage; or the parts behind which a block shall stand, by name.
        kind: 'balanced', or one branch alone: 'coord' or 'se'.
        identity_init: start at the identity, by a learnt factor g that is 0 at first; False is the paper.
        decay_alpha: whether weight decay acts on alpha's parameter, as in the paper's code.
        ca_reduction: C/r channels in the bottleneck of coordinate attention, at least one.
        se_reduction: the same for squeeze and excitation.
        theta_init: alpha starts at its sigmoid, 0.62; 0 for a half.
        seed: of the first values.

    Raises:
        RecipeError: for bad arguments; in setup without feature maps to attend to, for names that are no part, a
            network with balanced attention of its own, or other blocks from an earlier fit; in the first step for a
            part that gives no maps, or of another number of channels than its convolutions say.
    """

    paper = Paper(
        "Balanced Multi-Task Attention for Satellite Image Classification",
        "A. Vir",
        2025,
        "https://arxiv.org/abs/2510.15527",
        "https://github.com/virAditya/satellite-image-classification-eurosat",
    )
    does = "Puts spatial and spectral attention, mixed by one learnt scalar a block, into a convolutional network."
    use_when = "A convolutional network on images where both where and which channel matter, as satellite images."
    costs = "About C^2 / 2 weights a block and one more pass over its map; it cannot be merged and stays."
    log_prefix = "attention"
    merge_on_end: ClassVar[bool] = False

    operation: Attention | None = None

    def __init__(
        self,
        after: Literal["auto"] | Sequence[str] = "auto",
        kind: Kind = "balanced",
        identity_init: bool = True,
        decay_alpha: bool = False,
        ca_reduction: int = 8,
        se_reduction: int = 16,
        theta_init: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        named = after == "auto" or (not isinstance(after, str) and len(after) > 0)
        check_argument(named, self, "after", after, "'auto' or names of at least one part")
        check_argument(kind in KINDS, self, "kind", kind, "'balanced', 'coord' or 'se'")
        check_argument(ca_reduction >= 1, self, "ca_reduction", ca_reduction, "at least 1")
        check_argument(se_reduction >= 1, self, "se_reduction", se_reduction, "at least 1")
        self.after, self.kind, self.identity_init, self.decay_alpha = after, kind, identity_init, decay_alpha
        self.ca_reduction, self.se_reduction, self.theta_init, self.seed = ca_reduction, se_reduction, theta_init, seed

    def declare(self, plan: Plan) -> None:
        plan.surgery(
            AttentionBlocks(
                self.after if self.after == "auto" else list(self.after),
                self.kind,
                self.identity_init,
                self.decay_alpha,
                self.ca_reduction,
                self.se_reduction,
                self.theta_init,
                self.seed,
            )
        )

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        thetas = [block.attention.theta for block in self.operation.blocks.values() if self.kind == "balanced"]
        gradients = [theta.grad for theta in thetas if theta.grad is not None]
        if gradients:
            self.log("attention/theta_grad", torch.stack(gradients).abs().mean())

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        blocks = self.operation.blocks
        if self.kind == "balanced":
            alphas = {path: block.attention.alpha for path, block in blocks.items()}
            self.log_dict({f"attention/alpha/{path}": alpha for path, alpha in alphas.items()})
            self.log("attention/alpha_mean", torch.stack(list(alphas.values())).mean())
        if self.identity_init:
            self.log("attention/g_mean", torch.stack([block.g.detach() for block in blocks.values()]).mean())
