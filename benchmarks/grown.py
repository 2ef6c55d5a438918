"""Cases grown along one axis: more recipes, more parameters, more parameter tensors, or more samples.

Their names say what they are, ``GradientNoise @ parameters 1000000``, so that another process builds the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise

import lightning.pytorch as pl
from torch import nn

from benchmarks.cases import CASES, LONG_TAIL, Case
from lightning_recipes.callbacks import (
    AAER,
    PSKD,
    BayesErrorMonitor,
    DataDiet,
    DropBlock,
    GradientNoise,
    LogitAdjustment,
    LongTailMonitor,
    Mixup,
    PrePostMonitor,
    ProgressiveUnfreezing,
    SmallInit,
    WiSEFT,
)

AXES: dict[str, tuple[int, ...]] = {
    "recipes": (1, 2, 4, 8),
    "parameters": (10**6, 10**7, 10**8),
    "tensors": (10, 100, 1000),
    "samples": (10**3, 10**4, 10**5, 10**6),
}
"""What grows, and the sizes that it is measured at. Tensors share `SHARED` parameters."""
SHARED = 10**6
DEPTH = 8  # layers of a network that grows in width
IMAGE = (3, 4)  # channels and edge: a million of them are 0.2 GB
INPUTS, CLASSES = IMAGE[0] * IMAGE[1] ** 2, 10

# Attached in this order, the first so many of them; each at the setting at which it does nothing.
NEUTRAL: tuple[Callable[[], pl.Callback], ...] = (
    lambda: AAER(0.0),
    lambda: LogitAdjustment(LONG_TAIL, tau=0.0),
    lambda: GradientNoise(0.0),
    lambda: DropBlock(0.0),
    lambda: PSKD(0.0),
    lambda: WiSEFT(1.0),
    lambda: Mixup(0.0),
    lambda: SmallInit(1.0),
)

# What grows along which axis, by the name of a case; the baseline of each is 'plain'.
GROWS: dict[str, tuple[str, ...]] = {
    "recipes": ("neutral",),
    "parameters": (
        "AAER",
        "BANG, fine-tuning",
        "ExactResume",
        "FreezeOut",
        "GLAD, all weights",
        "GradientNoise",
        "NormalizedGD",
        "ProgressiveUnfreezing, all",
        "PSKD, snapshot",
        "SLCA",
        "WiSEFT",
    ),
    "samples": (
        "BayesErrorMonitor",
        "DataDiet, el2n",
        "DataDiet, forgetting",
        "ExactResume",
        "LogitAdjustment, counted",
        "LongTailMonitor",
        "PrePostMonitor",
        "PruneTrainSet",
        "PSKD, snapshot",
        "PSKD, table",
    ),
}
GROWS["tensors"] = GROWS["parameters"]


def width_of(parameters: int, hidden: int) -> int:
    """Of an MLP with so many hidden layers, that it has about so many parameters: the root of
    (hidden - 1) w^2 + (inputs + classes + hidden) w + classes = parameters."""
    a, b, c = hidden - 1, INPUTS + CLASSES + hidden, CLASSES - parameters
    return max(1, round((math.sqrt(b * b - 4 * a * c) - b) / (2 * a)))


def mlp(parameters: int, hidden: int) -> nn.Sequential:
    """An MLP of about so many parameters in 2 (hidden + 1) tensors, from images 3 x 4 x 4 to 10 classes; every layer
    with its activation is a part of its own, so that what works in blocks finds them."""
    width = width_of(parameters, hidden)
    sizes = [INPUTS, *[width] * hidden]
    layers = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(sizes)]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(width, CLASSES))


def grown(what: str, axis: str, size: int) -> Case:
    """What `what` names, at that size.

    Raises:
        KeyError: there is no such thing.
    """
    if axis == "recipes":
        return replace(CASES["nothing"], recipes=lambda: [make() for make in NEUTRAL[:size]], loop=None, neutral=None)
    parameters, hidden = {
        "parameters": (size, DEPTH),
        "tensors": (SHARED, size // 2 - 1),
        "samples": (20_000, 2),
    }[axis]
    network = partial(mlp, parameters, hidden)
    samples = size if axis == "samples" else None
    return replace(_base(what, hidden), network=network, image=IMAGE, samples=samples, loop=None, neutral=None)


def _base(what: str, hidden: int) -> Case:
    """A case, if need be with arguments that suit an MLP of so many hidden layers."""
    own = {
        "plain": Case("resnet", list),
        "BayesErrorMonitor": Case("resnet", lambda: [BayesErrorMonitor(max_samples=256)], validates=True),
        "DataDiet, el2n": Case("resnet", lambda: [DataDiet("el2n", 1)]),
        "LogitAdjustment, counted": Case("resnet", lambda: [LogitAdjustment()]),
        "LongTailMonitor": Case("resnet", lambda: [LongTailMonitor()], validates=True),
        "ProgressiveUnfreezing, all": Case(
            "resnet", lambda: [ProgressiveUnfreezing(at=(0,) * (hidden + 1), lr_scale=0.9)]
        ),
        "PrePostMonitor": Case("resnet", lambda: [PrePostMonitor(max_samples=256)], validates=True),
    }
    return own[what] if what in own else CASES[what]


def find(name: str) -> Case:
    """A case by its name, grown where the name says so."""
    what, grows, at = name.partition(" @ ")
    if not grows:
        return CASES[name]
    axis, size = at.split()
    return grown(what, axis, int(size))
