"""Accuracy and forgetting over a sequence of tasks, as continual learning reports them.

Forgetting: Chaudhry et al., "Riemannian Walk for Incremental Learning", ECCV 2018 (https://arxiv.org/abs/1801.10112);
average incremental accuracy: Rebuffi et al., "iCaRL", CVPR 2017. With a_{k,j} the accuracy on held-out samples of task
j after training on task k, and A_k the accuracy on those of all tasks so far together:

    last accuracy  A_k        average incremental accuracy  (1 / k) sum_{l <= k} A_l
    forgetting     F_k = (1 / (k - 1)) sum_{j < k} [ max_{j <= l < k} a_{l,j} - a_{k,j} ]

Class-incremental: the task of a sample is not told; its class is decided among all classes seen so far, and among those
only.

A stream whose classes recur (Lesort et al., "Challenging Common Assumptions about Catastrophic Forgetting", CoLLAs
2023, https://arxiv.org/abs/2207.04543) is measured by class, since its tasks are not disjoint. Among all classes, with
a_{k,c} the accuracy on held-out samples of class c after task k:

    accuracy on all classes, on those of the task, on those that it does not have
    forgetting F_k = mean over the classes c seen so far of  [ max_{l <= k} a_{l,c} - a_{k,c} ]

Costs a count of labels a training step, and nothing but counts in a validation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_recipes.core.diagnostics import draw_curves, log_text, where_to_draw
from lightning_recipes.core.distributed import all_sum
from lightning_recipes.core.errors import RecipeError, check_argument
from lightning_recipes.core.features import head_input
from lightning_recipes.core.labels import labels_in
from lightning_recipes.core.outputs import part_of, watch_outputs
from lightning_recipes.core.prepare import Plan
from lightning_recipes.core.recipe import Paper, Recipe
from lightning_recipes.core.tasks import Tasks, cut, recur, supplied, up_to

Matrix = Sequence[Sequence[float]]
"""a_{k,j}: row k holds the accuracies on tasks 0 to k after task k; nan where nothing was measured."""


def forgetting(matrix: Matrix) -> float:
    """F of the last row: how much was lost, on average over the earlier tasks, since each was known best.

    Tasks that were not measured do not count; 0 where there is no earlier task.
    """
    *before, now = matrix
    lost = []
    for j, accuracy in enumerate(now[: len(before)]):
        known = [row[j] for row in before[j:] if j < len(row) and not math.isnan(row[j])]
        if known and not math.isnan(accuracy):
            lost.append(max(known) - accuracy)
    return sum(lost) / len(lost) if lost else 0.0


def average_incremental(seen: Sequence[float]) -> float:
    """Mean of the accuracies over all classes so far, one after every task; those not measured (nan) do not count."""
    measured = [accuracy for accuracy in seen if not math.isnan(accuracy)]
    return sum(measured) / len(measured) if measured else math.nan


def by_task(counts: Tensor, tasks: Tasks) -> tuple[list[float], float]:
    """Accuracies from counts by class.

    Args:
        counts: samples classified correctly, and all samples, of each class: ``[2, classes]``.
        tasks: the classes of each task to score.

    Returns:
        one accuracy a task, and that of all of them together; nan where there is no sample.
    """
    right, total = counts.tolist()

    def share(classes: Sequence[int]) -> float:
        samples = sum(total[c] for c in classes)
        return sum(right[c] for c in classes) / samples if samples else math.nan

    return [share(classes) for classes in tasks], share(up_to(tasks, len(tasks)))


def forgotten(best: Sequence[float], now: Sequence[float], seen: Sequence[bool]) -> float:
    """F of a stream: how much classes seen have lost since each was known best, on average; 0 where there is none.

    Args:
        best: of each class the best accuracy so far, this one among them; nan where there is none.
        now: accuracy of each class; nan for one without samples.
        seen: whether a class was trained on.
    """
    lost = [b - a for b, a, there in zip(best, now, seen) if there and not (math.isnan(a) or math.isnan(b))]
    return sum(lost) / len(lost) if lost else 0.0


def better(best: Sequence[float], now: Sequence[float]) -> list[float]:
    """The larger accuracy of each class; nan only where both are."""
    return [b if math.isnan(a) else a if math.isnan(b) else max(a, b) for b, a in zip(best, now)]


def in_words(curve: Sequence[Mapping[str, float]], classes: int) -> str:
    """What a stream came to.

    Args:
        curve: after each task that was measured: ``task``, ``acc_all``, ``forgetting``, ``acc_absent``.
        classes: how many there are.
    """
    first, last = curve[0], curve[-1]
    gain = last["acc_all"] - first["acc_all"]
    verdict = (
        "knowledge accumulates in spite of forgetting"
        if gain > 0.05
        else "nothing accumulates: try GroupMask, no momentum or replay"
    )
    absent = "" if math.isnan(last["acc_absent"]) else f"; classes not in the task are at {last['acc_absent']:.1%}"
    return (
        f"accuracy on all {classes} classes went from {first['acc_all']:.1%} after task {first['task'] + 1:.0f} to"
        f" {last['acc_all']:.1%} after task {last['task'] + 1:.0f}: {verdict}. A class is on average"
        f" {100 * last['forgetting']:.1f} points below its best{absent}"
    )


def draw_matrix(matrix: Matrix, path: str | Path, title: str) -> Path | None:
    """Draw the accuracies, one row after each task; None where matplotlib (the `plots` extra) is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    size = len(matrix)
    filled = [[row[j] if j < len(row) else math.nan for j in range(size)] for row in matrix]
    side = min(2.5 + 0.5 * size, 14)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(filled, vmin=0, vmax=1, cmap="viridis")
    if size <= 25:
        for k, row in enumerate(filled):
            for j, value in enumerate(row):
                if not math.isnan(value):
                    axes.text(j, k, f"{100 * value:.0f}", ha="center", va="center", color="w" if value < 0.6 else "k")
    axes.set(title=title, xlabel="accuracy on task", ylabel="after task", xticks=range(size), yticks=range(size))
    figure.colorbar(image, ax=axes, shrink=0.8)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


