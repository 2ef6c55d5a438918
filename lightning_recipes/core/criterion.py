"""Seeing the loss that a stock module computes, and changing what it is computed from.

A module calls its loss in one of two ways. Losses of ``torch.nn.functional`` (also through ``nn.CrossEntropyLoss`` and
the built-in losses of Hugging Face models) are seen by swapping the function for an observing version while the
module's own step runs. Losses that cannot be seen like this (timm's, hand-written ones, ``from ... import
cross_entropy``) are named by the user, a submodule or a method, and wrapped in place.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_recipes.core.distributed import all_sum, rank_and_world
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.patch import Patch

CLASS_LOSSES = ("cross_entropy", "nll_loss")
OBSERVED = (
    *CLASS_LOSSES,
    "binary_cross_entropy_with_logits",
    "binary_cross_entropy",
    "soft_margin_loss",
    "mse_loss",
    "l1_loss",
    "smooth_l1_loss",
    "huber_loss",
)

_HERE = threading.local()  # .watch: the observation of this thread's running step


class Stages(Protocol):
    """What an observation asks before it computes the loss: the step with its recipes."""

    def transform(self, call: Call) -> tuple[Tensor, Tensor, Tensor | None]: ...

    def computed(self, call: Call, logits: Tensor, targets: Tensor, loss: Any) -> None: ...


@dataclass
class Call:
    """One call of a loss inside the module's step."""

    name: str
    function: Callable[..., Any]
    logits: Tensor
    """As the network gave them: ``[n, classes]`` (or ``[n, classes, d1, ...]``; any shape for regression losses)."""
    targets: Tensor
    """As the module gave them, hard or soft."""
    options: dict[str, Any] = field(default_factory=dict)
    place: int = 0
    """Among all loss calls of the step, those that train nothing counted too."""
    class_weights: Tensor | None = None
    """``[classes]``, of the recipes; the module's own are among the options."""

    @property
    def is_function(self) -> bool:
        return self.name in OBSERVED

    @property
    def classifies(self) -> bool:
        """Whether the loss is one of class scores (for a named criterion: whether its targets are class indices)."""
        return self.name in CLASS_LOSSES if self.is_function else not self.targets.is_floating_point()

    def per_sample(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The module's own loss, sample by sample, with its label smoothing, class weights and other options.

        Args:
            logits: ``[n, ...]``.
            targets: ``[n, ...]`` hard, or soft ``[n, classes]``.

        Returns:
            ``[n]``, in the dtype of the loss.
        """
        if not self.is_function:
            one = lambda z, y: self.function(z[None], y[None], **self.options)  # noqa: E731
            return torch.func.vmap(one, randomness="different")(logits, targets)
        losses = self._unreduced(logits, targets)
        return losses.flatten(1).mean(1) if losses.dim() > 1 else losses

    def value(self, logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Any:
        """The loss as the module would have computed it from these logits and targets, weighted by sample if asked.

        With class weights w a mean is sum w l / sum w over the samples of all ranks, as nn.CrossEntropyLoss(weight=w)
        has it in one process; a soft target is one of every class by its share: -sum_c y_c w_c log p_c over
        sum_c y_c w_c.

        Raises:
            RecipeError: for soft targets or weights that the criterion cannot take.
        """
        softened = targets is not self.targets and self.classifies and targets.shape != self.targets.shape
        if self.class_weights is not None and not self.classifies:
            raise RecipeError(f"class weights need a loss of class scores; the observed one is {self.name}")
        if weights is None and self.class_weights is None and not softened:
            return self.function(logits, targets, **self.options)
        if not self.is_function:
            if softened:
                self.check_takes_soft()
            weighted = self.per_sample(logits, targets)
            weighted = weighted if weights is None else weighted * weights
            if self.class_weights is None:
                return weighted.mean()
            of_label = self._weights_at(targets)
            if of_label.dim() != 1:
                raise RecipeError(
                    f"criterion={self.name!r} has targets {list(targets.shape)}; class weights need one a sample, [n]"
                )
            return (weighted * of_label).sum() / self._over_ranks(of_label.sum())
        losses, reduction = self._unreduced(logits, targets), self.options.get("reduction", "mean")
        weighted = losses if weights is None else losses * weights.reshape(-1, *[1] * (losses.dim() - 1))
        if reduction == "none":
            return weighted
        return weighted.sum() if reduction == "sum" else weighted.sum() / self._count(losses, targets)

    def check_takes_soft(self) -> None:
        """Refuse a named criterion of class indices, for a recipe that will make the targets soft.

        Raises:
            RecipeError: names it.
        """
        if not self.is_function and self.classifies:
            raise RecipeError(
                f"criterion={self.name!r} takes class indices and a recipe made the targets soft; use a criterion"
                " that takes probabilities (nn.CrossEntropyLoss does)"
            )

    def _unreduced(self, logits: Tensor, targets: Tensor) -> Tensor:
        options = {**self.options, "reduction": "none"}
        if self.class_weights is not None:
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            options["weight"] = self._all_class_weights().to(logits.dtype)
        soft = self.classifies and targets.is_floating_point()
        if soft:
            options.pop("ignore_index", None)
        if soft and self.name == "nll_loss":
            class_weights = options.get("weight")
            terms = -logits * targets if class_weights is None else -logits * targets * class_weights
            losses = terms.sum(1)
        else:
            losses = self.function(logits, targets, **options)
        kept = self._kept() if soft else None
        return losses if kept is None else losses * kept

    def _kept(self) -> Tensor | None:
        """Where the module's own hard targets were not ``ignore_index``."""
        if self.targets.is_floating_point():
            return None
        return self.targets != self.options.get("ignore_index", -100)

    def _count(self, losses: Tensor, targets: Tensor) -> Tensor | int:
        """The divisor of a mean: samples, or the class weights of those that are not ignored."""
        kept = self._kept() if self.classifies else None
        if self.class_weights is not None:
            if targets.is_floating_point():
                shape = (-1, *[1] * (targets.dim() - 2))
                present = (targets * self._all_class_weights().reshape(shape)).sum(1)
                present = present if kept is None else present * kept
            else:
                present = self._weights_at(targets)
            return self._over_ranks(present.sum())
        if kept is None:
            return losses.numel()
        return kept.sum() if self.options.get("weight") is None else self._weights_at(self.targets).sum()

    def _all_class_weights(self) -> Tensor | None:
        own = self.options.get("weight")
        if self.class_weights is None or own is None:
            return own if self.class_weights is None else self.class_weights
        return own * self.class_weights

    def _weights_at(self, targets: Tensor) -> Tensor:
        """The class weight of every hard target, 0 where it is ignored."""
        kept = self._kept()
        return self._all_class_weights()[torch.where(kept, targets, 0)] * kept

    def _over_ranks(self, present: Tensor) -> Tensor:
        """The mean over ranks of the weight that is present, so that DDP's mean of the losses is the global one."""
        return all_sum(present) / rank_and_world()[1]


class Observation:
    """Watches one run of the module's step and computes the chosen loss call from what the recipes make of it.

    Args:
        stages: the step.
        select: None for the only call, an index in call order, or a dotted name (then functions are not watched).
    """

    def __init__(self, stages: Stages, select: str | int | None) -> None:
        self.stages, self.select = stages, select
        self.seen: list[Call] = []
        self._calls = 0
        self._inside = False
        self._idle = False

    @property
    def call(self) -> Call | None:
        """The observed call, None as long as none came."""
        index = self.select if isinstance(self.select, int) else 0
        return self.seen[index] if index < len(self.seen) else None

    def run(self, make: Callable[[], Call], plain: Callable[[], Any]) -> Any:
        """Called in the place of a loss."""
        if self._inside:
            return plain()
        call = make()
        call.place, self._calls = self._calls, self._calls + 1
        if not (torch.is_grad_enabled() and call.logits.requires_grad):
            self._idle = True
            return plain()  # a loss computed for a log entry trains nothing
        self.seen.append(call)
        if self.call is not call:
            return plain()
        self._inside = True
        try:
            logits, targets, weights = self.stages.transform(call)
            loss = call.value(logits, targets, weights)
        finally:
            self._inside = False
        self.stages.computed(call, logits, targets, loss)
        return loss

    def check(self, needed: bool) -> None:
        """At the end of the step: the loss was seen, and it was the only one if none was chosen.

        Raises:
            RecipeError: lists the candidates, or says how to name a criterion that cannot be seen.
        """
        if self.select is None and len(self.seen) > 1:
            listed = "; ".join(
                f"{i}: {c.name} of {tuple(c.logits.shape)} and {tuple(c.targets.shape)}"
                for i, c in enumerate(self.seen)
            )
            raise RecipeError(
                f"the training step computes {len(self.seen)} losses ({listed}); choose with criterion=INDEX"
            )
        if needed and self.call is None:
            raise RecipeError(
                "no loss was seen in the training step. A loss of torch.nn.functional is seen when it is called through"
                " its module (F.cross_entropy, nn.CrossEntropyLoss); name any other with criterion='dotted.name' of the"
                " submodule or method that computes it"
                + (f" (criterion={self.select!r} was never called)" if self.select is not None else "")
                + (" (one was computed, from what needs no gradient: is everything frozen?)" if self._idle else "")
            )


class Glance:
    """Watches a run of the module's step that trains nothing, and takes the logits of one of its loss calls.

    Args:
        place: of that call (:attr:`Call.place`).
        select: the dotted name of the criterion, where one is named.
    """

    def __init__(self, place: int, select: str | int | None) -> None:
        self.place, self.select = place, select
        self.logits: Tensor | None = None
        self._calls = 0

    def run(self, make: Callable[[], Call], plain: Callable[[], Any]) -> Any:
        """Called in the place of a loss."""
        if self._calls == self.place:
            self.logits = make().logits
        self._calls += 1
        return plain()


def _observer(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def observed(*args: Any, **kwargs: Any) -> Any:
        watch = getattr(_HERE, "watch", None)
        if watch is None:
            return original(*args, **kwargs)

        def make() -> Call:
            options = dict(signature.bind(*args, **kwargs).arguments)
            logits, targets = options.pop("input"), options.pop("target")
            return Call(name, original, logits, targets, options)

        return watch.run(make, lambda: original(*args, **kwargs))

    return torch.compiler.disable(observed)


# Made once: a compiled step guards on the identity of F.cross_entropy, and a fresh wrapper a step would recompile it.
_ORIGINALS = {name: getattr(F, name) for name in OBSERVED}
_OBSERVERS = {name: _observer(name, original) for name, original in _ORIGINALS.items()}


Watch = TypeVar("Watch", Observation, Glance)


@contextmanager
def watching(observation: Watch) -> Iterator[Watch]:
    """Watch this thread's loss calls. Nests: an inner watch (a replay) hides the outer one until it ends."""
    before, outermost = getattr(_HERE, "watch", None), F.cross_entropy is not _OBSERVERS["cross_entropy"]
    _HERE.watch = observation
    if outermost and not isinstance(observation.select, str):
        for name, observer in _OBSERVERS.items():
            setattr(F, name, observer)
    try:
        yield observation
    finally:
        _HERE.watch = before
        if outermost:
            for name, original in _ORIGINALS.items():
                setattr(F, name, original)


def wrap_named(module: nn.Module, name: str) -> Callable[[], None]:
    """Wrap the criterion that the user named; inert unless a step of this thread is being watched.

    Args:
        module: the LightningModule.
        name: dotted name of a submodule (its ``forward`` is wrapped) or of a method of the module or a submodule,
            called as ``criterion(logits, targets, ...)``.

    Returns:
        a function that takes the wrapper off again.

    Raises:
        RecipeError: when nothing of that name can be called.
    """
    owner_name, _, attribute = name.rpartition(".")
    try:
        owner = module.get_submodule(owner_name)
        target = getattr(owner, attribute)
    except AttributeError:
        target = None
    if not callable(target):
        raise RecipeError(f"criterion={name!r} is no submodule or method of {type(module).__name__}")
    if isinstance(target, nn.Module):
        owner, attribute = target, "forward"

    def observed(logits: Tensor, targets: Tensor, *args: Any, **kwargs: Any) -> Any:
        watch = getattr(_HERE, "watch", None)
        if watch is None or args:
            return patch.original(logits, targets, *args, **kwargs)
        make = lambda: Call(name, patch.original, logits, targets, kwargs)  # noqa: E731
        return watch.run(make, lambda: patch.original(logits, targets, **kwargs))

    patch = Patch(owner, attribute, observed, compiled=False)
    return patch.restore
