"""Fitting a linear head on features that are already computed: multinomial logistic regression by L-BFGS.

    minimise over W, b     sum_i w_i CE(W f(x_i) + b, y_i) + l2 / 2 ||W||_F^2

with weights w of mean 1 and f the standardisation by the mean and deviation of the features that it is fitted on. l2 is
1 / C of scikit-learn. The objective is convex and the start is zero: the result depends on no random number, and on the
order of the samples only by rounding. The standardisation is folded into W and b, so a fitted head takes the features
as they are. Under DDP gather the features and fit on one rank (``decided_on_rank_zero``).
"""

from __future__ import annotations

from dataclasses import dataclass

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_recipes.core.errors import RecipeError


@dataclass(frozen=True)
class LinearHead:
    """A fitted linear map from features to logits.

    Attributes:
        weight, bias: ``[classes, p]`` and ``[classes]``, in the precision of the fit.
        steps: iterations that the fit took.
        converged: whether the gradient where it ended is within a hundred times the tolerance.
    """

    weight: Tensor
    bias: Tensor
    steps: int
    converged: bool

    def __call__(self, features: Tensor) -> Tensor:
        """Logits ``[n, classes]`` of features ``[n, p]``, computed in the precision of the fit."""
        return F.linear(features.to(self.weight), self.weight, self.bias)

    def to(self, device: torch.device | str) -> LinearHead:
        """The same on another device."""
        return LinearHead(self.weight.to(device), self.bias.to(device), self.steps, self.converged)

    @torch.no_grad()
    def write(self, layer: nn.Linear) -> None:
        """Copy it into a layer of the same shape, in place and in the layer's precision.

        Raises:
            RecipeError: when the layer has another shape, or no bias to take this one's.
        """
        if layer.weight.shape != self.weight.shape:
            raise RecipeError(
                f"the fitted head is {tuple(self.weight.shape)} and the layer to write it into is"
                f" {tuple(layer.weight.shape)} (classes, features)"
            )
        if layer.bias is None and bool(self.bias.any()):
            raise RecipeError("the layer to write the fitted head into has no bias; fit it with bias=False")
        layer.weight.copy_(self.weight)
        if layer.bias is not None:
            layer.bias.copy_(self.bias)


