"""Attacks on a classifier's input under an L-infinity bound, and robust accuracy as a metric.

Everything works on tensors and a function from inputs to logits; nothing here knows Lightning. Gradients are taken with
``autograd.grad`` with respect to the input only. Perturbations are computed and kept in fp32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from lightning_recipes.core.errors import RecipeError

Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Box:
    """The pixel range and the attack's units, in the network's input space.

    With `mean` and `std` (one value a channel) inputs are pixels of [0, 1] normalised by them, and a radius of
    `epsilon` pixels becomes ``epsilon / std``. Without them inputs live in `input_range` and radii are absolute.
    """

    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    input_range: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        for name in ("mean", "std", "input_range"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(value))
        if (self.mean is None) != (self.std is None):
            raise RecipeError(f"mean and std go together; got mean={self.mean}, std={self.std}")
        if self.std is not None and not all(s > 0 for s in self.std):
            raise RecipeError(f"std must be positive in every channel; got {list(self.std)}")
        if self.mean is not None and len(self.mean) != len(self.std):
            raise RecipeError(f"mean and std need one value a channel; got {len(self.mean)} and {len(self.std)}")
        if not self.input_range[0] < self.input_range[1]:
            raise RecipeError(f"input_range must be (low, high) with low < high; got {self.input_range}")

    def bounds(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(low, high, unit), each broadcastable to x ``[n, C, ...]``, fp32; `unit` is one pixel's worth of range.

        Raises:
            RecipeError: when x has another number of channels.
        """
        if self.mean is not None and (x.dim() < 2 or x.shape[1] != len(self.mean)):
            raise RecipeError(f"mean and std have {len(self.mean)} channels; the batch has shape {tuple(x.shape)}")
        return _bounds(self, x.device, x.dim())

    def check_inputs(self, x: Tensor) -> None:
        """Refuse inputs that no attack of these bounds can start from.

        Raises:
            RecipeError: when x is not floating point, has another number of channels, or lies outside the range.
        """
        if not x.is_floating_point():
            raise RecipeError(
                f"an attack follows the gradient of the input; the batch's input is {x.dtype}, not floating point"
            )
        low, high, _ = self.bounds(x)
        if bool(((x < low - 1e-4) | (x > high + 1e-4)).any()):
            given = self.mean is not None
            why = "not normalised by mean and std" if given else "normalised but mean and std were not given"
            raise RecipeError(
                f"inputs reach from {x.min():.3g} to {x.max():.3g}, outside the range that the attack keeps to; they"
                f" seem to be {why} (or give input_range)"
            )


@functools.cache  # a copy to the device in every step would wait for it
def _bounds(box: Box, device: torch.device, dimensions: int) -> tuple[Tensor, Tensor, Tensor]:
    if box.mean is None:
        low, high = box.input_range
        return tuple(torch.tensor(v, dtype=torch.float32, device=device) for v in (low, high, 1.0))
    shape = (-1, *[1] * (dimensions - 2))
    mean = torch.tensor(box.mean, dtype=torch.float32, device=device).reshape(shape)
    std = torch.tensor(box.std, dtype=torch.float32, device=device).reshape(shape)
    return (0 - mean) / std, (1 - mean) / std, 1 / std


def clip(value: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Elementwise clip with tensor bounds."""
    return torch.minimum(torch.maximum(value, low), high)


def sign_gradient(loss: Tensor, x: Tensor) -> Tensor:
    """sign(d loss / d x), in fp32; parameters get no gradient."""
    return torch.autograd.grad(loss, x)[0].float().sign()


def fgsm(logits: Logits, x: Tensor, y: Tensor, epsilon: float, box: Box = Box()) -> Tensor:
    """The fast gradient sign method from the clean input.

    Args:
        logits: inputs ``[n, C, ...]`` to logits ``[n, classes]``.
        x, y: inputs and integer labels ``[n]``.
        epsilon: radius in pixel units.

    Returns:
        the perturbed inputs, inside the box.
    """
    low, high, unit = box.bounds(x)
    start = x.detach().clone().requires_grad_()
    return clip(x + epsilon * unit * sign_gradient(_attack_loss(logits(start), y).sum(), start), low, high)


def pgd(
    logits: Logits,
    x: Tensor,
    y: Tensor,
    epsilon: float,
    steps: int = 50,
    restarts: int = 10,
    step_size: float | None = None,
    box: Box = Box(),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Projected gradient descent with random restarts, as in fast adversarial training (Wong et al. 2020).

    Every restart begins at a uniform point of the ball; only samples still classified correctly are moved; per sample
    the perturbation with the largest final loss over the restarts is kept.

    Args:
        logits, x, y, epsilon, box: as in :func:`fgsm`.
        steps, restarts: their numbers.
        step_size: in pixel units; None is epsilon / 4.
        generator: a CPU generator for the starts.

    Returns:
        the perturbed inputs, inside ball and box.
    """
    low, high, unit = box.bounds(x)
    radius, step = epsilon * unit, (epsilon / 4 if step_size is None else step_size) * unit
    best_loss = torch.full((len(x),), -torch.inf, device=x.device)
    best = torch.zeros_like(x, dtype=torch.float32)
    each = (-1, *[1] * (x.dim() - 1))
    for _ in range(restarts):
        noise = torch.rand(x.shape, generator=generator).to(x.device) * 2 - 1
        delta = clip(noise * radius, low - x, high - x)
        for _ in range(steps):
            perturbed = (x + delta).detach().requires_grad_()
            out = logits(perturbed)
            moving = out.argmax(1) == y
            moved = delta + step * sign_gradient(_attack_loss(out, y).sum(), perturbed)
            moved = clip(clip(moved, -radius, radius), low - x, high - x)
            delta = torch.where(moving.reshape(each), moved, delta)
        with torch.no_grad():
            loss = _attack_loss(logits(x + delta), y)
        better = loss >= best_loss
        best = torch.where(better.reshape(each), delta, best)
        best_loss = torch.maximum(best_loss, loss)
    return x + best


def _attack_loss(out: Tensor, y: Tensor) -> Tensor:
    with torch.autocast(out.device.type, enabled=False):
        return F.cross_entropy(out.float(), y, reduction="none")


class RobustAccuracy(Metric):
    """Accuracy on attacked inputs, a torchmetrics metric.

    ``metric.update(logits_function, x, y)`` attacks the batch and counts; ``compute()`` gives the share that is still
    classified correctly. Works under ``no_grad`` and ``inference_mode``.

    Args:
        attack: (logits function, inputs, labels) to perturbed inputs; None measures clean accuracy.
    """

    full_state_update = False
    higher_is_better = True

    def __init__(self, attack: Callable[[Logits, Tensor, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.attack = attack
        self.add_state("correct", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logits: Logits, x: Tensor, y: Tensor) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            x, y = x.detach().clone(), y.detach().clone()
            attacked = x if self.attack is None else self.attack(logits, x, y)
            with torch.no_grad():
                hit = (logits(attacked).argmax(1) == y).sum()
        self.correct = self.correct + hit
        self.total = self.total + len(y)

    def compute(self) -> Tensor:
        return self.correct.float() / self.total.clamp_min(1)
