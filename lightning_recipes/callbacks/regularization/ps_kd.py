"""PSKD: training on labels mixed with the prediction that the model itself made for the sample one epoch earlier.

Kim, Ji, Yoon, Hwang, "Self-Knowledge Distillation with Progressive Refinement of Targets", ICCV 2021
(https://arxiv.org/abs/2006.12000; code https://github.com/lgcnsai/PS-KD-Pytorch, commit 9aa0828).

With T epochs e = 0 .. T - 1, logits z of a sample k with label y, and its past prediction P[k]:

    alpha_e = alpha_T (e + 1) / T
    q       = (1 - alpha_e) onehot(y) + alpha_e P[k]        (P[k] = onehot(y) in epoch 0)
    loss    = mean of -sum_c q_c log softmax(z)_c           (gradient by logit: softmax(z) - q)
    P[k]    = softmax(z)                                    (after the loss, for the next epoch)

The paper writes P as the previous epoch's model on the sample. The official code stores the prediction that training
made in that epoch, with its augmentation and weights that were still moving, and so does ``mode="table"``;
``mode="snapshot"`` keeps the weights that the epoch ended with and runs them, in eval mode, on the inputs at hand. The
two are not equal.

OURS is what becomes of Mixup, CutMix and BANG beside it: the batch is mixed first, q starts from the mixed label, and
the rows of P are mixed alike; what is stored for a sample is the prediction for the mixture that it led.

OURS too is ``targets``: P from a file that a teacher's run wrote (``LangevinMixture(distill=...)``), the same in every
epoch. That is plain distillation at temperature 1, with (1 - alpha_e) of the label.

Costs, as a table: no pass, 4 C bytes a sample (2 C as float16) and a copy of n rows to and from it a step. As a
snapshot: a forward pass without gradients, and a copy of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_recipes.core.artefacts import content_at, key_of
from lightning_recipes.core.copies import FrozenCopy
from lightning_recipes.core.distributed import active, decided_on_rank_zero
from lightning_recipes.core.errors import RecipeError, check_argument, speaking_for
from lightning_recipes.core.mixing import as_probabilities, mixes_of
from lightning_recipes.core.prepare import Plan
from lightning_recipes.core.recipe import Paper, StepRecipe
from lightning_recipes.core.sample_ids import SampleIds
from lightning_recipes.core.sample_table import SampleTable, of_all_ranks
from lightning_recipes.core.step import Step

_MIXES_FIRST = "labels are mixed first, and past predictions alike"


def growth(epoch: int, epochs: int, alpha_T: float, schedule: str | Sequence[float] = "linear") -> float:
    """alpha_e, the weight of past predictions in epoch e of T; held after the last one.

    Args:
        epoch: e, from 0.
        epochs: T.
        alpha_T: the weight in the last epoch.
        schedule: 'linear' for alpha_T (e + 1) / T, 'constant' for alpha_T, or the share of alpha_T in each epoch.
    """
    if schedule == "constant":
        return alpha_T
    if schedule == "linear":
        return alpha_T * min(epoch + 1, epochs) / epochs
    return alpha_T * schedule[min(epoch, len(schedule) - 1)]


def refined(y: Tensor, past: Tensor, alpha: float) -> Tensor:
    """q = (1 - alpha) y + alpha P, probabilities of one shape."""
    return (1 - alpha) * y + alpha * past


def normalised(rows: Tensor) -> Tensor:
    """Probabilities that were stored in half precision, ``[n, C]``, so that they sum to 1 again."""
    return rows / rows.sum(1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)


def entropy(q: Tensor) -> Tensor:
    """Mean entropy of targets ``[n, C, ...]`` in nats."""
    return -torch.special.xlogy(q, q).sum(1).mean()


def agreement(past: Tensor, y: Tensor, known: Tensor | None = None) -> Tensor:
    """Share of samples whose past prediction was their label.

    Args:
        past: ``[n, C, ...]``.
        y: class indices ``[n, ...]`` (negative ones are left out), or probabilities of the shape of `past`.
        known: bool ``[n]``, which samples have a past.
    """
    labels = y.argmax(1) if y.is_floating_point() else y
    counted = labels >= 0 if known is None else known & (labels >= 0)
    return ((past.argmax(1) == labels) & counted).sum() / counted.sum().clamp_min(1)


def soft_targets_at(path: str) -> Mapping[str, Any]:
    """What a file of soft targets holds: ``log_probs`` float ``[n, C]``, the ``ids`` int64 ``[n]`` of their samples,
    and the ``total`` of the data set.

    Raises:
        RecipeError: when there is none.
    """
    content = content_at(path)
    if content.keys() != {"log_probs", "ids", "total"}:
        raise RecipeError(f"{path} holds no soft targets of LangevinMixture(distill=...) but {', '.join(content)}")
    return content


def _as_table(given: Mapping[str, Any], classes: int, path: str) -> dict[str, Tensor]:
    """Soft targets as the state of a table of probabilities."""
    found, ids = given["log_probs"].exp(), given["ids"]
    if found.shape[1] != classes:
        raise RecipeError(f"targets={path!r} holds {found.shape[1]} classes a sample and the logits have {classes}")
    rows, written = found.new_zeros(given["total"], classes), torch.zeros(given["total"], dtype=torch.bool)
    rows[ids], written[ids] = found, True
    return {"written": written, "rows": rows[written]}


class PSKD(StepRecipe):
    """Mix every label with the model's own prediction of one epoch ago, more so as training goes on.

    The module has a classification loss of logits ``[n, C]`` and class indices, or class probabilities. Only that loss
    sees the mixed targets: class weights, label smoothing and ``ignore_index`` of the module's own stay what they are,
    and so do the labels that its metrics see. It makes errors fewer and confidence better calibrated, except where
    labels are noisy or the plain network was calibrated already: then it may become under-confident.

    Past predictions go by the index of a sample in its data set, whatever sampler, workers and number of ranks there
    are; that index never shows in a batch. A sample that was not seen in an epoch keeps the prediction before; one
    that is drawn several times in an epoch has the last. The table holds a row for every sample of the data set under
    all ``Subset``s and is the same on every rank.

    Args:
        alpha_T: weight of past predictions in the last epoch; 0 switches the recipe off.
        max_epochs: T; None is the Trainer's ``max_epochs``. Needed where the run is bounded by steps or time.
        schedule: how alpha grows: 'linear' as in the paper, 'constant', or a list with the share of alpha_T in every
            epoch (the last one is held).
        mode: 'table' stores what training predicted; 'snapshot' runs the weights of the previous epoch's end once more
            and needs no ids, for data without an index and for logits ``[n, C, ...]``.
        dtype: of the table. float16 halves it; probabilities below 6e-8 become 0.
        storage: of the table: 'cpu' for main memory, 'device' for the accelerator's, 'memmap' for a file under the
            Trainer's ``default_root_dir``, which goes with the process.
        num_classes: C, for a check of the memory before the first step; None is what the logits have.
        save_table: whether checkpoints hold the table. Without, a resume begins again with labels alone: not exact.
        criterion: which loss to observe, where it cannot be found: an index or a dotted name.
        targets: a file of ``LangevinMixture(distill=...)``, or a folder that holds a single one: P is what stands there
            from the first epoch on, and nothing of the model's own. alpha_T=1 with schedule='constant' trains on it
            alone. A sample that is not in it keeps its label.

    Raises:
        RecipeError: for bad arguments; in setup for an unknown number of epochs, data without an index in table mode,
            another data set than the checkpoint's or than that of the file, other recipes that rewrite targets without
            an order; in the first step for a loss that is not one of classification and a table that does not fit into
            memory.
    """

    paper = Paper(
        "Self-Knowledge Distillation with Progressive Refinement of Targets",
        "K. Kim, B. Ji, D. Yoon, S. Hwang",
        2021,
        "https://arxiv.org/abs/2006.12000",
        "https://github.com/lgcnsai/PS-KD-Pytorch",
    )
    does = "Mixes every label with the model's own prediction for that sample one epoch earlier."
    use_when = "A classifier is over-confident or overfits its labels, and there is no teacher to distil from."
    costs = (
        "table: no pass, 4 bytes a sample and class (20 MB for CIFAR-100, 5.1 GB for ImageNet), in checkpoints too;"
        " snapshot: a forward pass and a copy of the weights"
    )
    log_prefix = "ps_kd"
    needs_criterion = True
    works_sharded = True  # from its table; a snapshot is a copy of the weights
    refuses: ClassVar[Mapping[str, str]] = {
        "PSER": "two teachers rewrite one target",
        "NormalizedGD": "its step length assumes hard labels",
        "LOOK": "it looks for neighbours of the same class, which needs hard labels",
        "SupCon": "it pairs samples of the same class, which needs hard labels",
    }
    comes_after: ClassVar[Mapping[str, str]] = dict.fromkeys(("Mixup", "CutMix", "BANG"), _MIXES_FIRST)
    free_on_resume = frozenset({"storage", "save_table", "targets"})  # the file may move, and is compared

    def __init__(
        self,
        alpha_T: float = 0.8,
        max_epochs: int | None = None,
        schedule: Literal["linear", "constant"] | list[float] = "linear",
        mode: Literal["table", "snapshot"] = "table",
        dtype: Literal["float32", "float16"] = "float32",
        storage: Literal["cpu", "device", "memmap"] = "cpu",
        num_classes: int | None = None,
        save_table: bool = True,
        criterion: str | int | None = None,
        targets: str | None = None,
    ) -> None:
        super().__init__()
        check_argument(0 <= alpha_T <= 1, self, "alpha_T", alpha_T, "in [0, 1]")
        check_argument(max_epochs is None or max_epochs >= 1, self, "max_epochs", max_epochs, "None or at least 1")
        shares = not isinstance(schedule, str) and len(schedule) > 0 and all(0 <= share <= 1 for share in schedule)
        known = shares or (isinstance(schedule, str) and schedule in ("linear", "constant"))
        check_argument(known, self, "schedule", schedule, "'linear', 'constant' or shares of alpha_T in [0, 1]")
        check_argument(mode in ("table", "snapshot"), self, "mode", mode, "'table' or 'snapshot'")
        check_argument(dtype in ("float32", "float16"), self, "dtype", dtype, "'float32' or 'float16'")
        check_argument(storage in ("cpu", "device", "memmap"), self, "storage", storage, "'cpu', 'device' or 'memmap'")
        check_argument(num_classes is None or num_classes >= 2, self, "num_classes", num_classes, "None or at least 2")
        ok = targets is None or (bool(targets) and mode == "table")
        check_argument(ok, self, "targets", targets, "None or a file, with mode='table'")
        self.targets = targets
        self.alpha_T, self.max_epochs, self.schedule, self.mode = alpha_T, max_epochs, schedule, mode
        self.dtype, self.storage, self.num_classes, self.save_table = dtype, storage, num_classes, save_table
        self.criterion = criterion
        self._trainer: pl.Trainer | None = None  # while a fit goes on
        self._forget()

    def _forget(self) -> None:
        self._epochs = 0  # T
        self._ids: SampleIds | None = None
        self._table: SampleTable | None = None
        self._saved: Mapping[str, Any] | None = None  # the checkpoint's table, until its place is made
        self._copy: FrozenCopy | None = None
        self._new: tuple[Tensor, Tensor] | None = None  # ids and predictions of the batch at hand
        self._window: dict[int, tuple[Tensor, Tensor]] = {}  # what the batches of an open window have read
        self._given: Mapping[str, Any] | None = None  # of the file of targets
        self._given_key: str | None = None
        self._checked = self._told = False

    @property
    def neutral(self) -> bool:
        return self.alpha_T == 0

    @property
    def looks(self) -> bool:
        """Only the snapshot runs the step once more."""
        return self.mode == "snapshot"

    # -- declarations ------------------------------------------------------------------------------------------------

    def declare(self, plan: Plan) -> None:
        if not plan.fitting:
            return
        self._forget()
        self._epochs = self._count_epochs(plan)
        self._check_others(plan.trainer)
        self._trainer = plan.trainer
        plan.at_end(self._finish)
        if self.targets is not None:
            with speaking_for(self):
                self._given = decided_on_rank_zero(lambda: soft_targets_at(self.targets), plan.trainer)
            self._given_key = key_of(self._given)
        if self.mode == "table":
            otherwise = " or use mode='snapshot'"
            self._ids = SampleIds(plan.trainer, "PSKD(mode='table')", otherwise, self._check_size)
            plan.install(self._ids)
        else:
            if not plan.module.automatic_optimization:
                raise RecipeError(
                    "PSKD(mode='snapshot') runs the training step once more and needs automatic optimization: under"
                    " manual optimization that step trains; use mode='table'"
                )
            self._copy = FrozenCopy(plan.module)
        super().declare(plan)

    def _finish(self) -> None:
        self._trainer = None

    def _count_epochs(self, plan: Plan) -> int:
        """T, of the whole run."""
        epochs = self.max_epochs if self.max_epochs is not None else plan.trainer.max_epochs
        if epochs is None or epochs < 1:
            raise RecipeError(
                f"PSKD needs the number of epochs that alpha grows over; Trainer(max_epochs=...) is {epochs}. Give"
                " PSKD(max_epochs=...)"
            )
        trained = plan.trainer._checkpoint_connector._loaded_checkpoint.get("epoch", 0)
        if self.max_epochs is None and trained > epochs:
            raise RecipeError(
                f"PSKD: alpha grows over the whole run; Trainer(max_epochs=...) is {epochs} and the checkpoint has"
                f" trained {trained} epochs already. Give the epochs of the whole run, not those that are left"
            )
        return epochs

    def _check_others(self, trainer: pl.Trainer) -> None:
        """Another recipe that rewrites targets must have a place before or after this one."""
        for other in trainer.callbacks:
            if other is self or not isinstance(other, StepRecipe) or other.neutral:
                continue
            name = type(other).__name__
            ordered = name in self.comes_after or "PSKD" in type(other).comes_after
            if other.overrides("transform_targets") and not ordered:
                raise RecipeError(
                    f"PSKD and {name} both rewrite the targets, and neither says which comes first; use one of them"
                    f" (or have {name}.comes_after name PSKD)"
                )

    def _check_size(self, total: int) -> None:
        if self._given is not None and self._given["total"] != total:
            raise RecipeError(
                f"PSKD: the training set has {total} samples and that of targets={self.targets!r} had"
                f" {self._given['total']}; soft targets belong to their samples"
            )
        there = None if self._saved is None else len(self._saved["written"])
        if there is not None and there != total:
            raise RecipeError(
                f"PSKD: the training set has {total} samples and the checkpoint's had {there}; past predictions belong"
                " to their samples. Resume with the same data, or begin again from the checkpoint's weights"
            )
        if self._table is not None and self._table.samples != total:
            raise RecipeError(f"PSKD: the training set went from {self._table.samples} to {total} samples in one fit")

    # -- the step ----------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._trainer is not None and self._ids is not None and self.num_classes is not None:
            self._open(self.num_classes, pl_module.device)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The weights here are those that the previous epoch ended with, also where its end was in another process."""
        if self._trainer is not None and self._copy is not None and batch_idx == 0 and trainer.current_epoch > 0:
            self._copy.take()

    def transform_targets(self, step: Step, logits: Tensor, targets: Tensor) -> Tensor:
        if not self._checked:
            self._check_loss(step, logits)
        past = self._from_table(step, logits) if self._copy is None else self._from_copy(step)
        alpha = growth(step.trainer.current_epoch, self._epochs, self.alpha_T, self.schedule)
        if past is None:
            step.log(self, {"alpha": alpha})
            return targets
        past, known = past
        with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
            y = as_probabilities(targets, logits)
            accuracy = agreement(past, step.hard_targets, known)
            if known is not None:
                past = torch.where(known[:, None], past, as_probabilities(step.hard_targets, logits).float())
                past = self._mixed_alike(step, past)
            q = refined(y.float(), past, alpha)
            step.log(self, {"alpha": alpha, "target_entropy": entropy(q), "teacher_accuracy": accuracy})
            return q.to(y.dtype)

    def _from_table(self, step: Step, logits: Tensor) -> tuple[Tensor, Tensor] | None:
        """Past predictions of the batch and which there are; None in epoch 0. Keeps the new ones for afterwards."""
        if step.run_again:
            return self._window.get(step.batch_idx)
        ids = self._ids.now()
        if len(ids) != len(logits):
            raise RecipeError(f"PSKD: the batch has {len(ids)} samples and the loss got logits of {len(logits)}")
        if self._table is None:
            self._open(logits.shape[1], logits.device)
        past = None
        if step.trainer.current_epoch > 0 or self._given is not None:
            past = self._table.read(ids)
            if self.dtype == "float16":
                past = normalised(past[0]), past[1]
        if step.replaying:
            return past
        # not what an optimizer makes of a batch by running it over and over
        if self._new is None and self._given is None:
            with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
                self._new = ids, logits.detach().float().softmax(1)
        if past is not None:
            self._window[step.batch_idx] = past
        return past

    def _from_copy(self, step: Step) -> tuple[Tensor, None] | None:
        """What the previous epoch's weights predict for the inputs at hand, a mixture too; None without any."""
        if not self._copy or step.trainer.current_epoch == 0:
            return None
        logits = step.look(self._copy.worn())
        with torch.autocast(logits.device.type, enabled=False):
            return logits.float().softmax(1), None

    def _mixed_alike(self, step: Step, past: Tensor) -> Tensor:
        for mix in mixes_of(step):
            if not self._told:
                rank_zero_info("PSKD: past predictions are mixed as the labels of the batch are (an extension of ours)")
                self._told = True
            past = mix.targets(past, mix.of_partners(past))
        return past

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Store what this step predicted, of all ranks; an update of the weights, if one was due, is done."""
        if self._trainer is None or self._table is None:
            return
        (ids, values), self._new = self._new or (None, None), None
        if active() and self._given is None:
            like = torch.empty(self._table.columns, device=pl_module.device)
            ids, values = of_all_ranks(ids, values, self._ids.most, like)
        if ids is not None:
            self._table.write(ids, values)
        if not trainer.fit_loop._should_accumulate():
            self._window.clear()

    def _check_loss(self, step: Step, logits: Tensor) -> None:
        call, y = step.call, step.call.targets
        soft = y.is_floating_point()
        classifies = call.classifies or (soft and not call.is_function)
        shape = logits.shape if soft else logits.shape[:1] + logits.shape[2:]
        if not classifies or logits.dim() < 2 or y.shape != shape:
            raise RecipeError(
                "PSKD needs a classification loss of logits [n, C] and class indices [n], or class probabilities"
                f" [n, C]; the observed one is {call.name} of {tuple(logits.shape)} and {tuple(y.shape)}"
            )
        if logits.dim() > 2 and self._copy is None:
            raise RecipeError(
                f"PSKD(mode='table') holds one prediction a sample; the logits are {tuple(logits.shape)}, one a place."
                " Use mode='snapshot'"
            )
        if self.num_classes is not None and self.num_classes != logits.shape[1]:
            raise RecipeError(f"PSKD: num_classes={self.num_classes} and the logits have {logits.shape[1]} classes")
        call.check_takes_soft()
        self._checked = True

    def _open(self, classes: int, device: torch.device) -> None:
        trainer = self._trainer
        with speaking_for(self):
            self._table = SampleTable(
                self._ids.total,
                classes,
                getattr(torch, self.dtype),
                self.storage,
                device,
                trainer.default_root_dir,
                trainer.num_devices,
                "; mode='snapshot' needs none",
            )
            rank_zero_info(f"PSKD: past predictions take {self._table.size}")
            if self._given is not None:
                self._table.load(_as_table(self._given, classes, self.targets))
            elif self._saved is not None:
                self._table.load(self._saved)
            self._saved = None

    # -- state -------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """The table or the copy as it stands, of rank 0 (it is the same on all); and what an open window has read."""
        zero = self._trainer is None or self._trainer.is_global_zero
        table = None
        if zero and self.save_table and self.targets is None:
            table = self._saved if self._table is None else self._table.state()
        return {
            "table": table,
            "copy": self._copy.state() if zero and self._copy else {},
            "window": {index: list(rows) for index, rows in self._window.items()},
            "epochs": self._epochs,
            "left_out": self.mode == "table" and not self.save_table and self.targets is None,
            "targets": self._given_key,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        if self._trainer is None:
            return
        if state.get("targets") != self._given_key:
            raise RecipeError(
                f"PSKD: targets={self.targets!r} holds other soft targets than the run of the checkpoint had; resume"
                " with its file, or start a new fit from the checkpoint's weights"
            )
        if state["left_out"]:
            rank_zero_warn(
                "PSKD: the checkpoint was written with save_table=False; past predictions begin again with the labels"
            )
        if state["epochs"] != self._epochs:
            rank_zero_warn(
                f"PSKD: alpha grew over {state['epochs']} epochs in the run of the checkpoint and goes on over"
                f" {self._epochs}; PSKD(max_epochs=...) keeps it as it was"
            )
        if state["table"] is not None:
            self._saved = state["table"]
        if self._copy is not None and state["copy"]:
            with speaking_for(self):
                self._copy.load(state["copy"])
        device = self._trainer.strategy.root_device
        self._window = {index: tuple(part.to(device) for part in rows) for index, rows in state["window"].items()}
