"""From declarations to a prepared module: collect what all recipes want, check it together, apply all or nothing.

Callbacks' ``setup`` runs before the module's own ``setup`` and ``configure_model``, when there may be no network yet.
So ``setup`` only joins a session, and the session prepares at the one moment that fits: after ``configure_model``, when
Lightning has read the checkpoint and not yet loaded it. Then what a resume must know before weights load (adapters, the
trainable set) can be read from the recipes' sections of that checkpoint.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal, Protocol

import lightning.pytorch as pl
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_recipes.core.distributed import check_same_checkpoint, check_strategy, shards
from lightning_recipes.core.errors import RecipeError, speaking_for
from lightning_recipes.core.gradients import GradientSocket, Window, check_optimizers
from lightning_recipes.core.loader import end_of_recording
from lightning_recipes.core.parameters import Claim, ParameterTable, user_flags
from lightning_recipes.core.patch import Patch
from lightning_recipes.core.phases import PhasePlan, Phases
from lightning_recipes.core.reentry import what_a_resume_loses
from lightning_recipes.core.step import StepSocket
from lightning_recipes.core.surgery import Operation, Surgery, Writing, as_structure, rebuilt, stored_in

if TYPE_CHECKING:
    from lightning_recipes.core.recipe import Recipe, StepRecipe

_SESSIONS: weakref.WeakKeyDictionary[pl.Trainer, Session] = weakref.WeakKeyDictionary()


class Part(Protocol):
    """Something that takes hold of the Trainer's own machinery and lets go of it again."""

    def install(self, undo: ExitStack) -> None:
        """Take hold, and leave with `undo` how to let go."""


class Plan:
    """Takes one recipe's declarations. What only training needs is dropped in validate, test and predict.

    Attributes:
        trainer, module: the user's; the module's network is built.
        fitting: whether this run trains.
        section: the recipe's section of the checkpoint that is about to be loaded, None without one.
    """

    def __init__(self, session: Session, recipe: Recipe, section: Mapping[str, Any] | None) -> None:
        self._session, self._recipe, self.section = session, recipe, section
        self.trainer, self.module = session.trainer, session.module
        self.fitting = session.fitting

    def _whole(self, what: str) -> None:
        """Refuse a socket of weights or gradients where no process holds them whole."""
        if shards(self.trainer):
            raise RecipeError(
                f"it {what}, and under {type(self.trainer.strategy).__name__} each process holds only a part of every"
                " weight. Use strategy='auto' on one device or strategy='ddp'."
            )

    def step(self, recipe: StepRecipe) -> None:
        """Run the recipe's stages in the training step."""
        self._session.step_recipes.append(recipe)

    def edit_gradients(
        self,
        edit: Callable[[Optimizer], None],
        when: Literal["before_clip", "after_clip"] = "before_clip",
        once: bool = False,
    ) -> None:
        """Edit the true final gradient in place, once an optimizer step; with `once` an optimizer that asks for
        several gradients a step is refused."""
        self._whole("edits gradients")
        self._session.gradients.add(self._recipe, edit, when, once)
        self._session.edits.append(self._recipe)

    def after_step(self, edit: Callable[[Optimizer], None]) -> None:
        """Edit the weights in place right after every true optimizer step; one that fp16 skips is none."""
        self._whole("edits weights after a step")
        self._session.gradients.after_step(self._recipe, edit)
        self._session.edits.append(self._recipe)

    def replay_window(
        self, edit: Callable[[Optimizer, Window], None], run: Callable[[Any], Tensor] | None = None
    ) -> None:
        """Edit the gradient with a second pass over the accumulation window at hand (`run`: of batch to loss, instead
        of the module's own step)."""
        self._whole("runs a second pass at other weights")
        self._session.gradients.replay_window(self._recipe, edit, run)
        self._session.edits.append(self._recipe)

    def surgery(self, spec: Surgery) -> None:
        """Have parts of the network replaced or added; what it came to is the recipe's ``operation``.

        In validate, test and predict it is carried out as the checkpoint describes it, where it does.
        """
        self._whole("changes the network")
        self._session.surgeries[self._recipe] = spec

    def write_weights(self, values: Callable[[], Mapping[str, Tensor]], after_surgery: bool = False) -> Writing:
        """Have weights written over before training; the recipe settles them once a step is under way.

        Args:
            values: asked for when they are written; new values by the parameter's name.
            after_surgery: write over what surgery has made, not under it.
        """
        self._whole("writes weights")
        writing = Writing(self.module, values, after_surgery)
        self._session.writings[self._recipe] = writing
        return writing

    def after_surgery(self, look: Callable[[], None]) -> None:
        """Have the recipe look at the network once all surgery is done and all names are final; it may refuse then."""
        self._whole("looks at the network's weights")
        self._session.looks[self._recipe] = look

    def parameters(self, claim: Callable[[], Claim]) -> None:
        """Claim parameters; the claim is asked for after surgery, when all names are final."""
        self._whole("decides what trains")
        self._session.claims[self._recipe] = claim

    def change_parameters(self, claim: Claim) -> None:
        """Claim anew during the fit: at an optimizer-step boundary and at the same one on all ranks."""
        self._whole("decides what trains")
        self._session.claim(self._recipe, claim)

    def phases(self, plan: PhasePlan) -> None:
        """Cut the fit into phases; at most one recipe of a Trainer may.

        Raises:
            RecipeError: when another recipe does, or the module takes its optimizer steps itself.
        """
        self._whole("cuts the fit into phases with fresh optimizers")
        self._session.cut(self._recipe, plan)

    def install(self, part: Part) -> None:
        """Have a part of the fit's machinery put on for the length of the fit."""
        self._session.parts.append(part)

    def at_end(self, finish: Callable[[], None]) -> None:
        """Have the recipe let go of the run when it is over, also after an error or an interrupt; once the parts that
        were installed for it are off again."""
        self._session._undo.callback(finish)

    def keeps_place(self) -> None:
        """Say that the recipe continues this run at the place where its checkpoint was taken."""
        self._session.keeps_place = True

    @property
    def gradients(self) -> GradientSocket:
        """The gradient socket, for what it has under way in the middle of an accumulation window."""
        return self._session.gradients

    @property
    def frozen_by_surgery(self) -> dict[str, str]:
        """The parameters that do not train because of what surgery did, each with the recipe whose surgery it was;
        known once all is done."""
        return {name: type(r).__name__ for r, claim in self._session.around.items() for name in sorted(claim.frozen)}

    @property
    def trainable_parameters(self) -> int:
        """Number of scalars that train now."""
        return self._session.parameters.trainable


