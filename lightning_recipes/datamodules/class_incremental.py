"""Class-incremental learning over any other data module: its classes in turn, a few at a time."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from lightning_recipes.core.tasks import Tasks, cut
from lightning_recipes.datamodules.base import require
from lightning_recipes.datamodules.splits import keyed_permutation
from lightning_recipes.datamodules.task_stream import TaskStream


class ClassIncrementalDataModule(TaskStream):
    """Trains on the classes of one task, evaluates on those of all tasks so far. Labels stay those of ``data``.

    Setting ``task`` moves on; a recipe such as `SLCA` does it at every boundary, and so may a loop of your own:
    loaders that are made afterwards are those of the new task. A checkpoint holds the task, so that a test from it
    is on the classes that the run had seen.

    Args:
        data: the data module to take samples from: its training set (whole, with its ``fraction``), validation set and
            test set, with their transforms. Its own loaders are not used. Also anybody's data module, or a pair or
            three of labelled data sets: training, (validation,) test.
        tasks: how many tasks, of sizes that differ by one at most; or the classes of each, in order.
        classes_per_task: instead of ``tasks``: classes of each task; the last may have fewer.
        first: with ``classes_per_task``: classes of the first task, where it is larger.
        class_order: the order in which classes are dealt out: "seed" draws it by ``seed``, "labels" is 0, 1, 2, ...; or
            all classes in a list.
        evaluate: "per_task" has one evaluation loader for each task so far (a module whose ``validation_step`` has no
            ``dataloader_idx`` cannot take several); "together" has one for all of them.
        validate_on: "val", or "test" for the protocol of the field's tables, which measures on the test samples of the
            tasks so far after every task: choose nothing by it.
        task: index of the current task.
        **kwargs: those of `DataModule`: batch_size, num_workers, seed, ... ; ``seed`` draws the class order too.
    """

    def __init__(
        self,
        data: LightningDataModule | tuple[Dataset, ...],
        tasks: int | list[list[int]] | None = None,
        classes_per_task: int | None = None,
        first: int | None = None,
        class_order: Literal["seed", "labels"] | list[int] = "seed",
        evaluate: Literal["per_task", "together"] = "per_task",
        validate_on: Literal["val", "test"] = "val",
        task: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(data, task, validate_on, **kwargs)
        if (tasks is None) == (classes_per_task is None):
            raise ValueError(f"tasks={tasks!r}, classes_per_task={classes_per_task!r}: give one of them")
        require(not isinstance(tasks, int) or tasks >= 1, "tasks", tasks, "at least 1")
        require(classes_per_task is None or classes_per_task >= 1, "classes_per_task", classes_per_task, "at least 1")
        require(first is None or first >= 1, "first", first, "None or at least 1")
        require(first is None or classes_per_task is not None, "first", first, "None without classes_per_task")
        given = not isinstance(class_order, str)
        require(given or class_order in ("seed", "labels"), "class_order", class_order, "'seed', 'labels' or a list")
        listed = tasks is not None and not isinstance(tasks, int)
        require(not (given and listed), "class_order", class_order, "left out where tasks lists the classes")
        require(evaluate in ("per_task", "together"), "evaluate", evaluate, "'per_task' or 'together'")
        self.tasks = tasks
        self.classes_per_task = classes_per_task
        self.first = first
        self.class_order = class_order
        self.evaluate = evaluate

    # -- set-up ------------------------------------------------------------------------------------------------------

    def derive(self) -> None:
        self.task_classes = self._cut()
        self.task = self._task

    def _cut(self) -> Tasks:
        order = self._order()
        if self.classes_per_task is None:
            return cut(self.tasks, order)
        first = self.first or self.classes_per_task
        starts = range(first, len(order), self.classes_per_task)
        return cut([order[:first], *(order[at : at + self.classes_per_task] for at in starts)], order)

    def _order(self) -> list[int]:
        if isinstance(self.class_order, str):
            drawn = self.class_order == "seed" and (self.tasks is None or isinstance(self.tasks, int))
            classes = np.arange(self.num_classes)
            return (keyed_permutation(self.num_classes, self.seed, "classes") if drawn else classes).tolist()
        allowed = f"all classes from 0 to {self.num_classes - 1}, each once"
        require(sorted(self.class_order) == list(range(self.num_classes)), "class_order", self.class_order, allowed)
        return list(self.class_order)

    def evaluation_of(self, dataset: Any) -> DataLoader | list[DataLoader]:
        if dataset is None:
            return []
        parts = [self.seen_classes] if self.evaluate == "together" else self.task_classes[: self._task + 1]
        loaders = [self.evaluation_loader(dataset.select(self.samples_of(dataset, classes))) for classes in parts]
        return loaders[0] if len(loaders) == 1 else loaders

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {"task": self._task, "task_classes": self.task_classes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.task_classes and state_dict["task_classes"] != self.task_classes:
            raise ValueError(
                f"the checkpoint was written with other tasks: {state_dict['task_classes']}, here {self.task_classes};"
                " give the same tasks, class_order and seed"
            )
        self.task = state_dict["task"]
