"""WiSEFT and BANG: their card in the conformance tests."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from torch import Tensor

from lightning_recipes.callbacks import AAER, BANG, PEGO, WiSEFT
from tests.conformance.misuse import (
    LAYERS,
    Misuse,
    MultiLabel,
    Regression,
    Segmentation,
    X,
    Y,
    argument,
    manual,
    saved,
    sees_no_loss,
)
from tests.conformance.recipes.mixing import Probabilities
from tests.conformance.table import Row
from tests.stock import Classifier, loader, mlp

ROWS = [
    Row("wise", lambda: [WiSEFT(0.5)], lambda: [WiSEFT(1.0)]),
    Row("wise_fisher", lambda: [WiSEFT(0.5, fisher=True, scope=["0", "2"], buffers="interpolate")], couples=True),
    Row(
        "bang",
        lambda: [BANG(0.5, across_ranks=True)],
        lambda: [BANG(1.0, label_smoothing=0.0, mixup_alpha=0.0)],
        couples=True,
    ),
    Row("bang_smoothing", lambda: [BANG(0.5, mixup_alpha=0.0)]),
]
MEMBERS = {"WiSEFT": lambda: WiSEFT(0.5), "BANG": lambda: BANG(0.5, across_ranks=True)}
REFUSED = {
    ("WiSEFT", "BANG"): "both decide with which weights the network is evaluated",
    ("BANG", "Mixup"): "both soften the labels; choose one",
    ("BANG", "CutMix"): "both soften the labels; choose one",
    ("WiSEFT", "LEVI"): "leaves the network with another structure",
    ("BANG", "LEVI"): "leaves the network with another structure",
}
OTHER = {"WiSEFT": {"alpha": 0.25}, "BANG": {"label_smoothing": 0.25}}


class Smooths(Classifier):
    """A loss that smooths labels itself."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1], label_smoothing=0.3)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()


def _file(name: str, classes: int = 3, leave_out: str = "") -> str:
    """A file with the weights of a network."""
    path = Path(_folder().name, name)
    if not path.exists():
        state = {k: v for k, v in Classifier(mlp(classes=classes)).state_dict().items() if k != leave_out}
        torch.save(state, path)
    return str(path)


