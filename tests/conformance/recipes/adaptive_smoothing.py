"""Adaptive smoothing's card in the conformance tests. A fit is none of its business: it looks whether its partner can
be had, and does nothing more."""

from __future__ import annotations

import functools
import math
from typing import Any

from torch import nn

from lightning_recipes.callbacks import AdaptiveSmoothing, BackdoorAdjustment, LangevinMixture
from tests.conformance.misuse import Misuse, argument
from tests.conformance.table import Row
from tests.stock import Classifier, mlp

PARTNER = {"partner": "torch.nn:Linear", "partner_args": {"in_features": 64, "out_features": 10}}  # it is never run

ROWS = [
    Row("adaptive_smoothing", lambda: [AdaptiveSmoothing(**PARTNER)], monitors=True),
]
MEMBERS = {"AdaptiveSmoothing": lambda: AdaptiveSmoothing(**PARTNER)}
REFUSED = {("AdaptiveSmoothing", "BackdoorAdjustment"): "both replace the outputs at evaluation"}
OTHER = {"AdaptiveSmoothing": {"alpha": 0.7}}


def shared() -> Classifier:
    """A module that trains the network that is to be its partner."""
    return Classifier(SHARED)


SHARED = mlp()


def misuses() -> list[Misuse]:
    smooths = functools.partial(Misuse, "AdaptiveSmoothing")
    bad = functools.partial(argument, AdaptiveSmoothing)
    partner: dict[str, Any] = {"partner": nn.Linear(6, 3)}
    one = "give one of alpha, gamma and mixer, the others None; got "
    return [
        bad("partner must be a module, 'package.module:Class' or a timm name; got 3", partner=3),
        bad("partner_args must be None when partner is a module", **partner, partner_args={"bias": False}),
        bad("role must be 'robust' or 'standard'; got 'accurate'", **partner, role="accurate"),
        bad(r"alpha must be in \[0, 1\]; got 1\.2", **partner, alpha=1.2),
        bad(r"alpha must be in \[0, 1\]; got -0\.1", **partner, alpha=-0.1),
        bad("gamma must be a number; got nan", **partner, alpha=None, gamma=math.nan),
        bad(one + r"\['alpha', 'gamma'\]", **partner, gamma=2.0),
        bad(one + r"\[\]", **partner, alpha=None),
        bad(one + r"\['alpha', 'mixer'\]", **partner, mixer="mixer.pt"),
        bad("std_scale must be positive; got 0", **partner, std_scale=0),
        bad("rob_scale must be positive; got -1", **partner, rob_scale=-1),
        bad("mixer must be a file or a Mixer; got Linear", **partner, alpha=None, mixer=nn.Linear(1, 1)),
        bad("eval_affine must be None without a mixer", **partner, eval_affine=[2.0, 1.0]),
        bad(r"eval_affine must be None or \(c, b\)", **partner, alpha=None, mixer="m.pt", eval_affine=[0.0, 1.0]),
        bad(r"alpha_range must be None or \(low, high\)", **partner, alpha=None, mixer="m.pt", alpha_range=[0.9, 1.1]),
        bad("stages must be a list of 'validate', 'test' and 'predict'; got 'test'", **partner, stages="test"),
        bad("stages must be a list of 'validate', 'test' and 'predict'", **partner, stages=["fit"]),
        bad("partner_input_transform must be None or a function; got 3", **partner, partner_input_transform=3),
        smooths(
            "no such partner",
            "partner='no_such_net' must be a module, an import path",
            lambda: [AdaptiveSmoothing("no_such_net")],
        ),
        smooths(
            "a partner that cannot be built",
            "partner='torch.nn:Linear' could not be built",
            lambda: [AdaptiveSmoothing("torch.nn:Linear")],
        ),
        smooths(
            "weights that are not there",
            "partner_checkpoint='no.pt': no such file",
            lambda: [AdaptiveSmoothing(nn.Linear(6, 3), partner_checkpoint="no.pt")],
        ),
        smooths(
            "a partner that trains",
            "partner shares parameters with the module",
            lambda: [AdaptiveSmoothing(SHARED)],
            shared,
        ),
        smooths(
            "no such mixer",
            "mixer='no.pt': there is no such file",
            lambda: [AdaptiveSmoothing(nn.Linear(6, 3), alpha=None, mixer="no.pt")],
        ),
        smooths(
            "a part that is not there",
            "forward must be 'forward' or the name of a submodule",
            lambda: [AdaptiveSmoothing(nn.Linear(6, 3), forward="body")],
        ),
        smooths(
            "another owner of the outputs",
            "AdaptiveSmoothing and LangevinMixture cannot share a Trainer: both replace the outputs at evaluation",
            lambda: [AdaptiveSmoothing(nn.Linear(6, 3)), LangevinMixture()],
        ),
        smooths(
            "the backdoor adjustment beside it",
            "AdaptiveSmoothing and BackdoorAdjustment cannot share a Trainer: both replace the outputs",
            lambda: [AdaptiveSmoothing(nn.Linear(6, 3)), BackdoorAdjustment(["other.ckpt"])],
        ),
    ]
