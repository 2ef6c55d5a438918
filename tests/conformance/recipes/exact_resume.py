"""ExactResume in the conformance tests."""

from __future__ import annotations

from lightning_recipes.callbacks import ExactResume
from tests.conformance.misuse import Misuse, X, Y, saved
from tests.conformance.table import Row
from tests.stock import Classifier, loader

ROWS = [Row("exact_resume", lambda: [ExactResume()], monitors=True)]
MEMBERS = {"ExactResume": ExactResume}


def misuses() -> list[Misuse]:
    exact = lambda: [ExactResume()]  # noqa: E731
    before = saved(Classifier, exact)
    return [
        Misuse(
            "ExactResume",
            "other training data",
            "the training data differ from the checkpoint's: batches is 2, there it was 4; resume with the same data",
            exact,
            data=lambda: loader(X[:8], Y[:8]),
            checkpoint=before,
            loads=True,
        ),
        Misuse(
            "",
            "an empty checkpoint",
            "the checkpoint .*on_exception.ckpt cannot be read .*; it may be cut off: resume from an earlier",
            exact,
            checkpoint=lambda: b"",
        ),
    ]
