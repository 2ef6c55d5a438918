"""Taking hold of predictions: what ``trainer.predict`` returns is what ``predict_step`` returns.

A callback's hook sees that result and cannot replace it. So the socket wraps ``predict_step`` on the instance, as the
step socket does with ``training_step``; under DDP the strategy looks the step up on the instance too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

from lightning_recipes.core.patch import Patch

Predict = Callable[[Any], Any]
"""The prediction for a batch: the module's own, or that of whoever wrapped it before."""

Around = Callable[[Predict, Any], Any]
"""From what predicts and a batch to the prediction: may change either, or call `predict` several times or never."""


def wrap_predictions(module: pl.LightningModule, around: Around) -> Callable[[], None]:
    """Have every prediction of a module go through a function, until the returned one is called.

    Several wrap each other: the last one sees the loader's batch first and its result is what is returned.

    Args:
        module: its ``predict_step`` may be Lightning's, which calls the module, or its own.
        around: called with what predicts and the batch; batch and loader index are passed on by `predict`.
    """

    def step(batch: Any, *rest: Any, **named: Any) -> Any:
        return around(lambda each: patch.original(each, *rest, **named), batch)

    patch = Patch(module, "predict_step", step, compiled=False)
    return patch.restore
