"""Attacks on a classifier's input under an L-infinity bound, and robust accuracy as a metric.

Everything works on tensors and a function from inputs to logits; nothing here knows Lightning. Gradients are taken with
``autograd.grad`` with respect to the input only. Perturbations are computed and kept in fp32.

Auto-PGD (:func:`auto_pgd`, and :func:`apgd` with restarts and targets): Croce and Hein, "Reliable evaluation of
adversarial robustness with an ensemble of diverse parameter-free attacks", 2020 (https://arxiv.org/abs/2003.01690);
step for step as in its authors' code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.silence import gradients_allowed

Logits = Callable[[Tensor], Tensor]
Loss = Callable[[Any, Tensor], Tensor]
"""From what the attacked function returned, and labels ``[n]``, to what the attack drives up, ``[n]``."""


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


# -- auto-PGD ----------------------------------------------------------------------------------------------------------


def cross_entropy(out: Any, y: Tensor) -> Tensor:
    """The loss of each sample, in fp32 at least."""
    return _attack_loss(logits_of(out), y)


def dlr(out: Any, y: Tensor) -> Tensor:
    """Difference of logits ratio, -(z_y - max_{i != y} z_i) / (z_(1) - z_(3)), z_(k) the k-th largest.

    Unlike the cross-entropy it has a gradient that does not vanish with the scale of the logits. Needs 3 classes.
    """
    z = logits_of(out)
    ranked, order = z.sort(1, descending=True)
    other = torch.where(order[:, 0] == y, ranked[:, 1], ranked[:, 0])
    return (other - _of_class(z, y)) / (ranked[:, 0] - ranked[:, 2] + 1e-12)


def targeted_dlr(out: Any, y: Tensor, target: Tensor) -> Tensor:
    """:func:`dlr` towards one class, -(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2). Needs 4 classes.

    Args:
        target: class indices ``[n]``.
    """
    z = logits_of(out)
    ranked = z.sort(1, descending=True).values
    span = ranked[:, 0] - (ranked[:, 2] + ranked[:, 3]) / 2
    return (_of_class(z, target) - _of_class(z, y)) / (span + 1e-12)


def logits_of(out: Any) -> Tensor:
    """The logits of an output, in fp32 at least: itself, or the first of a tuple."""
    z = out[0] if isinstance(out, tuple) else out
    return z if z.dtype == torch.float64 else z.float()


def _of_class(z: Tensor, y: Tensor) -> Tensor:
    return z.gather(1, y[:, None])[:, 0]


@dataclass(frozen=True)
class Attacked:
    """What one run of :func:`auto_pgd` found.

    Attributes:
        fooling: the last point that was classified wrongly, for each sample; its start where there was none.
        strongest: the point of the largest loss.
        loss: that loss, ``[n]``.
        fooled: whether any point was classified wrongly, bool ``[n]``.
    """

    fooling: Tensor
    strongest: Tensor
    loss: Tensor
    fooled: Tensor


def auto_pgd(
    logits: Callable[[Tensor], Any],
    x: Tensor,
    y: Tensor,
    epsilon: float | Tensor,
    steps: int = 100,
    loss: Loss = cross_entropy,
    rho: float = 0.75,
    box: Box = Box(),
    generator: torch.Generator | None = None,
) -> Attacked:
    """One run of Auto-PGD from a random start: sign steps with momentum, of size 2 epsilon at first. For a sample that
    does not get on the size is halved, and it goes back to its best point.

    Works under ``no_grad`` and ``inference_mode``. The whole batch is asked at once; nothing waits for the device.

    Args:
        logits: inputs ``[n, C, ...]`` to logits ``[n, classes]``, or to a tuple that begins with them.
        x, y: inputs and integer labels ``[n]``.
        epsilon: radius in pixel units, or one for each sample, ``[n]``.
        steps: number of steps; each is a forward and a backward pass, and there is one more at the start.
        loss: what to drive up, from what `logits` returned.
        rho: a step size is halved where less than this share of the last steps raised the loss.
        box: range and units of the inputs.
        generator: a CPU generator for the start.

    Returns:
        points inside ball and box, fp32, without a graph.
    """
    with gradients_allowed():
        x, y = x.detach().clone().float(), y.detach().clone()
        low, high, unit = box.bounds(x)
        each = (-1, *[1] * (x.dim() - 1))
        radius = (epsilon.reshape(each) if isinstance(epsilon, Tensor) else epsilon) * unit
        noise = torch.rand(x.shape, generator=generator).to(x.device) * 2 - 1
        noise = noise / (noise.abs().flatten(1).amax(1).reshape(each) + 1e-12)  # its largest entry is on the ball

        def inside(point: Tensor) -> Tensor:
            return clip(clip(point, x - radius, x + radius), low, high)

        def ask(point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            point = point.detach().requires_grad_()
            out = logits(point)
            value = loss(out, y)
            gradient = sign_gradient(value.sum(), point)
            return gradient, value.detach().float(), logits_of(out).argmax(1) != y

        now = previous = clip(x + radius * noise, low, high)
        gradient, value, wrong = ask(now)
        best, best_gradient, best_value = now, gradient, value
        fooling, fooled = now, wrong
        step = torch.full((len(x),), 2.0, device=x.device)
        # The authors' code compares the first loss with 0, not with the loss of the start.
        history = [torch.zeros_like(value)]
        reduced, value_at_check = torch.ones_like(wrong), value
        every, since = max(int(0.22 * steps), 1), 0
        for i in range(steps):
            pull = 0.75 if i else 1.0
            moved = inside(now + step.reshape(each) * radius * gradient)
            moved = inside(now + (moved - now) * pull + (now - previous) * (1 - pull))
            previous, now = now, moved
            gradient, value, wrong = ask(now)
            history.append(value)
            fooling, fooled = torch.where(wrong.reshape(each), now, fooling), fooled | wrong
            better = value > best_value
            best = torch.where(better.reshape(each), now, best)
            best_gradient = torch.where(better.reshape(each), gradient, best_gradient)
            best_value = torch.maximum(best_value, value)
            since += 1
            if since == every:
                window = torch.stack(history[-every - 1 :])
                raised = (window[1:] > window[:-1]).sum(0)
                halved = (raised <= rho * every) | (~reduced & (value_at_check >= best_value))
                reduced, value_at_check = halved, best_value
                step = torch.where(halved, step / 2, step)
                now = torch.where(halved.reshape(each), best, now)
                gradient = torch.where(halved.reshape(each), best_gradient, gradient)
                every, since = max(every - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1)), 0
        return Attacked(fooling, best, best_value, fooled)


def apgd(
    logits: Logits,
    x: Tensor,
    y: Tensor,
    epsilon: float,
    steps: int = 100,
    restarts: int = 1,
    loss: Literal["ce", "dlr", "targeted"] = "ce",
    targets: int = 9,
    box: Box = Box(),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Auto-PGD with restarts on the cross-entropy, on DLR, or on targeted DLR for each of the next-likeliest classes.

    Args:
        logits, x, y, epsilon, steps, box, generator: as in :func:`auto_pgd`.
        restarts: number of starts (for every target).
        loss: 'ce', 'dlr' or 'targeted'.
        targets: of 'targeted', as many as there are other classes at most.

    Returns:
        for each sample the first point found that is classified wrongly; the input itself where there is none.

    Raises:
        RecipeError: for a loss that needs more classes than there are.
    """
    with gradients_allowed():
        x, y = x.detach().clone().float(), y.detach().clone()
        with torch.no_grad():
            clean = logits_of(logits(x))
        check_classes(loss, clean.shape[1])
        objectives: list[Loss] = [{"ce": cross_entropy, "dlr": dlr}.get(loss, dlr)]
        if loss == "targeted":
            objectives = [partial(targeted_dlr, target=target) for target in runners_up(clean, targets)]
        each, adversarial, fooled = (-1, *[1] * (x.dim() - 1)), x, clean.argmax(1) != y
        for objective in objectives:
            for _ in range(restarts):
                found = auto_pgd(logits, x, y, epsilon, steps, objective, box=box, generator=generator)
                new = found.fooled & ~fooled
                adversarial = torch.where(new.reshape(each), found.fooling, adversarial)
                fooled = fooled | found.fooled
        return adversarial


