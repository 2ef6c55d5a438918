"""All misuses: those of the cards, and what every row of the table of recipes must refuse.

The latter come from the rows by themselves; only another value of one argument is asked for, in a card's ``OTHER``.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader

from lightning_recipes.core.recipe import plain

from . import recipes, table
from .misuse import Misuse, manual, saved
from .recipes import AUTOMATIC, MEMBERS, NETWORK, OTHER, ROWS, SURGERY
from .table import Row, small_vit


class FetchesItself(table.Classifier):
    def training_step(self, dataloader_iter: Any) -> Any:
        batch, batch_idx, _ = next(dataloader_iter)
        return super().training_step(batch, batch_idx)


def other_arguments(row: Row, module: Callable[[], LightningModule], before: Callable[[], bytes]) -> list[Misuse]:
    """A resume of the row with one argument of one recipe changed."""
    found = []
    for place, recipe in enumerate(row.recipes()):
        if not recipe.arguments:
            continue
        name = type(recipe).__name__
        ((argument, value),) = OTHER[name].items()

        def changed(place: int = place, argument: str = argument, value: Any = value) -> list[Callback]:
            recipes = row.recipes()
            old = recipes[place]
            recipes[place] = type(old)(**{**old.arguments, argument: value})
            return recipes

        was = re.escape(repr(plain(recipe.arguments[argument])))
        says = rf"other arguments \({argument}={was} in the checkpoint but {value!r} here\)\. Resume with the arguments"
        wrong = f"{row.name} resumed with another {argument}"
        found.append(
            Misuse(
                name, wrong, says, changed, module, lambda: table.batches(row), trainer=row.trainer, checkpoint=before
            )
        )
    return found


def of_every_row() -> list[Misuse]:
    found = []
    for row in ROWS:
        recipes = row.recipes()
        names = [type(recipe).__name__ for recipe in recipes]

        def module(row: Row = row) -> LightningModule:
            return table.stock(row)

        def batches(row: Row = row) -> DataLoader:
            return table.batches(row)

        def iterates(row: Row = row) -> LightningModule:
            return FetchesItself(row.network(), row.optimizer)

        def twice(row: Row = row) -> list[Callback]:
            return [*row.recipes(), row.recipes()[0]]

        validation = (lambda: table.digits()) if row.validation else (lambda: None)
        before = saved(module, row.recipes, batches, validation=validation, max_epochs=2, **row.trainer)
        without = saved(module, list, batches, max_epochs=2)
        bad = functools.partial(Misuse, data=batches, trainer=row.trainer)
        found += other_arguments(row, module, before)
        found.append(
            bad(
                names[0],
                f"{row.name} on training_step(dataloader_iter)",
                r"training_step\(dataloader_iter\) fetches its own batches; recipes need training_step\(batch, ",
                row.recipes,
                iterates,
            )
        )
        found.append(
            bad(
                names[0],
                f"{row.name} twice",
                f"more than one stateful callback of type `{names[0]}`",
                twice,
                module,
                error=RuntimeError,  # Lightning's own
            )
        )
        refusing = "|".join(name for name in names if name in AUTOMATIC)
        if refusing:
            says = f"^({refusing}) .*automatic optimization: .*under manual optimization"
            by_hand = Misuse("", f"{row.name} under manual optimization", says, row.recipes, manual(module))
            found.append(replace(by_hand, data=batches))
        found.append(
            bad(
                "",
                f"{row.name} from a checkpoint that is cut off",
                "the checkpoint .*on_exception.ckpt cannot be read .*; it may be cut off: resume from an earlier",
                row.recipes,
                module,
                checkpoint=lambda before=before: before()[: len(before()) // 2],
            )
        )
        operates = [name for name, r in zip(names, recipes) if name in SURGERY and getattr(r, "rank", 0) is not None]
        for name in operates[:1]:
            found.append(
                bad(
                    name,
                    f"{row.name} from a checkpoint without it",
                    f"the checkpoint was written without {name} and holds no .* Load its weights into",
                    row.recipes,
                    module,
                    checkpoint=without,
                )
            )
    return found


def of_others_checkpoints() -> list[Misuse]:
    """Every recipe resumed from the checkpoint of a run with somebody else's adapters."""

    def on(network: Callable[[], nn.Module]) -> Callable[[], LightningModule]:
        def module() -> LightningModule:
            torch.manual_seed(0)
            return table.Classifier(network())

        return module

    before = {
        (name, network): saved(on(network), lambda name=name: [MEMBERS[name]()], lambda: table.digits())
        for name in [name for name in SURGERY if name not in NETWORK][:2]
        for network in {small_vit, *NETWORK.values()}
    }
    found = {}
    for member, make in MEMBERS.items():
        name = type(make()).__name__
        network = NETWORK.get(name, small_vit)
        owner = next(each for each, _ in before if each != name)
        found[name] = Misuse(
            name,
            f"a checkpoint with the adapters of {owner}",
            f"the checkpoint holds the .* of {owner}, which is not among the Trainer's callbacks. Add it",
            lambda member=member: [MEMBERS[member]()],
            on(network),
            lambda: table.digits(),
            checkpoint=before[owner, network],
        )
    return list(found.values())


MISUSES = [*recipes.MISUSES, *recipes.CANNOT_ATTACH, *of_every_row(), *of_others_checkpoints()]
