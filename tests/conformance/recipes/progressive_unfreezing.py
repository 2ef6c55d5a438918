"""ProgressiveUnfreezing: its card in the conformance tests."""

from __future__ import annotations

import functools
import math
from typing import Any

from lightning.pytorch.callbacks import BackboneFinetuning
from torch.optim import LBFGS

from lightning_recipes.callbacks import GLAD, ProgressiveUnfreezing
from lightning_recipes.core.schedule import At, EveryN, Plateau
from tests.conformance.misuse import Backbone, Misuse, argument, finds_no_layers, head_only, stepped_by
from tests.conformance.table import Row


def _unfreeze(**arguments: Any) -> ProgressiveUnfreezing:
    return ProgressiveUnfreezing(
        groups=["3", "2", ["0", "1"]], **{"at": (0, 1, 2), "lr_scale": (1, 0.5, 0.25), **arguments}
    )


ROWS = [
    Row("unfreeze", lambda: [_unfreeze()], lambda: [_unfreeze(at=(0, 0, 0), lr_scale=1.0)]),
    Row("unfreeze_filter", lambda: [_unfreeze()], optimizer="filter"),
    Row("unfreeze_drop", lambda: [_unfreeze(mechanism="drop_grad")]),
    Row("unfreeze_steps", lambda: [_unfreeze(at=At((0, 2, 5), "step"))]),
    Row("unfreeze_every", lambda: [ProgressiveUnfreezing(at=EveryN(1), lr_scale=0.5)], optimizer="adamw"),
    Row("unfreeze_probe", lambda: [_unfreeze(at=(0, 1, 1), probe_epochs=1, probe_lr=0.01)], optimizer="adamw"),
    Row("unfreeze+glad", lambda: [_unfreeze(), GLAD(rank=None)]),
]
MEMBERS = {"ProgressiveUnfreezing": lambda: ProgressiveUnfreezing(at=(0, 1, 2), lr_scale=(1, 1, 0.5))}
AUTOMATIC = ["ProgressiveUnfreezing"]
OTHER = {"ProgressiveUnfreezing": {"bn": "train"}}


