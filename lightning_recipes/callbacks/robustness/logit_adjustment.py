"""LogitAdjustment: training on a long tail with the class prior added to the logits of the loss.

Menon et al., "Long-tail learning via logit adjustment", ICLR 2021 (https://arxiv.org/abs/2007.07314); the training loss
of stage 1 of Chen et al., "Rethinking the Bias of Foundation Model under Long-tailed Distribution", ICML 2025
(https://arxiv.org/abs/2501.15955; code https://github.com/JiahaoChen1/Pre-train-Imbalance, commit f5ec404).

With n_c training samples of class c and logits z:

    pi_c = n_c / sum n
    loss = CE(z + tau log pi, y)                 (natural logarithm, in training only)

so that z, without the prior, is what ranks classes for a balanced test set. Metrics, validation and test see z.
Costs one addition a step, and one look at all training labels as the fit begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_recipes.core.diagnostics import log_values
from lightning_recipes.core.errors import RecipeError, check_argument
from lightning_recipes.core.labels import check_same_counts, counted_for, one_for_every_class
from lightning_recipes.core.prepare import Plan, Session
from lightning_recipes.core.recipe import Paper, StepRecipe
from lightning_recipes.core.step import Step


def log_prior(counts: Tensor, smoothing: float = 0.0) -> Tensor:
    """log(n_c / sum n + smoothing), fp32 ``[C]``; the official code's smoothing is 1e-9."""
    counts = counts.double()
    return (counts / counts.sum() + smoothing).log().float()


def adjusted(logits: Tensor, prior: Tensor, tau: float, normalised: bool = False) -> Tensor:
    """z + tau log pi, in at least fp32.

    Args:
        logits: ``[n, C, ...]``.
        prior: :func:`log_prior`, ``[C]``.
        normalised: whether the logits are log-probabilities and must stay such.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits + tau * prior.reshape(-1, *[1] * (logits.dim() - 2))
    return logits.log_softmax(1) if normalised else logits


def kl_to_uniform(counts: Tensor) -> float:
    """KL divergence of the class prior from the uniform one, in nats: 0 for balanced data, at most log C."""
    prior = counts.double() / counts.sum()
    return float((torch.special.xlogy(prior, prior) + prior * torch.tensor(float(len(prior))).log()).sum())


class LogitAdjustment(StepRecipe):
    """Add tau times the log prior of the training classes to the logits that the loss sees.

    Labels may be soft (mixup): the prior is that of the data set's own labels.

    Args:
        class_counts: training samples of each class, or 'auto' to count the labels of the whole training set.
        tau: strength; 0 switches the recipe off.
        smoothing: added to the prior inside the logarithm, for classes without samples; the official code's is 1e-9.
        criterion: which loss to observe, where it cannot be found: an index or a dotted name.

    Raises:
        RecipeError: for bad arguments; as the fit begins when labels cannot be counted, or are not those of the
            checkpoint; in the first step for a class without samples, counts of another length than the logits, and
            a loss that is not one of classification.
    """

    paper = Paper(
        "Long-tail learning via logit adjustment",
        "A. K. Menon, S. Jayasumana, A. S. Rawat, H. Jain, A. Veit, S. Kumar",
        2021,
        "https://arxiv.org/abs/2007.07314",
        "https://github.com/google-research/google-research/tree/master/logit_adjustment",
    )
    does = (
        "Adds the log prior of the training classes to the logits of the loss, so that rare classes are not ranked low."
    )
    use_when = "Training classes are unequally frequent and all of them matter alike at test time."
    works_sharded = True
    costs = "One addition a step; all training labels are read once."
    refuses: ClassVar[Mapping[str, str]] = {"ClassWeights": "both correct for the class prior"}

    def __init__(
        self,
        class_counts: Sequence[float] | Literal["auto"] = "auto",
        tau: float = 1.0,
        smoothing: float = 0.0,
        criterion: str | int | None = None,
    ) -> None:
        super().__init__()
        check_argument(tau >= 0, self, "tau", tau, "at least 0")
        check_argument(smoothing >= 0, self, "smoothing", smoothing, "at least 0")
        if not isinstance(class_counts, str):
            class_counts = [float(n) for n in class_counts]
        usable = class_counts == "auto" or (
            not isinstance(class_counts, str) and len(class_counts) > 1 and min(class_counts) >= 0
        )
        check_argument(usable, self, "class_counts", class_counts, "'auto' or a number of samples a class, at least 0")
        self.class_counts, self.tau, self.smoothing, self.criterion = class_counts, tau, smoothing, criterion
        self._counts: Tensor | None = None
        if class_counts != "auto":
            self._counts = torch.tensor(class_counts)
            self._check_zeros(self._counts)
        self._saved: Tensor | None = None
        self._names: list[str] | None = None
        self._prior: Tensor | None = None

    @property
    def neutral(self) -> bool:
        return self.tau == 0

    def declare(self, plan: Plan) -> None:
        self._prior = self._saved = None  # another fit may bring other data
        names = getattr(plan.trainer.datamodule, "class_names", None)
        self._names = None if names is None else [str(name) for name in names]
        super().declare(plan)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.neutral:
            return
        if self.class_counts == "auto":
            phases = Session.of(trainer, pl_module).phases
            changes = phases is not None and phases.plan.reload_data
            self._counts = counted_for(self, trainer, changes, "class_counts=[samples of class 0, of class 1, ...]")
        check_same_counts(self, self._counts, self._saved)

    def transform_logits(self, step: Step, logits: Tensor) -> Tensor:
        """z + tau log pi for the loss alone."""
        if self._prior is None or self._prior.device != logits.device:
            self._fix_prior(step, logits)
        return adjusted(logits, self._prior, self.tau, normalised=step.call.name == "nll_loss")

    def _fix_prior(self, step: Step, logits: Tensor) -> None:
        """In the first step, which shows how many classes there are."""
        call, counts = step.call, self._counts
        if (call.is_function and not call.classifies) or logits.dim() < 2:
            raise RecipeError(
                "LogitAdjustment needs a classification loss of logits [n, classes]; the observed one is"
                f" {call.name} of {tuple(logits.shape)}"
            )
        counted = self.class_counts == "auto"
        counts = one_for_every_class(self, counts, logits.shape[1], "class counts", counted)
        self._check_zeros(counts)
        if call.options.get("weight") is not None:
            rank_zero_warn("LogitAdjustment: the module's loss has class weights too; the prior is corrected twice")
        self._prior = log_prior(counts, self.smoothing).to(logits.device)
        log_values(step.trainer, {"logit_adjustment/kl_to_uniform": kl_to_uniform(counts)})

    def _check_zeros(self, counts: Tensor) -> None:
        empty = torch.nonzero(counts == 0).flatten().tolist()
        if empty and not self.smoothing and self.tau:
            more = f" (and {len(empty) - 1} more)" if len(empty) > 1 else ""
            raise RecipeError(
                f"LogitAdjustment: class {empty[0]}{more} has no training sample; its log prior is -inf; pass smoothing"
                " (1e-9 as in the official code)"
            )

    def state(self) -> dict[str, Any]:
        return {"counts": self._counts, "class_names": self._names}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._saved = state["counts"]
