"""Scores of training examples, and what is chosen by them.

Paul, Ganguli, Dziugaite, "Deep Learning on a Data Diet: Finding Important Examples Early in Training", NeurIPS 2021
(https://arxiv.org/abs/2107.07075; code https://github.com/mansheej/data_diet, commit aee462e). With logits f, p =
softmax(f(x_i)), y_i one-hot, C classes, after a few epochs and in eval mode:

    el2n         || p - y ||_2                                        in [0, sqrt 2]
    grand        || d CE(f(x_i), y_i) / d theta ||_2                  over all trainable parameters
    grand_last   the same over a last linear layer with bias: el2n sqrt(1 + || h ||^2), h its input
    l1           || p - y ||_1
    max_margin   max_{c != y} p_c - p_y                sum_margin     sum_{c != y} (p_c - p_y) = 1 - C p_y
    forgetting   how often a training batch had an example wrong that an earlier one had right; inf if none ever had

S_i is the mean over R independent runs (other first weights and another order; the authors advise at least 10). Of the
ascending order of S the method keeps the last M (``keep_max``), over all classes together; a window that leaves out the
hardest is for noisy labels, which score highest. Then a new network is trained on what is kept with AS MANY STEPS as on
the whole set. Ties are broken by index, so that every process keeps the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_recipes.core import random
from lightning_recipes.core.artefacts import content_at
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.outputs import logits_in
from lightning_recipes.core.recipe import Paper
from lightning_recipes.core.sample_gradients import SampleGradients

Score = Literal["el2n", "grand", "grand_last", "l1", "max_margin", "sum_margin", "forgetting"]
Mode = Literal["keep_max", "keep_min", "keep_max_abs", "keep_min_abs", "random", "offset"]
SCORES: tuple[Score, ...] = get_args(Score)
MODES: tuple[Mode, ...] = get_args(Mode)

PAPER = Paper(
    "Deep Learning on a Data Diet: Finding Important Examples Early in Training",
    "M. Paul, S. Ganguli, G. K. Dziugaite",
    2021,
    "https://arxiv.org/abs/2107.07075",
    "https://github.com/mansheej/data_diet",
)


# -- scores of logits ------------------------------------------------------------------------------------------------


def el2n(logits: Tensor, targets: Tensor) -> Tensor:
    """|| softmax(logits) - y ||_2.

    Args:
        logits: ``[n, classes]``; taken in fp32, as everywhere here.
        targets: class indices ``[n]``, or probabilities ``[n, classes]``.

    Returns:
        ``[n]`` in [0, sqrt 2].

    Raises:
        RecipeError: for other shapes, and labels that the logits have no class for.
    """
    p, y = _probabilities(logits, targets)
    return (p - y).norm(dim=1)


def l1(logits: Tensor, targets: Tensor) -> Tensor:
    """|| softmax(logits) - y ||_1, in [0, 2]."""
    p, y = _probabilities(logits, targets)
    return (p - y).abs().sum(1)


def max_margin(logits: Tensor, targets: Tensor) -> Tensor:
    """The largest probability of a wrong class minus that of the right one, in [-1, 1]."""
    p, y = _probabilities(logits, targets)
    right = y.argmax(1, keepdim=True)
    return p.scatter(1, right, -1.0).amax(1) - p.gather(1, right)[:, 0]


def sum_margin(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum over wrong classes of their probability minus that of the right one: 1 - C p_y, in [1 - C, 1]."""
    p, y = _probabilities(logits, targets)
    return 1 - p.shape[1] * p.gather(1, y.argmax(1, keepdim=True))[:, 0]


def grand_last(logits: Tensor, targets: Tensor, features: Tensor, bias: bool = True) -> Tensor:
    """Norm of the gradient of cross-entropy with respect to a last linear layer.

    Args:
        features: input of that layer ``[n, d]``.
        bias: whether it has one.
    """
    squares = features.float().square().sum(1)
    return el2n(logits, targets) * (squares + 1 if bias else squares).sqrt()


def grand(
    network: nn.Module,
    args: tuple[Any, ...],
    targets: Tensor,
    kwargs: Mapping[str, Any] | None = None,
    chunk: int | None = 32,
) -> Tensor:
    """Norm of every example's gradient of cross-entropy with respect to all trainable parameters.

    No ``.grad`` is touched. The network's mode is the caller's business: in train mode batch norm makes an example's
    gradient depend on its batch.

    Args:
        network: gives logits ``[n, classes]``, or an output that holds them under 'logits'.
        args, kwargs: of its call; tensors whose first axis is n long are one entry an example, all else is shared.
        targets: class indices ``[n]`` or probabilities ``[n, classes]``.
        chunk: examples at once; None all.

    Returns:
        fp32 ``[n]``.
    """
    return SampleGradients(network, each_cross_entropy, chunk).norms(args, targets, kwargs)


def each_cross_entropy(output: Any, targets: Tensor) -> Tensor:
    """The loss of every example, ``[n]`` in fp32, from logits or an output that holds them."""
    logits = output if isinstance(output, Tensor) else logits_in(output)
    return F.cross_entropy(logits.float(), targets, reduction="none")


