"""The gradient socket: ordered edits of the true final gradient, of the weights right after the update, and a second
pass over the accumulation window.

Lightning calls ``configure_gradient_clipping`` once a true step, always, after accumulation, all-reduce and unscaling
and right before the update; it is wrapped on the instance. (Optimizer step pre-hooks come before there is a gradient.)
An optimizer's post-hooks run right after the update, and not where the fp16 scaler skips it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_recipes.core import random
from lightning_recipes.core.distributed import all_mean_, rank_and_world
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.patch import Patch
from lightning_recipes.core.silence import silent
from lightning_recipes.core.step import at_batch

if TYPE_CHECKING:
    from lightning_recipes.core.recipe import Recipe

Edit = Callable[[Optimizer], None]


class GradientSocket:
    """Runs the recipes' edits around the module's own gradient clipping, in the order of the Trainer's callbacks."""

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.trainer, self.module = trainer, module
        self._edits: dict[str, list[Edit]] = {"before_clip": [], "after_clip": [], "after_step": []}
        self._watched: dict[Optimizer, RemovableHandle] = {}
        self._window: Window | None = None
        self._once: list[Recipe] = []
        self._edited_at: tuple[int, int] | None = None

    def add(
        self,
        recipe: Recipe,
        edit: Edit,
        when: Literal["before_clip", "after_clip", "after_step"] = "before_clip",
        once: bool = False,
    ) -> None:
        """Declare an edit of ``.grad`` (in place), called with the optimizer; for 'after_step' see :meth:`after_step`.

        Args:
            once: whether the edit is one of the update: an optimizer that asks for a second gradient in it (its
                closure) is refused when it does.

        Raises:
            RecipeError: under manual optimization, where the module steps by itself.
        """
        if not self.module.automatic_optimization:
            raise RecipeError(
                f"{type(recipe).__name__} edits gradients and needs automatic optimization: under manual optimization"
                " the module takes its optimizer steps itself"
            )
        self._edits[when].append(edit)
        if once:
            self._once.append(recipe)

    def after_step(self, recipe: Recipe, edit: Edit) -> None:
        """Declare an edit of the weights (in place), called with the optimizer right after it has stepped.

        A step that the fp16 scaler skips does not count. Clipping and edits of the gradient are over then; the groups
        may be those of the update (:meth:`~lightning_recipes.core.parameters.ParameterTable.expanded`).

        Raises:
            RecipeError: under manual optimization.
        """
        self.add(recipe, edit, "after_step")

    def replay_window(
        self, recipe: Recipe, edit: Callable[[Optimizer, Window], None], run: Callable[[Any], Tensor] | None = None
    ) -> None:
        """Declare an edit that runs the whole accumulation window a second time (before clipping).

        Args:
            run: batch to loss, in the place of the module's step, whose side effects cannot be repeated.

        Raises:
            RecipeError: when another recipe already does, or the optimizer's closure is not Lightning's to repeat.
        """
        if self._window is not None:
            raise RecipeError(
                f"{type(self._window.owner).__name__} and {type(recipe).__name__} both run a second pass over the"
                " window; use one of them"
            )
        window = self._window = Window(recipe, self.trainer, self.module, run)
        self.add(recipe, lambda optimizer: window.run(edit, optimizer), once=True)

    def install(self, undo: ExitStack) -> None:
        """Put the wrappers on and leave their removal with `undo`."""
        if self._window is not None:
            self._window.install(undo)
        if any(self._edits.values()):
            patch = Patch(self.module, "configure_gradient_clipping", lambda *a, **k: self._clip(patch, *a, **k))
            undo.callback(patch.restore)
            undo.callback(self._unwatch)

    def check_parameters(self) -> None:
        """Refuse a second pass that has nothing to run for, or that would step; once what trains is known.

        Raises:
            RecipeError: when nothing trains, or an optimizer steps in backward.
        """
        if self._window is None:
            return
        name = type(self._window.owner).__name__
        trained = [p for p in self.module.parameters() if p.requires_grad]
        if not trained:
            raise RecipeError(
                f"{name}: no parameter of {type(self.module).__name__} requires a gradient; unfreeze what is to train"
            )
        if any(p._post_accumulate_grad_hooks for p in trained):
            raise RecipeError(
                f"{name}: a parameter has a hook that runs as soon as its gradient is there (an optimizer that steps in"
                " backward?), and the second pass would run it at other weights; step after backward"
            )

    def state(self) -> list[Any]:
        """The micro-batches of an accumulation window under way, as a checkpoint takes them."""
        return self._window.state() if self._window is not None else []

    def load_state(self, state: Sequence[Any]) -> None:
        """Take back what :meth:`state` gave."""
        if self._window is not None:
            self._window.load_state(state)

    def _clip(self, patch: Patch, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        here = self.trainer.current_epoch, self.trainer.fit_loop.batch_idx
        if self._once and here == self._edited_at:
            raise RecipeError(
                f"{type(self._once[0]).__name__} edits the gradient of an update, and {type(optimizer).__name__} calls"
                " its closure several times for one; use another optimizer"
            )
        self._edited_at = here
        for edit in self._edits["before_clip"]:
            edit(optimizer)
        patch.original(optimizer, *args, **kwargs)
        for edit in self._edits["after_clip"]:
            edit(optimizer)
        if self._edits["after_step"] and optimizer not in self._watched:  # from its first step on, whenever made
            self._watched[optimizer] = optimizer.register_step_post_hook(self._stepped)

    def _stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        with torch.no_grad():
            for edit in self._edits["after_step"]:
                edit(optimizer)

    def _unwatch(self) -> None:
        for handle in self._watched.values():
            handle.remove()
        self._watched.clear()


class Window:
    """The micro-batches of one accumulation window, kept so that they can be run again at other weights.

    Kept are the batches as Lightning handed them to the step, by reference, and the random state before each. The
    replay runs the wrapped step again, with every recipe in it: their keyed random numbers come out the same.
    """

    def __init__(
        self,
        owner: Recipe,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        run: Callable[[Any], Tensor] | None = None,
    ) -> None:
        self.owner, self.trainer, self.module, self._run = owner, trainer, module, run
        self._steps: list[tuple[tuple[Any, ...], int, dict[str, Any], Tensor]] = []
        self._patch: Patch | None = None
        self._recording = True

    def install(self, undo: ExitStack) -> None:
        """Record every step from here on; outermost of the wrappers on ``training_step``."""
        self._patch = Patch(self.module, "training_step", self._step)
        undo.callback(self._patch.restore)
        undo.callback(self._steps.clear)

    def _step(self, *args: Any) -> Any:
        if not (self._recording and self.trainer.training):
            return self._patch.original(*args)
        if self.trainer.fit_loop.batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._steps.clear()
        state = random.states([self.module.device])
        output = self._patch.original(*args)
        if output is not None:
            self._steps.append((args, self.trainer.fit_loop.batch_idx, state, _loss(output).detach()))
        return output

    def run(self, edit: Callable[[Optimizer, Window], None], optimizer: Optimizer) -> None:
        """Let the owner edit the gradient, then forget the window."""
        self._recording = False
        try:
            if self._steps:
                edit(optimizer, self)
        finally:
            self._recording = True
            self._steps.clear()

    def state(self) -> list[Any]:
        """The steps so far, as a checkpoint takes them; none at the end of a window."""
        return [[list(args), index, random.as_saved(state), loss] for args, index, state, loss in self._steps]

    def load_state(self, state: Sequence[Any]) -> None:
        """Take back what :meth:`state` gave."""
        device = self.module.device
        self._steps[:] = [
            (tuple(move_data_to_device(args, device)), index, random.from_saved(states), loss.to(device))
            for args, index, states, loss in state
        ]

    @property
    def loss(self) -> Tensor:
        """Mean loss of this rank's micro-batches in the first pass."""
        return torch.stack([loss for *_, loss in self._steps]).mean()

    def gradients(self, parameters: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """The window's gradient at the weights as they stand now, and its mean loss on this rank.

        Silent: nothing is logged, statistics and random state are left alone. ``.grad`` is as before when it returns.

        Args:
            parameters: those whose gradient is asked for.

        Returns:
            one tensor a parameter (zeros where the loss does not reach it), averaged over ranks and unscaled, in the
            parameter's dtype; and the mean loss, before any all-reduce.
        """
        trainer, module = self.trainer, self.module
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        held = [(p, p.grad) for p in module.parameters() if p.requires_grad]
        losses = []
        try:
            for parameter, _ in held:
                parameter.grad = None
            with torch.enable_grad(), silent(module):
                for number, (args, index, state, _) in enumerate(self._steps, 1):
                    random.set_states(state)
                    with trainer.precision_plugin.train_step_context(), at_batch(index, number == len(self._steps)):
                        loss = _loss(module.training_step(*args) if self._run is None else self._run(args[0]))
                    losses.append(loss.detach())
                    loss = loss / trainer.accumulate_grad_batches
                    module.backward(loss if scaler is None else scaler.scale(loss))
            fresh = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        finally:
            for parameter, grad in held:
                parameter.grad = grad
        if scaler is not None:
            torch._foreach_mul_(fresh, scaler._scale.double().reciprocal().float())  # as unscale_ does, no .item()
        if rank_and_world()[1] > 1:
            all_mean_(fresh)
        return fresh, torch.stack(losses).mean()


def _loss(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output["loss"]


def optimized(optimizer: Optimizer) -> list[Tensor]:
    """The optimizer's parameters that have a gradient, in its order."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """One L2 norm over all tensors, computed in fp32 without a synchronisation."""
    norms = torch._foreach_norm([t.float() if t.dtype != torch.float32 else t for t in tensors])
    return torch.linalg.vector_norm(torch.stack(norms))


def skip_if_nonfinite(trainer: pl.Trainer, optimizer: Optimizer, gradients: Sequence[Tensor]) -> None:
    """Under fp16, have the scaler skip this step when an edited gradient is not finite.

    The scaler looked at the gradients when they were unscaled, before the edit, and does not look again.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None:
        return
    for device, found in scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"].items():
        bad = torch.stack([(~torch.isfinite(g)).any() for g in gradients if g.device == device])
        found += bad.any().to(found.dtype)


def check_optimizers(trainer: pl.Trainer, recipe: Recipe) -> None:
    """Refuse optimizers that do not take one update from one finished gradient.

    LBFGS asks for several gradients an update. Under fp16 a fused optimizer unscales, and skips, inside its step: there
    is no true gradient to edit before it, and nobody knows afterwards whether it stepped.

    Raises:
        RecipeError: names the optimizer.
    """
    if any(isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers):
        raise RecipeError(
            f"{type(recipe).__name__} takes part in an update once, and LBFGS calls its closure several times for one;"
            " use another optimizer"
        )
    plugin = trainer.precision_plugin
    if not isinstance(plugin, MixedPrecision) or plugin.scaler is None:
        return
    for optimizer in trainer.optimizers:
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            raise RecipeError(
                f"{type(recipe).__name__} works on the unscaled gradient or right after a step that was taken, and"
                f" {type(optimizer).__name__}(fused=True) unscales inside its step; use fused=False or bf16-mixed"
            )
