"""ClassWeights: the module's own classification loss with a weight for every class.

Fixed weights as in Vir, "Balanced Multi-Task Attention for Satellite Image Classification", 2025
(https://arxiv.org/abs/2510.15527; code https://github.com/virAditya/satellite-image-classification-eurosat, commit
a01ffe4), or weights from the number n_c of training samples of each of C classes:

    'balanced_eurosat'   0.8 to 1.3, set by hand from a confusion matrix of EuroSAT's ten classes
    'inverse'            w_c = sum n / (C n_c)
    'effective_number'   w_c ~ (1 - beta) / (1 - beta^n_c), their sum C   (Cui et al., "Class-Balanced Loss Based on
                         Effective Number of Samples", CVPR 2019, https://arxiv.org/abs/1901.05555)

    loss = sum_i w_{y_i} l_i / sum_i w_{y_i}

The paper calls its weights class-balanced; they are not those of that name. The mean divides by the weights that are
present, as ``nn.CrossEntropyLoss(weight=w)`` does; over the samples of all ranks, which that does not. Of accumulated
micro-batches each has a mean of its own. A soft target counts as one of every class by its share: -sum_c y_c w_c log
p_c over sum_c y_c w_c.

Costs a sum of a batch's weights a step, on several ranks a message of one number, and one look at all training labels
as the fit begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_recipes.core.diagnostics import log_values
from lightning_recipes.core.errors import RecipeError, check_argument
from lightning_recipes.core.labels import check_same_counts, counted_for, one_for_every_class
from lightning_recipes.core.prepare import Plan, Session
from lightning_recipes.core.recipe import Paper, StepRecipe
from lightning_recipes.core.step import Step

BALANCED_EUROSAT = (1.0, 0.8, 1.3, 1.0, 1.3, 1.0, 1.3, 0.8, 1.0, 0.8)
"""In alphabetical order: up HerbaceousVegetation, Industrial, PermanentCrop; down Forest, Residential, SeaLake."""
COUNTED = ("inverse", "effective_number")


def inverse(counts: Tensor) -> Tensor:
    """sum n / (C n_c), fp32 ``[C]``; 1 on average over the samples."""
    counts = counts.double()
    return (counts.sum() / (len(counts) * counts)).float()


def effective_number(counts: Tensor, beta: float) -> Tensor:
    """(1 - beta) / (1 - beta^n_c) scaled to a sum of C, fp32 ``[C]``; all 1 at beta 0, ~ 1 / n_c at beta near 1."""
    if beta == 0:
        return torch.ones(len(counts))
    counts = counts.double()
    weights = -1 / torch.expm1(counts * torch.tensor(beta, dtype=torch.float64).log())
    return (weights * len(counts) / weights.sum()).float()


class ClassWeights(StepRecipe):
    """Weigh the classes in the module's own classification loss.

    Labels may be soft (mixup); what is counted are the data set's own.

    Args:
        weights: 'effective_number' or 'inverse' to compute them from the training set; 'balanced_eurosat' for the
            paper's; or one positive number a class. All 1 switches the recipe off.
        beta: of 'effective_number', in [0, 1): 0 for equal weights, near 1 for the inverse frequency.
        criterion: which loss to observe, where it cannot be found: an index or a dotted name.

    Raises:
        RecipeError: for bad arguments; as the fit begins when labels cannot be counted, or are not those of the
            checkpoint; in the first step for a class without samples, weights of another length than the logits, a
            loss that is not one of classification, or one that has class weights of its own.
    """

    paper = Paper(
        "Class-Balanced Loss Based on Effective Number of Samples",
        "Y. Cui, M. Jia, T.-Y. Lin, Y. Song, S. Belongie",
        2019,
        "https://arxiv.org/abs/1901.05555",
        "https://github.com/virAditya/satellite-image-classification-eurosat",
    )
    does = "Weighs classes in the module's own loss, by their frequency or by given weights."
    use_when = "Training classes are unequally frequent, or some are confused more often than others."
    works_sharded = True
    costs = "A sum of a batch's weights a step; all training labels are read once."
    couples_samples: ClassVar[bool] = True
    refuses: ClassVar[Mapping[str, str]] = {"LogitAdjustment": "both correct for the class prior"}

    def __init__(
        self,
        weights: Sequence[float] | Literal["effective_number", "inverse", "balanced_eurosat"] = "effective_number",
        beta: float = 0.999,
        criterion: str | int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(weights, str):
            weights = [float(w) for w in weights]
        usable = weights in (*COUNTED, "balanced_eurosat") or (
            not isinstance(weights, str) and len(weights) > 1 and all(0 < w < float("inf") for w in weights)
        )
        allowed = "'effective_number', 'inverse', 'balanced_eurosat' or a positive number a class"
        check_argument(usable, self, "weights", weights, allowed)
        check_argument(0 <= beta < 1, self, "beta", beta, "in [0, 1)")
        self.weights, self.beta, self.criterion = weights, beta, criterion
        self._counts: Tensor | None = None
        self._saved: Tensor | None = None
        self._by_class: Tensor | None = None

    @property
    def neutral(self) -> bool:
        if isinstance(self.weights, str):
            return self.weights == "effective_number" and self.beta == 0
        return set(self.weights) == {1.0}

    def declare(self, plan: Plan) -> None:
        self._by_class = self._saved = self._counts = None  # another fit may bring other data
        super().declare(plan)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.neutral or self.weights not in COUNTED:
            return
        phases = Session.of(trainer, pl_module).phases
        changes = phases is not None and phases.plan.reload_data
        self._counts = counted_for(self, trainer, changes, "weights=[weight of class 0, of class 1, ...]")
        check_same_counts(self, self._counts, self._saved)

    def class_weights(self, step: Step) -> Tensor:
        """One weight a class, on the logits' device."""
        if self._by_class is None or self._by_class.device != step.outputs.device:
            self._fix(step)
        return self._by_class

    def _fix(self, step: Step) -> None:
        """In the first step, which shows how many classes there are."""
        call, logits = step.call, step.outputs
        if (call.is_function and not call.classifies) or logits.dim() < 2:
            raise RecipeError(
                "ClassWeights needs a classification loss of logits [n, classes]; the observed one is"
                f" {call.name} of {tuple(logits.shape)}"
            )
        if call.options.get("weight") is not None:
            raise RecipeError(
                "ClassWeights: the module's loss has class weights of its own; take them out there, or leave the recipe"
                " out"
            )
        weights = self._from_counts(logits.shape[1]) if self.weights in COUNTED else self._given()
        weights = one_for_every_class(self, weights, logits.shape[1], "class weights", counted=False)
        self._by_class = weights.to(logits.device)
        log_values(step.trainer, {"class_weights/smallest": weights.min(), "class_weights/largest": weights.max()})

    def _given(self) -> Tensor:
        return torch.tensor(BALANCED_EUROSAT if self.weights == "balanced_eurosat" else self.weights)

    def _from_counts(self, classes: int) -> Tensor:
        counts = one_for_every_class(self, self._counts, classes, "classes of labels", counted=True)
        empty = torch.nonzero(counts == 0).flatten().tolist()
        if empty:
            more = f" (and {len(empty) - 1} more)" if len(empty) > 1 else ""
            raise RecipeError(
                f"ClassWeights: class {empty[0]}{more} has no training sample, so weights={self.weights!r} has none for"
                " it; give weights=[weight of class 0, of class 1, ...]"
            )
        return inverse(counts) if self.weights == "inverse" else effective_number(counts, self.beta)

    def state(self) -> dict[str, Any]:
        return {"counts": self._counts}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._saved = state["counts"]
