"""GradientNoise: its card in the conformance tests."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.optim import LBFGS, AdamW

from lightning_recipes.callbacks import GradientNoise, LangevinMixture, NormalizedGD
from tests.conformance.misuse import SAM, Misuse, argument, saved, stepped_by
from tests.conformance.table import Row, small_vit
from tests.stock import Classifier

ROWS = [
    Row(
        "gradient_noise",
        lambda: [GradientNoise(0.001)],
        lambda: [GradientNoise(0.0)],
        trainer={"gradient_clip_val": 0.5},
    ),
    Row(
        "gradient_noise_some",
        lambda: [GradientNoise(0.01, start_step=1, parameters=["*.weight"], after_clipping=False)],
        lambda: [GradientNoise(0.0)],
        network=small_vit,
        optimizer="filter",
    ),
]
MEMBERS = {"GradientNoise": lambda: GradientNoise(0.001)}
AUTOMATIC = ["GradientNoise"]
OTHER = {"GradientNoise": {"gamma": 0.25}}


class Words(Classifier):
    """An embedding whose gradients are sparse, as its module says, or as only its call does."""

    def __init__(self, says: bool) -> None:
        super().__init__(nn.Linear(4, 3))
        self.words, self.says = nn.Embedding(9, 4, sparse=says), says

    def forward(self, x: Tensor) -> Tensor:
        index = x.argmax(1)
        return self.net(self.words(index) if self.says else F.embedding(index, self.words.weight, sparse=True))


def _noise(**arguments: Any) -> list[GradientNoise]:
    return [GradientNoise(**arguments)]


def _half() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))


def misuses() -> list[Misuse]:
    noise = functools.partial(Misuse, "GradientNoise")
    return [
        argument(GradientNoise, "eta must be a variance, at least 0 and finite; got -0.1", eta=-0.1),
        argument(GradientNoise, "eta must be .* finite; got inf", eta=math.inf),
        argument(GradientNoise, "eta must be .* finite; got nan", eta=math.nan),
        argument(GradientNoise, "gamma must be at least 0 and finite; got -0.55", gamma=-0.55),
        argument(GradientNoise, "start_step must be at least 0; got -1", start_step=-1),
        argument(GradientNoise, "stop_step must be None or above start_step=0; got 0", stop_step=0),
        argument(GradientNoise, "stop_step must be None or above start_step=9; got 5", start_step=9, stop_step=5),
        argument(GradientNoise, r"parameters must be None, .* at least one part; got \[\]", parameters=[]),
        noise(
            "a name that matches nothing",
            r"parameters: 'nothing' matches no parameter; the module's parts are \['net', 'net\.0', 'net\.2', 'net\.4",
            lambda: _noise(parameters="nothing"),
        ),
        noise(
            "a function that chooses nothing",
            r"parameters: the function chooses no parameter; the module's parts are \['net', 'net\.0'",
            lambda: _noise(parameters=lambda name, parameter: parameter.dim() == 4),
        ),
        noise(
            "other parameters on a resume",
            r"`parameters` chose 2 parameters, the first 'net\.0\.bias' there and chooses all here\. Resume with the",
            _noise,
            checkpoint=saved(Classifier, lambda: _noise(parameters=["0"])),
        ),
        noise(
            "an embedding with sparse gradients",
            "words has sparse gradients, and noise is dense; make it with sparse=False",
            _noise,
            lambda: Words(True),
        ),
        noise(
            "a sparse gradient that nothing told of",
            "a gradient is sparse, and noise is dense; make it with sparse=False",
            _noise,
            lambda: Words(False),
            in_step=True,
        ),
        noise(
            "an optimizer that calls its closure repeatedly",
            "LBFGS calls its closure several times for one; use another optimizer",
            _noise,
            stepped_by(LBFGS),
        ),
        noise(
            "a user's optimizer that calls its closure repeatedly",
            "SAM calls its closure several times for one; use another optimizer",
            _noise,
            stepped_by(lambda parameters: SAM(parameters, lr=0.1)),
            in_step=True,
        ),
        noise(
            "a fused optimizer under fp16",
            r"AdamW\(fused=True\) unscales inside its step; use fused=False or bf16-mixed",
            _noise,
            stepped_by(lambda parameters: AdamW(parameters, fused=True)),
            trainer={"plugins": [_half()]},
        ),
        noise(
            "another recipe that adds noise",
            "GradientNoise and LangevinMixture cannot share a Trainer: both add noise",
            lambda: [GradientNoise(), LangevinMixture()],
        ),
        noise(
            "a recipe after it that scales the gradient",
            r"NormalizedGD must stand before GradientNoise in Trainer\(callbacks=\[\.\.\.\]\): the noise is added",
            lambda: [GradientNoise(), NormalizedGD(require_full_batch=False)],
        ),
    ]
