"""PSKD: its card in the conformance tests."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_recipes.callbacks import GLAD, PSKD, Mixup
from lightning_recipes.core.recipe import StepRecipe
from tests.conformance.misuse import (
    Hidden,
    Misuse,
    MultiLabel,
    Regression,
    Segmentation,
    TwoLosses,
    X,
    Y,
    argument,
    frozen,
    manual,
    saved,
    sees_no_loss,
)
from tests.conformance.recipes.mixing import OfNumbers
from tests.conformance.table import Row
from tests.stock import Classifier, loader

ROWS = [
    Row("ps_kd", lambda: [PSKD()], lambda: [PSKD(0.0)]),
    Row("ps_kd_half_memmap", lambda: [PSKD(dtype="float16", storage="memmap", schedule="constant")]),
    Row("ps_kd_snapshot", lambda: [PSKD(mode="snapshot")], lambda: [PSKD(0.0, mode="snapshot")]),
    Row("mixup+ps_kd", lambda: [Mixup(0.4, across_ranks=True), PSKD()], couples=True),
    Row("ps_kd+glad", lambda: [PSKD(), GLAD(rank=None)]),
    Row("glad+ps_kd_snapshot", lambda: [GLAD(rank=None), PSKD(mode="snapshot")]),
]
MEMBERS = {"PSKD": PSKD}
REFUSED = {("PSKD", "NormalizedGD"): "its step length assumes hard labels"}
OTHER = {"PSKD": {"alpha_T": 0.5}}


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(zip(X, Y))


class Rewrites(StepRecipe):
    """Somebody's own, which does not say where it stands."""

    def transform_targets(self, step: Any, logits: Tensor, targets: Tensor) -> Tensor:
        return targets


def misuses() -> list[Misuse]:
    bad = functools.partial(Misuse, "PSKD")
    in_step = functools.partial(bad, in_step=True)
    ours = lambda: [PSKD()]  # noqa: E731
    needs = r"PSKD\(mode='table'\) needs a stable id per training sample; give a map-style dataset or use mode='snapsho"
    return [
        argument(PSKD, r"alpha_T must be in \[0, 1\]; got 8", alpha_T=8),
        argument(PSKD, r"alpha_T must be in \[0, 1\]; got -0\.1", alpha_T=-0.1),
        argument(PSKD, "max_epochs must be None or at least 1; got -1", max_epochs=-1),
        argument(PSKD, r"schedule must be 'linear', 'constant' or shares .*; got 'cosine'", schedule="cosine"),
        argument(PSKD, r"schedule must be 'linear', 'constant' or shares .*; got \[0\.5, 2\]", schedule=[0.5, 2]),
        argument(PSKD, "mode must be 'table' or 'snapshot'; got 'ema'", mode="ema"),
        argument(PSKD, "dtype must be 'float32' or 'float16'; got 'int8'", dtype="int8"),
        argument(PSKD, "storage must be 'cpu', 'device' or 'memmap'; got 'disk'", storage="disk"),
        argument(PSKD, "num_classes must be None or at least 2; got 1", num_classes=1),
        argument(
            PSKD, "targets must be None or a file, with mode='table'; got 'a.pt'", targets="a.pt", mode="snapshot"
        ),
        bad("a file of targets that is not there", "PSKD: there is no file a.pt", lambda: [PSKD(targets="a.pt")]),
        bad(
            "a run without a number of epochs",
            r"needs the number of epochs that alpha grows over; Trainer\(max_epochs=...\) is -1\. Give PSKD\(",
            ours,
            trainer={"max_epochs": -1, "max_steps": 10},
        ),
        bad("data without an index", needs, ours, data=lambda: DataLoader(Stream(), 4)),
        bad("two loaders", f"{needs}.*there are 2 training loaders", ours, data=lambda: [loader(X, Y), loader(X, Y)]),
        bad(
            "another data set on resume",
            "the training set has 8 samples and the checkpoint's had 16; past predictions belong to their samples",
            ours,
            data=lambda: loader(X[:8], Y[:8]),
            checkpoint=saved(Classifier, ours),
            loads=True,
        ),
        bad(
            "a table larger than memory",
            r"the table takes .*6\.4e\+05 GB .* of main memory .*storage='memmap'.*mode='snapshot' needs none",
            lambda: [PSKD(num_classes=10**13)],
        ),
        bad(
            "a snapshot under manual optimization",
            r"PSKD\(mode='snapshot'\) runs .* needs automatic optimization: .* that step trains; use mode='table'",
            lambda: [PSKD(mode="snapshot")],
            manual(),
        ),
        bad(
            "another recipe that rewrites targets",
            "PSKD and Rewrites both rewrite the targets, and neither says which comes first; use one of them",
            lambda: [Rewrites(), PSKD()],
        ),
        bad(
            "labels mixed after it",
            r"Mixup must stand before PSKD in Trainer\(callbacks=\[...\]\): labels are mixed first, and past",
            lambda: [PSKD(), Mixup()],
        ),
        in_step(
            "other classes than it was told",
            "num_classes=4 and the logits have 3 classes",
            lambda: [PSKD(num_classes=4)],
        ),
        in_step("a regression", r"needs a classification loss .*; the observed one is mse_loss of", ours, Regression),
        in_step("several labels a sample", "the observed one is binary_cross_entropy_with_logits of", ours, MultiLabel),
        in_step("one label a place", r"holds one prediction a sample; .* Use mode='snapshot'", ours, Segmentation),
        in_step("a loss that is not seen", r"no loss was seen .* name any other with criterion=", ours, Hidden),
        in_step("two losses to choose from", r"2 losses .*choose with criterion=INDEX", ours, TwoLosses),
        in_step("a module with everything frozen", r"what needs no gradient: is everything frozen\?", ours, frozen()),
        in_step(
            "a criterion that takes class indices only",
            "criterion='own' takes class indices and a recipe made the targets soft",
            lambda: [PSKD(criterion="own")],
            OfNumbers,
        ),
    ]


def cannot_attach(row: Row) -> list[Misuse]:
    return [sees_no_loss(row)] if row.name != "glad+ps_kd_snapshot" else []
