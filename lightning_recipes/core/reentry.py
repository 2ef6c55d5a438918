"""Entering Lightning's loops again at the very place where a checkpoint was taken.

Lightning writes checkpoints inside hooks, with an iteration half done: the rest of the hook's callbacks, a validation
that is due, the end of the epoch come after the file. On a resume it skips what is left and begins the next batch or
epoch. Here the same loops go on with what was left first.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from lightning.pytorch.loops import _Loop
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_recipes.core.patch import Patch

BATCH, VALIDATION, EPOCH = "on_train_batch_end", "on_validation_end", "on_train_epoch_end"
BETWEEN, DUE = "between two batches or epochs", "a validation is due"  # places where no hook is under way


class Places:
    """Says at which place of the loops a checkpoint is being taken. One for a fit.

    Args:
        trainer, module: the user's.
        before_validation: called right before every validation within the fit; a run that is stopped in one (by
            SIGTERM) begins it anew.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, before_validation: Callable[[], None]) -> None:
        self.trainer, self.module, self._before_validation = trainer, module, before_validation
        self._batch: tuple[Any, ...] | None = None
        self._hook_done = False

    def install(self, undo: ExitStack) -> None:
        """Take note of validations, and have the module's own ``on_train_batch_end`` run before a checkpoint that
        callbacks take there, not after: its arguments, a batch among them, cannot be had again.
        """
        validate = Patch(self.trainer.fit_loop.epoch_loop.val_loop, "run", lambda: self._validate(validate))
        undo.callback(validate.restore)
        if not is_overridden(BATCH, self.module):
            return
        hook = Patch(self.module, BATCH, lambda *args: self._unless_done(hook, *args))
        save = Patch(self.trainer, "save_checkpoint", lambda *a, **k: self._hook_then_save(save, *a, **k))
        undo.callback(hook.restore)
        undo.callback(save.restore)

    def _validate(self, run: Patch) -> Any:
        if not self.trainer.sanity_checking:
            self._before_validation()
        return run.original()

    def note(self, *batch: Any) -> None:
        """Take note of the arguments of ``on_train_batch_end``; before any callback that saves there."""
        self._batch, self._hook_done = batch, False

    def _unless_done(self, hook: Patch, *args: Any) -> Any:
        done, self._hook_done, self._batch = self._hook_done, False, None
        return None if done else hook.original(*args)

    def _hook_then_save(self, save: Patch, *args: Any, **kwargs: Any) -> None:
        early = self._batch is not None and not self._hook_done and isinstance(self._asker(), Checkpoint)
        if early and self.module._current_fx_name == BATCH:
            call._call_lightning_module_hook(self.trainer, BATCH, *self._batch)  # the patch forgets the batch
            self._hook_done = True
        save.original(*args, **kwargs)

    def now(self) -> dict[str, Any]:
        """The place: the hook under way, who asked for the checkpoint in it, and why it cannot be exact if so."""
        hook, asker = self.module._current_fx_name, self._asker()
        place = {"hook": hook, "asker": _name(asker), "module_done": self._hook_done, "inexact": ""}
        if isinstance(sys.exc_info()[1], SIGTERMException):  # Lightning raises it at the end of a batch or epoch only
            return {**place, "hook": DUE if self.trainer.validating else BETWEEN}
        if hook == "on_train_end":
            return {**place, "hook": BETWEEN}
        if hook not in (BATCH, VALIDATION, EPOCH):
            return {**place, "inexact": f"it was taken in {hook or 'no hook'}, in the middle of a step"}
        if asker is None:
            return {
                **place,
                "inexact": f"it was taken in {hook} by a function, so that nobody knows what is left of it",
            }
        if hook == BATCH:
            lost = [_name(each) for each in _rest(self.trainer, place) if _needs_batch(each)]
            if lost:
                return {**place, "inexact": f"it was taken before {' and '.join(lost)} had seen the batch ({BATCH})"}
        return place

    def _asker(self) -> Any:
        """Who asked for this checkpoint: the innermost callback, or the module, on the stack."""
        known = [*self.trainer.callbacks, self.module]
        frame = sys._getframe(2)
        while frame is not None:
            owner = frame.f_locals.get("self")
            if any(owner is each for each in known) and frame.f_code.co_name not in ("state", "state_dict"):
                return owner
            frame = frame.f_back
        return None


