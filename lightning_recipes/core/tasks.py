"""Which samples come at which time: sequences of tasks, each of some classes.

In class-incremental learning every class comes once; in a recurring stream the same classes come again and again. A
data module that deals its samples out in tasks says so in one way for both, see :func:`supplied`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl

from lightning_recipes.core.errors import RecipeError

Tasks = list[list[int]]
"""The classes of every task, in the order in which they are learnt."""


def cut(tasks: int | Sequence[Sequence[int]], order: Sequence[int]) -> Tasks:
    """Cut classes into tasks.

    Args:
        tasks: how many, of sizes that differ by one at most, the larger ones first; or the classes of each.
        order: all classes; those of the first task first, where `tasks` is a number.

    Raises:
        RecipeError: for a number that does not fit, and for tasks that are empty, share a class, leave one out, or
            name one that does not exist.
    """
    count = len(order)
    if isinstance(tasks, int):
        if not 1 <= tasks <= count:
            raise RecipeError(f"tasks={tasks}: must be from 1 to the number of classes, {count}")
        size, larger = divmod(count, tasks)
        ends = [i * size + min(i, larger) for i in range(tasks + 1)]
        return [[int(c) for c in order[a:b]] for a, b in itertools.pairwise(ends)]
    listed = [[int(c) for c in task] for task in tasks]
    if not listed or not all(listed):
        raise RecipeError(f"tasks={listed}: every task must have at least one class")
    named = [c for task in listed for c in task]
    twice = sorted({c for c in named if named.count(c) > 1})
    if twice:
        raise RecipeError(f"tasks={listed}: class {twice[0]} stands in them twice; tasks must not overlap")
    beyond, missing = sorted(set(named) - set(order)), sorted(set(order) - set(named))
    if beyond:
        raise RecipeError(f"tasks={listed}: there is no class {beyond[0]}; the classes are 0 to {count - 1}")
    if missing:
        raise RecipeError(f"tasks={listed}: class {missing[0]} is in no task; there are {count} classes")
    return listed


def supplied(trainer: pl.Trainer) -> tuple[Any, Tasks] | None:
    """The Trainer's data module and its tasks, where it is one that deals its classes out in tasks.

    Such a data module has ``task_classes``, the classes of each task, and ``task``, the index of the current one, which
    may be set and decides what its loaders give; ``current_classes``, all that it trains on now, and ``num_classes``.
    One that moves on by itself within a fit also has ``phase_plan()``, the `PhasePlan` of its tasks.
    """
    data = getattr(trainer, "datamodule", None)
    tasks = getattr(data, "task_classes", None)
    return None if not tasks else (data, [list(task) for task in tasks])


def up_to(tasks: Tasks, last: int) -> list[int]:
    """The classes of tasks 0 to `last`, in order."""
    return [c for task in tasks[: last + 1] for c in task]


def recur(tasks: Tasks) -> bool:
    """Whether a class comes in more than one of them."""
    named = [c for task in tasks for c in task]
    return len(set(named)) < len(named)