def runners_up(z: Tensor, count: int) -> list[Tensor]:
    """The second, third, ... likeliest class of each sample, up to `count` of them: class indices ``[n]`` each."""
    return list(z.argsort(1, descending=True).unbind(1)[1 : count + 1])


def check_classes(loss: str, classes: int) -> None:
    """Refuse a loss that cannot be computed with so few classes.

    Raises:
        RecipeError: says how many it needs.
    """
    needed = {"dlr": 3, "targeted": 4}.get(loss, 2)
    if classes < needed:
        raise RecipeError(f"Auto-PGD on the {loss} loss needs {needed} classes; there are {classes}: use 'ce'")


def momentum_pgd(
    logits: Callable[[Tensor], Any],
    x: Tensor,
    y: Tensor,
    epsilon: float | Tensor,
    steps: int,
    step_size: float | Tensor,
    decay: float | Tensor = 0.0,
    loss: Loss = cross_entropy,
    box: Box = Box(),
    generator: torch.Generator | None = None,
) -> Tensor:
    """PGD along the sign of a decaying sum of gradients, g <- dL/dx + decay g, from a uniform point of the ball.

    Works under ``no_grad`` and ``inference_mode``.

    Args:
        logits, x, y, loss, box, generator: as in :func:`auto_pgd`.
        epsilon, step_size, decay: radius and step in pixel units, and the decay: numbers, or one for each sample.

    Returns:
        the last point of each sample, inside ball and box, fp32, without a graph.
    """
    with gradients_allowed():
        x, y = x.detach().clone().float(), y.detach().clone()
        low, high, unit = box.bounds(x)
        each = (-1, *[1] * (x.dim() - 1))
        epsilon, step_size, decay = (
            v.reshape(each) if isinstance(v, Tensor) else v for v in (epsilon, step_size, decay)
        )
        radius = epsilon * unit
        noise = torch.rand(x.shape, generator=generator).to(x.device) * 2 - 1
        now, momentum = clip(x + noise * radius, low, high), torch.zeros_like(x)
        for _ in range(steps):
            point = now.detach().requires_grad_()
            gradient = torch.autograd.grad(loss(logits(point), y).sum(), point)[0].float()
            momentum = gradient + decay * momentum
            now = clip(clip(now + step_size * unit * momentum.sign(), x - radius, x + radius), low, high)
        return now


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
