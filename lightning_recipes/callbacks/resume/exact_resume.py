"""A run that was killed goes on as if it had not been, bit for bit.

No paper's: what Lightning's own checkpoints leave out. Kept for every rank: the random states of Python, NumPy, torch
and the devices; the place in the training data, with workers, shuffling and a ``DistributedSampler``; gradients of an
accumulation window under way; running averages of what was logged and the states of torchmetrics metrics; buffers that
are no part of the state dict, or differ between ranks. And the place in Lightning's loops: an epoch that was cut off
after its last step is finished, with its validation, its epoch-end hooks and its plateau schedulers. And the files
themselves: one that a kill or a full disk interrupts is not there, and the one before it still is; on several ranks a
SIGTERM stops all of them after the same batch. A process that a SIGTERM has stopped exits with code 143, not with 0.

It costs nothing in a training step but what torchdata's loader costs where there are workers, and some 50 kB a rank
in a checkpoint, random states most of it. A checkpoint in the middle of an accumulation window also holds every rank's
gradients.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_recipes.core import random
from lightning_recipes.core.checkpoint_files import WholeFiles
from lightning_recipes.core.distributed import active, from_own_part, own_part, rank_and_world, shards
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.loader import TrainingData
from lightning_recipes.core.logged import logged, metric_states, relog, restore_metrics
from lightning_recipes.core.prepare import Plan
from lightning_recipes.core.recipe import Recipe
from lightning_recipes.core.reentry import DUE, VALIDATION, Places, Reentry
from lightning_recipes.core.sigterm import StopTogether, not_a_success

# What a ModelCheckpoint knows of its last save and does not put into its state.
_OF_SAVES = ("_last_global_step_saved", "_last_checkpoint_saved", "_defer_save_until_validation", "current_score")


_SEED = "PL_GLOBAL_SEED"


class _Seed:
    """The run's own ``seed_everything``: samplers that are made later, for another phase, take their order from it."""

    def __init__(self, seed: str | None) -> None:
        self.seed = seed

    def install(self, undo: ExitStack) -> None:
        undo.callback(_set_seed, os.environ.get(_SEED))
        _set_seed(self.seed)


def _set_seed(seed: str | None) -> None:
    os.environ.pop(_SEED, None)
    if seed is not None:
        os.environ[_SEED] = seed


