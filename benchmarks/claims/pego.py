"""PEGO: the two orthogonality terms keep the updates off the pre-trained weights and apart, so the source is kept.

Without them (weight = 0) it is plain LoRA, a group of four adapters of rank 2. The classifier stays as it was
pre-trained, its classes being the same. Whether unseen domains gain is a matter of models of CLIP's size: on digits
they do not, and nothing here says so.

The weight decides. At 1e-4 both overlaps fall to a quarter or less and the source is kept better on every seed; at 1e-5
the adapters part from one another all the same, but the overlap with W falls to about one half, on either side of it,
and the source is not kept better on every seed.
"""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch.optim import Adam

from benchmarks.claims.findings import Finding, Metrics, Results, column, compare
from benchmarks.claims.training import Batches, accuracy, digits, fit, pretrained, seeded, turned
from lightning_recipes.callbacks import PEGO
from lightning_recipes.core.gradients import global_norm

RECIPE = "PEGO"
CLAIM = "Orthogonal groups of adapters disturb the pre-trained weights less, and keep what the network knew."
EPOCHS, SOURCE, SEEN, UNSEEN = 40, 600, (15, 30, 45), (-30, -15, 60, 75)
SETTING = (
    f"MLP 64-128-128-10 trained on {SOURCE} upright digits, its first two layers adapted (4 adapters of rank 2)"
    f" to their rotations by {SEEN}, Adam 5e-3, batch 96, {EPOCHS} epochs; without: weight=0"
)
SEEDS = 4
ARMS: dict[str, dict[str, Any]] = {
    "without": {"weight": 0.0},
    "weight 1e-4": {"weight": 1e-4},
    "weight 1e-5": {"weight": 1e-5},
}


def run(seed: int, **arguments: Any) -> Metrics:
    """Adapt a network of upright digits to three rotations of the same digits; measure on digits it never saw.

    Args:
        seed: of split, weights, order and adapters.
        **arguments: PEGO's.

    Returns:
        ``source``, ``seen``, ``unseen``: accuracy upright, on the rotations trained on, and on others;
        ``overlap_with_w`` and ``overlap_of_pairs``: free of scale, as the recipe logs them; ``update``: Frobenius norm
        of what was added to both layers.
    """
    start, source, test = pretrained(seed, SOURCE)
    with seeded(seed):
        net, y = deepcopy(start), digits()[1]
        recipe = PEGO(rank=2, groups=4, target_modules=["net.0", "net.2"], train_fully=(), seed=seed, **arguments)
        x = torch.cat([turned(angle)[source] for angle in SEEN])
        batches = Batches(x, y[source].repeat(len(SEEN)), 96, seed)
        logged = fit(net, batches, EPOCHS, partial(Adam, lr=5e-3), callbacks=[recipe]).callback_metrics

        def at(*angles: float) -> float:
            return sum(accuracy(net, turned(angle)[test], y[test]) for angle in angles) / len(angles)

        with torch.no_grad():
            update = global_norm([net[i].weight - start[i].weight for i in (0, 2)])
        return {
            "source": at(0),
            "seen": at(*SEEN),
            "unseen": at(*UNSEEN),
            "overlap_with_w": float(logged["pego/overlap_with_w"]),
            "overlap_of_pairs": float(logged["pego/overlap_of_pairs"]),
            "update": float(update),
        }


def check(results: Results) -> list[Finding]:
    """Smaller overlaps at both weights, and the source kept better."""
    findings = []
    for arm in [name for name in results if name != "without"]:
        findings += [
            compare(
                f"Updates stay off the pre-trained weights ({arm}): overlap at most half",
                "overlap with W",
                *column(results, arm, "overlap_with_w"),
                lambda w, wo: wo / 2 - w,
            ),
            compare(
                f"Adapters stay apart from one another ({arm}): overlap at most half",
                "overlap of pairs",
                *column(results, arm, "overlap_of_pairs"),
                lambda w, wo: wo / 2 - w,
            ),
            compare(
                f"The source is kept better ({arm}): at least 3 points more",
                "accuracy on upright digits",
                *column(results, arm, "source"),
                lambda w, wo: w - wo - 0.03,
            ),
        ]
    return findings
