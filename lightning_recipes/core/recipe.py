"""What every recipe is: a Lightning callback with a paper, arguments that can be compared, and declarations.

A recipe overrides :meth:`Recipe.declare` and says there, once the network exists, what it wants of which socket.
``core.prepare`` collects the declarations of all recipes of a Trainer, checks them together and applies all or nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from types import BuiltinFunctionType, FunctionType
from typing import Any, ClassVar

import lightning.pytorch as pl
from torch import Tensor

from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.prepare import Plan, Session
from lightning_recipes.core.step import Step
from lightning_recipes.core.surgery import Operation


@dataclass(frozen=True)
class Paper:
    """Where a recipe comes from."""

    title: str
    authors: str
    year: int
    url: str
    code: str | None = None


class Recipe(pl.Callback):
    """One paper's technique as a callback that attaches to a stock LightningModule.

    A subclass sets the class attributes `paper`, `does`, `use_when` and `costs` that ``lightning-recipes show`` prints,
    keeps every constructor argument in an attribute of the same name, and overrides :meth:`declare`.
    """

    paper: ClassVar[Paper | None] = None
    """Where it comes from; None for one that stands on no paper."""
    does: ClassVar[str]
    use_when: ClassVar[str]
    costs: ClassVar[str]

    log_prefix: ClassVar[str | None] = None
    """What stands before the names that it logs; None is its class name in snake case."""
    couples_samples: ClassVar[bool] = False
    """Whether the loss of one sample depends on the others of its batch (a gate, a contrastive pair)."""
    refuses: ClassVar[Mapping[str, str]] = {}
    """Class names of recipes that cannot share a Trainer with this one, each with the reason."""
    comes_after: ClassVar[Mapping[str, str]] = {}
    """Class names of recipes that must stand before this one in ``Trainer(callbacks=[...])``, with the reason."""
    may_repeat: ClassVar[bool] = False
    """Whether a Trainer may hold several of this class."""
    works_sharded: ClassVar[bool] = False
    """Whether it works where each process holds only a part of every weight (FSDP2): it knows batches, logits, targets
    and losses, and no weight and no gradient, and makes as many passes on every rank, for each gathers the weights. The
    sockets of weights and gradients refuse there whatever this says."""
    owns_training_set: ClassVar[bool] = False
    """Whether the recipe decides which parameters train."""
    free_on_resume: ClassVar[frozenset[str]] = frozenset()
    """Arguments that may differ between a checkpoint and the run that resumes from it."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.arguments.items())})"

    @property
    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments by name, as they stand now."""
        parameters = inspect.signature(type(self).__init__).parameters.values()
        gathered = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)  # a recipe without a constructor
        return {p.name: getattr(self, p.name) for p in parameters if p.name != "self" and p.kind not in gathered}

    @property
    def neutral(self) -> bool:
        """True at the setting at which the recipe does nothing; then none of its declarations is entered."""
        return False

    def declare(self, plan: Plan) -> None:
        """Say what this recipe wants. Runs after ``configure_model`` and before any checkpoint is loaded.

        Args:
            plan: takes the declarations; ``plan.module`` is the user's module with its network built.

        Raises:
            RecipeError: when the recipe cannot attach to this module or Trainer.
        """

    operation: Operation | None = None
    """The surgery that was declared, once it is in place."""
    _structure: dict[str, Any] | None = None  # of the operation, as checkpoints store it; written by core.prepare

    # -- state -----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What an exact resume needs besides the arguments; tensors and plain values only."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state` gave."""

    def state_dict(self) -> dict[str, Any]:
        return {"arguments": plain(self.arguments), "state": self.state(), "structure": self._structure}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.load_state(state_dict["state"])

    def check_resume(self, section: Mapping[str, Any]) -> None:
        """Refuse a checkpoint that this recipe wrote with other arguments.

        Raises:
            RecipeError: names each argument with both of its values.
        """
        mine, theirs = plain(self.arguments), section.get("arguments", {})
        differ = [k for k in mine if k not in self.free_on_resume and k in theirs and mine[k] != theirs[k]]
        if differ:
            listed = ", ".join(f"{k}={theirs[k]!r} in the checkpoint but {mine[k]!r} here" for k in differ)
            raise RecipeError(
                f"{type(self).__name__}: the checkpoint was written with other arguments ({listed}). Resume with the"
                " arguments of the checkpoint, or start a new fit from its weights."
            )

    # -- Lightning's hooks, the same for every recipe ---------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        Session.of(trainer, pl_module).join(self)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        Session.of(trainer, pl_module).on_fit_start(self)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        Session.close_of(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        Session.close_after_exception(trainer, exception)


class StepRecipe(Recipe):
    """A recipe that changes the user's training step. Override any of the stages; what is not overridden costs nothing.

    Stages chain in the order of ``Trainer(callbacks=[...])``. Every stage sees the final batch; targets handed to a
    stage may be soft (class probabilities).
    """

    needs_criterion: ClassVar[bool] = False
    """Whether the recipe reads ``step.logits``, ``step.targets`` or ``step.loss``; implied by the stages that do."""
    of_weights_alone: ClassVar[bool] = False
    """Whether :meth:`extra_loss` does not depend on the batch: then it counts once an optimizer step."""
    looks: ClassVar[bool] = False
    """Whether the recipe calls ``step.look``, for which the step remembers the random state that it began with."""
    criterion: str | int | None = None
    """Which loss call to observe: None (the only one), an index in call order, or a dotted name in the module."""

    def declare(self, plan: Plan) -> None:
        plan.step(self)

    def transform_batch(self, step: Step, batch: Any) -> Any:
        """Return the batch that the module's own step shall see."""
        return batch

    def transform_logits(self, step: Step, logits: Tensor) -> Tensor:
        """Return the logits that the loss shall see; metrics of the module go on seeing the network's."""
        return logits

    def transform_targets(self, step: Step, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the targets that the loss shall see, hard ``[n]`` or soft ``[n, classes]``."""
        return targets

    def loss_weights(self, step: Step) -> Tensor | None:
        """Return one weight a sample, ``[n]``, for the mean of weight times loss; None leaves the loss as it is."""
        return None

    def class_weights(self, step: Step) -> Tensor | None:
        """Return one weight a class, ``[classes]``, for sum w loss / sum w over the samples of all ranks; None leaves
        the loss as it is. The module's own class weights multiply with them."""
        return None

    def extra_loss(self, step: Step) -> Tensor | Mapping[str, Tensor]:
        """Return a scalar to add to the loss, or several by name."""
        return {}

    def own_loss_weight(self, step: Step) -> float:
        """Return the factor on the module's own loss; 0 drops the term instead of multiplying by 0."""
        return 1.0

    @classmethod
    def overrides(cls, stage: str) -> bool:
        """Whether this class overrides the stage of that name."""
        return getattr(cls, stage) is not getattr(StepRecipe, stage)


def plain(value: Any) -> Any:
    """Reduce a value to what a checkpoint loads with ``weights_only=True``: numbers, strings, lists, dicts, tensors."""
    if value is None or isinstance(value, (bool, int, float, str, Tensor)):
        return value
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((plain(v) for v in value), key=repr)
    if isinstance(value, Sequence):
        return [plain(v) for v in value]
    if is_dataclass(value) and not isinstance(value, type):  # a schedule: the same from a script and from YAML
        return {
            "class": type(value).__name__,
            **{f.name: plain(getattr(value, f.name)) for f in fields(value) if f.init},
        }
    if isinstance(value, (FunctionType, BuiltinFunctionType)):  # its repr holds an address
        return f"{value.__module__}.{value.__qualname__}"
    return repr(value)
