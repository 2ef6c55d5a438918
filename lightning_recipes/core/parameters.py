"""The parameter socket: the only code that touches ``requires_grad``, learning-rate scales and decay per parameter.

Recipes *claim* parameters. What trains is what the user lets train (or a recipe names) and no recipe freezes. Rates and
decays are factors in a table keyed by parameter; the optimizer's groups stay the user's own at rest, so schedulers and
checkpoints never notice: for the update itself the groups are expanded, and put back after it, also when it raises.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.nn import Parameter
from torch.optim import LBFGS, Optimizer

from lightning_recipes.core.distributed import rebuild_ddp, stateful_comm_hook
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.patch import Patch

if TYPE_CHECKING:
    from lightning_recipes.core.recipe import Recipe

_RATES = ("lr", "weight_decay", "params")


@dataclass(frozen=True)
class Claim:
    """What one recipe wants of the parameters, by name in the LightningModule.

    Attributes:
        frozen: must not train now.
        thawed: shall train although the user froze them (the recipe's user named them).
        lr_scale: factor on the rate of the parameter's group; missing is 1.
        weight_decay: decay instead of the group's.
        changes: whether ``frozen`` changes during the fit.
    """

    frozen: frozenset[str] = frozenset()
    thawed: frozenset[str] = frozenset()
    lr_scale: Mapping[str, float] = field(default_factory=dict)
    weight_decay: Mapping[str, float] = field(default_factory=dict)
    changes: bool = False

    def joined(self, other: Claim) -> Claim:
        """Both claims of one recipe as one; where both name a parameter's rate or decay, the other's counts."""
        return Claim(
            self.frozen | other.frozen,
            self.thawed | other.thawed,
            {**self.lr_scale, **other.lr_scale},
            {**self.weight_decay, **other.weight_decay},
            self.changes or other.changes,
        )


class ParameterTable:
    """All claims of a Trainer's recipes on the parameters of its module.

    Args:
        trainer, module: the user's.
        flags: the user's own ``requires_grad`` by parameter, taken before any surgery.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, flags: Mapping[Parameter, bool]) -> None:
        self.trainer, self.module = trainer, module
        self._flags = dict(flags)
        self._claims: dict[Recipe, Claim] = {}
        self._names: dict[str, Parameter] = {}
        self._trainable: dict[str, bool] = {}
        self._factors: dict[int, tuple[float, float | None]] = {}
        self._undo: ExitStack | None = None

    # -- claims ------------------------------------------------------------------------------------------------------

    def claim(self, recipe: Recipe, claim: Claim) -> None:
        """Declare or, during the fit at an optimizer-step boundary, change what a recipe wants.

        A change of what trains drops the gradients and optimizer state of what is now frozen and wraps DDP anew; all
        ranks must call it at the same step.

        Raises:
            RecipeError: when nothing would train, or two recipes set one parameter's decay.
        """
        before, self._claims[recipe] = self._claims.get(recipe), claim
        if self._undo is not None:
            self._factors = self._resolve_factors()
            same = before is not None and (before.frozen, before.thawed) == (claim.frozen, claim.thawed)
            if not same and self._apply():  # a schedule may change rates in every step
                rebuild_ddp(self.trainer)

    @property
    def claimed(self) -> bool:
        """Whether any recipe has a say here."""
        return bool(self._claims)

    @property
    def trainable(self) -> int:
        """Number of parameters (scalars) that train now."""
        return sum(p.numel() for p in self.module.parameters() if p.requires_grad)

    def _user_trains(self, name: str, parameter: Parameter) -> bool:
        """What the user wants of a parameter; those that surgery made train."""
        return self._flags.get(parameter, True) or any(name in c.thawed for c in self._claims.values())

    def _resolve_factors(self) -> dict[int, tuple[float, float | None]]:
        factors: dict[int, tuple[float, float | None]] = {}
        for name, parameter in self._names.items():
            scale, decay = 1.0, None
            for recipe, claim in self._claims.items():
                scale *= claim.lr_scale.get(name, 1.0)
                if name in claim.weight_decay:
                    if decay is not None:
                        raise RecipeError(
                            f"{type(recipe).__name__} and another recipe both set the weight decay of {name}"
                        )
                    decay = claim.weight_decay[name]
            if scale != 1.0 or decay is not None:
                factors[id(parameter)] = (scale, decay)
        return factors

    # -- applying --------------------------------------------------------------------------------------------------

    def install(self, undo: ExitStack) -> None:
        """Freeze before the DDP wrap, and see to it that ``configure_optimizers`` finds the user's own flags."""
        self._undo = undo
        undo.callback(self._restore_flags)
        self._names = dict(self.module.named_parameters())
        self._factors = self._resolve_factors()
        if any(c.changes for c in self._claims.values()) and stateful_comm_hook(self.trainer):
            raise RecipeError(
                "a recipe changes what trains during the fit, and DDP's communication hook keeps state (ddp_comm_state)"
                " that the rebuilt wrapper would lose; use the strategy without it"
            )
        self._apply()
        patch = Patch(self.module, "configure_optimizers", lambda: self._configure(patch))
        undo.callback(patch.restore)

    def _apply(self) -> bool:
        wanted = {
            name: self._user_trains(name, parameter) and not any(name in c.frozen for c in self._claims.values())
            for name, parameter in self._names.items()
        }
        if self._flags and not any(wanted.values()):
            names = " and ".join(type(r).__name__ for r in self._claims)
            raise RecipeError(f"{names}: every parameter would be frozen; nothing is left to train")
        changed = wanted != self._trainable
        for name, trains in wanted.items():
            parameter = self._names[name]
            parameter.requires_grad_(trains)
            if not trains:
                parameter.grad = None
                for optimizer in self.trainer.optimizers:
                    optimizer.state.pop(parameter, None)
        self._trainable = wanted
        return changed

    def _restore_flags(self) -> None:
        for parameter, flag in self._flags.items():
            parameter.requires_grad_(flag)
            if not flag:
                parameter.grad = None

    def _configure(self, patch: Patch) -> Any:
        for name, parameter in self._names.items():
            parameter.requires_grad_(self._user_trains(name, parameter))
        try:
            return patch.original()
        finally:
            for name, parameter in self._names.items():
                parameter.requires_grad_(self._trainable[name])

    # -- the optimizer ---------------------------------------------------------------------------------------------

    def attach(self, made: Mapping[str, Parameter], *, whole: bool = True) -> None:
        """Once the optimizers exist and before their state is restored: adopt what surgery made, check, take the step.

        Args:
            made: parameters that surgery made, by name.
            whole: whether the optimizers shall hold all that trains; those of a phase hold what the phase chose.

        Raises:
            RecipeError: for a parameter that shall train and is in no optimizer; for LBFGS.
        """
        optimizers = self.trainer.optimizers
        if not optimizers or self._undo is None:
            return
        held = {id(p) for o in optimizers for g in o.param_groups for p in g["params"]}
        adopted = {n: p for n, p in made.items() if id(p) not in held} if whole else {}
        for name, parameter in adopted.items():
            _group_of_neighbours(optimizers[0], name, self._names)["params"].append(parameter)
        if adopted:
            rank_zero_info(f"{len(adopted)} new parameters joined the groups of {type(optimizers[0]).__name__}")
        held |= {id(p) for p in adopted.values()}
        missing = [n for n, p in self._names.items() if id(p) not in held and self._user_trains(n, p)]
        claimed = set().union(*(c.frozen | c.thawed | c.lr_scale.keys() for c in self._claims.values()), ())
        missing = [n for n in missing if n in claimed and self._opens(n)]
        if missing and whole:
            raise RecipeError(
                f"{len(missing)} parameters that are to train are in no optimizer, the first {missing[0]!r}; give the"
                " optimizer all parameters of the module (self.parameters())"
            )
        if self._factors or any(c.lr_scale or c.weight_decay for c in self._claims.values()):
            for optimizer in optimizers:
                self._scale(optimizer)

    def _opens(self, name: str) -> bool:
        """Whether a parameter trains now or may be opened later."""
        return all(name not in c.frozen or c.changes for c in self._claims.values())

    def _scale(self, optimizer: Optimizer) -> None:
        if isinstance(optimizer, LBFGS):
            raise RecipeError(
                "LBFGS takes one flat step over all parameters; rates per parameter need another optimizer"
            )

        def step(closure: Any = None, *args: Any, **kwargs: Any) -> Any:
            with ExitStack() as groups:
                if closure is None:
                    groups.enter_context(self.expanded(optimizer))
                    return patch.original(*args, **kwargs)

                def then_expand() -> Any:
                    result = closure()
                    groups.close()
                    groups.enter_context(self.expanded(optimizer))
                    return result

                return patch.original(then_expand, *args, **kwargs)

        patch = Patch(optimizer, "step", step)
        self._undo.callback(patch.restore)

    @contextmanager
    def expanded(self, optimizer: Optimizer) -> Iterator[None]:
        """Split the groups by rate and decay for the duration of one update.

        The list of groups is changed in place and put back. A tensor rate is replaced, not multiplied in place. What
        the optimizer writes into a group (a step count, an adapted distance) is carried back from its first part.
        """
        groups = optimizer.param_groups
        at_rest = list(groups)
        parts: list[list[dict[str, Any]]] = [self._split(group) for group in at_rest]
        groups[:] = [part for split in parts for part in split]
        try:
            yield
        finally:
            for group, split in zip(at_rest, parts):
                if split and split[0] is not group:
                    group.update({k: v for k, v in split[0].items() if k not in _RATES})
            groups[:] = at_rest

    def _split(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        by_factor: dict[tuple[float, float | None], list[Parameter]] = {}
        for parameter in group["params"]:
            by_factor.setdefault(self._factors.get(id(parameter), (1.0, None)), []).append(parameter)
        if by_factor.keys() == {(1.0, None)}:
            return [group]
        parts = []
        for (scale, decay), parameters in by_factor.items():
            part = {**group, "params": parameters, "lr": group["lr"] if scale == 1.0 else group["lr"] * scale}
            if decay is not None:
                part["weight_decay"] = decay
            parts.append(part)
        return parts


def _group_of_neighbours(optimizer: Optimizer, name: str, names: Mapping[str, Parameter]) -> dict[str, Any]:
    """The group that holds the parameters nearest to `name` in the module tree; the first one if none is near."""
    place = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    path = name
    while "." in path:
        path = path.rpartition(".")[0]
        for other, parameter in names.items():
            if other.startswith(path + ".") and id(parameter) in place:
                return place[id(parameter)]
    return optimizer.param_groups[0]


def user_flags(module: nn.Module) -> dict[Parameter, bool]:
    """The ``requires_grad`` of every parameter as it stands."""
    return {parameter: parameter.requires_grad for parameter in module.parameters()}


def batch_norms(module: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    """The batch-norm layers whose own parameters are all among `names`."""
    from torch.nn.modules.batchnorm import _BatchNorm

    chosen = set(names)
    found = []
    for path, part in module.named_modules():
        if isinstance(part, _BatchNorm):
            own = [f"{path}.{name}" if path else name for name, _ in part.named_parameters(recurse=False)]
            if own and chosen.issuperset(own):
                found.append(part)
    return found
