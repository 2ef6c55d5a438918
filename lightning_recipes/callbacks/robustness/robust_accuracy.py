"""Robust accuracy during anybody's training: FGSM, PGD with restarts, Auto-PGD, AutoAttack.

The protocol of fast adversarial training's evaluation: Wong, Rice, Kolter, "Fast is better than free", 2020
(https://arxiv.org/abs/2001.03994); PGD-50-10 is 10 restarts of 50 steps of epsilon / 4. AutoAttack: Croce and Hein,
2020 (https://arxiv.org/abs/2003.01690), through pyautoattack (the `attacks` extra); its first two parts, Auto-PGD on
the cross-entropy and on targeted DLR, need nothing installed.

What is attacked is the module as it evaluates: where another recipe replaces its outputs (AdaptiveSmoothing), the whole
of what they come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_recipes.core.attacks import Box, Logits, RobustAccuracy, apgd, fgsm, pgd
from lightning_recipes.core.batch import get_input, with_input
from lightning_recipes.core.diagnostics import History, where_to_draw
from lightning_recipes.core.errors import RecipeError, check_argument, speaking_for
from lightning_recipes.core.labels import labels_in
from lightning_recipes.core.outputs import logits_in, part_of
from lightning_recipes.core.prepare import Plan
from lightning_recipes.core.random import forked, generator
from lightning_recipes.core.recipe import Paper, Recipe
from lightning_recipes.core.silence import gradients_allowed
from lightning_recipes.core.step import observe

ATTACKS = ("fgsm", "pgd", "apgd", "apgd-t", "autoattack")
_NEEDS_EXTRA = "attack='autoattack' needs pyautoattack: pip install 'lightning_recipes[attacks]'"


def auto_attack(logits: Logits, x: Tensor, y: Tensor, epsilon: float, box: Box, seed: int = 0) -> Tensor:
    """The standard AutoAttack (APGD-CE, APGD-T, FAB-T, Square) under L-infinity, by its authors' code.

    Args:
        logits, x, y, epsilon, box: as in :func:`lightning_recipes.core.attacks.fgsm`.
        seed: of its random starts; the global random state is left as it was.

    Raises:
        RecipeError: when pyautoattack is not installed.
    """
    try:
        from pyautoattack import AutoAttack
    except ImportError as error:
        raise RecipeError(_NEEDS_EXTRA) from error
    low, high, unit = box.bounds(x)
    span = high - low  # AutoAttack works on [0, 1] images, with the normalisation inside the model
    model = _OnUnitImages(logits, low, span)
    radius = float(epsilon * (unit / span).max())
    with forked(x.device):
        attack = AutoAttack(model, norm="Linf", eps=radius, device=x.device, seed=seed)
        attacked, _ = attack.run_standard_evaluation((x - low) / span, y, batch_size=len(x))
    return attacked * span + low


class _OnUnitImages(nn.Module):
    def __init__(self, logits: Logits, low: Tensor, span: Tensor) -> None:
        super().__init__()
        self.logits, self.low, self.span = logits, low, span

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(images * self.span + self.low)


class RobustAccuracyMonitor(Recipe):
    """Measure accuracy under attack on the validation and test batches, in eval mode and without a trace in the run.

    Logs ``robust_accuracy/clean`` and ``robust_accuracy/<attack>`` (the attack with its steps and restarts), and draws
    both over training at the end of a fit.

    Args:
        attack: 'fgsm', 'pgd', 'apgd' (Auto-PGD on the cross-entropy), 'apgd-t' (on targeted DLR, for each of the nine
            next-likeliest classes; 4 classes or more), or 'autoattack' (the `attacks` extra).
        epsilon: radius in pixel units of a [0, 1] image.
        steps, restarts: of 'pgd', 'apgd' and 'apgd-t'.
        step_size: of 'pgd'; None is epsilon / 4.
        mean, std, input_range: where the network's inputs live, as for AAER.
        every_n_epochs: measure in every n-th training epoch.
        limit_batches: attack the first so many batches only; None all.
        criterion: which loss of the module's training step to observe, where it cannot be found.
        draw: save a picture in the run's log folder at the end of a fit (needs the `plots` extra).
        seed: of the random starts.
        forward: None reads the logits in the module's training step, whatever it does with the batch. 'forward', or the
            name of a submodule, calls that on the batch's input instead: for a module that optimizes manually.

    Raises:
        RecipeError: for bad arguments; in a fit's sanity check, or else in the first validation or test, for inputs
            that are not floating point, lie outside the box or have another number of channels, and for a loss that
            cannot be seen or is not one of classification.
    """

    paper = Paper(
        "Fast is better than free: Revisiting adversarial training",
        "E. Wong, L. Rice, J. Z. Kolter",
        2020,
        "https://arxiv.org/abs/2001.03994",
        "https://github.com/locuslab/fast_adversarial",
    )
    does = "Measures accuracy under FGSM, PGD or AutoAttack on the validation and test data."
    use_when = "You train for robustness, or want to know how robust what you train is."
    costs = "steps x restarts forward and backward passes a batch it attacks; nothing in training steps."
    may_repeat = True

    def __init__(
        self,
        attack: Literal["fgsm", "pgd", "apgd", "apgd-t", "autoattack"] = "pgd",
        epsilon: float = 8 / 255,
        steps: int = 50,
        restarts: int = 10,
        step_size: float | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        input_range: tuple[float, float] = (0.0, 1.0),
        every_n_epochs: int = 1,
        limit_batches: int | None = None,
        criterion: str | int | None = None,
        draw: bool = True,
        seed: int = 0,
        forward: str | None = None,
    ) -> None:
        super().__init__()
        check_argument(attack in ATTACKS, self, "attack", attack, f"one of {', '.join(map(repr, ATTACKS))}")
        check_argument(
            0 < epsilon <= 1 or (mean is None and epsilon > 0), self, "epsilon", epsilon, "in (0, 1] pixel units"
        )
        for name, value in (("steps", steps), ("restarts", restarts), ("every_n_epochs", every_n_epochs)):
            check_argument(value >= 1, self, name, value, "at least 1")
        check_argument(step_size is None or step_size >= 0, self, "step_size", step_size, "None or at least 0")
        check_argument(limit_batches is None or limit_batches >= 1, self, "limit_batches", limit_batches, "at least 1")
        self.attack, self.epsilon, self.steps, self.restarts, self.step_size = (
            attack,
            epsilon,
            steps,
            restarts,
            step_size,
        )
        self.mean, self.std, self.input_range = mean, std, tuple(input_range)
        self.every_n_epochs, self.limit_batches, self.criterion = every_n_epochs, limit_batches, criterion
        self.draw, self.seed, self.forward = draw, seed, forward
        with speaking_for(self):
            self._box = Box(mean, std, self.input_range)
        self._history = History()
        self._active = False

    @property
    def state_key(self) -> str:
        return f"{type(self).__name__}[{self._name}]"

    @property
    def _name(self) -> str:
        return f"{self.attack}-{self.steps}-{self.restarts}" if "pgd" in self.attack else self.attack

    def declare(self, plan: Plan) -> None:
        if self.attack == "autoattack" and find_spec("pyautoattack") is None:
            raise RecipeError(_NEEDS_EXTRA)
        if self.forward is not None:
            part_of(plan.module, self.forward)
        if plan.fitting and not plan.trainer.enable_validation:
            rank_zero_warn("RobustAccuracyMonitor measures in validations, and this fit has none")

    # -- validation and test -----------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        fitting = trainer.state.fn == "fit"
        self._active = not trainer.sanity_checking and (not fitting or trainer.current_epoch % self.every_n_epochs == 0)
        self._robust = RobustAccuracy().to(pl_module.device)
        self._clean = RobustAccuracy().to(pl_module.device)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        enough = self.limit_batches is not None and batch_idx >= self.limit_batches
        if dataloader_idx or enough or not (self._active or trainer.sanity_checking):
            return
        with speaking_for(self), gradients_allowed(), trainer.precision_plugin.forward_context():
            x = get_input(batch).detach().clone()
            self._box.check_inputs(x)
            batch = _leave_inference(batch)

            def see(inputs: Tensor) -> Any:
                with torch.enable_grad():
                    probed = inputs if inputs.requires_grad else inputs.detach().requires_grad_()
                    return observe(trainer, pl_module, with_input(batch, probed.to(x.dtype)), batch_idx, self.criterion)

            def logits(inputs: Tensor) -> Tensor:
                # An attack may ask for a part of the batch; the module's step wants as many inputs as labels.
                return see(torch.cat([inputs, x[len(inputs) :]])).logits[: len(inputs)]

            if self.forward is not None:
                logits = _Forward(pl_module, self.forward, x.dtype)
                found, y = logits(x), _labels(batch, len(x))
            else:
                clean = see(x)
                if not clean.call.classifies or clean.logits.dim() != 2 or len(clean.logits) != len(x):
                    raise RecipeError(
                        "needs a classification loss of logits [n, classes]; the observed one got"
                        f" {tuple(clean.logits.shape)} for {len(x)} inputs"
                    )
                found = clean.logits
                y = clean.targets if not clean.targets.is_floating_point() else clean.targets.argmax(1)
            if trainer.sanity_checking:
                return
            self._robust.attack = self._attack(batch_idx, trainer)
            self._robust.update(logits, x, y)
            self._clean.update(lambda _: found, x, y)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._active:
            return
        values = {
            "robust_accuracy/clean": self._clean.compute(),
            f"robust_accuracy/{self._name}": self._robust.compute(),
        }
        self.log_dict(values, rank_zero_only=False)
        if trainer.state.fn == "fit":
            self._history.add(trainer.global_step, {k.removeprefix("robust_accuracy/"): v for k, v in values.items()})

    on_test_start, on_test_batch_end = on_validation_start, on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        folder = where_to_draw(trainer)
        if self.draw and self._history.steps and trainer.is_global_zero and folder is not None:
            title = f"accuracy under attack, epsilon {self.epsilon:.4g}"
            self._history.draw(folder / f"robust_accuracy_{self._name}.png", title, "accuracy")

    def _attack(self, batch_idx: int, trainer: pl.Trainer) -> Any:
        if self.attack == "fgsm":
            return partial(fgsm, epsilon=self.epsilon, box=self._box)
        if self.attack == "autoattack":
            return partial(auto_attack, epsilon=self.epsilon, box=self._box, seed=self.seed)
        how = partial(pgd, step_size=self.step_size)
        if self.attack != "pgd":
            how = partial(apgd, loss="targeted" if self.attack == "apgd-t" else "ce")
        return partial(
            how,
            epsilon=self.epsilon,
            steps=self.steps,
            restarts=self.restarts,
            box=self._box,
            generator=generator(self.seed, "RobustAccuracyMonitor", batch_idx, trainer.global_rank),
        )

    def state(self) -> dict[str, Any]:
        return {"history": self._history.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        self._history.load(state["history"])


class _Forward:
    """Inputs to logits by the module's forward, or a part's."""

    def __init__(self, module: pl.LightningModule, name: str, dtype: torch.dtype) -> None:
        self.part, self.name, self.dtype = part_of(module, name), name, dtype

    def __call__(self, inputs: Tensor) -> Tensor:
        logits = logits_in(self.part(inputs.to(self.dtype)))
        if logits is None or len(logits) != len(inputs):
            raise RecipeError(f"forward={self.name!r} gives no logits [n, classes] for the batch's input")
        return logits


def _labels(batch: Any, count: int) -> Tensor:
    labels = labels_in(batch)
    if not isinstance(labels, Tensor) or labels.shape != (count,) or labels.is_floating_point():
        raise RecipeError("with forward=... the batch must hold class indices: second, or under 'labels' or 'targets'")
    return labels


def _leave_inference(batch: Any) -> Any:
    """The batch with every inference tensor cloned, so that autograd may save it."""
    from lightning.fabric.utilities.apply_func import apply_to_collection

    return apply_to_collection(batch, Tensor, lambda t: t.clone())
