"""Samples dealt out in tasks: what class-incremental learning and recurring streams share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_recipes.core.tasks import Tasks, up_to
from lightning_recipes.datamodules.base import Derived, Part, require


class TaskStream(Derived):
    """Trains on the classes of one task. Labels stay those of ``data``, and a sample its own index in the training set.

    Setting ``task`` moves on: loaders that are made afterwards are those of the new task. What a recipe may ask it is
    said in `lightning_recipes.core.tasks`.

    Args:
        data: where to take samples from.
        task: index of the current task.
        validate_on: "val", or "test" for the protocol of the field's tables: choose nothing by it.
        **kwargs: those of `DataModule`.
    """

    takes_any = True

    def __init__(self, data: Any, task: int = 0, validate_on: str = "val", **kwargs: Any) -> None:
        super().__init__(data, **kwargs)
        require(task >= 0, "task", task, "an integer of at least 0")
        require(validate_on in ("val", "test"), "validate_on", validate_on, "'val' or 'test'")
        self.validate_on = validate_on
        self.task_classes: Tasks = []
        """The classes of each task in order; known after ``setup``."""
        self._task = task

    @property
    def task(self) -> int:
        """Index of the current task. Loaders that are there already do not change when it is set."""
        return self._task

    @task.setter
    def task(self, task: int) -> None:
        if self.task_classes:
            require(0 <= task < len(self.task_classes), "task", task, f"from 0 to {len(self.task_classes) - 1}")
            self._task = task
            self.train_set = Part(self.data.train_set, self.samples_now(), self.train_labels)
        self._task = task

    def samples_now(self) -> Sequence[int] | np.ndarray:
        """Indices in the whole training set of what the current task trains on."""
        return self.samples_of(self.data.train_set, self.task_classes[self._task])

    @property
    def current_classes(self) -> list[int]:
        """The classes that are trained on now."""
        return list(self.task_classes[self._task])

    @property
    def seen_classes(self) -> list[int]:
        """The classes of the tasks so far, in order, each once."""
        return list(dict.fromkeys(up_to(self.task_classes, self._task)))

    @property
    def train_labels(self) -> Tensor:
        """Labels of the training samples of all tasks, int64 ``[n]``."""
        return self.data.train_set.labels

    def plain(self, dataset: Any) -> Any:
        if isinstance(dataset, Part) and dataset.dataset is self.data.train_set:
            return Part(self.data.plain(dataset.dataset), dataset.indices, self.train_labels)
        return super().plain(dataset)

    @staticmethod
    def samples_of(dataset: Any, classes: Sequence[int]) -> np.ndarray:
        """Indices of the samples of some classes, ascending."""
        return np.flatnonzero(np.isin(dataset.labels.numpy(), list(classes)))

    # -- loaders -----------------------------------------------------------------------------------------------------

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        return self.evaluation_of(self.data.val_set if self.validate_on == "val" else self.data.test_set)

    def test_dataloader(self) -> DataLoader | list[DataLoader]:
        return self.evaluation_of(self.data.test_set)

    @abstractmethod
    def evaluation_of(self, dataset: Any) -> DataLoader | list[DataLoader]:
        """The loaders of an evaluation on samples of that set; None for none."""
