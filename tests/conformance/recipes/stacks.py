"""Several recipes in one Trainer."""

from __future__ import annotations

from lightning_recipes.callbacks import AAER, GLAD, PEGO, ProgressiveUnfreezing
from tests.conformance.table import Row, small_vit

ROWS = [
    Row(
        "pego+unfreeze+aaer",
        lambda: [PEGO(2, 2), ProgressiveUnfreezing(at=(0, 1, 2), lr_scale=(1, 1, 0.5)), AAER(0.1)],
        network=small_vit,
        couples=True,
    ),
    Row("aaer+glad", lambda: [AAER(0.1), GLAD(rank=None)], couples=True),
]
