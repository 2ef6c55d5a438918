"""The training-step socket: one wrapper on the module's own ``training_step`` for all step recipes of a Trainer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_recipes.core import random
from lightning_recipes.core.criterion import Call, Glance, Observation, watching, wrap_named
from lightning_recipes.core.distributed import rank_and_world
from lightning_recipes.core.errors import RecipeError, speaking_for
from lightning_recipes.core.patch import Patch
from lightning_recipes.core.silence import modes_kept, silent

if TYPE_CHECKING:
    from lightning_recipes.core.recipe import StepRecipe

_NEED_CRITERION = ("transform_logits", "transform_targets", "loss_weights", "class_weights")
_AUTOMATIC_ONLY = ("loss_weights", "class_weights", "extra_loss", "own_loss_weight")
_RUNNING: ContextVar[Step | None] = ContextVar("the step that this thread is in", default=None)
_REPLAYED: ContextVar[tuple[int, bool] | None] = ContextVar("place of a micro-batch that is run again", default=None)


@contextmanager
def at_batch(index: int, last: bool) -> Iterator[None]:
    """Steps run inside belong to that batch of the epoch, wherever the Trainer's own counter stands.

    Args:
        index: of the batch in its epoch.
        last: whether it closes its accumulation window.
    """
    token = _REPLAYED.set((index, last))
    try:
        yield
    finally:
        _REPLAYED.reset(token)


def running() -> Step | None:
    """The training step that is under way, or its replay; None outside of one. For hooks within the network."""
    return _RUNNING.get()


@contextmanager
def _under_way(step: Step) -> Iterator[None]:
    token = _RUNNING.set(step)
    try:
        yield
    finally:
        _RUNNING.reset(token)


@dataclass(frozen=True)
class Replay:
    """What one silent run of the module's step computed."""

    logits: Tensor
    """The network's, ``[n, classes]``, with their graph."""
    targets: Tensor
    """As the loss saw them."""
    loss: Tensor
    """The module's observed loss, with its graph."""
    call: Call
    seen: Tensor
    """The logits as the loss saw them, after the recipes' logit transforms."""
    own_loss: Tensor | None = None
    """What the step returned to be descended on, observed or not; None where it returned nothing."""

    def per_sample(self) -> Tensor:
        """The observed loss sample by sample, ``[n]``, in fp32."""
        with torch.autocast(self.seen.device.type, enabled=False):
            return self.call.per_sample(self.seen.float(), self.targets)


