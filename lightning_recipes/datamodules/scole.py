"""SCoLe: a long stream of small tasks drawn at random from one data set, so that classes come again and again.

Lesort et al., "Challenging Common Assumptions about Catastrophic Forgetting", CoLLAs 2023
(https://arxiv.org/abs/2207.04543; code https://github.com/TLESORT/SCoLe-SCaling-Continual-Learning, commit ee71664).
With C classes and c of them a task:

    p_i  is proportional to  (1 - f i)^e,   i = 0 .. C - 1,   then permuted      (e = 0: uniform; f = 0.05, or 1 / C)
    task t:  c classes drawn by p without replacement; all their training samples, a tenth held out, for E epochs

Model and optimizer go on from task to task. Accuracy on ALL classes against t is the result (`ForgettingMonitor`).

Replay of stored samples, with n tasks so far and, of every class, occ = tasks in which it was trained on or replayed
and stat = the same (or, 'freq_acc', the sum of its held-out accuracies, 0 where it was replayed and not measured):

    'random'      Binomial(c, budget) of the classes seen that the task does not have
    'frequency'   at most as many as the task has, from the smallest stat on, of those with occ >= 3 that the task does
                  not have and  low < stat / n <= high

After a task up to 200 of its samples a class are stored; when the class comes again max(200 / (occ + 1), 10) of them
are written over. What is stored are indices.

The official code draws from NumPy's global generator; here every draw is a function of (seed, t) alone, the same after
a resume and on every rank.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from lightning_recipes.core.diagnostics import log_values
from lightning_recipes.core.distributed import all_sum, rank_and_world
from lightning_recipes.core.evaluation import Loader, outcomes
from lightning_recipes.core.phases import Phase, PhasePlan
from lightning_recipes.core.prepare import Session
from lightning_recipes.core.recipe import Paper
from lightning_recipes.core.tasks import Tasks
from lightning_recipes.datamodules.base import Part, require
from lightning_recipes.datamodules.splits import keyed_generator, keyed_permutation, stratified_split
from lightning_recipes.datamodules.task_stream import TaskStream

Scenario = Literal["uniform", "incremental", "forgetting", "iid", "limited_couples", "structured"]
SCENARIOS = ("uniform", "incremental", "forgetting", "iid", "limited_couples", "structured")
MOST_COUPLES = 1_000_000
"""Combinations of classes that are listed."""
TRIGGER = 3
"""Tasks that a class must have been in before it is replayed by frequency."""


# -- which classes come when ------------------------------------------------------------------------------------------


def probabilities(classes: int, entropy_decrease: float, seed: int | None = None) -> np.ndarray:
    """p of every class, fp64 ``[classes]``; in the order of classes without a seed, else permuted by it."""
    factor = 0.05 if classes <= 20 else 1 / classes  # as in the code for 10 and 100; p must stay positive
    p = (1 - factor * np.arange(classes)) ** entropy_decrease
    p /= p.sum()
    return p if seed is None else p[keyed_permutation(classes, seed, "scole classes")]


@dataclass(frozen=True)
class Schedule:
    """What decides the classes of every task; its arguments are those of `SCoLeDataModule`."""

    num_tasks: int
    classes: int
    classes_per_task: int
    scenario: Scenario = "uniform"
    entropy_decrease: float = 0.0
    prob_reduction: float = 1.0
    randomized_order: float = 0.0
    randomized_couples: float = 1.0
    seed: int = 0

    def tasks(self) -> Tasks:
        """The classes of all tasks, ascending in each.

        Raises:
            ValueError: for numbers that do not fit.
        """
        self._check()
        p, found = probabilities(self.classes, self.entropy_decrease, self.seed), []
        couples = self._couples()
        for t in range(self.num_tasks):
            chosen = sorted(set(self.draw(t, p, couples)))
            found.append(chosen)
            if self.prob_reduction > 1:
                p[chosen] /= self.prob_reduction
                p /= p.sum()
        return found

    def draw(self, t: int, p: np.ndarray, couples: Sequence[tuple[int, ...]] = ()) -> list[int]:
        """The classes of task t by (seed, t).

        Args:
            p: of every class, as it stands.
            couples: the combinations of classes that may come; for 'structured' and 'limited_couples'.
        """
        rng, half = keyed_generator(self.seed, "scole task", t), self.classes // 2
        if self.scenario == "iid":
            return list(range(self.classes))
        if self.scenario == "limited_couples":
            return list(couples[rng.integers(len(couples))])
        if self.scenario == "structured":
            kept = list(couples[t % len(couples)])
            other = rng.integers(self.classes, size=len(kept)).tolist()
            changed = rng.random(len(kept)) < self.randomized_order
            return [o if change else k for k, o, change in zip(kept, other, changed)]
        open_now = slice(None)
        if self.scenario == "incremental":
            open_now = slice(half, None) if t >= self.num_tasks / 2 else slice(half)
        elif self.scenario == "forgetting" and t >= self.num_tasks / 2:
            open_now = slice(half)
        among = np.arange(self.classes)[open_now]
        share = p[open_now] / p[open_now].sum()
        return rng.choice(among, self.classes_per_task, replace=False, p=share).tolist()

    def _couples(self) -> list[tuple[int, ...]]:
        if self.scenario not in ("limited_couples", "structured"):
            return []
        every = list(itertools.combinations(range(self.classes), self.classes_per_task))
        if self.scenario == "structured":
            return every
        count = int(self.randomized_couples * len(every))
        require(count >= 1, "randomized_couples", self.randomized_couples, f"at least 1 / {len(every)}")
        return [every[i] for i in keyed_permutation(len(every), self.seed, "scole couples")[:count]]

    def _check(self) -> None:
        classes, c = self.classes, self.classes_per_task
        require(c <= classes, "classes_per_task", c, f"at most the number of classes, {classes}")
        if self.scenario == "incremental":
            require(classes % 2 == 0, "scenario", self.scenario, f"another one for an odd number of classes, {classes}")
        if self.scenario in ("incremental", "forgetting"):
            require(c <= classes // 2, "classes_per_task", c, f"at most half of the {classes} classes")
        if self.scenario in ("limited_couples", "structured"):
            count = math.comb(classes, c)
            fits = f"such that there are at most {MOST_COUPLES:,} combinations of classes; there are {count:,}"
            require(count <= MOST_COUPLES, "classes_per_task", c, fits)


# -- replay -----------------------------------------------------------------------------------------------------------


@dataclass
class Memory:
    """What replay knows after some tasks.

    Attributes:
        tasks: how many.
        occurrences: of each class seen, in how many of them it was trained on or replayed.
        stat: of each class seen, what its frequency is computed from.
        kept: of each class trained on, indices of stored samples in the training set.
    """

    tasks: int = 0
    occurrences: dict[int, int] = field(default_factory=dict)
    stat: dict[int, float] = field(default_factory=dict)
    kept: dict[int, np.ndarray] = field(default_factory=dict)

    def frequent(self, current: Sequence[int], most: int, low: float, high: float) -> list[int]:
        """The classes to replay by frequency: the rarest first, in low < stat / tasks <= high."""
        chosen: list[int] = []
        for c in sorted(self.stat, key=lambda c: (self.stat[c], c)):
            if c in current or self.occurrences[c] < TRIGGER:
                continue
            frequency = self.stat[c] / self.tasks
            if len(chosen) == most or frequency > high:
                break
            if frequency > low:
                chosen.append(c)
        return chosen

    def at_random(self, current: Sequence[int], most: int, budget: float, rng: np.random.Generator) -> list[int]:
        """Binomial(most, budget) classes that were seen and are not current; all of them where there are fewer."""
        others = sorted(c for c in self.occurrences if c not in current)
        return rng.permutation(others).tolist()[: rng.binomial(most, budget)] if others else []

    def store(self, c: int, samples: np.ndarray, size: int, rng: np.random.Generator) -> None:
        """Keep samples of a class that was trained on: `size` at first, then some in the place of stored ones.

        Call it before :meth:`count`.
        """
        known = self.occurrences.get(c, 0)
        fresh = rng.permutation(samples)[: max(size // (known + 1), size // 20)]
        there = self.kept.get(c)
        if there is None:
            self.kept[c] = fresh
            return
        places = rng.permutation(len(there))[: len(fresh)]
        there[places] = fresh[: len(places)]

    def count(self, classes: Sequence[int], increments: Mapping[int, float] | None = None) -> None:
        """One more task, with these classes trained on or replayed; each counts 1, or what `increments` says (0)."""
        self.tasks += 1
        for c in classes:
            self.occurrences[c] = self.occurrences.get(c, 0) + 1
            self.stat[c] = self.stat.get(c, 0.0) + (1.0 if increments is None else increments.get(c, 0.0))

    def state(self) -> dict[str, Any]:
        """Plain values and tensors for a checkpoint."""
        seen = list(self.occurrences)
        return {
            "tasks": self.tasks,
            "occurrences": [[c, self.occurrences[c]] for c in seen],
            "stat": [self.stat[c] for c in seen],
            "kept": [[c, torch.from_numpy(np.asarray(indices, dtype=np.int64))] for c, indices in self.kept.items()],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Memory:
        """What :meth:`state` was taken from."""
        occurrences = dict(state["occurrences"])
        kept = {c: indices.numpy().copy() for c, indices in state["kept"]}
        return cls(state["tasks"], occurrences, dict(zip(occurrences, state["stat"])), kept)


# -- the data module --------------------------------------------------------------------------------------------------


class SCoLeDataModule(TaskStream):
    """Turns any labelled data into a long stream of small tasks whose classes recur, in one ``Trainer.fit``.

    A fit goes through the tasks by itself and must have ``max_epochs = num_tasks x epochs_per_task``. Tasks differ in
    length: at every boundary the loaders are made anew. Validation and test are on all classes; to validate is what
    costs most here, so do it every few tasks (``check_val_every_n_epoch``). Schedulers and callbacks that count epochs
    count tasks.

    With another recipe that cuts the fit into phases (`SLCA`, the probe of `ProgressiveUnfreezing`) it is refused.
    Setting ``task`` by hand gives the loaders of that task, without replay. Checkpoints hold the task, counts and
    indices of stored samples; a resume is exact, also in the middle of a task (with `ExactResume` at any step).

    Logs ``scole/task``, ``scole/replayed`` (how many classes) and ``scole/freq_<class>`` (stat / tasks) at every
    boundary.

    Args:
        data: a data module, of this package or anybody's, or a pair or three of labelled data sets read by index:
            training, (validation,) test. Its own loaders are not used.
        num_tasks: length of the stream.
        classes_per_task: c; with 'iid' every task has all classes.
        epochs_per_task: E.
        scenario: 'uniform' draws by p; 'incremental' has the first half of the classes in the first half of the tasks,
            then the others; 'forgetting' has the first half of the classes alone in the second half of the tasks; 'iid'
            has all classes; 'limited_couples' draws from a share of all combinations of c classes; 'structured' goes
            through all combinations in order.
        entropy_decrease: e, how uneven classes are; 0 for alike.
        prob_reduction: the probability of a class that came is divided by it; 1 for no reduction.
        randomized_order: with 'structured': probability that a class is replaced by any (doubles fall together).
        randomized_couples: with 'limited_couples': the share of combinations that ever come.
        replay: which stored classes are trained on beside a task's own: 'random', 'frequency', 'freq_acc' or None.
        replay_budget: with 'random': chance that each of c places is filled.
        low_frequency, high_frequency: with 'frequency' and 'freq_acc': the range of those replayed.
        buffer_per_class: samples stored of a class; 0 for no replay.
        task_val_fraction: share of a task's samples held out, drawn anew for every task; 'freq_acc' measures on it.
        reset_optimizer: fresh optimizers and schedulers for every task.
        validate_on: 'val', or 'test' for the paper's own curve: choose nothing by it.
        criterion: with 'freq_acc': which loss of the training step shows logits and labels, where it is not found.
        task: the task whose loaders there are outside of a fit.
        seed: draws tasks, splits and replay, and (together with the global seed) the order.
        **kwargs: those of `DataModule`: batch_size, num_workers, ...

    Raises:
        ValueError: for bad arguments; in ``setup`` for numbers that do not fit the classes, a class without samples,
            labels that are no class indices; as the fit begins for a task without one batch.
        RecipeError: as the fit begins for another ``max_epochs``, or another plan of phases.
    """

    paper = Paper(
        "Challenging Common Assumptions about Catastrophic Forgetting",
        "T. Lesort, O. Ostapenko, P. Rodriguez, D. Misra, M. R. Arefin, L. Charlin, I. Rish",
        2023,
        "https://arxiv.org/abs/2207.04543",
        "https://github.com/TLESORT/SCoLe-SCaling-Continual-Learning",
    )
    does = "Turns any labelled data into a long stream of small tasks whose classes recur, with replay by frequency."
    use_when = "You want to know what accumulates when training goes from task to task, or you have such a stream."
    costs = (
        "New loaders at every task; indices of stored samples in checkpoints; 'freq_acc' a pass over held-out samples."
    )
    purpose = "datamodules"

    def __init__(
        self,
        data: LightningDataModule | tuple[Dataset, ...],
        num_tasks: int = 500,
        classes_per_task: int = 2,
        epochs_per_task: int = 1,
        scenario: Scenario = "uniform",
        entropy_decrease: float = 0.0,
        prob_reduction: float = 1.0,
        randomized_order: float = 0.0,
        randomized_couples: float = 1.0,
        replay: Literal["random", "frequency", "freq_acc"] | None = None,
        replay_budget: float = 1.0,
        low_frequency: float = 0.01,
        high_frequency: float = 0.1,
        buffer_per_class: int = 200,
        task_val_fraction: float = 0.1,
        reset_optimizer: bool = False,
        validate_on: Literal["val", "test"] = "val",
        criterion: str | int | None = None,
        task: int = 0,
        seed: int = 1664,
        **kwargs: Any,
    ) -> None:
        super().__init__(data, task, validate_on, seed=seed, **kwargs)
        require(num_tasks >= 1, "num_tasks", num_tasks, "at least 1")
        require(classes_per_task >= 1, "classes_per_task", classes_per_task, "at least 1")
        require(epochs_per_task >= 1, "epochs_per_task", epochs_per_task, "at least 1")
        require(scenario in SCENARIOS, "scenario", scenario, f"one of {', '.join(map(repr, SCENARIOS))}")
        require(entropy_decrease >= 0, "entropy_decrease", entropy_decrease, "at least 0")
        require(prob_reduction >= 1, "prob_reduction", prob_reduction, "at least 1")
        require(0 <= randomized_order <= 1, "randomized_order", randomized_order, "between 0 and 1")
        require(0 < randomized_couples <= 1, "randomized_couples", randomized_couples, "above 0 and at most 1")
        known = (None, "random", "frequency", "freq_acc")
        require(replay in known, "replay", replay, "None, 'random', 'frequency' or 'freq_acc'")
        require(0 <= replay_budget <= 1, "replay_budget", replay_budget, "between 0 and 1")
        require(0 <= low_frequency < high_frequency, "low_frequency", low_frequency, f"below {high_frequency}, from 0")
        require(buffer_per_class >= 0, "buffer_per_class", buffer_per_class, "at least 0")
        require(0 <= task_val_fraction < 1, "task_val_fraction", task_val_fraction, "at least 0 and below 1")
        measures = replay != "freq_acc" or task_val_fraction > 0
        require(measures, "task_val_fraction", task_val_fraction, "above 0 for replay='freq_acc', which measures on it")
        self.num_tasks = num_tasks
        self.classes_per_task = classes_per_task
        self.epochs_per_task = epochs_per_task
        self.scenario = scenario
        self.entropy_decrease = entropy_decrease
        self.prob_reduction = prob_reduction
        self.randomized_order = randomized_order
        self.randomized_couples = randomized_couples
        self.replay = replay
        self.replay_budget = replay_budget
        self.low_frequency = low_frequency
        self.high_frequency = high_frequency
        self.buffer_per_class = buffer_per_class
        self.task_val_fraction = task_val_fraction
        self.reset_optimizer = reset_optimizer
        self.criterion = criterion
        self.memory = Memory()
        """Of the tasks before the current one, within a fit."""
        self.replayed: list[int] = []
        """The classes that are replayed now."""
        self.held_out = np.empty(0, dtype=np.int64)
        """Indices in the training set of the current task's samples that are not trained on."""
        self._schedule: Schedule | None = None
        self._begins, self._streams = False, False

    # -- set-up ------------------------------------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        if self.trainer is not None and self.trainer.state.fn == "fit":
            Session.of(self.trainer, self.trainer.lightning_module)  # which asks for the phase plan

    def derive(self) -> None:
        self._schedule = Schedule(
            self.num_tasks,
            self.num_classes,
            self.classes_per_task,
            self.scenario,
            self.entropy_decrease,
            self.prob_reduction,
            self.randomized_order,
            self.randomized_couples,
            self.seed,
        )
        counts = np.bincount(self.train_labels.numpy(), minlength=self.num_classes)
        if not counts.all():
            raise ValueError(f"data: class {int(counts.argmin())} has no training sample")
        self.task_classes = self._schedule.tasks()
        self.val_set, self.test_set = self.data.val_set, self.data.test_set
        self.task = self._task

    def teardown(self, stage: str) -> None:
        self._streams = False
        if self.trainer is not None:
            Session.close_of(self.trainer)

    def on_exception(self, exception: BaseException) -> None:
        self._streams = False
        if self.trainer is not None:
            Session.close_after_exception(self.trainer, exception)

    # -- the stream --------------------------------------------------------------------------------------------------

    @property
    def current_classes(self) -> list[int]:
        """The classes that are trained on now, those replayed last."""
        return [*self.task_classes[self._task], *self.replayed]

    def samples_now(self) -> np.ndarray:
        """Indices in the whole training set: the task's own that are not held out, then those replayed."""
        own = super().samples_now()
        labels = self.train_labels[torch.from_numpy(own)]
        kept, held = stratified_split(labels, self.task_val_fraction, self.seed, f"scole task {self._task}")
        self.held_out = own[held]
        return np.concatenate([own[kept], *(self.memory.kept[c] for c in self.replayed)])

    def phase_plan(self) -> PhasePlan:
        """The tasks, as stages of the fit that begins."""
        self._check_batches()
        self._begins = self._streams = True
        phases = [Phase(f"task {t}", self.epochs_per_task) for t in range(self.num_tasks)]
        return PhasePlan(phases, self._enter, reset_optimizers=self.reset_optimizer)

    def _check_batches(self) -> None:
        if not self.drop_last:
            return
        counts = np.bincount(self.train_labels.numpy(), minlength=self.num_classes)
        for t, classes in enumerate(self.task_classes):
            whole = int(counts[classes].sum())
            trained = whole - math.floor(whole * self.task_val_fraction + 0.5)
            if trained // self.shard["num_replicas"] < self.batch_size:
                raise ValueError(
                    f"batch_size={self.batch_size}, drop_last=True: task {t} (classes {classes}) has {trained} training"
                    " samples and so not one batch for every process; take a smaller batch_size or keep the last batch"
                )

    def _enter(self, task: int) -> None:
        """Before the loaders of a task are made."""
        if self._begins:  # a fit that resumes gets its memory from the checkpoint, which is loaded next
            self._begins, self.memory, self.replayed = False, Memory(), []
            self.task = task
            return
        self._leave()
        self._task = task
        self.replayed = self._choose()
        self.task = task
        seen = self.memory.stat
        frequencies = {f"scole/freq_{c}": seen.get(c, 0.0) / self.memory.tasks for c in range(self.num_classes)}
        log_values(self.trainer, {"scole/task": task, "scole/replayed": len(self.replayed), **frequencies})

    def _leave(self) -> None:
        """Take the current task into the memory."""
        own = self.task_classes[self._task]
        if self.replay is not None and self.buffer_per_class:
            trained = np.setdiff1d(super().samples_now(), self.held_out)
            labels = self.train_labels.numpy()[trained]
            for c in own:
                rng = keyed_generator(self.seed, "scole buffer", self._task, c)
                self.memory.store(c, trained[labels == c], self.buffer_per_class, rng)
        measured = self._held_out_accuracies() if self.replay == "freq_acc" else None
        self.memory.count([*own, *self.replayed], measured)

    def _choose(self) -> list[int]:
        """The classes to replay beside the task."""
        own = self.task_classes[self._task]
        if self.replay is None or not self.buffer_per_class:
            return []
        if self.replay == "random":
            rng = keyed_generator(self.seed, "scole replay", self._task)
            return self.memory.at_random(own, self.classes_per_task, self.replay_budget, rng)
        return self.memory.frequent(own, len(own), self.low_frequency, self.high_frequency)

    def _held_out_accuracies(self) -> dict[int, float]:
        """Of the task's own classes, on what is held out of them, with the module as it is now."""
        rank, world = rank_and_world()
        whole = self.data.plain(self.data.train_set)
        mine = Part(whole, self.held_out[rank::world], self.train_labels)
        batches = DataLoader(mine, self.batch_size, collate_fn=self.collate)
        (outcome,) = outcomes(self.trainer, [Loader(batches, math.inf)], self.criterion)
        labels = mine.labels.to(outcome.correct.device)
        counts = torch.zeros(2, self.num_classes, dtype=torch.float64, device=labels.device)
        counts[0].index_add_(0, labels, outcome.correct.double())
        counts[1].index_add_(0, labels, torch.ones_like(labels, dtype=torch.float64))
        right, total = all_sum(counts).tolist()
        return {c: right[c] / total[c] for c in self.task_classes[self._task] if total[c]}

    def train_dataloader(self) -> DataLoader:
        if self._streams and self.memory.tasks != self._task:
            raise ValueError(
                f"the checkpoint was written in task {self._task} without the state of its stream; resume from one of a"
                " fit with SCoLeDataModule, or start a new fit from its weights"
            )
        return super().train_dataloader()

    def evaluation_of(self, dataset: Any) -> DataLoader | list[DataLoader]:
        return self.evaluation_loader(dataset)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    @property
    def _decided_by(self) -> dict[str, Any]:
        """What decides which samples come when."""
        names = (
            *("num_tasks", "classes_per_task", "epochs_per_task", "scenario", "entropy_decrease", "prob_reduction"),
            *("randomized_order", "randomized_couples", "replay", "replay_budget", "low_frequency", "high_frequency"),
            *("buffer_per_class", "task_val_fraction", "seed"),
        )
        return {**{name: getattr(self, name) for name in names}, "training samples": len(self.train_labels)}

    def state_dict(self) -> dict[str, Any]:
        return {
            "task": self._task,
            "decided_by": self._decided_by,
            "memory": self.memory.state(),
            "replayed": list(self.replayed),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        here, there = self._decided_by, state_dict["decided_by"]
        differ = [name for name in here if here[name] != there.get(name)]
        if differ:
            listed = ", ".join(f"{name}={there.get(name)!r} there and {here[name]!r} here" for name in differ)
            raise ValueError(f"the checkpoint was written with another stream: {listed}; give the same arguments")
        self.memory, self.replayed = Memory.from_state(state_dict["memory"]), list(state_dict["replayed"])
        self.task = state_dict["task"]