class ForgettingMonitor(Recipe):
    """Measure accuracy on every task so far and how much of it is forgotten, in any run that goes from task to task.

    Logs ``forgetting/acc_seen`` (over all classes so far), ``forgetting/acc_average`` (average incremental accuracy),
    ``forgetting/acc_task_<j>`` and ``forgetting/forgetting``; the last validation after a task counts for it. At the
    end of a fit the matrix of accuracies is drawn. A test logs the accuracies on the test data.

    On a stream whose classes recur (``SCoLeDataModule``) tasks are not disjoint, and classes are measured:
    ``forgetting/acc_all``, ``acc_seen``, ``acc_current`` and ``acc_absent`` (of the classes that the task has and does
    not have), ``acc_class_<c>``, ``forgetting`` and ``task``. At the end it says in words whether knowledge
    accumulates, and draws the curve.

    Which task a class-incremental run is at it takes from the labels that it trains on, so it serves with or without a
    recipe for continual learning, and over several fits with one monitor. Under DDP Lightning's validation sampler
    repeats a few samples to give all ranks as many; they count twice.

    Args:
        tasks: the classes of each task in order; a number cuts the head's classes in order; None asks the data module
            (``ClassIncrementalDataModule``, ``SCoLeDataModule``).
        forward: the part whose output are the logits: 'forward' for the module itself, or a dotted name.
        draw: save a picture in the run's log folder at the end of a fit (needs the `plots` extra).

    Raises:
        RecipeError: for tasks that overlap, are empty or miss a class, and where they are not given and the data module
            has none; in a fit's sanity check, or else in the first evaluation, when no logits come out of `forward`;
            in the first batch for labels that are no class indices.
    """

    paper = Paper(
        "Riemannian Walk for Incremental Learning: Understanding Forgetting and Intransigence",
        "A. Chaudhry, P. K. Dokania, T. Ajanthan, P. H. S. Torr",
        2018,
        "https://arxiv.org/abs/1801.10112",
    )
    does = "Measures last and average incremental accuracy, forgetting and the accuracy on every task."
    use_when = "You train on classes or tasks that come one after the other."
    costs = "A count of labels a step and of predictions a validation batch; no further pass."
    free_on_resume = frozenset({"draw"})
    log_prefix = "forgetting"

    def __init__(self, tasks: int | list[list[int]] | None = None, forward: str = "forward", draw: bool = True) -> None:
        super().__init__()
        self.tasks, self.forward, self.draw = tasks, forward, draw
        ok = tasks is None or (tasks >= 1 if isinstance(tasks, int) else not isinstance(tasks, str) and len(tasks) > 0)
        check_argument(ok, self, "tasks", tasks, "None, a number of at least 1, or the classes of each task")
        check_argument(bool(forward), self, "forward", forward, "'forward' or the name of a part")
        self.matrix: list[list[float]] = []
        """a_{k,j} so far."""
        self.seen: list[float] = []
        """A_k so far."""
        self.curve: list[dict[str, float]] = []
        """Of a stream whose classes recur: what was logged, after each task that was measured, without the classes."""
        self.best: list[float] = []
        """Of such a stream: the best accuracy of each class so far."""
        self.verdict: str | None = None
        """Of such a stream: what the last fit came to, in words."""
        self._tasks: Tasks = []
        self._stream: Any = None  # the data module of such a stream
        self._trained: Tensor | None = None  # by class, whether this rank has trained on it
        self._seen: list[bool] = []  # by class of a stream, whether any rank has trained on it
        self._now = 0  # the task of the evaluation under way
        self._counts: Tensor | None = None
        self._open: Tensor | None = None  # classes among which the evaluation decides
        self._logits: Tensor | None = None
        self._undo: Callable[[], None] | None = None

    # -- declarations ------------------------------------------------------------------------------------------------

    def declare(self, plan: Plan) -> None:
        if plan.trainer.state.fn == "predict":
            return
        self._tasks = self._resolve(plan)
        part = part_of(plan.module, self.forward)
        self._undo = watch_outputs(part, lambda logits: self._keep(plan.trainer, logits))
        plan.at_end(self._finish)
        data = supplied(plan.trainer)
        streams = data is not None and (recur(self._tasks) or hasattr(data[0], "phase_plan"))
        self._stream = data[0] if streams and self.tasks is None else None
        size = 1 + max(up_to(self._tasks, len(self._tasks)))
        if self._stream is not None:
            size = self._stream.num_classes
            if plan.fitting and plan.section is None:
                self.curve, self.best, self.verdict = [], [math.nan] * size, None
        if self._trained is None or len(self._trained) != size:
            self._trained = torch.zeros(size, dtype=torch.bool)

    def _resolve(self, plan: Plan) -> Tasks:
        given = supplied(plan.trainer)
        if self.tasks is None:
            if given is None:
                raise RecipeError(
                    "ForgettingMonitor: tasks is None and the Trainer's data module has no tasks; give tasks, or a"
                    " ClassIncrementalDataModule"
                )
            return given[1]
        if isinstance(self.tasks, int):
            return cut(self.tasks, range(head_input(plan.module)[1].out_features))
        return cut(self.tasks, sorted({c for task in self.tasks for c in task}))

    def _keep(self, trainer: pl.Trainer, logits: Tensor) -> None:
        if self._counts is not None and not trainer.training:
            self._logits = logits

    # -- training ----------------------------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._trained = self._trained.to(pl_module.device)
        self._trained.index_fill_(0, self._labels(batch), True)

    def _labels(self, batch: Any) -> Tensor:
        labels = labels_in(batch)
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dim() != 1:
            found = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
            raise RecipeError(f"ForgettingMonitor: needs class indices [n] in every batch; found {found}")
        return labels

    # -- evaluation --------------------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trained = all_sum(self._trained.to(pl_module.device, torch.int64)).tolist()
        if self._stream is not None:
            self._start_stream(trainer, pl_module, trained)
            return
        learnt = [k for k, classes in enumerate(self._tasks) if any(trained[c] for c in classes)]
        if trainer.state.fn == "fit" and not learnt and not trainer.sanity_checking:
            return
        self._now = learnt[-1] if learnt else len(self._tasks) - 1
        self._counts = torch.zeros(2, len(trained), device=pl_module.device)
        seen = up_to(self._tasks, self._now)
        self._open = torch.tensor([c in seen for c in range(len(trained))], device=pl_module.device)

    def _start_stream(self, trainer: pl.Trainer, pl_module: pl.LightningModule, trained: list[int]) -> None:
        if trainer.state.fn == "fit" and not any(trained) and not trainer.sanity_checking:
            return
        self._now = self._stream.task
        self._counts = torch.zeros(2, len(trained), device=pl_module.device)
        self._open = torch.ones(len(trained), dtype=torch.bool, device=pl_module.device)
        self._seen = [bool(n) for n in trained]

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._counts is None:
            return
        labels, logits, self._logits = self._labels(batch), self._logits, None
        classes = len(self._open)
        if logits is None or len(logits) != len(labels) or logits.shape[1] < classes:
            found = "nothing" if logits is None else f"logits {tuple(logits.shape)}"
            raise RecipeError(
                f"ForgettingMonitor: {self.forward!r} gave {found} for {len(labels)} samples of {classes} classes in an"
                " evaluation step; name the part that the step calls with forward="
            )
        guess = logits[:, :classes].masked_fill(~self._open, -torch.inf).argmax(1)
        self._counts[0].index_add_(0, labels, (guess == labels).to(self._counts))
        self._counts[1].index_add_(0, labels, torch.ones_like(labels, dtype=self._counts.dtype))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._counts is None:
            return
        k, counts = self._now, all_sum(self._counts.double())
        self._counts = self._open = self._logits = None
        if trainer.sanity_checking:  # that it can be measured is all that this shows
            return
        if self._stream is not None:
            self.log_dict(self._of_stream(k, counts, trainer.state.fn == "fit"), rank_zero_only=False)
            return
        accuracies, seen = by_task(counts, self._tasks[: k + 1])
        values = {f"forgetting/acc_task_{j}": a for j, a in enumerate(accuracies) if not math.isnan(a)}
        if not math.isnan(seen):
            values["forgetting/acc_seen"] = seen
        if trainer.state.fn == "fit":
            self._note(k, accuracies, seen)
            values["forgetting/acc_average"] = average_incremental(self.seen)
            values["forgetting/forgetting"] = forgetting(self.matrix)
        self.log_dict(values, rank_zero_only=False)

    def _of_stream(self, task: int, counts: Tensor, fitting: bool) -> dict[str, float]:
        """What is logged of a stream; in a fit it is noted too, the last validation after a task in its place."""
        classes = range(counts.shape[1])
        current = set(self._tasks[task])
        groups = {
            "all": classes,
            "seen": [c for c in classes if self._seen[c]],
            "current": sorted(current),
            "absent": [c for c in classes if c not in current],
        }
        by_group, _ = by_task(counts, [list(group) for group in groups.values()])
        by_class, _ = by_task(counts, [[c] for c in classes])
        values = {f"acc_{name}": accuracy for name, accuracy in zip(groups, by_group)}
        if fitting:
            self.best = better(self.best, by_class)
            values |= {"forgetting": forgotten(self.best, by_class, self._seen), "task": float(task)}
            if self.curve and self.curve[-1]["task"] == task:
                self.curve.pop()
            self.curve.append(dict(values))
        values |= {f"acc_class_{c}": accuracy for c, accuracy in zip(classes, by_class)}
        return {f"forgetting/{name}": value for name, value in values.items() if not math.isnan(value)}

    on_test_start, on_test_batch_end = on_validation_start, on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    def _note(self, k: int, accuracies: list[float], seen: float) -> None:
        for row in range(len(self.seen), k + 1):  # a task without a validation stays unmeasured
            self.matrix.append([math.nan] * (row + 1))
            self.seen.append(math.nan)
        self.matrix[k], self.seen[k] = accuracies, seen

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        folder = where_to_draw(trainer)
        if self._stream is not None and self.curve:
            self.verdict = in_words(self.curve, len(self.best))
            rank_zero_info(f"ForgettingMonitor: {self.verdict}")
            log_text(trainer, "forgetting/verdict", self.verdict)
            if self.draw and trainer.is_global_zero and folder is not None:
                tasks = [row["task"] + 1 for row in self.curve]
                names = ("acc_all", "acc_current", "acc_absent", "forgetting")
                curves = {name: (tasks, [row[name] for row in self.curve]) for name in names}
                title = f"all classes {self.curve[-1]['acc_all']:.1%}, forgetting {self.curve[-1]['forgetting']:.1%}"
                draw_curves(folder / "forgetting.png", curves, title, "tasks", "accuracy")
        if self.draw and self.matrix and trainer.is_global_zero and folder is not None:
            title = (
                f"last {100 * self.seen[-1]:.1f} %, average {100 * average_incremental(self.seen):.1f} %,"
                f" forgetting {100 * forgetting(self.matrix):.1f} points"
            )
            draw_matrix(self.matrix, folder / "forgetting.png", title)

    def _finish(self) -> None:
        self._counts = self._open = self._logits = self._stream = None
        if self._undo is not None:
            self._undo()
            self._undo = None

    # -- state -------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        trained = [] if self._trained is None else self._trained.tolist()
        return {
            "trained": trained,
            "matrix": [list(row) for row in self.matrix],
            "seen": list(self.seen),
            "curve": [dict(row) for row in self.curve],
            "best": list(self.best),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._trained = torch.tensor(state["trained"], dtype=torch.bool)
        self.matrix, self.seen = [list(row) for row in state["matrix"]], list(state["seen"])
        self.curve, self.best = [dict(row) for row in state.get("curve", [])], list(state.get("best", []))