class Session:
    """The recipes of one Trainer for the length of one fit, validate, test or predict.

    A data module that moves on by itself opens one too (``Session.of`` in its ``setup``), so that it does so without
    any recipe; it closes it in its ``teardown`` and ``on_exception``, as recipes do.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.trainer, self.module = trainer, module
        self.fitting = trainer.state.fn == TrainerFn.FITTING
        self.recipes: list[Recipe] = []
        self.step_recipes: list[StepRecipe] = []
        self.edits: list[Recipe] = []
        self.parts: list[Part] = []
        self.writings: dict[Recipe, Writing] = {}
        self.looks: dict[Recipe, Callable[[], None]] = {}
        self.phase_plan: tuple[object, PhasePlan] | None = None  # and whose it is
        self.phases: Phases | None = None
        self.keeps_place = False
        self.surgeries: dict[Recipe, Surgery] = {}
        self.claims: dict[Recipe, Callable[[], Claim]] = {}
        self.operations: dict[Recipe, Operation] = {}
        self._named_then: dict[Recipe, dict[str, Parameter]] = {}  # right after each operation
        self.around: dict[Recipe, Claim] = {}  # what each operation wants of the parameters
        self.gradients = GradientSocket(trainer, module)
        self.parameters: ParameterTable  # made when the network exists
        self._undo = ExitStack()
        self._fit_started = False
        self._refused = False  # before its first step
        self._steps_before = trainer.global_step
        connector = trainer._checkpoint_connector
        patch = Patch(connector, "resume_start", lambda *a, **k: self._read_then_prepare(patch, *a, **k))
        self._undo.callback(patch.restore)

    # -- finding the session -----------------------------------------------------------------------------------------

    @classmethod
    def of(cls, trainer: pl.Trainer, module: pl.LightningModule) -> Session:
        """The Trainer's session; begins one if there is none."""
        session = _SESSIONS.get(trainer)
        if session is None:
            session = _SESSIONS[trainer] = cls(trainer, module)
        return session

    @classmethod
    def close_of(cls, trainer: pl.Trainer) -> None:
        """End the Trainer's session: the module is stock again, or what a recipe keeps by choice."""
        session = _SESSIONS.pop(trainer, None)
        if session is not None:
            session.close()

    @classmethod
    def close_after_exception(cls, trainer: pl.Trainer, exception: BaseException) -> None:
        """End the session once every callback has seen the exception, so that one that saves a checkpoint then still
        finds adapters and optimizer as they trained; or at once when one of them fails in turn.

        A run that was refused before its first step has nothing to save: callbacks that save on an exception would
        write over the checkpoint that it was to resume from.
        """
        session = _SESSIONS.get(trainer)
        if session is None or isinstance(trainer.strategy.__dict__.get("on_exception"), Patch):
            return
        end_of_recording()
        session._refused = isinstance(exception, RecipeError) and trainer.global_step <= session._steps_before
        held: list[Patch] = []

        def hear(listener: Any) -> None:
            def on_exception(*args: Any) -> None:
                if session._refused and listener in trainer.checkpoint_callbacks:
                    return
                try:
                    heard.original(*args)
                except BaseException:  # a full disk, a rank that is gone: Lightning ends here and asks nobody else
                    let_go()
                    cls.close_of(trainer)
                    raise

            heard = Patch(listener, "on_exception", on_exception)
            held.append(heard)

        def let_go() -> None:
            for each in held:
                each.restore()

        def then_close(exception: BaseException) -> None:
            let_go()
            try:
                patch.original(exception)
            finally:
                cls.close_of(trainer)

        for listener in [*trainer.callbacks, getattr(trainer, "datamodule", None)]:
            if listener is not None:
                hear(listener)
        patch = Patch(trainer.strategy, "on_exception", then_close)
        held.append(patch)

    # -- data modules ------------------------------------------------------------------------------------------------

    def cut(self, owner: object, plan: PhasePlan) -> None:
        """Cut the fit into phases on behalf of a recipe, or of the data module; see :meth:`Plan.phases`."""
        name = type(owner).__name__
        if self.phase_plan is not None:
            raise RecipeError(
                f"{type(self.phase_plan[0]).__name__} and {name} both cut the fit into phases; use one of them"
            )
        if not self.module.automatic_optimization:
            raise RecipeError(
                f"{name} cuts the fit into phases and needs automatic optimization: under manual optimization the"
                " module may hold on to optimizers that a phase makes anew"
            )
        self.phase_plan = owner, plan

    def _ask_data(self) -> None:
        """A data module that moves on by itself (it has a ``phase_plan``) is the first to cut the fit."""
        data = getattr(self.trainer, "datamodule", None)
        if self.fitting and hasattr(data, "phase_plan"):
            with speaking_for(data):
                check_strategy(self.trainer)
                self.cut(data, data.phase_plan())

    # -- the life of a session ---------------------------------------------------------------------------------------

    def join(self, recipe: Recipe) -> None:
        """A recipe's ``setup``."""
        if shards(self.trainer) and not recipe.neutral:  # now: the network is sharded before the session prepares
            with speaking_for(recipe):
                check_strategy(self.trainer, sharded=recipe.works_sharded)
        self.recipes.append(recipe)

    def _read_then_prepare(self, patch: Patch, *args: Any, **kwargs: Any) -> None:
        failed: Exception | None = None
        try:
            self._read(patch, *args, **kwargs)
        except Exception as error:
            failed = error
        # before anything else: processes that are not at the same place would wait for each other for ever
        check_same_checkpoint(self.trainer._checkpoint_connector._loaded_checkpoint, failed)
        if failed is not None:
            raise failed
        patch.restore()
        self.prepare(self.trainer._checkpoint_connector._loaded_checkpoint)
        if self.fitting and self.trainer.strategy.restore_checkpoint_after_setup:
            self.trainer.fit_loop._combined_loader = None  # of a module that has asked for its data already
            self._begin_fit()  # the hook came before the checkpoint

    def _read(self, patch: Patch, *args: Any, **kwargs: Any) -> None:
        try:
            patch.original(*args, **kwargs)
        except FileNotFoundError:
            raise
        except (OSError, EOFError, RuntimeError) as error:
            raise RecipeError(
                f"the checkpoint {args[0]} cannot be read ({type(error).__name__}: {error}); it may be cut off: resume"
                " from an earlier one"
            ) from error

    def prepare(self, checkpoint: Mapping[str, Any]) -> None:
        """Check all declarations together and apply them; on an error nothing is left applied.

        Raises:
            RecipeError: one clear error, before anything is trained or loaded.
        """
        self.parameters = ParameterTable(self.trainer, self.module, user_flags(self.module))
        sections = checkpoint.get("callbacks", {})
        active = [recipe for recipe in self.recipes if not recipe.neutral]
        self._steps_before = checkpoint.get("global_step", self._steps_before)
        self._ask_data()
        if self.fitting and active:
            for recipe in active:
                with speaking_for(recipe):
                    check_strategy(self.trainer, sharded=recipe.works_sharded)
            with speaking_for(*active):
                self._check_step_signature()
                self._check_structure(checkpoint, active)
            _check_pairs(active, self.trainer)
        plans = {recipe: Plan(self, recipe, sections.get(recipe.state_key)) for recipe in active}
        for recipe, plan in plans.items():
            if self.fitting and plan.section is not None:
                recipe.check_resume(plan.section)
            with speaking_for(recipe):
                recipe.declare(plan)
        if self.fitting and not self.keeps_place and (lost := what_a_resume_loses(checkpoint)):
            rank_zero_warn(lost)
        try:
            if self.fitting:
                self._write(after_surgery=False)
            self._operate(plans, resumes="callbacks" in checkpoint)
            if self.fitting:
                self._write(after_surgery=True)
                self._attach(checkpoint)
        except BaseException:
            self.close()
            raise

    def _write(self, after_surgery: bool) -> None:
        for recipe, writing in self.writings.items():
            if writing.after_surgery == after_surgery:
                self._undo.callback(writing.take_back)
                with speaking_for(recipe):
                    writing.write()

    def _operate(self, plans: Mapping[Recipe, Plan], resumes: bool) -> None:
        for recipe, spec in self.surgeries.items():
            name, stored = type(recipe).__name__, stored_in(plans[recipe].section)
            if not self.fitting:
                if stored is None or spec.present(self.module):
                    continue  # nothing to build for, or it is in place: the module is what it is
            elif resumes and plans[recipe].section is None:
                raise RecipeError(
                    f"{name}: the checkpoint was written without {name} and holds no {spec.what} to resume. Load its"
                    f" weights into the module and start a new fit, or resume without {name}"
                )
            elif resumes and stored is None:
                raise RecipeError(
                    f"{name}: the checkpoint was written after the fit ended and holds stock weights; there is no"
                    f" {spec.what} to resume. Load its weights into the module and start a new fit"
                )
            rival = next((r for r in self.operations if spec.on_weights and self.surgeries[r].on_weights), None)
            if rival is not None:
                raise RecipeError(f"{type(rival).__name__} and {name} both adapt the module's layers; use one of them")
            with speaking_for(recipe):
                operation = (spec if stored is None else rebuilt(spec, stored)).operate(self.module)
            self.operations[recipe] = recipe.operation = operation
            self._named_then[recipe] = dict(self.module.named_parameters())
            recipe._structure = as_structure(operation.spec)
            self._undo.callback(self._finish_surgery, recipe, operation)
        if self.fitting and self.operations:
            self._claim_around()

    def _finish_surgery(self, recipe: Recipe, operation: Operation) -> None:
        keep = self._fit_started and not self._refused and not getattr(recipe, "merge_on_end", True)
        if not keep:
            operation.remove(merge=True)
            recipe._structure = None

    def _claim_around(self) -> None:
        """What each operation wants of the parameters; the parts that train beside it must be the user's to train."""
        names = dict(self.module.named_parameters())
        now = {id(p): name for name, p in names.items()}
        made = {now[id(p)] for operation in self.operations.values() for p in operation.made.values()}
        for recipe, operation in self.operations.items():
            # A later operation may have moved the parts of an earlier one to other names.
            moved = {name: now[id(p)] for name, p in self._named_then[recipe].items() if id(p) in now}
            kept = [moved[name] for name in operation.kept_whole or () if name in moved]
            stuck = [name for name in kept if not self.parameters._user_trains(name, names[name])]
            if stuck:
                raise RecipeError(
                    f"{type(recipe).__name__}: {stuck[0]!r} is to train beside the {operation.spec.what} (train_fully)"
                    " and the module froze it; unfreeze it or leave it out of train_fully"
                )
            self.around[recipe] = Claim(
                frozenset() if operation.kept_whole is None else frozenset(names) - made - set(kept),
                lr_scale={moved[name]: scale for name, scale in operation.lr_scale.items()},
                weight_decay={moved[name]: decay for name, decay in operation.weight_decay.items()},
            )
            self.claims.setdefault(recipe, Claim)

    def _attach(self, checkpoint: Mapping[str, Any]) -> None:
        for recipe, look in self.looks.items():
            with speaking_for(recipe):
                look()
        if self.phase_plan is not None:  # first: the parameter socket wraps the optimizers of a phase too
            owner, plan = self.phase_plan
            with speaking_for(owner):
                self.phases = Phases(self.trainer, self.module, plan, checkpoint, self.configure_anew)
                self.phases.install(self._undo)
        for part in self.parts:  # before a claim that asks for the number of steps, and so for the data
            part.install(self._undo)
        for recipe, claim in self.claims.items():
            with speaking_for(recipe):
                self.claim(recipe, claim())
        if self.parameters.claimed:
            with speaking_for(*self.claims):
                self.parameters.install(self._undo)
        if self.step_recipes:
            StepSocket(self.trainer, self.module, self.step_recipes).install(self._undo)
        self.gradients.install(self._undo)

    def claim(self, recipe: Recipe, claim: Claim) -> None:
        """What a recipe wants of the parameters now, beside what its surgery does."""
        around = self.around.get(recipe)
        self.parameters.claim(recipe, claim if around is None else around.joined(claim))

    def _check_step_signature(self) -> None:
        if is_param_in_hook_signature(self.module.training_step, "dataloader_iter", explicit=True):
            raise RecipeError(
                "training_step(dataloader_iter) fetches its own batches; recipes need training_step(batch, ...)"
            )

    def _check_structure(self, checkpoint: Mapping[str, Any], active: list[Recipe]) -> None:
        """Refuse a checkpoint with the surgery of a recipe that this run does not have, on a module without it."""
        here = {recipe.state_key for recipe in active}
        carries = checkpoint.get("state_dict", {}).keys() == self.module.state_dict().keys()
        for key, section in checkpoint.get("callbacks", {}).items():
            ours = isinstance(section, Mapping) and "arguments" in section
            stored = stored_in(section) if ours and key not in here else None
            if stored and (stored.get("stock_keys") or not carries):
                raise RecipeError(
                    f"the checkpoint holds the {stored['what']} of {key}, which is not among the Trainer's callbacks."
                    " Add it with the arguments of the checkpoint, or start a new fit from merged weights"
                )

    def on_fit_start(self, recipe: Recipe) -> None:
        """Optimizers exist, their state is not restored yet; runs once, with the first recipe's hook."""
        if not (self._fit_started or self.trainer.strategy.restore_checkpoint_after_setup):
            self._begin_fit()

    def _begin_fit(self) -> None:
        self._attach_optimizers()
        self.gradients.check_parameters()
        self._fit_started = True  # only now: an error above leaves nothing in the module

    def configure_anew(self) -> None:
        """Fresh optimizers and schedulers, as at the start of the fit; between two epochs, on all ranks together."""
        strategy = self.trainer.strategy
        strategy.setup_optimizers(self.trainer)
        strategy.setup_precision_plugin()
        _optimizers_to_device(strategy.optimizers, strategy.root_device)
        self._attach_optimizers()

    def _attach_optimizers(self) -> None:
        made = {name: p for operation in self.operations.values() for name, p in operation.made.items()}
        whole = self.phases is None or self.phases.phase.optimizers is None
        with speaking_for(*self.claims):
            self.parameters.attach(made, whole=whole)
        for operation in self.operations.values():
            operation.take_places(self.trainer.optimizers)
        for edited in self.edits:
            check_optimizers(self.trainer, edited)

    def close(self) -> None:
        """Take everything off again, in reverse order."""
        self._undo.close()


def _check_pairs(recipes: list[Recipe], trainer: pl.Trainer) -> None:
    """Refuse pairs that cannot share a Trainer, or stand in the wrong order.

    Raises:
        RecipeError: names both and gives the reason.
    """
    names = [type(recipe).__name__ for recipe in recipes]
    for name in names:
        if names.count(name) > 1 and not next(r for r in recipes if type(r).__name__ == name).may_repeat:
            raise RecipeError(f"{name} is in the Trainer's callbacks {names.count(name)} times; once is what it means")
    for place, recipe in enumerate(recipes):
        for other, reason in recipe.refuses.items():
            if other in names:
                raise RecipeError(f"{names[place]} and {other} cannot share a Trainer: {reason}")
        for other, reason in recipe.comes_after.items():
            if other in names[place + 1 :]:
                raise RecipeError(f"{other} must stand before {names[place]} in Trainer(callbacks=[...]): {reason}")
    finetuning = [type(c).__name__ for c in trainer.callbacks if isinstance(c, BaseFinetuning)]
    moving = [type(r).__name__ for r in recipes if r.owns_training_set]
    if finetuning and moving:
        raise RecipeError(f"{moving[0]} and {finetuning[0]} both decide what trains; use one of them")