def _probabilities(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    soft = targets.is_floating_point()
    shape = logits.shape if soft else logits.shape[:1]
    if logits.dim() != 2 or targets.shape != shape:
        raise RecipeError(
            f"needs logits [n, classes] and class indices [n] or probabilities [n, classes]; got {tuple(logits.shape)}"
            f" and {tuple(targets.shape)}"
        )
    classes = logits.shape[1]
    if not soft and len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < classes:
        raise RecipeError(f"the logits have {classes} classes and a label is {int(targets.max())}")
    y = targets if soft else F.one_hot(targets, classes)
    return logits.float().softmax(1), y.float()


OF_LOGITS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "el2n": el2n,
    "l1": l1,
    "max_margin": max_margin,
    "sum_margin": sum_margin,
}


# -- forgetting ------------------------------------------------------------------------------------------------------


def forget(rows: Tensor, correct: Tensor) -> Tensor:
    """What is known of examples after they have been in a batch.

    Args:
        rows: before it ``[n, 3]``: whether classified correctly the last time, forgetting events, whether ever correct;
            zeros for an example that was in none yet.
        correct: bool ``[n]``.
    """
    before, events, ever = rows.unbind(1)
    now = correct.to(rows.dtype)
    return torch.stack([now, events + (before > now), torch.maximum(ever, now)], 1)


def forgetting(rows: Tensor) -> Tensor:
    """Forgetting events of rows as in :func:`forget`, ``[n]``; inf for an example that was never correct."""
    return torch.where(rows[:, 2] > 0, rows[:, 1], torch.inf)


# -- choosing --------------------------------------------------------------------------------------------------------


def prune_indices(
    scores: Tensor,
    keep: int | float,
    mode: Mode = "keep_max",
    offset: int | float | None = None,
    seed: int = 0,
) -> Tensor:
    """Which examples to train on.

    Args:
        scores: ``[n]``; inf is a score, nan is not.
        keep: how many, or (a float) what share in (0, 1].
        mode: 'keep_max' the highest scores, 'keep_min' the lowest, '..._abs' by absolute value, 'random' any, 'offset'
            those from place `offset` on in ascending order.
        offset: a place, or (a float) a share of n.
        seed: of the random choice.

    Returns:
        ascending int64 indices. Among equal scores a later index counts as higher.

    Raises:
        RecipeError: when there are not so many, and for scores that are nan.
    """
    total = len(scores)
    if scores.dim() != 1 or not total or bool(scores.isnan().any()):
        raise RecipeError(f"scores must be numbers [n], none of them nan; got {tuple(scores.shape)}")
    count = max(round(keep * total), 1) if isinstance(keep, float) else keep
    if not 1 <= count <= total:
        raise RecipeError(f"keep={keep!r} of {total} scores: must be a share in (0, 1] or from 1 to {total}")
    if mode not in MODES:
        raise RecipeError(f"mode must be one of {', '.join(map(repr, MODES))}; got {mode!r}")
    if (mode == "offset") != (offset is not None):
        raise RecipeError(f"offset goes with mode='offset'; got mode={mode!r}, offset={offset!r}")
    if mode == "random":
        return torch.randperm(total, generator=random.generator(seed, "PruneTrainSet"))[:count].sort().values
    order = (scores.abs() if mode.endswith("_abs") else scores).cpu().argsort(stable=True)
    if mode == "offset":
        start = round(offset * total) if isinstance(offset, float) else offset
        if start < 0 or start + count > total:
            raise RecipeError(f"offset={offset!r} and keep={keep!r}: {start} + {count} are more than {total} scores")
        return order[start : start + count].sort().values
    chosen = order[total - count :] if mode.startswith("keep_max") else order[:count]
    return chosen.sort().values


def suspicious(scores: Tensor, count: int | float = 0.01) -> Tensor:
    """The examples whose labels are most likely wrong: indices of the highest scores, the highest first.

    Args:
        scores: ``[n]``, by EL2N or another score that is high for what is hard.
        count: how many, or (a float) what share.
    """
    count = max(round(count * len(scores)), 1) if isinstance(count, float) else count
    return scores.cpu().argsort(descending=True, stable=True)[:count]


@dataclass(frozen=True)
class Scores:
    """What a file of scores holds.

    Attributes:
        score: which one.
        at_epoch: epochs that a run had trained before.
        runs: names of the runs.
        values: fp32 ``[runs, n]``, in the order of the training set.
        labels: int64 ``[n]``, that they were scored with.
    """

    score: str
    at_epoch: int
    runs: list[str]
    values: Tensor
    labels: Tensor

    @property
    def mean(self) -> Tensor:
        """S, the mean over runs, in fp64 ``[n]``."""
        return self.values.double().mean(0)

    def suspicious(self, count: int | float = 0.01) -> Tensor:
        """:func:`suspicious` of the mean."""
        return suspicious(self.mean, count)


def read_scores(path: str | Path) -> Scores:
    """The scores in a file of DataDiet's, or in a folder that holds a single one.

    Raises:
        RecipeError: when there is none.
    """
    content = content_at(path)
    try:
        return Scores(**content)
    except TypeError:
        raise RecipeError(f"{path} holds no scores of DataDiet's but {', '.join(map(str, content))}") from None
