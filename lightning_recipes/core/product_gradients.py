"""The gradient of a matrix that a network holds only as a product of two factors.

For X = B A, acting on h as B (A h), the network computes dL/dB = Q A^T and dL/dA = B^T Q, and never Q = dL/dX itself.
With g the gradient of what B puts out, summed over samples and tokens:

    Q = sum g h^T

Costs one product of the size of a dense weight's gradient a pair and pass, and that much memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_recipes.core.distributed import all_mean_, rank_and_world
from lightning_recipes.core.features import part_of
from lightning_recipes.core.silence import is_silent


class ProductGradients:
    """Sums Q = dL/dX over the micro-batches of an optimizer step, in fp32 at least.

    Use it as a part of a fit (``plan.install(found)``). Seen are passes with gradients that are not silent. A copy of
    the module carries hooks that do nothing.

    Args:
        module: any module.
        pairs: by the caller's own name, (path of the linear layer whose weight is A, path of that whose weight is B),
            or one path twice for a part that puts out X itself.

    Attributes:
        sums: Q so far by name, ``[rows of B, columns of A]``, of this rank and as backward scaled it; what a checkpoint
            in the middle of a window must keep.
    """

    def __init__(self, module: nn.Module, pairs: Mapping[str, tuple[str, str]]) -> None:
        self.pairs = dict(pairs)
        self._parts = {name: (part_of(module, a), part_of(module, b)) for name, (a, b) in self.pairs.items()}
        self.sums: dict[str, Tensor] = {}

    def install(self, undo: ExitStack) -> None:
        """Watch for the length of a fit."""
        undo.callback(self.sums.clear)
        for name, (first, last) in self._parts.items():
            watch = _Watch(self.sums, name, is_product=first is last)
            if first is not last:
                undo.callback(first.register_forward_pre_hook(_Before(watch)).remove)
            undo.callback(last.register_forward_hook(_After(watch)).remove)

    def take(self, trainer: pl.Trainer) -> dict[str, Tensor]:
        """The finished Q by name, as the parameters' gradients are then: the mean over ranks, unscaled. Call it on all
        ranks, once a step. A pair that backward did not reach is missing.
        """
        taken = dict(self.sums)
        self.sums.clear()
        if rank_and_world()[1] > 1:
            all_mean_(list(taken.values()))
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and taken:
            torch._foreach_mul_(list(taken.values()), scaler._scale.double().reciprocal().float())
        return taken


class _Watch:
    def __init__(self, sums: dict[str, Tensor], name: str, is_product: bool) -> None:
        self.sums, self.name, self.is_product = sums, name, is_product
        self.input: Tensor | None = None

    def saw(self, output: Any) -> None:
        if not isinstance(output, Tensor) or not output.requires_grad or is_silent():
            return
        given, self.input = self.input, None
        if self.is_product:
            output.register_hook(lambda gradient: self.add(gradient.detach()))
        elif given is not None:
            output.register_hook(lambda gradient: self.add(_outer(gradient.detach(), given)))

    @torch.no_grad()
    def add(self, gradient: Tensor) -> None:
        gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        before = self.sums.get(self.name)
        self.sums[self.name] = gradient.clone() if before is None else before.to(gradient.device) + gradient


class _Before:
    def __init__(self, watch: _Watch) -> None:
        self.watch = watch

    # Outside of a compiled graph, in which a hook on a tensor cannot be set.
    @torch.compiler.disable
    def __call__(self, part: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled() and not is_silent():
            self.watch.input = args[0].detach()

    def __reduce__(self) -> Any:
        return _Nothing, ()


class _After:
    def __init__(self, watch: _Watch) -> None:
        self.watch = watch

    @torch.compiler.disable
    def __call__(self, part: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.is_grad_enabled():
            self.watch.saw(output)

    def __reduce__(self) -> Any:
        return _Nothing, ()


class _Nothing:
    """What a hook becomes in a copy."""

    def __call__(self, *args: Any) -> None:
        return None


@torch.no_grad()
def _outer(gradient: Tensor, given: Tensor) -> Tensor:
    """sum g h^T over everything but the last axis, outside autocast."""
    wide = torch.promote_types(gradient.dtype, torch.float32)
    with torch.autocast(gradient.device.type, enabled=False):
        return gradient.flatten(0, -2).to(wide).T @ given.flatten(0, -2).to(wide)
