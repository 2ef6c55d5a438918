"""PEGO: the two orthogonality terms keep the updates off the pre-trained weights and apart, so the source is kept.

Without them (weight = 0) it is plain LoRA, a group of four adapters of rank 2. Whether unseen domains gain is a matter
of models of CLIP's size: on digits they do not, and nothing here says so.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.optim import Adam

from benchmarks.claims.findings import Finding, Metrics, Results, column, compare
from benchmarks.claims.training import Batches, accuracy, digits, fit, mlp, seeded, turned
from lightning_recipes.callbacks import PEGO

RECIPE = "PEGO"
CLAIM = "Orthogonal groups of adapters disturb the pre-trained weights less, and keep what the network knew."
EPOCHS, SOURCE, SEEN, UNSEEN = 40, 600, (15, 30, 45), (-30, -15, 60, 75)
SETTING = (
    f"MLP 64-128-128-10 trained on {SOURCE} upright digits, its first two layers adapted (4 adapters of rank 2) to"
    f" rotations {SEEN}, Adam 5e-3, {EPOCHS} epochs; without: weight=0"
)
SEEDS = 3
ARMS: dict[str, dict[str, Any]] = {
    "without": {"weight": 0.0},
    "weight 1e-5": {"weight": 1e-5},
    "weight 1e-4": {"weight": 1e-4},
}


def run(seed: int, epochs: int = EPOCHS, **arguments: Any) -> Metrics:
    """Pre-train upright, adapt to three rotations, measure on digits that neither has seen.

    Args:
        seed: of split, weights, order and adapters.
        epochs: of the adaptation.
        **arguments: PEGO's.

    Returns:
        ``source``, ``seen``, ``unseen``: accuracy upright, on the rotations trained on, and on others;
        ``overlap_with_w`` and ``overlap_of_pairs``: free of scale, as the recipe logs them; ``update``: Frobenius norm
        of what was added to both layers.
    """
    with seeded(seed):
        images, y = digits()
        order = torch.randperm(len(images))
        source, test = order[:SOURCE], order[SOURCE:]
        net = mlp()
        fit(net, Batches(images[source].flatten(1), y[source], 32, seed), 30, partial(Adam, lr=1e-3))
        before = [net[i].weight.detach().clone() for i in (0, 2)]
        x = torch.cat([turned(images[source], angle) for angle in SEEN])
        recipe = PEGO(rank=2, groups=4, target=["net.0", "net.2"], seed=seed, **arguments)
        batches = Batches(x, y[source].repeat(len(SEEN)), 96, seed + 1)
        trainer = fit(net, batches, epochs, partial(Adam, lr=5e-3), callbacks=[recipe])

        def at(*angles: float) -> float:
            return sum(accuracy(net, turned(images[test], angle), y[test]) for angle in angles) / len(angles)

        logged = trainer.callback_metrics
        return {
            "source": at(0),
            "seen": at(*SEEN),
            "unseen": at(*UNSEEN),
            "overlap_with_w": float(logged["pego/overlap_with_w"]),
            "overlap_of_pairs": float(logged["pego/overlap_of_pairs"]),
            "update": sum(float((net[i].weight - w).detach().norm() ** 2) for i, w in zip((0, 2), before)) ** 0.5,
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
