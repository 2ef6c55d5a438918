"""SaRA: the smallest entries of a trained network hardly matter, and its rank loss keeps what it makes of them low.

The paper's main promise, that training the smallest entries forgets less of what a network knows, is one about large
generative models. On digits it does not show, and the re-selection slows the learning: both are measured and reported.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from copy import deepcopy
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW

from benchmarks.claims.findings import Finding, Metrics, Results, column, compare
from benchmarks.claims.training import Batches, accuracy, digits, fit, seeded, turned
from lightning_recipes.callbacks import SaRA
from lightning_recipes.callbacks.adapters.sara import quantiles

RECIPE = "SaRA"
CLAIM = "The smallest entries of trained weights are not needed, and can be trained with a low-rank loss."
SOURCE, WIDTH, SHARE, EPOCHS, ANGLE = 600, 256, 0.1, 30, 90
SETTING = (
    f"MLP 64-{WIDTH}-{WIDTH}-10 trained on {SOURCE} upright digits, then {SHARE:.0%} of its entries for {EPOCHS} epochs"
    f" of AdamW at 1e-3 on the same digits turned by {ANGLE} degrees; without: rank_weight=0, no re-selection"
)
SEEDS = 3
ARMS: dict[str, dict[str, Any]] = {
    "without": {"rank_weight": 0.0},
    "rank loss": {"rank_weight": 5e-3},
    "re-selection": {"rank_weight": 0.0, "progressive_at": 0.5},
    "full fine-tuning": {"recipe": False},
}
MATRICES = ("net.0.weight", "net.2.weight")


@cache
def source_of(seed: int) -> tuple[nn.Sequential, Tensor, Tensor]:
    """The network trained on upright digits, the indices of those digits, and the indices of the others."""
    with seeded(seed):
        x, y = turned(0), digits()[1]
        source, others = torch.randperm(len(x)).split([SOURCE, len(x) - SOURCE])
        hidden = [nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU()]
        net = nn.Sequential(*hidden, nn.Linear(WIDTH, 10))
        fit(net, Batches(x[source], y[source], 64, seed), 30, partial(Adam, lr=1e-3))
        return net, source, others


@torch.no_grad()
def without_entries(net: nn.Module, smallest: bool) -> nn.Module:
    """A copy with a tenth of all entries set to 0."""
    net = deepcopy(net)
    parameters = list(net.parameters())
    (theta,) = quantiles(parameters, [SHARE if smallest else 1 - SHARE])
    for p in parameters:
        p.mul_((p.abs() >= theta) if smallest else (p.abs() < theta))
    return net


def masked_norm(net: nn.Module, entries: Mapping[str, tuple[Tensor, Tensor]]) -> float:
    """Sum over the hidden matrices of the nuclear norm of their free entries."""
    total = 0.0
    for name in MATRICES:
        index, values = entries[name]
        weight = net.get_parameter(name.removeprefix("net."))
        total += float(torch.zeros(weight.numel()).index_copy(0, index, values).view_as(weight).norm(p="nuc"))
    return total


def run(seed: int, recipe: bool = True, **arguments: Any) -> Metrics:
    """Tune the network to the turned digits.

    Args:
        seed: of the split, the weights, the order and the draws.
        recipe: use SaRA; else all entries train.
        **arguments: SaRA's.

    Returns:
        ``old`` and ``new``: accuracy on upright and turned digits that neither stage has seen; ``before``, ``smallest``
        and ``largest``: accuracy on the upright ones before tuning, whole and with a tenth of the entries set to 0;
        with the recipe ``norm``, the nuclear norm of the free entries, and ``moved``, how many of the others moved.
    """
    source, seen, others = source_of(seed)
    with seeded(seed), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "SaRA: only the smallest entries of the head")  # it is pre-trained
        upright, x, y = turned(0), turned(ANGLE), digits()[1]
        net, callbacks = deepcopy(source), []
        if recipe:
            settings = {"progressive_at": None, "rank_min_size": 64, "train_fully": (), "seed": seed, **arguments}
            callbacks = [SaRA(None, SHARE, **settings)]
        fit(net, Batches(x[seen], y[seen], 64, seed), EPOCHS, partial(AdamW, lr=1e-3), callbacks=callbacks)
        found = {
            "old": accuracy(net, upright[others], y[others]),
            "new": accuracy(net, x[others], y[others]),
            "before": accuracy(source, upright[others], y[others]),
            "smallest": accuracy(without_entries(source, True), upright[others], y[others]),
            "largest": accuracy(without_entries(source, False), upright[others], y[others]),
        }
        if recipe:
            entries = callbacks[0].entries(_named(net))
            found["norm"] = masked_norm(net, entries)
            found["moved"] = float(sum(_moved(net, source, n, index) for n, (index, _) in entries.items()))
        return found


def _named(net: nn.Module) -> nn.Module:
    """The network under the name that it had in the LightningModule."""
    holder = nn.Module()
    holder.net = net
    return holder


def _moved(net: nn.Module, source: nn.Module, name: str, free: Tensor) -> int:
    """How many entries that are not free differ."""
    after, before = (each.get_parameter(name.removeprefix("net.")).detach().flatten() for each in (net, source))
    return int((after != before).index_fill(0, free, False).sum())


def check(results: Results) -> list[Finding]:
    """What the card asks for; and of the arms that were run, what does not show."""
    base = results["without"]
    before = [r["before"] for r in base]
    findings = [
        compare(
            "The smallest tenth of all entries is not needed: set to 0 it costs less than 1 point",
            "accuracy before tuning",
            [r["smallest"] for r in base],
            before,
            lambda w, wo: w - wo + 0.01,
        ),
        compare(
            "The largest tenth is: set to 0 it costs 10 points or more",
            "accuracy before tuning",
            [r["largest"] for r in base],
            before,
            lambda w, wo: wo - w - 0.1,
        ),
        compare(
            "Entries that are not free stay as they were, bit for bit",
            "frozen entries that moved",
            [r["moved"] for r in results.get("rank loss", base)],
            [0.0] * len(base),
            lambda w, wo: wo - w,
        ),
    ]
    if "rank loss" in results:
        findings.append(
            compare(
                "The rank loss lowers the nuclear norm of the free entries by 10 % or more",
                "nuclear norm of the free entries of both hidden matrices",
                *column(results, "rank loss", "norm"),
                lambda w, wo: 0.9 * wo - w,
            )
        )
    if "re-selection" in results:
        findings.append(
            compare(
                "The re-selection learns the new digits no worse",
                "accuracy on turned digits",
                *column(results, "re-selection", "new"),
                lambda w, wo: w - wo,
            )
        )
    if "full fine-tuning" in results:
        findings.append(
            compare(
                "It forgets less than full fine-tuning does (with: SaRA, without: full)",
                "accuracy on upright digits after tuning",
                [r["old"] for r in base],
                [r["old"] for r in results["full fine-tuning"]],
                lambda w, wo: w - wo - 0.01,
            )
        )
        findings.append(
            compare(
                "It learns the new digits as well as full fine-tuning does, up to 1 point (with: SaRA, without: full)",
                "accuracy on turned digits",
                [r["new"] for r in base],
                [r["new"] for r in results["full fine-tuning"]],
                lambda w, wo: w - wo + 0.01,
            )
        )
    return findings