def of_both(recipe: Callable[..., Any]) -> list[Misuse]:
    name = recipe.__name__
    misuse = functools.partial(Misuse, name)
    curve = lambda: [recipe(grid=[0.5])]  # noqa: E731
    validation = lambda: loader(X, Y)  # noqa: E731
    owns = f"{name} and .*WeightAveraging cannot share a Trainer: both decide with which weights"
    found = [
        argument(recipe, r"alpha must be in \[0, 1\], .*; got 1\.5", alpha=1.5),
        argument(recipe, r"alpha must be in \[0, 1\], .*; got -0\.1", alpha=-0.1),
        argument(recipe, r"grid must be None or at least one weight in \[0, 1\]; got \[\]", grid=[]),
        argument(recipe, r"grid must be weights in \[0, 1\]; got \[0\.5, 2\]", grid=[0.5, 2]),
        argument(recipe, r"scope must be None or names of at least one part; got \[\]", scope=[]),
        argument(recipe, "buffers must be 'interpolate', 'finetuned' or 'recalibrate'; got 'mean'", buffers="mean"),
        argument(recipe, r"fisher_floor must be positive; got 0\.0", fisher_floor=0.0),
        misuse(
            "a reference that is not there",
            "reference='nowhere.pt' is 'init' or the path of a file; there is none at /",
            lambda: [recipe(reference="nowhere.pt")],
        ),
        misuse(
            "a reference of an unknown kind",
            r"reference='.+' must be a \.safetensors, \.pt, \.pth or \.ckpt file",
            lambda: [recipe(reference=__file__)],
        ),
        misuse(
            "a reference with another head",
            r"has 'net\.4\.weight' of shape \(5, 5\) and the module \(3, 5\); leave what differs, a new head, out of",
            lambda: [recipe(reference=_file("head.pt", classes=5))],
        ),
        misuse(
            "a reference without a part of the module",
            r"has no 'net\.2\.bias'; leave what is new in the module out of scope",
            lambda: [recipe(reference=_file("less.pt", leave_out="net.2.bias"))],
        ),
        misuse(
            "a scope that matches nothing",
            r"scope: 'nothing' matches no parameter; the module's parts are \['net', 'net\.0', 'net\.2', 'net\.4",
            lambda: [recipe(scope=["nothing"])],
        ),
        misuse("a curve without validation data", r"grid=\[0\.5\] needs validation data to measure on", curve),
        misuse(
            "a curve over a module that steps by hand",
            "grid runs the module's training step to look at it, and needs automatic optimization",
            curve,
            manual(),
            validation=validation,
        ),
        misuse(
            "a resume from a run without it",
            f"written without {name}, so that the weights before fine-tuning are not in it; give them by ref.*=PATH",
            lambda: [recipe()],
            checkpoint=saved(Classifier, lambda: []),
        ),
        misuse(
            "a resume from averaged weights",
            "written after the fit ended and holds averaged weights; .* Load its weights into the module and start a",
            lambda: [recipe()],
            checkpoint=saved(Classifier, lambda: [recipe()], merged=True),
        ),
        misuse("Lightning's moving average beside it", owns, lambda: [recipe(), EMAWeightAveraging()]),
        misuse("Lightning's SWA beside it", owns, lambda: [recipe(), StochasticWeightAveraging(0.1)]),
        misuse(
            "adapters that stay in the module",
            f"{name} and PEGO cannot share a Trainer: PEGO leaves the network with another structure",
            lambda: [PEGO(1, 2, target_modules=LAYERS, merge_on_end=False), recipe()],
        ),
    ]
    for kind, wrong in ((Regression, "a regression"), (MultiLabel, "several labels"), (Segmentation, "a segmentation")):
        says = r"(grid|fisher) needs a classification loss of logits \[n, classes\]; the observed one got"
        found.append(misuse(f"a curve over {wrong}", says, curve, kind, validation=validation))
        found.append(misuse(f"Fisher information of {wrong}", says, lambda: [recipe(fisher=True)], kind))
    return found


def misuses() -> list[Misuse]:
    in_step = functools.partial(Misuse, "BANG", in_step=True)
    bang = lambda: [BANG()]  # noqa: E731
    return [
        *of_both(WiSEFT),
        *of_both(BANG),
        argument(BANG, r"label_smoothing must be in \[0, 1\); got 1\.0", label_smoothing=1.0),
        argument(BANG, r"label_smoothing must be in \[0, 1\); got -0\.1", label_smoothing=-0.1),
        argument(BANG, "mixup_alpha must be at least 0 and finite; got -1", mixup_alpha=-1),
        in_step(
            "a loss that smooths labels", r"the module's loss smooths labels by 0\.3 already; take that", bang, Smooths
        ),
        in_step("soft targets", r"softens class indices; the targets are probabilities \(4, 3\)", bang, Probabilities),
        in_step("several labels a sample", r"_with_logits got targets \(4, 3\) .*several labels", bang, MultiLabel),
        in_step("a segmentation", r"got targets \(4, 1\) for \(4, 3, 1\): .*segmentation", bang, Segmentation),
        in_step("a regression", r"mse_loss got targets \(4, 3\) .*regression are not supported", bang, Regression),
        in_step(
            "batches of 1", "needs at least 2 samples to mix; the batch has 1", bang, data=lambda: loader(X, Y, size=1)
        ),
        Misuse(
            "BANG",
            "the attack before it",
            r"BANG must stand before AAER in Trainer\(callbacks=\[\.\.\.\]\): the attack must start from the mixed",
            lambda: [AAER(0.1), BANG()],
        ),
    ]


def cannot_attach(row: Row) -> list[Misuse]:
    """Without a curve WiSEFT averages any module."""
    return [sees_no_loss(row)] if row.name.startswith("bang") else []