def standardisation(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of every feature, ``[p]`` each; the deviation of a constant one is 1.

    Args:
        x: ``[n, p]``.
    """
    mean = x.mean(0)
    deviation = (x - mean).square().mean(0).sqrt()
    # What rounding leaves of a constant feature is not to be blown up to a deviation of 1.
    rounding = max(1e-7, 10 * torch.finfo(x.dtype).eps)
    constant = deviation <= rounding * x.square().mean(0).sqrt()
    return mean, torch.where(constant, 1.0, deviation)


def balanced(labels: Tensor) -> Tensor:
    """Weights of mean 1, ``[n]`` in fp64, by which every value that occurs among the labels counts the same in total.

    Args:
        labels: ``[n]`` integers: classes, groups, or one number for every pair of both.
    """
    _, inverse, counts = labels.unique(return_inverse=True, return_counts=True)
    return (len(labels) / (len(counts) * counts.double()))[inverse]


def fit_logistic(
    x: Tensor,
    y: Tensor,
    classes: int | None = None,
    *,
    l2: float = 1.0,
    standardise: bool = True,
    floor: float = 0.0,
    weights: Tensor | None = None,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
    max_steps: int = 1000,
    tolerance: float = 1e-8,
) -> LinearHead:
    """Multinomial logistic regression, on the device of the features and without touching any random state.

    Args:
        x: features ``[n, p]``.
        y: class indices ``[n]``.
        classes: how many there are; None for the largest index plus 1. One that does not occur gets a low logit.
        l2: weight of the penalty on the (standardised) weights; the bias is free.
        standardise: fit on standardised features; the result takes them as they are.
        floor: a standardised feature whose deviation is below this share of the largest one, or of the root mean square
            of all features, is scaled by that instead. A feature that hardly varies would get a weight as large as its
            deviation is small, and with it what rounding left of the feature: fine for a probe, but brittle in a
            classifier that is to be used. The fit then sees the scale of single features.
        weights: ``[n]``, scaled to mean 1 here; :func:`balanced` gives those that balance classes or groups.
        bias: fit one; without it nothing can take up a mean, so the features are scaled but not centred.
        dtype: fp64, or fp32 where there are too many features for it.
        max_steps: iterations after which the fit ends in any case.
        tolerance: largest entry of the gradient of the mean objective at which the fit ends. In reach of fp64; rounding
            may end it a little earlier.

    Raises:
        RecipeError: for shapes that do not fit, labels outside the classes, no samples, or features that are not
            finite.
    """
    if x.dim() != 2 or y.shape != x.shape[:1] or not len(x):
        raise RecipeError(
            f"a head is fitted on features [n, p] and labels [n]; got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if y.is_floating_point() or bool(y.min() < 0) or (classes is not None and bool(y.max() >= classes)):
        raise RecipeError(
            f"labels must be class indices from 0 to {'classes' if classes is None else classes} - 1; got"
            f" {y.dtype} from {y.min().item():g} to {y.max().item():g}"
        )
    if not bool(x.isfinite().all()):
        raise RecipeError("the features that a head is to be fitted on are not all finite")
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        x, y = x.detach().to(dtype).clone(), y.detach().clone()
        classes = int(y.max()) + 1 if classes is None else classes
        mean, scale = standardisation(x) if standardise else (x.new_zeros(x.shape[1]), x.new_ones(x.shape[1]))
        scale = scale.clamp_min(floor * float(scale.max().maximum(x.square().mean().sqrt()))) if floor else scale
        mean = mean if bias else torch.zeros_like(mean)
        x = (x - mean) / scale
        share = x.new_full((len(x),), 1 / len(x)) if weights is None else (weights / weights.sum()).to(x)
        w = x.new_zeros(classes, x.shape[1], requires_grad=True)
        b = x.new_zeros(classes, requires_grad=bias)
        free = [w, b] if bias else [w]
        solver = torch.optim.LBFGS(
            free,
            max_iter=max_steps,
            tolerance_grad=tolerance,
            tolerance_change=4 * torch.finfo(dtype).eps,  # of the objective: no more to be gained
            history_size=20,
            line_search_fn="strong_wolfe",
        )

        def objective() -> Tensor:
            solver.zero_grad()
            losses = F.cross_entropy(F.linear(x, w, b), y, reduction="none")
            value = torch.dot(share, losses) + l2 / (2 * len(x)) * w.square().sum()
            value.backward()
            return value

        solver.step(objective)
        steps = solver.state[w]["n_iter"]
        steepest = max(float(p.grad.abs().max()) for p in free)
        weight = w.detach() / scale
        return LinearHead(weight, b.detach() - weight @ mean, steps, steepest <= 100 * tolerance)


def accuracy(head: LinearHead, x: Tensor, y: Tensor) -> Tensor:
    """Whether each sample is classified correctly, as 0 or 1, ``[n]``: its mean is the accuracy."""
    return (head(x).argmax(1) == y).double()


def worst_group(correct: Tensor, groups: Tensor) -> Tensor:
    """The lowest mean of `correct` over the groups that occur.

    Args:
        correct: ``[n]``.
        groups: ``[n]`` integers.
    """
    _, inverse, counts = groups.unique(return_inverse=True, return_counts=True)
    return (correct.new_zeros(len(counts)).index_add_(0, inverse, correct) / counts).min()


def where_to_fit(module: pl.LightningModule) -> torch.device:
    """The module's device where it has fp64."""
    return module.device if module.device.type == "cuda" else torch.device("cpu")
