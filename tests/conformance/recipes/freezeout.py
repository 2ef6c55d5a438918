"""FreezeOut in the conformance tests."""

from __future__ import annotations

import functools

from torch.optim import LBFGS

from lightning_recipes.callbacks import FreezeOut, ProgressiveUnfreezing
from tests.conformance.misuse import Misuse, argument, finds_no_layers, head_only, stepped_by
from tests.conformance.table import Row

ROWS = [
    Row("freezeout", lambda: [FreezeOut(["3", "2", ["0", "1"]], t0=0.5, how="squared")]),
    Row("freezeout_auto", lambda: [FreezeOut(t0=0.6, how="linear", scale_lr=False)], optimizer="adamw"),
]
MEMBERS = {"FreezeOut": lambda: FreezeOut(t0=0.5, how="linear")}
REFUSED = {("FreezeOut", "ProgressiveUnfreezing"): "both decide when a layer trains"}
AUTOMATIC = ["FreezeOut"]
OTHER = {"FreezeOut": {"t0": 0.75}}


def misuses() -> list[Misuse]:
    bad = functools.partial(Misuse, "FreezeOut", trainer={"max_epochs": 4})
    setting = functools.partial(FreezeOut, groups=["net.4", "net.2", "net.0"])
    return [
        argument(FreezeOut, "groups must be 'auto' or a list of groups.*; got 'head'", groups="head"),
        argument(FreezeOut, r"groups must be 'auto' or a list of groups.*; got \[\]", groups=[]),
        argument(FreezeOut, r"t0 must be in \(0, 1\]; got 0\.0", t0=0.0),
        argument(FreezeOut, r"t0 must be in \(0, 1\]; got 1\.5", t0=1.5),
        argument(FreezeOut, "how must be 'linear', 'squared' or 'cubic'; got 'sine'", how="sine"),
        argument(FreezeOut, "never must be a list of names; got 'head'", never="head"),
        bad(
            "a parameter in no group",
            r"groups: 2 parameters are in no group, the first 'net\.2\.weight'; add them or put them in never",
            lambda: [setting(groups=["net.4", "net.0"])],
        ),
        bad(
            "a group that matches nothing",
            r"groups: 'nothing' matches no parameter; the module's parts are \['net', 'net\.0', 'net\.2', 'net\.4'\]",
            lambda: [setting(groups=["net.4", "nothing"])],
        ),
        bad(
            "parameters in no optimizer",
            r"4 parameters that are to train are in no optimizer, the first 'net\.0\.weight'; give the optimizer all",
            lambda: [setting()],
            head_only,
        ),
        bad(
            "a fit without an end",
            r"FreezeOut needs Trainer\(max_steps=\.\.\.\) or max_epochs",
            lambda: [setting()],
            trainer={"max_epochs": -1},
        ),
        bad(
            "an optimizer with one flat step",
            "LBFGS takes one flat step over all parameters; rates per parameter need another optimizer",
            lambda: [setting()],
            stepped_by(LBFGS),
        ),
        bad(
            "another owner of what trains",
            "FreezeOut and ProgressiveUnfreezing cannot share a Trainer: both decide when a layer trains",
            lambda: [setting(), ProgressiveUnfreezing(at=(0, 1))],
        ),
    ]


def cannot_attach(row: Row) -> list[Misuse]:
    return [finds_no_layers(row)]