class Step:
    """One run of the module's ``training_step``, as its recipes see it.

    Attributes:
        trainer, module: the user's.
        batch: the batch, after the transforms so far.
        batch_idx: its index in the epoch.
        outputs: logits as the network gave them, once the loss was called.
        weights: one a sample, of all recipes together, as the loss had them; None where it had none.
        logits, targets: as the loss saw them. ``hard_targets``: as the module gave them.
        loss: the observed loss. ``own_loss``: what the module returned, observed or not.
        replaying: True inside :meth:`replay`; a recipe must not change its own state then.
        run_again: True when the batch of an accumulation window is run once more; nor may it then.
        notes: what a recipe keeps from one stage to the next, keyed by the recipe.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        run: Callable[..., Any],
        batch: Any,
        rest: Sequence[Any] = (),
        recipes: Sequence[StepRecipe] = (),
        select: str | int | None = None,
        replaying: bool = False,
    ) -> None:
        self.trainer, self.module, self.batch, self.replaying = trainer, module, batch, replaying
        replayed = _REPLAYED.get()
        now = trainer.fit_loop.batch_idx if replayed is None else replayed[0]
        self.batch_idx: int = rest[0] if rest else now
        self.run_again = replayed is not None
        self._closes = None if replayed is None else replayed[1]
        self.own_loss: Tensor | None = None
        self.outputs: Tensor | None = None
        self.logits: Tensor | None = None
        self.targets: Tensor | None = None
        self.hard_targets: Tensor | None = None
        self.loss: Tensor | None = None
        self.notes: dict[StepRecipe, Any] = {}
        self.call: Call | None = None
        self._weights: Tensor | None = None
        self._run, self._rest, self._recipes, self._select = run, tuple(rest), recipes, select
        self._calls: dict[str, int] = {}
        looks = any(recipe.looks for recipe in recipes)
        self._began = random.states([module.device]) if looks else None

    # -- for recipes -----------------------------------------------------------------------------------------------

    @property
    def epochs_done(self) -> float:
        """Epochs with the fraction of the running one, in batches; the same when this batch is run again."""
        return self.trainer.current_epoch + self.batch_idx / max(self.trainer.num_training_batches, 1)

    @property
    def weights(self) -> Tensor | None:
        return self._weights

    @property
    def closes_window(self) -> bool:
        """Whether an optimizer step follows, at the end of an accumulation window."""
        return not self.trainer.fit_loop._should_accumulate() if self._closes is None else self._closes

    def replay(self, batch: Any, *, track_statistics: bool = False) -> Replay:
        """Run the module's own step once more on another batch, silently, and return what it computed.

        The random state of the replay is that of the step itself, so that both draw the same dropout masks. Take
        gradients of the result with ``autograd.grad`` with respect to inputs only: a ``backward`` would fire DDP's
        reduction.

        Args:
            batch: in the form of the module's batches.
            track_statistics: let batch-norm statistics move, for papers whose extra pass moves them.

        Raises:
            RecipeError: when no loss of the step can be seen.
        """
        inner = Step(
            self.trainer, self.module, self._run, batch, self._rest, self._recipes, self._select, replaying=True
        )
        with (
            _under_way(inner),
            silent(self.module, track_statistics=track_statistics),
            watching(Observation(inner, self._select)) as watch,
        ):
            output = self._run(batch, *self._rest)
        watch.check(needed=True)
        own = output.get("loss") if isinstance(output, Mapping) else output
        return Replay(inner.outputs, inner.targets, inner.loss, inner.call, inner.logits, own)

    def look(self, weights: AbstractContextManager[Any]) -> Tensor:
        """The logits that the observed loss would see of this batch, under other weights: one more run of the module's
        own step, silently, in eval mode and without gradients. Its random draws are those of the step itself.

        To be called where the loss is computed (``transform_targets``), by a recipe whose ``looks`` is true.

        Args:
            weights: a context in which the module holds them (``core.copies.FrozenCopy.worn``).

        Raises:
            RecipeError: when the run does not come to that loss.
        """
        with (
            torch.no_grad(),
            weights,
            silent(self.module),
            modes_kept(self.module, training=False),
            watching(Glance(self.call.place, self._select)) as glance,
        ):
            random.set_states(self._began)
            self._run(self.batch, *self._rest)
            logits = glance.logits
            if logits is None:
                raise RecipeError("the training step computes another loss in eval mode than in train mode")
            return self._seen_by_loss(logits)

    def _seen_by_loss(self, logits: Tensor) -> Tensor:
        for recipe in self._recipes:
            if recipe.overrides("transform_logits"):
                logits = recipe.transform_logits(self, logits)
        return logits

    def loss_of(self, logits: Tensor) -> Any:
        """The observed loss of other logits of this batch, through the recipes' logit transforms and with the targets
        and weights that the loss had."""
        return self.call.value(self._seen_by_loss(logits), self.targets, self._weights)

    def share_of_loss(self) -> Tensor:
        """d ``own_loss`` / d ``loss``, of the shape of ``loss``: its factor in what the module returned.

        Raises:
            RecipeError: when what the module returned does not depend on the observed loss.
        """
        (share,) = torch.autograd.grad(self.own_loss, self.loss, retain_graph=True, allow_unused=True)
        if share is None:
            raise RecipeError("the loss that the training step returns does not depend on the one that was observed")
        return share

    @contextmanager
    def second_pass(self, *, track_statistics: bool = False) -> Iterator[Any]:
        """The module's own step once more on the same batch, silently; inside stands what taps see of it, and nothing
        of it is left afterwards. No loss has to be seen, and recipes have no say in it.

        Args:
            track_statistics: as in :meth:`replay`.
        """
        with silent(self.module, track_statistics=track_statistics):
            yield self._run(self.batch, *self._rest)

    def generator(self, recipe: StepRecipe, seed: int, stream: str) -> torch.Generator:
        """A CPU generator for a decision that all ranks share, keyed by (seed, epoch, batch, stream, call number)."""
        return random.generator(*self._key(recipe, seed, stream))

    def uniform(self, recipe: StepRecipe, seed: int, stream: str, like: Tensor) -> Tensor:
        """Numbers in [0, 1) of the shape of `like` that belong to each sample's place in the epoch.

        Independent of ranks and micro-batches when samples are dealt to the ranks in turn, as a
        ``DistributedSampler`` does: sample j of batch b on rank r of W stands at place (b n + j) W + r.
        """
        rank, world = rank_and_world()
        full = getattr(self.trainer.train_dataloader, "batch_size", None) or 0  # the last batch may be short
        first = self.batch_idx * max(full, len(like))
        place = (torch.arange(first, first + len(like), device=like.device)) * world + rank
        name = type(recipe).__name__
        parts = random.key(seed, self.trainer.current_epoch, f"{name}/{stream}", self._call_number(name, stream))
        return random.uniform(parts, place, like.shape[1:])

    def log(self, recipe: StepRecipe, values: Mapping[str, Any]) -> None:
        """Log detached values under the recipe's prefix, without a synchronisation."""
        for name, value in values.items():
            self.module.log(f"{prefix(recipe)}/{name}", value.detach() if isinstance(value, Tensor) else value)

    def _key(self, recipe: StepRecipe, seed: int, stream: str) -> tuple[int | str, ...]:
        name = type(recipe).__name__
        return seed, self.trainer.current_epoch, self.batch_idx, f"{name}/{stream}", self._call_number(name, stream)

    def _call_number(self, name: str, stream: str) -> int:
        number = self._calls.get(f"{name}/{stream}", 0)
        self._calls[f"{name}/{stream}"] = number + 1
        return number

    # -- for the observation ---------------------------------------------------------------------------------------

    def transform(self, call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the loss shall be computed from, after every recipe had its say."""
        self.call, self.outputs, self.hard_targets = call, call.logits, call.targets
        self.logits, self.targets, weights = call.logits, call.targets, None
        for recipe in self._recipes:
            if recipe.overrides("transform_logits"):
                self.logits = recipe.transform_logits(self, self.logits)
        for recipe in self._recipes:
            if recipe.overrides("transform_targets"):
                self.targets = recipe.transform_targets(self, self.logits, self.targets)
        for recipe in self._recipes:
            if recipe.overrides("loss_weights"):
                weight = recipe.loss_weights(self)
                if weight is not None:
                    weights = weight if weights is None else weights * weight
            if recipe.overrides("class_weights"):
                weight = recipe.class_weights(self)
                if weight is not None:
                    call.class_weights = weight if call.class_weights is None else call.class_weights * weight
        self._weights = weights
        return self.logits, self.targets, weights

    def computed(self, call: Call, logits: Tensor, targets: Tensor, loss: Any) -> None:
        """Take note of the loss."""
        self.loss = loss


class StepSocket:
    """Wraps ``training_step`` on the instance, inside DDP's forward.

    Args:
        trainer, module: the user's.
        recipes: all step recipes that are not neutral, in the Trainer's order.

    Raises:
        RecipeError: for combinations that cannot work, before anything is wrapped.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, recipes: Sequence[StepRecipe]) -> None:
        self.trainer, self.module, self.recipes = trainer, module, recipes
        self.observing = [r for r in recipes if r.needs_criterion or any(r.overrides(s) for s in _NEED_CRITERION)]
        self.select = self._agree_on_criterion()
        self._check()
        self._patch: Patch | None = None

    def _agree_on_criterion(self) -> str | int | None:
        named = {type(r).__name__: r.criterion for r in self.recipes if r.criterion is not None}
        if len(set(named.values())) > 1:
            raise RecipeError(
                f"recipes name different losses: {', '.join(f'{k} criterion={v!r}' for k, v in named.items())}"
            )
        return next(iter(named.values()), None)

    def _check(self) -> None:
        own = [type(r).__name__ for r in self.recipes if r.overrides("own_loss_weight")]
        if len(own) > 1:
            raise RecipeError(f"{' and '.join(own)} each set the weight of the module's own loss; use one of them")
        self._check_compiled()
        if not self.module.automatic_optimization:
            for recipe in self.recipes:
                asked = [stage for stage in _AUTOMATIC_ONLY if recipe.overrides(stage)]
                if asked:
                    raise RecipeError(
                        f"{type(recipe).__name__} needs automatic optimization: under manual optimization the module"
                        f" calls backward itself, inside its step, so {', '.join(asked)} would come too late"
                    )

    def _check_compiled(self) -> None:
        """A loss inside one unbroken graph cannot be observed, and CUDA graphs write over what a step keeps."""
        context = (getattr(self.module, "_compiler_ctx", None) or {}).get("dynamo_ctx")
        if context is None or not self.observing:
            return
        name = type(self.observing[0]).__name__
        if context.fullgraph:
            raise RecipeError(
                f"{name} observes the loss, which torch.compile(module, fullgraph=True) has inside its one graph;"
                " compile the network alone (module.net.compile(fullgraph=True)) or leave fullgraph out"
            )
        if (context.compiler_config or {}).get("triton.cudagraphs"):
            raise RecipeError(
                f"{name} keeps what a pass computed, and CUDA graphs (torch.compile with mode='reduce-overhead' or"
                " 'max-autotune') write over it in the next pass; use mode='default' or 'max-autotune-no-cudagraphs'"
            )

    def install(self, undo: ExitStack) -> None:
        """Put the wrappers on and leave their removal with `undo`."""
        if isinstance(self.select, str):
            with speaking_for(*(r for r in self.recipes if r.criterion is not None)):
                undo.callback(wrap_named(self.module, self.select))
        self._patch = Patch(self.module, "training_step", self._step)
        undo.callback(self._patch.restore)

    def _step(self, batch: Any, *rest: Any) -> Any:
        run = self._patch.original
        if not self.trainer.training:  # a module that validates by its training step
            return run(batch, *rest)
        step = Step(self.trainer, self.module, run, batch, rest, self.recipes, self.select)
        with _under_way(step):
            return self._run(step, run, rest)

    def _run(self, step: Step, run: Callable[..., Any], rest: Sequence[Any]) -> Any:
        for recipe in self.recipes:
            if recipe.overrides("transform_batch"):
                with speaking_for(recipe):
                    step.batch = recipe.transform_batch(step, step.batch)
        if not self.observing:
            return self._with_extra(step, run(step.batch, *rest))
        with speaking_for(*self.observing):
            with watching(Observation(step, self.select)) as watch:
                output = run(step.batch, *rest)
            if not self.module.automatic_optimization:
                watch.check(needed=False)  # a step may be the generator's turn
            elif output is not None:
                watch.check(needed=True)
        return self._with_extra(step, output)

    def _with_extra(self, step: Step, output: Any) -> Any:
        """Add the recipes' own terms to what the module returned, a tensor or a dict with 'loss'."""
        terms, own = [], 1.0
        if output is None:
            return None
        loss = step.own_loss = output.get("loss") if isinstance(output, Mapping) else output
        for recipe in self.recipes:
            if recipe.overrides("own_loss_weight"):
                own = recipe.own_loss_weight(step)
            if recipe.overrides("extra_loss") and (step.closes_window or not recipe.of_weights_alone):
                extra = recipe.extra_loss(step)
                named = extra if isinstance(extra, Mapping) else {"extra_loss": extra}
                step.log(recipe, named)
                # Lightning divides what a micro-batch returns by the accumulation, in a short last window too.
                times = self.trainer.accumulate_grad_batches if recipe.of_weights_alone else 1
                terms.extend(term * times if times > 1 else term for term in named.values())
        if not terms and own == 1.0:
            return output
        if own != 1.0:
            loss = loss * own if own else None
        for term in terms:
            loss = term if loss is None else loss + term
        if loss is None:
            raise RecipeError("the weight of the module's own loss is 0 and no recipe adds a loss: nothing to train")
        return {**output, "loss": loss} if isinstance(output, Mapping) else loss


