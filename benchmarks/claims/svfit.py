"""SVFit: as accurate as LoRA with a sixteenth of the trained parameters or fewer.

A network of upright digits is adapted to turned ones; the head trains in every arm. Each arm has the learning rate that
was best of 1e-3, 3e-3, 1e-2, 3e-2 and 1e-1 when it trained on four fifths of its training digits and was measured on
the others. What is left of the old task (``upright``) is measured too, and nothing is claimed of it: it depends on the
rates more than on the method.

The top 32 values a layer do not reach LoRA by a point or two, whatever their rate; that arm is measured all the same.
"""

from __future__ import annotations

from copy import deepcopy
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam

from benchmarks.claims.findings import Finding, Metrics, Results, column, compare
from benchmarks.claims.training import Batches, accuracy, digits, fit, seeded, turned
from lightning_recipes.callbacks import GLAD, SVFit
from lightning_recipes.core.adapters import AdapterRecipe

RECIPE = "SVFit"
CLAIM = "Training singular values alone matches LoRA with sixteen times fewer trained parameters."
SOURCE, TARGET, ANGLE, BATCH, EPOCHS = 600, 700, 45, 64, 30
SETTING = (
    f"MLP 64-256-256-10 trained on {SOURCE} upright digits, its two hidden layers adapted and its head trained on"
    f" {TARGET} others turned by {ANGLE} degrees, Adam, batch {BATCH}, {EPOCHS} epochs, tested on the rest turned; LoRA"
    " of rank 8; rates: 1e-2 for LoRA and the head alone, 3e-2 for SVFit, each the best of 1e-3 to 1e-1 on a fifth of"
    " the training digits"
)
SEEDS = 5
ARMS: dict[str, dict[str, Any]] = {
    "without": {"way": "head", "lr": 1e-2},
    "LoRA": {"way": "lora", "lr": 1e-2},
    "all values": {"way": "svfit", "lr": 3e-2},
    "top 32": {"way": "svfit", "lr": 3e-2, "rank": 32},
}
LAYERS = ["net.0", "net.2"]


@cache
def start(seed: int) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A network of upright digits, and which digits to adapt it on and to test it on. Copy it before you train it."""
    with seeded(seed):
        x, y = turned(0), digits()[1]
        source, target, test = torch.randperm(len(x)).split([SOURCE, TARGET, len(x) - SOURCE - TARGET])
        net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
        fit(net, Batches(x[source], y[source], BATCH, seed), 30, partial(Adam, lr=1e-3))
        return net, target, test


def run(seed: int, way: str, lr: float, rank: int | None = None) -> Metrics:
    """Adapt a network of upright digits to turned ones.

    Args:
        seed: of split, weights, order and adapters.
        way: 'head', 'lora' or 'svfit'.
        lr: Adam's rate.
        rank: of SVFit.

    Returns:
        ``turned``, ``upright``: accuracy on digits that neither stage has seen; ``adapted``: number of trained
        parameters beside the head's.
    """
    source, target, test = start(seed)
    with seeded(seed):
        net, x, y = deepcopy(source), turned(ANGLE), digits()[1]
        recipes: list[AdapterRecipe] = []
        if way == "lora":
            recipes = [GLAD(mix=0, rank=8, lora_alpha=8, target_modules=LAYERS, seed=seed)]
        elif way == "svfit":
            recipes = [SVFit(rank, target_modules=LAYERS)]
        else:
            net[:4].requires_grad_(False)
        batches = Batches(x[target], y[target], BATCH, seed)
        logged = fit(net, batches, EPOCHS, partial(Adam, lr=lr), callbacks=recipes).callback_metrics
        head = sum(p.numel() for p in net[4].parameters())
        trained = [int(value) for name, value in logged.items() if name.endswith("/trainable")]
        return {
            "turned": accuracy(net, x[test], y[test]),
            "upright": accuracy(net, turned(0)[test], y[test]),
            "adapted": float(sum(trained) - head) if trained else 0.0,
        }


def check(results: Results) -> list[Finding]:
    """No more than a point below LoRA, sixteen times smaller, and ten points above the head alone."""
    lora = {metric: column(results, "LoRA", metric)[0] for metric in ("turned", "adapted")}
    findings = []
    for arm in [name for name in results if name in ("all values", "top 32")]:
        accuracies, head_only = column(results, arm, "turned")
        findings += [
            compare(
                f"As accurate as LoRA of rank 8 ({arm}): at most 1 point less",
                "accuracy on turned digits",
                accuracies,
                lora["turned"],
                lambda w, wo: w - wo + 0.01,
            ),
            compare(
                f"It trains at least 16 times fewer parameters than LoRA of rank 8 ({arm})",
                "trained parameters of the hidden layers",
                column(results, arm, "adapted")[0],
                lora["adapted"],
                lambda w, wo: wo / 16 - w,
            ),
            compare(
                f"The layers do adapt ({arm}): at least 10 points more than the head alone",
                "accuracy on turned digits",
                accuracies,
                head_only,
                lambda w, wo: w - wo - 0.1,
            ),
        ]
    return findings
