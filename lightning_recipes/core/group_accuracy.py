"""Accuracy by how often a class was trained on: many-, medium- and few-shot classes, and all of them alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class LongTailAccuracy(Metric):
    """Mean accuracy of the classes with many, medium and few training samples, as the long-tailed literature has it.

    Each figure is the mean over the classes of a group of the accuracy within the class (Liu et al., "Large-Scale
    Long-Tailed Recognition in an Open World", CVPR 2019); on a balanced test set that is the accuracy of its samples.

    Args:
        class_counts: training samples of each class, ``[C]``.
        many: classes with more than so many samples are many-shot.
        few: classes with fewer than so many are few-shot; what is between is medium-shot.

    ``update(logits (N,C) or predictions (N,), labels (N,))``; ``compute()`` gives a dict of scalars ``many``,
    ``medium``, ``few`` and ``balanced`` (over all classes) in [0,1]; nan for a group of which no sample was seen.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def __init__(self, class_counts: Sequence[int] | Tensor, many: int = 100, few: int = 20, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        counts = torch.as_tensor(class_counts)
        if counts.dim() != 1 or len(counts) < 2 or bool((counts < 0).any()):
            raise ValueError(f"class_counts={counts.tolist()}: must be one number of samples a class, at least 0")
        if not 0 <= few <= many + 1:
            raise ValueError(f"few={few}, many={many}: few must be at least 0 and at most many + 1")
        self.num_classes, self.many, self.few = len(counts), many, few
        self.register_buffer("class_counts", counts, persistent=False)
        self.add_state("correct", torch.zeros(len(counts)), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(len(counts)), dist_reduce_fx="sum")

    @property
    def groups(self) -> dict[str, Tensor]:
        """Which classes belong to each group, bool ``[C]``."""
        n = self.class_counts
        return {
            "many": n > self.many,
            "medium": (n <= self.many) & (n >= self.few),
            "few": n < self.few,
            "balanced": torch.ones_like(n, dtype=torch.bool),
        }

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        if predictions.dim() == 2:
            if predictions.shape[1] != self.num_classes:
                raise ValueError(f"logits: shape {tuple(predictions.shape)}, must be (N, {self.num_classes})")
            predictions = predictions.argmax(1)
        right = (predictions == labels).to(self.correct.dtype)
        self.correct.index_add_(0, labels, right)
        self.total.index_add_(0, labels, torch.ones_like(right))

    def compute(self) -> dict[str, Tensor]:
        seen, accuracy = self.total > 0, self.correct / self.total.clamp_min(1)
        return {
            name: torch.where(seen & group, accuracy, 0.0).sum() / (seen & group).sum()
            for name, group in self.groups.items()
        }
