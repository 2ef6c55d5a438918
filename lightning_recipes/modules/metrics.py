"""Metrics that torchmetrics does not have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


def aurc(confidence: Tensor, correct: Tensor) -> Tensor:
    """Area under the risk-coverage curve: the mean over coverages k/n of the error rate among the k most confident.

    Geifman, Uziel, El-Yaniv, "Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers", ICLR 2019. Samples of
    one confidence share their errors evenly, so that the order in which they came does not count. Papers give it times
    1000.

    Args:
        confidence: ``[n]``, the largest probability of each sample.
        correct: bool ``[n]``.

    Returns:
        scalar in [0, 1], in double precision; 0 for a classifier without errors, nan for no samples.
    """
    order = confidence.argsort(descending=True)
    _, ties = confidence[order].unique_consecutive(return_counts=True)
    group = torch.repeat_interleave(torch.arange(len(ties), device=ties.device), ties)
    wrong = (~correct.bool())[order].double()
    errors = torch.zeros(len(ties), dtype=torch.double, device=wrong.device).index_add_(0, group, wrong)
    risk = (errors / ties)[group].cumsum(0) / torch.arange(1, len(wrong) + 1, device=wrong.device)
    return risk.mean()


def harmonic_mean(base: Tensor | float, novel: Tensor | float) -> Tensor:
    """2 b n / (b + n) of two accuracies; 0 where both are 0."""
    base, novel = torch.as_tensor(base), torch.as_tensor(novel)
    total = base + novel
    return torch.where(total == 0, torch.zeros_like(total), 2 * base * novel / total)


class BaseToNovelAccuracy(Metric):
    """Accuracy on base classes, on novel classes, and their harmonic mean (CoCoOp, Zhou et al., CVPR 2022).

    A sample of a base class is decided among the base classes only and a novel one among the novel classes only, as
    that protocol does; so it is not the accuracy over all classes together.

    Args:
        num_classes: all classes, C.
        num_base: base classes, which are labels 0 to num_base - 1; None for ceil(C/2).

    ``update(logits (N,C), labels (N,))``; ``compute()`` gives a dict of scalars ``base``, ``novel`` and
    ``harmonic_mean`` in [0,1] (nan where no sample of the kind was seen).
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def __init__(self, num_classes: int, num_base: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        num_base = -(-num_classes // 2) if num_base is None else num_base
        if not 1 <= num_base < num_classes:
            raise ValueError(f"num_base={num_base}: must be from 1 to num_classes - 1 = {num_classes - 1}")
        self.num_classes = num_classes
        self.num_base = num_base
        self.add_state("correct", torch.zeros(2), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(2), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        if logits.ndim != 2 or logits.shape[1] != self.num_classes:
            raise ValueError(f"logits: shape {tuple(logits.shape)}, must be (N, {self.num_classes})")
        novel = labels >= self.num_base
        is_novel_class = torch.arange(self.num_classes, device=logits.device) >= self.num_base
        other_half = novel[:, None] != is_novel_class[None, :]
        right = logits.masked_fill(other_half, -torch.inf).argmax(1) == labels
        for kind, chosen in enumerate((~novel, novel)):
            self.correct[kind] += (right & chosen).sum()
            self.total[kind] += chosen.sum()

    def compute(self) -> dict[str, Tensor]:
        base, novel = self.correct / self.total
        return {"base": base, "novel": novel, "harmonic_mean": harmonic_mean(base, novel)}


class AURC(Metric):
    """Area under the risk-coverage curve (:func:`aurc`): how well confidence tells right from wrong predictions.

    Args:
        num_classes: C.

    ``update(preds (N,C) logits or probabilities, labels (N,))``; ``compute()`` gives a scalar in [0,1]. Holds two
    numbers a sample.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_classes = num_classes
        self.add_state("confidence", [], dist_reduce_fx="cat")
        self.add_state("correct", [], dist_reduce_fx="cat")

    def update(self, preds: Tensor, labels: Tensor) -> None:
        if preds.ndim != 2 or preds.shape[1] != self.num_classes:
            raise ValueError(f"preds: shape {tuple(preds.shape)}, must be (N, {self.num_classes})")
        inside = ((preds >= 0) & (preds <= 1)).all()
        probabilities = torch.where(inside, preds, preds.softmax(1))  # as torchmetrics tells logits
        self.confidence.append(probabilities.amax(1))
        self.correct.append(preds.argmax(1) == labels)

    def compute(self) -> Tensor:
        return aurc(dim_zero_cat(self.confidence), dim_zero_cat(self.correct))