def _name(owner: Any) -> str:
    return owner.state_key if isinstance(owner, pl.Callback) else type(owner).__name__ if owner is not None else ""


def _needs_batch(owner: Any) -> bool:
    """Whether this one's hook would miss its batch; Lightning's own callbacks and those that save do without."""
    if isinstance(owner, pl.LightningModule):
        return is_overridden(BATCH, owner)
    stock = isinstance(owner, Checkpoint) or type(owner).__module__.startswith("lightning.")
    return not stock and getattr(type(owner), BATCH) is not getattr(pl.Callback, BATCH)


def _rest(trainer: pl.Trainer, place: Mapping[str, Any]) -> list[Any]:
    """Whose turn in the hook was still to come, in Lightning's order."""
    module, order = trainer.lightning_module, list(trainer.callbacks)
    if place["hook"] == EPOCH:  # there the module comes before the callbacks that monitor
        order.sort(key=lambda each: isinstance(each, (EarlyStopping, Checkpoint)))
        monitoring = [isinstance(each, (EarlyStopping, Checkpoint)) for each in order]
        order.insert(monitoring.index(True) if any(monitoring) else len(order), module)
    else:
        order.append(module)
    names = [_name(each) for each in order]
    rest = order[names.index(place["asker"]) + 1 :] if place["asker"] in names else []
    return [each for each in rest if not (each is module and place["module_done"])]