class ExactResume(Recipe):
    """Makes any Lightning run resumable at any optimizer step, with bitwise the same end as the run never interrupted.

    Put it among the callbacks and save as you always do (``ModelCheckpoint(every_n_train_steps=...)``); resume with
    ``trainer.fit(..., ckpt_path=...)``, the same number of processes and the same data. Checkpoints that
    ``ModelCheckpoint`` takes are exact, at the end of a batch, of a validation or of an epoch, as are those that
    Lightning takes when it gets a SIGTERM; one that code of your own takes in the middle of a step is said not to be.
    After a SIGTERM the exit code is 143 (128 + 15; Lightning's is 0), of several ranks that of every node's first one.

    What it cannot know of: attributes of your module that are no tensors of its state (a counter, a list); put them
    into the module's ``on_save_checkpoint``.

    Raises:
        RecipeError: when the run that resumes has another number of processes, or other training data.
    """

    does = "Makes any run resumable at any step, bitwise: random states, place in the data, metrics, a cut-off epoch."
    use_when = (
        "runs that may be killed (preemption, time limits, crashes), and whenever a resumed run must be the same run"
    )
    works_sharded = True
    costs = "nothing in a step; some 50 kB a rank in a checkpoint, and gradients where one falls into a window"

    def __init__(self) -> None:
        self._plan: Plan | None = None
        self._data: TrainingData
        self._places: Places
        self._validation: dict[str, Any] = {}  # the state before the validation under way
        self._mine: Mapping[str, Any] = {}
        self._shared: Mapping[str, Any] = {}

    # -- declarations ------------------------------------------------------------------------------------------------

    def declare(self, plan: Plan) -> None:
        if not plan.fitting:
            return
        trainer = plan.trainer
        state = plan.section["state"] if plan.section else {}
        self._plan, self._places = plan, Places(trainer, plan.module, self._before_validation)
        plan.at_end(self._finish)
        rank, world = rank_and_world()
        if state and len(state["ranks"]) != world:
            raise RecipeError(
                f"ExactResume: the checkpoint was written by {len(state['ranks'])} processes and this run has {world};"
                " resume with as many, or leave ExactResume out and accept another order of the data"
            )
        self._mine, self._shared = (state["ranks"][rank], state["shared"]) if state else ({}, {})
        self._data = TrainingData(trainer, "ExactResume", self._mine.get("data"))
        plan.install(self._data)
        plan.install(self._places)
        plan.install(WholeFiles(trainer))
        if world > 1:
            plan.install(StopTogether(trainer))
        if state:
            plan.install(_Seed(self._shared["seed"]))
            plan.keeps_place()
            place = self._shared["place"]
            if place["inexact"]:
                rank_zero_warn(f"ExactResume: this resume is not exact: the checkpoint says that {place['inexact']}")
            plan.install(Reentry(trainer, place, self._data.catch_up, self._restore))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._plan is not None:
            self._places.note(outputs, batch, batch_idx)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        not_a_success(trainer, exception)
        super().on_exception(trainer, pl_module, exception)

    def _finish(self) -> None:
        self._plan = None

    # -- state -------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """The place of the run, every rank's on rank zero; on all ranks together, as Lightning saves checkpoints."""
        if self._plan is None or not self._plan.trainer.fit_loop._data_fetcher:
            return {}
        place = self._places.now()
        if place["inexact"]:
            rank_zero_warn(f"ExactResume: a resume from this checkpoint will not be exact: {place['inexact']}")
        return {"shared": self._shared_state(place), "ranks": _gather(self._rank_state(place))}

    def _shared_state(self, place: dict[str, Any]) -> dict[str, Any]:
        trainer, fit = self._plan.trainer, self._plan.trainer.fit_loop
        modes = fit.epoch_loop.val_loop._module_mode.mode if trainer.validating else None
        saves = {
            each.state_key: {name: getattr(each, name) for name in _OF_SAVES}
            for each in trainer.callbacks
            if isinstance(each, ModelCheckpoint)
        }
        if place["asker"] in saves:
            saves[place["asker"]]["_last_global_step_saved"] = trainer.global_step
        return {
            "place": place,
            "seed": os.environ.get(_SEED),
            "should_stop": trainer.should_stop,
            "modes": dict(modes)
            if modes
            else {name: part.training for name, part in self._plan.module.named_modules()},
            "reloaded": [fit._last_train_dl_reload_epoch, fit.epoch_loop.val_loop._last_val_dl_reload_epoch],
            "saves": saves,
        }

    def _rank_state(self, place: dict[str, Any]) -> dict[str, Any]:
        trainer = self._plan.trainer
        moving = self._validation if place["hook"] == DUE else self._moving()
        if place["hook"] == VALIDATION:  # what the training had before it began to validate
            moving["logged"]["first"] = trainer.fit_loop.epoch_loop.batch_progress.current.ready == 1
        state = {
            **moving,
            "data": self._data.place(),
            "buffers": self._buffers(),
            "gradients": self._gradients(),
            "window": self._plan.gradients.state(),
        }
        if trainer.global_rank:  # Lightning's checkpoint holds those of rank zero, and metrics may differ
            state["callbacks"] = {each.state_key: each.state_dict() for each in self._others()}
            state["schedulers"] = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
        return move_data_to_device(state, "cpu")

    def _moving(self) -> dict[str, Any]:
        """What a validation moves too."""
        return {
            "random": random.snapshot(self._devices()),
            "held": self._data.held(),
            "logged": logged(self._plan.trainer),
            "metrics": metric_states(self._plan.module),
        }

    def _before_validation(self) -> None:
        self._validation = self._moving()

    def _others(self) -> list[pl.Callback]:
        return [each for each in self._plan.trainer.callbacks if not isinstance(each, (ExactResume, Checkpoint))]

    def _devices(self) -> set[torch.device]:
        return {self._plan.trainer.strategy.root_device, *(p.device for p in self._plan.module.parameters())}

    def _buffers(self) -> dict[str, Tensor]:
        """Those that the checkpoint's weights do not tell this rank. Of sharded ones it holds any rank's."""
        module = self._plan.module
        return dict(module.named_buffers()) if shards(self._plan.trainer) else _own_buffers(module)

    def _gradients(self) -> dict[str, Tensor]:
        """Those that the next step adds to; under manual optimization only the module knows whether it does."""
        module, fit = self._plan.module, self._plan.trainer.fit_loop
        if module.automatic_optimization and not fit._should_accumulate():
            return {}
        return {name: own_part(p.grad) for name, p in module.named_parameters() if p.grad is not None}

    def _restore(self) -> None:
        """Put everything back; the last thing before training goes on, so that nothing draws a number in between."""
        trainer, module, mine, shared = self._plan.trainer, self._plan.module, self._mine, self._shared
        relog(trainer, mine["logged"])
        restore_metrics(module, mine["metrics"])
        buffers = dict(module.named_buffers())
        with torch.no_grad():
            for name, value in mine["buffers"].items():
                buffers[name].copy_(value)
            for name, parameter in module.named_parameters():
                if name in mine["gradients"]:
                    parameter.grad = from_own_part(mine["gradients"][name].to(parameter.device), parameter)
        self._plan.gradients.load_state(mine["window"])
        for name, part in module.named_modules():
            part.training = shared["modes"].get(name, part.training)
        for each in self._others():
            if mine.get("callbacks", {}).get(each.state_key):
                each.load_state_dict(mine["callbacks"][each.state_key])
        for config, state in zip(trainer.lr_scheduler_configs, mine.get("schedulers", ())):
            config.scheduler.load_state_dict(state)
        trainer.should_stop = shared["should_stop"]
        fit = trainer.fit_loop
        fit._last_train_dl_reload_epoch, fit.epoch_loop.val_loop._last_val_dl_reload_epoch = shared["reloaded"]
        for each in trainer.callbacks:
            if isinstance(each, ModelCheckpoint):
                vars(each).update(shared["saves"].get(each.state_key, {}))
        self._data.settle(mine["held"])
        random.restore(mine["random"])
        self._mine, self._shared = {}, {}


def _own_buffers(module: torch.nn.Module) -> dict[str, Tensor]:
    """Buffers that the state dict of rank zero does not tell this rank: others than there, or not persistent."""
    rank, _ = rank_and_world()
    told = module.state_dict().keys()
    own = {}
    for name, buffer in module.named_buffers():
        if not active():
            if name not in told:
                own[name] = buffer
            continue
        theirs = buffer.detach().clone()
        dist.broadcast(theirs, 0)
        if (rank == 0 and name not in told) or (rank and not torch.equal(theirs, buffer)):
            own[name] = buffer
    return own


def _gather(state: dict[str, Any]) -> list[dict[str, Any]]:
    """Every rank's state, on rank zero, which writes the checkpoint."""
    if not active():
        return [state]
    rank, world = rank_and_world()
    states: list[Any] | None = [None] * world if rank == 0 else None
    dist.gather_object(state, states, dst=0)
    return states or []
