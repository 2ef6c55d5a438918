"""The surgery socket: parts of the user's network replaced or added, and taken out, merged or kept at the end.

A recipe declares a :class:`Surgery`, a description in plain values and tensors. It is carried out once the network
exists and before weights load, optimizers are made and DDP wraps; what it came to is stored in checkpoints, from which
the same structure is built again for a resume, and for validate, test and predict.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Protocol

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer


class Surgery(Protocol):
    """What shall be done to a module: a frozen dataclass of plain values, lists, dicts and tensors.

    Attributes:
        what: a noun for messages, as 'adapters' or 'a projection head'.
        on_weights: whether it adapts the layers' weights; two such in one Trainer are refused.
        stock_keys: whether a module that carries it saves its state under the names of one that does not; left out it
            does not.
    """

    what: ClassVar[str]
    on_weights: ClassVar[bool]

    def operate(self, module: pl.LightningModule) -> Operation:
        """Change the module: the same way on every rank, and without touching the global random state.

        Raises:
            RecipeError: when the module cannot take it; nothing is changed then.
        """

    def present(self, module: pl.LightningModule) -> bool:
        """Whether the module carries it already, kept from an earlier fit."""


@dataclass
class Operation:
    """A surgery that is in place.

    Attributes:
        module: the user's.
        spec: the surgery as it was carried out, with everything decided (sizes, chosen entries): what a checkpoint
            stores.
        made: the parameters that it made, by name in the module.
        kept_whole: names of the parameters that train beside them while all others are frozen; None freezes nothing.
        lr_scale, weight_decay: of parameters by name, as in :class:`~lightning_recipes.core.parameters.Claim`.
        undo: what takes it out again.
    """

    module: pl.LightningModule
    spec: Any
    made: dict[str, Parameter] = field(default_factory=dict)
    kept_whole: list[str] | None = None
    lr_scale: dict[str, float] = field(default_factory=dict)
    weight_decay: dict[str, float] = field(default_factory=dict)
    undo: ExitStack = field(default_factory=ExitStack, repr=False)

    def take_places(self, optimizers: Sequence[Optimizer]) -> None:
        """Put the made parameters where they belong in new optimizers, before any state is restored.

        They are in there already: where the module put them, or beside their neighbours.
        """

    def remove(self, *, merge: bool) -> None:
        """Give the module its stock structure back; `merge` folds in what was trained, where that can be done."""
        self.undo.close()
        self.made = {}


class Writing:
    """Values that a recipe writes over parameters before training begins: before surgery, so that adapters stand on
    them, or after it, over the parameters that it made; and before a checkpoint is restored, which writes over them in
    turn.

    What stood there is kept until :meth:`settle` and comes back with :meth:`take_back`, so that a fit that is refused
    leaves the module as it was.

    Args:
        module: the user's.
        values: from nothing to the new values by the parameter's name; they may be fewer than all.
        after_surgery: whether they are written once all surgery is done.
    """

    def __init__(
        self, module: pl.LightningModule, values: Callable[[], Mapping[str, Tensor]], after_surgery: bool = False
    ) -> None:
        self.module, self._values, self.after_surgery = module, values, after_surgery
        self._before: dict[Parameter, Tensor] = {}

    @torch.no_grad()
    def write(self) -> None:
        """Write them."""
        parameters = dict(self.module.named_parameters())
        for name, value in self._values().items():
            self._before[parameters[name]] = parameters[name].detach().clone()
            parameters[name].copy_(value)

    def settle(self) -> None:
        """Training has begun: they stay."""
        self._before.clear()

    @torch.no_grad()
    def take_back(self) -> None:
        """Put back what stood there, unless they are settled."""
        for parameter, value in self._before.items():
            parameter.copy_(value)
        self._before.clear()


def as_structure(spec: Surgery) -> dict[str, Any]:
    """A surgery as a checkpoint takes it. A field with ``metadata={"stored": False}`` (a module of the user's) is left
    out: the recipe gives it anew."""
    stored = [f.name for f in fields(spec) if f.init and f.metadata.get("stored", True)]
    values = {name: getattr(spec, name) for name in stored}
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
    return {"what": spec.what, "stock_keys": getattr(spec, "stock_keys", False), "spec": plain}


def stored_in(section: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What a recipe's section of a checkpoint holds of its surgery, None for nothing."""
    return (section or {}).get("structure")


def rebuilt(spec: Surgery, stored: Mapping[str, Any]) -> Surgery:
    """The surgery that a checkpoint describes, of the kind of `spec`."""
    return replace(spec, **stored["spec"])