def check_observable(module: pl.LightningModule, recipe: object) -> None:
    """Refuse a module of which a recipe cannot :func:`observe` the step, in ``declare``, before anything has run.

    Raises:
        RecipeError: when the module takes its optimizer steps itself.
    """
    if not module.automatic_optimization:
        raise RecipeError(
            f"{type(recipe).__name__} runs the module's training step to look at it, and needs automatic optimization:"
            " under manual optimization that step trains"
        )


def observe(
    trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int, select: str | int | None = None
) -> Replay:
    """What the module's own step makes of a batch, silently and with no recipe in it; for probes outside a step.

    Raises:
        RecipeError: when the module takes its optimizer steps itself; to look would be to train.
    """
    if not module.automatic_optimization:
        raise RecipeError(
            f"{type(module).__name__} optimizes manually: its training step would train, so that it cannot be looked at"
        )
    step = Step(trainer, module, stock_step(module), batch, rest_of_arguments(module, batch_idx), select=select)
    with ExitStack() as undo:
        if isinstance(select, str):
            undo.callback(wrap_named(module, select))
        return step.replay(batch)


def stock_step(module: pl.LightningModule) -> Callable[..., Any]:
    """The module's step below every wrapper of ours."""
    run = module.training_step
    while isinstance(run, Patch):
        run = run.original
    return run


def rest_of_arguments(module: pl.LightningModule, batch_idx: int) -> tuple[int, ...]:
    """What the module's step takes after the batch: its index, or nothing."""
    parameters = list(inspect.signature(inspect.unwrap(stock_step(module))).parameters)
    takes_index = len([p for p in parameters if p != "self"]) > 1
    return (batch_idx,) if takes_index else ()


def prefix(recipe: object) -> str:
    """The log prefix of a recipe: its own, or its class name in snake case, an acronym as one word."""
    if own := getattr(recipe, "log_prefix", None):
        return own
    name = type(recipe).__name__
    out = ""
    for i, letter in enumerate(name):
        starts = letter.isupper() and i and (name[i - 1].islower() or (i + 1 < len(name) and name[i + 1].islower()))
        out += ("_" if starts else "") + letter.lower()
    return out
