"""GLAD: its card in the conformance tests."""

from __future__ import annotations

import functools
from typing import Any

from torch.optim import LBFGS

from lightning_recipes.callbacks import GLAD, PEGO, NormalizedGD
from lightning_recipes.core.recipe import Recipe
from tests.conformance.misuse import (
    SAM,
    Misuse,
    PackedBlock,
    argument,
    finds_no_layers,
    frozen,
    of_adapters,
    stepped_by,
    steps_in_backward,
    trains_nothing,
    with_net,
)
from tests.conformance.table import Row, small_vit

ROWS = [
    Row("glad", lambda: [GLAD(rank=2)], network=small_vit, optimizer="adamw"),
    Row("glad_full", lambda: [GLAD(rank=None)], lambda: [GLAD(0.0, rank=None)], trainer={"gradient_clip_val": 0.5}),
]
MEMBERS = {"GLAD": lambda: GLAD(rank=2), "GLAD of all weights": lambda: GLAD(rank=None)}
AUTOMATIC = ["GLAD"]
SURGERY = ["GLAD"]
OTHER = {"GLAD": {"rho": 0.2}}


class SecondPass(Recipe):
    """Stands for another rule like SAM's."""

    def declare(self, plan: Any) -> None:
        plan.replay_window(lambda optimizer, window: None)


class ProgressiveShrinking(Recipe):
    pass


def misuses() -> list[Misuse]:
    glad = functools.partial(Misuse, "GLAD")
    of_all = lambda: [GLAD(rank=None)]  # noqa: E731
    return [
        argument(GLAD, r"mix must be in \[0, 1\]; got 1\.5", mix=1.5),
        argument(GLAD, r"mix must be in \[0, 1\]; got -0\.1", mix=-0.1),
        argument(GLAD, "rho must be positive; got 0", rho=0),
        argument(GLAD, "rank must be None or at least 1; got 0", rank=0),
        argument(GLAD, "lora_alpha must be positive; got 0", lora_alpha=0),
        argument(GLAD, r"lora_dropout must be in \[0, 1\); got 1\.0", lora_dropout=1.0),
        argument(GLAD, "params must be 'trainable' or 'adapters'; got 'all'", params="all"),
        argument(GLAD, "adapter_dir must be None when rank is None; got 'out'", adapter_dir="out", rank=None),
        argument(GLAD, "params must be 'trainable' when rank is None; got 'adapters'", params="adapters", rank=None),
        glad(
            "dropout on packed attention",
            r"dropout must be 0 on a packed nn\.MultiheadAttention \(net\.attention\.q\)",
            lambda: [GLAD(rank=1, lora_dropout=0.1)],
            with_net(PackedBlock),
        ),
        glad(
            "nothing that trains",
            "no parameter of Classifier requires a gradient; unfreeze what is to train",
            of_all,
            frozen(),
        ),
        glad(
            "an optimizer that calls its closure repeatedly",
            "LBFGS calls its closure several times for one; use another optimizer",
            of_all,
            stepped_by(LBFGS),
        ),
        glad(
            "a user's optimizer that calls its closure repeatedly",
            "SAM calls its closure several times for one; use another optimizer",
            of_all,
            stepped_by(lambda parameters: SAM(parameters, lr=0.1)),
            in_step=True,
        ),
        glad(
            "an optimizer that steps in backward",
            r"a hook that runs as soon as its gradient is there .*; step after backward",
            of_all,
            stepped_by(steps_in_backward),
        ),
        glad(
            "a loss to replay that is not there",
            "replay='nothing' is no method of Classifier",
            lambda: [GLAD(rank=None, replay="nothing")],
        ),
        glad(
            "another recipe with a second pass",
            "GLAD and SecondPass both run a second pass over the window; use one of them",
            lambda: [GLAD(rank=None), SecondPass()],
        ),
        glad(
            "another recipe with further passes",
            "GLAD and ProgressiveShrinking cannot share a Trainer: both run further passes",
            lambda: [ProgressiveShrinking(), GLAD(rank=None)],
        ),
        glad(
            "a recipe that needs the plain gradient",
            "GLAD and NormalizedGD cannot share a Trainer: its factor assumes the plain gradient",
            lambda: [GLAD(rank=None), NormalizedGD()],
        ),
        glad(
            "PEGO beside it",
            "GLAD and PEGO cannot share a Trainer: both adapt the layers' weights",
            lambda: [GLAD(target_modules=["0"]), PEGO(target_modules=["2"])],
        ),
        *of_adapters(GLAD, rank=1),
    ]


def cannot_attach(row: Row) -> list[Misuse]:
    return [trains_nothing(row) if row.recipes()[0].rank is None else finds_no_layers(row)]
