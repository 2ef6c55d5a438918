"""The lightweight-CNN paper's unified model under ProgressiveUnfreezing: its card in the conformance tests."""

from __future__ import annotations

from torch import nn

from lightning_recipes.callbacks import ProgressiveUnfreezing
from lightning_recipes.core.schedule import EveryN
from lightning_recipes.modules import LightweightCNN, UnifiedClassifier
from tests.conformance.misuse import Misuse
from tests.conformance.table import Row
from tests.stock import Classifier


def unified() -> nn.Module:
    """Two branches of 8x8 grey images and a new head."""
    return UnifiedClassifier(*(LightweightCNN(size=8, padding=1) for _ in range(2)))


def _unfreeze(groups: list[list[str]] | None = None) -> ProgressiveUnfreezing:
    paper = [["head"], ["a.conv2", "b.conv2"], ["a.conv1", "b.conv1"]]
    return ProgressiveUnfreezing(groups=groups or paper, at=EveryN(1), lr_scale=None)


ROWS = [Row("unfreeze_unified", lambda: [_unfreeze()], network=unified)]


def misuses() -> list[Misuse]:
    def bad(wrong: str, says: str, groups: list[list[str]]) -> Misuse:
        return Misuse(
            "ProgressiveUnfreezing",
            wrong,
            says,
            lambda: [_unfreeze(groups)],
            lambda: Classifier(unified()),
            trainer={"max_epochs": 4},
        )

    return [
        bad(
            "one branch's layers left out",
            r"groups: 4 parameters are in no group, the first 'net\.b\.conv1\.weight'; add them or put them in never",
            [["head"], ["a.conv2"], ["a.conv1"]],
        ),
        bad(
            "the branches' old classifiers first, which were cut off: an empty first step",
            r"every parameter would be frozen; nothing is left to train",
            [["a.head", "b.head"], ["head"], ["a.conv2", "b.conv2"], ["a.conv1", "b.conv1"]],
        ),
    ]