class Reentry:
    """Runs a resumed fit from a place on.

    Args:
        trainer: the user's.
        place: of :meth:`Places.now`, in the process that is continued.
        catch_up: brings the training data to the place.
        restore: puts back everything else; called last, right before training goes on.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        place: Mapping[str, Any],
        catch_up: Callable[[], None],
        restore: Callable[[], None],
    ) -> None:
        self.trainer, self.place, self.catch_up, self.restore = trainer, place, catch_up, restore
        self.fit, self.epoch = trainer.fit_loop, trainer.fit_loop.epoch_loop

    def install(self, undo: ExitStack) -> None:
        """Take the place of the fit loop's ``run``, once."""
        patch = Patch(self.fit, "run", self._run)
        undo.callback(patch.restore)
        undo.callback(setattr, self.trainer, "num_sanity_val_steps", self.trainer.num_sanity_val_steps)
        self.trainer.num_sanity_val_steps = 0  # the run that is continued had its check

    @property
    def _epoch_under_way(self) -> bool:
        progress = self.fit.epoch_progress.current
        return progress.completed < progress.ready

    def _run(self) -> None:
        fit = self.fit
        torch.set_grad_enabled(True)
        fit.setup_data()
        if not fit.max_batches or (not self._epoch_under_way and fit.done):
            return
        for loop in (fit, self.epoch, self.epoch.val_loop):
            loop._restarting = False
        counters = fit.epoch_progress.state_dict()
        under_way = self._epoch_under_way
        fit.on_run_start()
        fit.epoch_progress.load_state_dict(counters)  # the hook's caller moves them on to the next epoch
        if under_way:
            self.catch_up()
        self.restore()
        if not under_way:
            fit.on_iteration_done()
        if not fit.done or under_way:
            _go_on(fit, self._rest_of_epoch if under_way else self._next_epoch, self._next_epoch)
        fit._restarting = False
        fit.on_run_end()

    def _next_epoch(self) -> None:
        self.fit.on_advance_start()
        self.fit.advance()
        self.fit.on_advance_end()

    def _rest_of_epoch(self) -> None:
        if self.place["hook"] == EPOCH:
            self._rest_of_epoch_end()
            return
        fetcher = self.fit._data_fetcher

        def next_batch() -> None:
            self.epoch.advance(fetcher)
            self.epoch.on_advance_end(fetcher)

        with self.trainer.profiler.profile("run_training_epoch"):
            self.epoch.on_run_start(fetcher)
            _go_on(self.epoch, lambda: self._rest_of_batch(fetcher), next_batch)
        self.fit.on_advance_end()

    def _rest_of_batch(self, fetcher: Any) -> None:
        """What Lightning's ``advance`` does after the hook, and its validation."""
        connector, epoch = self.trainer._logger_connector, self.epoch
        if self.place["hook"] == BETWEEN:
            return
        if self.place["hook"] == BATCH:
            self._rest_of_hook(None, None, epoch.batch_idx)
            connector.on_batch_end()
            epoch.batch_progress.increment_completed()
            connector.update_train_step_metrics()
            epoch.on_advance_end(fetcher)
            return
        with ExitStack() as undo:
            undo.callback(Patch(epoch, "_should_check_val_fx", lambda *args: True).restore)
            if self.place["hook"] == VALIDATION:
                undo.callback(Patch(epoch.val_loop, "run", self._rest_of_validation).restore)
            epoch.on_advance_end(fetcher)

    @torch.no_grad()
    def _rest_of_validation(self) -> list[Any]:
        """What Lightning's evaluation does after the hook."""
        module, validation = self.trainer.lightning_module, self.epoch.val_loop
        validation._module_mode.capture(module)
        module.eval()
        self._rest_of_hook()
        call._call_strategy_hook(self.trainer, VALIDATION)
        self.trainer._logger_connector.reset_results()
        validation._on_evaluation_model_train()
        self.trainer._last_val_time = time.monotonic()
        return []

    def _rest_of_epoch_end(self) -> None:
        """What Lightning's ``on_advance_end`` does after the hook."""
        connector, epoch = self.trainer._logger_connector, self.epoch
        self._rest_of_hook()
        connector.on_epoch_end()
        if epoch._num_ready_batches_reached():
            epoch.update_lr_schedulers("epoch", update_plateau_schedulers=True)
        epoch._batches_that_stepped -= 1
        connector.update_train_epoch_metrics()
        epoch._batches_that_stepped += 1
        self.fit.epoch_progress.increment_completed()
        if self.trainer.received_sigterm:
            raise SIGTERMException

    def _rest_of_hook(self, *args: Any) -> None:
        module, hook = self.trainer.lightning_module, self.place["hook"]
        for each in _rest(self.trainer, self.place):
            module._current_fx_name = hook
            if each is module:
                call._call_lightning_module_hook(self.trainer, hook, *args)
            else:
                getattr(each, hook)(self.trainer, module, *args)
        module._current_fx_name = None


def _go_on(loop: _Loop, first: Callable[[], None], then: Callable[[], None]) -> None:
    """A Lightning loop whose first iteration is another one."""
    step = first
    while step is first or not loop.done:
        try:
            step()
        except StopIteration:
            break
        finally:
            loop.on_iteration_done()
        step = then


def what_a_resume_loses(checkpoint: Mapping[str, Any]) -> str:
    """What Lightning's own resume from this checkpoint will do otherwise than the run that wrote it; '' for nothing
    but random numbers, at the end of an epoch.
    """
    loops = checkpoint.get("loops", {}).get("fit_loop", {})
    epochs, batches = loops.get("epoch_progress"), loops.get("epoch_loop.batch_progress")
    if not epochs or epochs["current"]["processed"] == epochs["current"]["ready"]:
        return ""
    done, epoch = batches["current"]["ready"], epochs["current"]["completed"]
    lost = ["the random states begin anew", "averages and metrics of the epoch so far are forgotten"]
    if batches["is_last_batch"]:
        lost.append("the epoch's validation, its epoch-end hooks and plateau schedulers are left out")
    else:
        lost.append(f"the training data begin again with their first batch, for what is left of the epoch after {done}")
    return (
        f"This resumes in the middle of epoch {epoch}, after {done} batches, and will not end as the uninterrupted run:"
        f" {'; '.join(lost)}. Add ExactResume() to the callbacks of the run that writes the checkpoint and of the one"
        " that resumes"
    )
