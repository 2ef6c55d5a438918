"""AAER: single-step adversarial training that does not collapse.

Lin, Yu, Liu, "Eliminating Catastrophic Overfitting Via Abnormal Adversarial Examples Regularization", NeurIPS 2023
(https://arxiv.org/abs/2404.08154; code https://github.com/tmllab/2023_NeurIPS_AAER, commit 5ad2591).

With radius eps' and step a' in the network's input space, box [lo, hi], logits f, per-sample loss l, n samples:

    eta   = clip(U(-eps', eps'), lo - x, hi - x)             (rs; U(-2 eps', 2 eps') for n; 0 for zero)
    z0    = f(x + eta),  l0 = l(z0, y)                       (kept, detached)
    delta = eta + a' sign(d mean(l0) / d eta)                (rs, zero: clipped to [-eps', eps']; then to the box)
    z1    = f(x + delta),  l1 = l(z1, y)                     (what the module trains on)
    A     = {i : l0_i > l1_i},  m = |A|                      (abnormal: the loss FELL along the attack)
    V_S   = mean over S of ||z1_i - z0_i||^2                 (V_N over the others, detached)
    C_A   = mean over A of (l0_i - l1_i)
    loss  = mean(l1) + lambda1 (m/n) (lambda2 C_A + lambda3 max(V_A - V_N, 0))     if 0 < m < n, else mean(l1)

As in the official code l0 and l1 inside C_A carry no gradient, so lambda2 changes the reported loss and nothing else;
``ce_gradient=True`` lets l1 carry it (experimental; no published number belongs to that).

Costs one more forward and the backward to the input, as every FGSM training does. The gate and V_N are those of the
micro-batch, summed over ranks: k accumulated micro-batches are not one batch of k times the size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_recipes.core.attacks import Box, clip, sign_gradient
from lightning_recipes.core.batch import get_input, with_input
from lightning_recipes.core.distributed import all_sum
from lightning_recipes.core.errors import RecipeError, check_argument, speaking_for
from lightning_recipes.core.prepare import Plan
from lightning_recipes.core.recipe import Paper, StepRecipe
from lightning_recipes.core.schedule import linear
from lightning_recipes.core.silence import modes_kept
from lightning_recipes.core.step import Step

# 16-bit gradients of a mean over a batch underflow to 0, and sign(0) attacks nothing; the sign does not mind a factor.
_FP16_SCALE = 1024.0

_DEFAULTS = {"rs": (1.25, 2.5, 1.5), "n": (1.0, 1.5, 0.15), "zero": (1.0, 2.5, 1.5)}  # alpha, lambda2, lambda3 at eps 8


def random_start(u: Tensor, x: Tensor, radius: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """eta from uniform numbers `u` in [0, 1) of the shape of x: uniform in the ball of that radius, inside the box."""
    return clip((2 * u - 1) * radius, low - x, high - x)


def single_step(
    eta: Tensor, sign: Tensor, x: Tensor, step: Tensor, radius: Tensor | None, low: Tensor, high: Tensor
) -> Tensor:
    """delta: one step from eta along the sign, projected on the ball (None: not projected) and the box."""
    delta = eta + step * sign
    if radius is not None:
        delta = clip(delta, -radius, radius)
    return clip(delta, low - x, high - x)


def abnormal_statistics(z0: Tensor, z1: Tensor, l0: Tensor, l1: Tensor) -> dict[str, Tensor]:
    """Counts and sums over abnormal and normal samples; sums over ranks of these are those of the global batch.

    Args:
        z0, z1: logits at the start and at the adversarial example, ``[n, classes]``.
        l0, l1: per-sample losses there, ``[n]``.

    Returns:
        ``m`` and ``n`` (counts), ``moved`` and ``moved_normal`` (sums of squared output movement over A and the rest),
        ``fallen`` (sum of l0 - l1 over A).
    """
    abnormal = l0 > l1
    movement = (z1 - z0).square().sum(1)
    zero = torch.zeros_like(movement)
    return {
        "m": abnormal.sum().to(movement.dtype),
        "n": torch.full_like(movement, 1.0).sum(),
        "moved": torch.where(abnormal, movement, zero).sum(),
        "moved_normal": torch.where(abnormal, zero, movement).sum(),
        "fallen": torch.where(abnormal, l0 - l1, zero).sum(),
    }


def regularizer(
    own: Mapping[str, Tensor], everywhere: Mapping[str, Tensor], lambda1: float, lambda2: float, lambda3: float
) -> Tensor:
    """This rank's share of the regulariser; the mean over equally large ranks is the one of the global batch.

    Args:
        own: :func:`abnormal_statistics` of this rank, with gradient.
        everywhere: the same summed over ranks, without.
    """
    m, n = everywhere["m"], everywhere["n"]
    v_abnormal = everywhere["moved"] / m.clamp_min(1)
    v_normal = everywhere["moved_normal"] / (n - m).clamp_min(1)
    movement = torch.where(v_abnormal > v_normal, own["moved"] / own["n"] - m / n * v_normal, 0.0)
    total = lambda1 * (lambda2 * own["fallen"] / own["n"] + lambda3 * movement)
    return torch.where((m > 0) & (m < n), total, 0.0)


class AAER(StepRecipe):
    """Train on single-step adversarial examples and keep them from becoming abnormal.

    The module must map inputs to logits ``[n, classes]`` with a classification loss; hard or soft labels.

    Args:
        epsilon: attack radius in pixel units of a [0, 1] image. 0 switches the recipe off.
        variant: 'rs' starts in the ball and projects, 'n' starts in twice the ball and does not, 'zero' starts at x.
        alpha: step as a multiple of epsilon; None is the paper's (1.25 for 'rs', else 1).
        lambda1: weight of the regulariser; 0 is plain RS-/N-FGSM.
        lambda2: weight of the cross-entropy variation; without `ce_gradient` it changes the reported loss only. None
            is the paper's at eps 8/255 (2.5; 'n' 1.5).
        lambda3: weight of the output movement. None is the paper's at eps 8/255 (1.5; 'n' 0.15). Larger is not better:
            watch the gradient norm and clip it when lambda1 * lambda3 is large.
        mean, std: per channel, when the network's inputs are normalised; radius, step and box are then converted.
        input_range: where inputs live without mean and std.
        ce_gradient: let the loss at the adversarial example carry gradient in the lambda2 term (experimental).
        attack_warmup_epochs: ramp of step and projection radius (the paper's 5 on SVHN).
        reg_warmup_epochs: ramp of the regulariser (20 for long schedules).
        attack_mode: 'train' runs the attack's forward in the module's own mode, which moves batch-norm statistics twice
            a step as the official code does; 'eval' in eval mode, with statistics left alone.
        criterion: which loss to observe, where it cannot be found: an index or a dotted name.
        seed: of the random starts, which depend on (seed, epoch, place of the sample) alone.

    Raises:
        RecipeError: for bad arguments at construction; in the first step for inputs that are not floating point, lie
            outside the box or have another number of channels, and for a loss that is not one of classification.
    """

    paper = Paper(
        "Eliminating Catastrophic Overfitting Via Abnormal Adversarial Examples Regularization",
        "R. Lin, C. Yu, T. Liu",
        2023,
        "https://arxiv.org/abs/2404.08154",
        "https://github.com/tmllab/2023_NeurIPS_AAER",
    )
    does = "Trains on single-step adversarial examples and penalises output movement of those whose loss fell."
    use_when = "You want a robust classifier at the price of FGSM training, without catastrophic overfitting."
    costs = "One more forward and a backward to the input a step; memory for one batch of logits."
    couples_samples = True
    works_sharded = True
    needs_criterion = True
    comes_after: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("Mixup", "CutMix", "BANG"), "the attack must start from the mixed batch that the module trains on"
    )

    def __init__(
        self,
        epsilon: float = 8 / 255,
        variant: Literal["rs", "n", "zero"] = "rs",
        alpha: float | None = None,
        lambda1: float = 1.0,
        lambda2: float | None = None,
        lambda3: float | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        input_range: tuple[float, float] = (0.0, 1.0),
        ce_gradient: bool = False,
        attack_warmup_epochs: float = 0,
        reg_warmup_epochs: float = 0,
        attack_mode: Literal["train", "eval"] = "train",
        criterion: str | int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_argument(variant in _DEFAULTS, self, "variant", variant, "'rs', 'n' or 'zero'")
        pixels = "in [0, 1]: pixel units of a [0, 1] image, e.g. 8/255 (in units of input_range without mean and std)"
        widest = 1.0 if mean is not None else max(1.0, input_range[1] - input_range[0])
        check_argument(0 <= epsilon <= widest, self, "epsilon", epsilon, pixels)
        check_argument(alpha is None or alpha > 0, self, "alpha", alpha, "positive, a multiple of epsilon")
        for name, value in (("lambda1", lambda1), ("lambda2", lambda2), ("lambda3", lambda3)):
            check_argument(value is None or value >= 0, self, name, value, "at least 0")
        check_argument(attack_warmup_epochs >= 0, self, "attack_warmup_epochs", attack_warmup_epochs, "at least 0")
        check_argument(reg_warmup_epochs >= 0, self, "reg_warmup_epochs", reg_warmup_epochs, "at least 0")
        check_argument(attack_mode in ("train", "eval"), self, "attack_mode", attack_mode, "'train' or 'eval'")
        self.epsilon, self.variant, self.lambda1 = epsilon, variant, lambda1
        self.alpha = _DEFAULTS[variant][0] if alpha is None else alpha
        self.lambda2 = _DEFAULTS[variant][1] if lambda2 is None else lambda2
        self.lambda3 = _DEFAULTS[variant][2] if lambda3 is None else lambda3
        self.mean, self.std, self.input_range = mean, std, tuple(input_range)
        self.ce_gradient, self.attack_mode, self.criterion, self.seed = ce_gradient, attack_mode, criterion, seed
        self.attack_warmup_epochs, self.reg_warmup_epochs = attack_warmup_epochs, reg_warmup_epochs
        with speaking_for(self):
            self._box = Box(mean, std, self.input_range)
        self._checked = False

    @property
    def neutral(self) -> bool:
        return self.epsilon == 0

    def declare(self, plan: Plan) -> None:
        self._checked = False  # another fit may bring other inputs
        super().declare(plan)

    def transform_batch(self, step: Step, batch: Any) -> Any:
        """x to x + delta: a silent replay of the module's own step at the random start, and one step along the sign."""
        x = get_input(batch).detach()
        if not self._checked:
            self._box.check_inputs(x)
        low, high, unit = self._box.bounds(x)
        ramp = _ramp(step, self.attack_warmup_epochs)
        radius = self.epsilon * unit
        u = torch.zeros((), device=x.device) + 0.5
        if self.variant != "zero":
            u = step.uniform(self, self.seed, "start", x)
        eta = random_start(u, x, radius * (2 if self.variant == "n" else 1), low, high).broadcast_to(x.shape)
        start = (x + eta).to(x.dtype).requires_grad_()
        frozen_mode = modes_kept(step.module, training=False) if self.attack_mode == "eval" else nullcontext()
        with frozen_mode:
            replay = step.replay(with_input(batch, start), track_statistics=self.attack_mode == "train")
        self._check_outputs(replay.call.classifies, replay.logits, x)
        l0 = replay.per_sample()
        sign = sign_gradient((l0 * _FP16_SCALE).sum(), start)
        projected = None if self.variant == "n" else ramp * radius
        delta = single_step(eta, sign, x, ramp * self.alpha * radius, projected, low, high)
        step.notes[self] = replay.logits.detach().float(), l0.detach()
        return with_input(batch, (x + delta).to(x.dtype))

    def extra_loss(self, step: Step) -> Mapping[str, Tensor]:
        """The regulariser; the gate and V_N are those of the global batch."""
        z0, l0 = step.notes[self]
        z1 = step.outputs.float()
        with torch.autocast(z1.device.type, enabled=False), torch.set_grad_enabled(self.ce_gradient):
            l1 = step.call.per_sample(step.logits.float(), step.targets)
        own = abnormal_statistics(z0, z1, l0, l1)
        names = list(own)
        everywhere = dict(zip(names, all_sum(torch.stack([own[name].detach() for name in names])).unbind()))
        m, n = everywhere["m"], everywhere["n"]
        v_abnormal = everywhere["moved"] / m.clamp_min(1)
        step.log(
            self,
            {
                "abnormal_fraction": m / n,
                "ce_variation": everywhere["fallen"] / m.clamp_min(1),
                "l2_variation": v_abnormal - everywhere["moved_normal"] / (n - m).clamp_min(1),
            },
        )
        if self.lambda1 == 0:
            return {}
        weight = self.lambda1 * _ramp(step, self.reg_warmup_epochs)
        return {"regularizer": regularizer(own, everywhere, weight, self.lambda2, self.lambda3)}

    def _check_outputs(self, classifies: bool, logits: Tensor, x: Tensor) -> None:
        if self._checked:
            return
        if not classifies or logits.dim() != 2 or len(logits) != len(x):
            raise RecipeError(
                f"AAER needs a classification loss of logits [n, classes]; the observed one got {tuple(logits.shape)}"
                f" for {len(x)} inputs"
            )
        self._checked = True


def _ramp(step: Step, epochs: float) -> float:
    return linear(step.epochs_done / epochs, 0.0, 1.0) if epochs else 1.0
