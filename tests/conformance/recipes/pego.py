"""PEGO: its card in the conformance tests."""

from __future__ import annotations

import functools

from lightning_recipes.callbacks import PEGO
from tests.conformance.misuse import (
    GroupedBlock,
    InterleavedBlock,
    Misuse,
    argument,
    finds_no_layers,
    of_adapters,
    with_net,
)
from tests.conformance.table import Row, small_vit

ROWS = [Row("pego", lambda: [PEGO(2, 2, 1e-3)], network=small_vit, optimizer="adamw")]
MEMBERS = {"PEGO": lambda: PEGO(2, 2, 1e-3)}
REFUSED = {("PEGO", "GLAD"): "both adapt"}
AUTOMATIC = ["PEGO"]
SURGERY = ["PEGO"]
OTHER = {"PEGO": {"weight": 0.5}}


def misuses() -> list[Misuse]:
    at = functools.partial(PEGO, 1, 2)
    pego = functools.partial(Misuse, "PEGO")
    return [
        argument(PEGO, "rank must be at least 1; got 0", rank=0),
        argument(PEGO, "groups must be at least 1; got 0", groups=0),
        argument(PEGO, "weight must be at least 0; got -1", weight=-1),
        argument(PEGO, "scaling must be positive; got 0", scaling=0),
        argument(PEGO, "groups=1 .* diversify alone is an empty term; set preserve=True", groups=1, preserve=False),
        pego(
            "attention that interleaves its projections",
            r"net\.query_key_value interleaves q, k and v by head; name the modules to adapt",
            lambda: [at()],
            with_net(InterleavedBlock),
        ),
        pego(
            "attention with fewer keys than queries",
            r"net\.qkv fuses projections of different sizes \(6 to 10\); name the modules to adapt",
            lambda: [at()],
            with_net(GroupedBlock),
        ),
        *of_adapters(PEGO, rank=1, groups=2),
    ]


def cannot_attach(row: Row) -> list[Misuse]:
    return [finds_no_layers(row)]
