"""GroupMask: the loss sees the logits of the classes at hand and no others.

Lesort et al., "Challenging Common Assumptions about Catastrophic Forgetting", CoLLAs 2023
(https://arxiv.org/abs/2207.04543; code https://github.com/TLESORT/SCoLe-SCaling-Continual-Learning, commit ee71664).
With G the classes that have a label in the batch (or in the task) and logits z:

    z_c <- -1e9  for c not in G,      loss = CE(z; y)  =  -z_y + log sum_{c in G} exp z_c

so that no gradient reaches the rows of the head that belong to other classes: a task of two classes does not push down
all that were learnt before. In training only, and in the loss only: the module's own metrics, validation and test see
the network's logits, over all classes. Weight decay and momentum do move the other rows; the paper trains without them.

Costs a mask a step; over ranks, one message of as many numbers as there are classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_recipes.core.distributed import all_sum
from lightning_recipes.core.errors import RecipeError, check_argument
from lightning_recipes.core.prepare import Plan
from lightning_recipes.core.recipe import Paper, StepRecipe
from lightning_recipes.core.step import Step
from lightning_recipes.core.tasks import supplied


def present(targets: Tensor, classes: int) -> Tensor:
    """Which classes have a label, bool ``[classes]``.

    Args:
        targets: class indices ``[n, ...]`` (those below 0, to be ignored, are none), or probabilities
            ``[n, classes, ...]``, of which a class with any above 0 is present.
    """
    if targets.is_floating_point():
        return (targets > 0).transpose(0, 1).flatten(1).any(1)
    labels = targets.flatten()
    found = torch.zeros(classes + 1, dtype=torch.bool, device=labels.device)
    found[torch.where(labels < 0, classes, labels)] = True
    return found[:classes]


def masked(logits: Tensor, keep: Tensor, fill: float = -1e9, normalised: bool = False) -> Tensor:
    """Logits with `fill` in the place of classes that are not kept.

    Args:
        logits: ``[n, classes, ...]``.
        keep: bool ``[classes]``.
        fill: at least half of the smallest number that the dtype holds (-32752 in fp16).
        normalised: whether the logits are log-probabilities and must stay such.
    """
    fill = max(fill, torch.finfo(logits.dtype).min / 2)
    left = logits.masked_fill(~keep.reshape(-1, *[1] * (logits.dim() - 2)), fill)
    return left.log_softmax(1) if normalised else left


class GroupMask(StepRecipe):
    """Leave the classes that are not at hand out of the loss, for training on a few classes at a time.

    Accuracy that the module itself computes in training is over all classes, unmasked.

    Args:
        scope: which classes stay: those with a label in the 'batch' (as in the official code), those of the 'task'
            (the data module's, with what it replays), or 'all', which switches the recipe off.
        fill: what stands in the place of the others' logits; below what a dtype holds, half of its smallest number.
        sync: with 'batch': the batch is that of all ranks together, as it is in one process; False takes each rank's
            own. Micro-batches of an accumulation are masked one by one.
        criterion: which loss to observe, where it cannot be found: an index or a dotted name.

    Raises:
        RecipeError: for bad arguments; as the fit begins for scope='task' without a data module that deals in tasks; in
            the first step for a loss that is not one of class scores or smooths labels, for labels beyond the logits,
            and for a data module with another number of classes.
    """

    paper = Paper(
        "Challenging Common Assumptions about Catastrophic Forgetting",
        "T. Lesort, O. Ostapenko, P. Rodriguez, D. Misra, M. R. Arefin, L. Charlin, I. Rish",
        2023,
        "https://arxiv.org/abs/2207.04543",
        "https://github.com/TLESORT/SCoLe-SCaling-Continual-Learning",
    )
    does = "Leaves classes without a label in the batch out of the loss, so that training does not push them down."
    use_when = "You train on few of many classes at a time: long streams of small tasks whose classes come again."
    costs = "A mask a step; over ranks, one message of as many numbers as classes."
    couples_samples = True
    works_sharded = True
    refuses: ClassVar[Mapping[str, str]] = {
        "SLCA": "both mask the same logits",
        "BANG": "it smooths labels over all classes, and the mask leaves only those at hand",
        "PSKD": "its targets have mass on classes that another batch had, whose logits are masked now",
    }
    comes_after: ClassVar[Mapping[str, str]] = {
        "LogitAdjustment": "logits are adjusted first, then those of classes that are not there are masked"
    }

    def __init__(
        self,
        scope: Literal["batch", "task", "all"] = "batch",
        fill: float = -1e9,
        sync: bool = True,
        criterion: str | int | None = None,
    ) -> None:
        super().__init__()
        check_argument(scope in ("batch", "task", "all"), self, "scope", scope, "'batch', 'task' or 'all'")
        check_argument(fill <= -1e3, self, "fill", fill, "at most -1e3")
        self.scope, self.fill, self.sync, self.criterion = scope, fill, sync, criterion
        self._data: Any = None
        self._checked = False
        self._of_task: tuple[list[int], Tensor] | None = None

    @property
    def neutral(self) -> bool:
        return self.scope == "all"

    def declare(self, plan: Plan) -> None:
        given = supplied(plan.trainer)
        self._data, self._checked, self._of_task = None if given is None else given[0], False, None
        if plan.fitting and self.scope == "task" and given is None:
            raise RecipeError(
                "GroupMask: scope='task' needs a data module that deals its classes out in tasks (SCoLeDataModule,"
                " ClassIncrementalDataModule); without one take scope='batch'"
            )
        plan.at_end(self._finish)
        super().declare(plan)

    def _finish(self) -> None:
        self._data, self._of_task = None, None

    def transform_logits(self, step: Step, logits: Tensor) -> Tensor:
        """Only the classes at hand count."""
        if not self._checked:
            self._check(step, logits)
        keep = self._at_hand(step.hard_targets, logits)
        return masked(logits, keep, self.fill, normalised=step.call.name == "nll_loss")

    def _at_hand(self, targets: Tensor, logits: Tensor) -> Tensor:
        """Which classes stay, bool ``[classes]`` on the logits' device."""
        classes, device = logits.shape[1], logits.device
        if self.scope == "task":
            now = self._data.current_classes
            if self._of_task is None or self._of_task[0] != now or self._of_task[1].device != device:
                keep = torch.zeros(classes, dtype=torch.bool)
                keep[now] = True
                self._of_task = now, keep.to(device)
            return self._of_task[1]
        keep = present(targets, classes)
        return all_sum(keep.to(torch.float32)) > 0 if self.sync else keep

    def _check(self, step: Step, logits: Tensor) -> None:
        """In the first step, which shows the loss."""
        call, targets = step.call, step.hard_targets
        if (call.is_function and not call.classifies) or logits.dim() < 2:
            raise RecipeError(
                f"GroupMask: needs a classification loss of logits [n, classes]; the observed one is {call.name} of"
                f" {tuple(logits.shape)}"
            )
        classes = logits.shape[1]
        if call.options.get("label_smoothing"):
            raise RecipeError(
                f"GroupMask: the loss smooths labels (label_smoothing={call.options['label_smoothing']}) over all"
                " classes, and only those at hand are there; use plain labels"
            )
        known = getattr(self._data, "num_classes", classes)
        if known != classes:
            raise RecipeError(
                f"GroupMask: the data module has {known} classes and the logits {classes}; give the network one output"
                " for every class"
            )
        if not targets.is_floating_point() and targets.numel() and int(targets.max()) >= classes:
            raise RecipeError(f"GroupMask: a label is {int(targets.max())} and the logits have {classes} classes")
        self._checked = True