def misuses() -> list[Misuse]:
    unfreeze = ProgressiveUnfreezing
    setting = functools.partial(ProgressiveUnfreezing, groups=["net.4", "net.2", "net.0"], at=(0, 1, 2), lr_scale=None)
    bad = functools.partial(Misuse, "ProgressiveUnfreezing", trainer={"max_epochs": 4})
    parts = r"the module's parts are \['net', 'net\.0', 'net\.2', 'net\.4'\]"
    times = r"at must be epochs or steps \(int\), fractions in \[0, 1\] \(float\) or inf; got "
    positive = "lr_scale must be 'paper', None, or positive: one a group or one ratio; got "
    missing = r"4 parameters that are to train are in no optimizer, the first 'net\.0\.weight'; give the optimizer all"
    return [
        argument(unfreeze, "groups must be 'auto' or a list of groups.*; got 'head'", groups="head"),
        argument(unfreeze, r"groups must be 'auto' or a list of groups.*; got \[\]", groups=[]),
        argument(unfreeze, r"groups must be 'auto' or a list of groups.*; got \[\[\]\]", groups=[[]]),
        argument(unfreeze, "bn must be 'follow', 'train' or 'eval'; got 'frozen'", bn="frozen"),
        argument(unfreeze, "probe_epochs must be at least 0; got -1", probe_epochs=-1),
        argument(unfreeze, "probe_lr must be positive; got 0", probe_lr=0),
        bad(
            "a probe that leaves no epoch",
            r"probe_epochs=4 leaves no epoch of Trainer\(max_epochs=4\) for what comes after",
            lambda: [setting(probe_epochs=4)],
        ),
        bad(
            "a probe in a fit without an end",
            r"probe_epochs=2 leaves no epoch of Trainer\(max_epochs=-1\) for what comes after",
            lambda: [setting(probe_epochs=2)],
            trainer={"max_epochs": -1, "max_steps": 3},
        ),
        argument(unfreeze, "mechanism must be 'auto', 'rewrap' or 'drop_grad'; got 'fast'", mechanism="fast"),
        argument(unfreeze, positive + r"\(1\.0, 0\.0\)", lr_scale=(1.0, 0.0)),
        argument(unfreeze, positive + r"\(\)", lr_scale=()),
        argument(unfreeze, positive + "'papr'", lr_scale="papr"),
        argument(unfreeze, r"weight_decay must be non-negative; got \(-1\.0,\)", weight_decay=(-1.0,)),
        argument(unfreeze, "never must be a list of names; got 'head'", never="head"),
        argument(unfreeze, r"at must be a list of times, At, EveryN or Plateau; got 0\.5", at=0.5),
        argument(unfreeze, r"at must be the time of at least one group; got \(\)", at=()),
        Misuse("At", "a fraction above 1", times + r"1\.5", lambda: [unfreeze(at=(0, 1.5))]),
        Misuse("At", "a time before the start", times + "-1", lambda: [unfreeze(at=(0, -1))]),
        argument(At, "unit must be 'epoch' or 'step'; got 'batch'", at=(0,), unit="batch"),
        argument(EveryN, "n must be at least 1; got 0", n=0),
        argument(EveryN, "unit must be 'epoch' or 'step'; got 'batch'", n=1, unit="batch"),
        argument(Plateau, "patience must be at least 1; got 0", patience=0),
        argument(Plateau, "mode must be 'min' or 'max'; got 'up'", mode="up"),
        bad("times that decrease", r"at must not decrease; got \[0, 2, 1\]", lambda: [setting(at=(0, 2, 1))]),
        bad("too few times", "at has 2 times for 3 groups; give one time a group", lambda: [setting(at=(0, 1))]),
        bad("too few times, all of them 0", "at has 2 times for 3 groups; give one time", lambda: [setting(at=(0, 0))]),
        bad(
            "more times than the network has layers",
            r"at has 4 times and the network 3 groups \['head', 'net\.2', 'net\.0'\]",
            lambda: [setting(groups="auto", at=(0, 1, 2, 3))],
        ),
        bad(
            "more rates than groups",
            "lr_scale has 4 factors for 3 groups; give at most one a group",
            lambda: [setting(lr_scale=(1.0,) * 4)],
        ),
        bad(
            "too few decays",
            "weight_decay has 1 values for 3 groups; give one a group",
            lambda: [setting(weight_decay=(0.1,))],
        ),
        bad(
            "a group that matches nothing",
            f"groups: 'nothing' matches no parameter; {parts}",
            lambda: [setting(groups=["net.4", "nothing"], at=(0, 1))],
        ),
        bad(
            "a group that matches nothing, awake from the start",
            f"groups: 'nothing' matches no parameter; {parts}",
            lambda: [setting(groups=["nothing"], at=(0,))],
        ),
        bad(
            "a part never to train that matches nothing",
            f"never: 'nothing' matches no parameter; {parts}",
            lambda: [setting(never=["nothing"])],
        ),
        bad(
            "a parameter in two groups",
            r"groups: parameter 'net\.4\.weight' is in \['net\.4'\] and in \['net'\]",
            lambda: [setting(groups=["net.4", "net"], at=(0, 1))],
        ),
        bad(
            "a parameter in a group that is never to train",
            r"groups: parameter 'net\.4\.weight' is in never and in \['net\.4'\]",
            lambda: [setting(never=["head"])],
        ),
        bad(
            "a parameter in no group",
            r"groups: 2 parameters are in no group, the first 'net\.2\.weight'; add them or put them in never",
            lambda: [setting(groups=["net.4", "net.0"], at=(0, 1))],
        ),
        bad(
            "the head alone, with the rest in no group",
            r"groups: 4 parameters are in no group, the first 'net\.0\.weight'; add them or put them in never",
            lambda: [unfreeze(groups=["head"], at=(0,))],
        ),
        bad(
            "nothing that ever trains",
            "every parameter would be frozen; nothing is left to train",
            lambda: [setting(at=(math.inf,) * 3, mechanism="rewrap")],
        ),
        bad("parameters in no optimizer", missing, lambda: [setting()], head_only),
        bad("parameters in no optimizer, drop_grad", missing, lambda: [setting(mechanism="drop_grad")], head_only),
        bad(
            "fractions of a fit without an end",
            r"at=\[0, 0\.5, 0\.6\] in fractions of the fit needs Trainer\(max_epochs=\.\.\.\); it is -1.*, or give",
            lambda: [setting(at=(0, 0.5, 0.6))],
            trainer={"max_epochs": -1, "max_steps": 3},
        ),
        bad(
            "a plateau without validation",
            r"at=Plateau\(\.\.\.\) wakes groups after validations, and this fit has none; give it validation data, or",
            lambda: [setting(at=Plateau("val/loss"))],
        ),
        bad(
            "an optimizer with one flat step",
            "LBFGS takes one flat step over all parameters; rates per parameter need another optimizer",
            lambda: [setting()],
            stepped_by(LBFGS),
        ),
        bad(
            "Lightning's own finetuning beside it",
            "ProgressiveUnfreezing and BackboneFinetuning both decide what trains; use one of them",
            lambda: [setting(), BackboneFinetuning(unfreeze_backbone_at_epoch=1)],
            Backbone,
        ),
    ]


def cannot_attach(row: Row) -> list[Misuse]:
    return [finds_no_layers(row)]
