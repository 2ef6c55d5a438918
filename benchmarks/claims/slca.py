"""SLCA on digits that come two classes at a time.

As the card of the method measured it in plain PyTorch: in this toy the backbone's pre-training is so close to the tasks
that freezing it does as well as slow learning, and plain cross-entropy aligns better than the normalised one. In the
paper's settings both ingredients pay; what must show here is that fine-tuning fails, and that alignment mends it.
"""

from __future__ import annotations

import itertools
from copy import deepcopy
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import MultiStepLR
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.claims.findings import Finding, Metrics, Results, compare
from benchmarks.claims.training import Batches, accuracy, digits, fit, seeded
from lightning_recipes.callbacks import SLCA

RECIPE = "SLCA"
CLAIM = "A slow backbone and a classifier aligned on drawn features learn classes in turn without storing samples."
SOURCE, TRAIN, TASKS, EPOCHS, LR = 600, 700, 5, 20, 0.05
SETTING = (
    f"digits, an MLP pre-trained on {SOURCE} of all classes and given a new head, {TRAIN} others in {TASKS} tasks of 2"
    f" classes in an order drawn by the seed, {EPOCHS} epochs of batch 32 a task, SGD {LR} with momentum; accuracy over"
    " all ten classes at the end"
)
SEEDS = 3
ARMS: dict[str, dict[str, Any]] = {
    "without": {"backbone_lr_scale": 1.0, "ca_epochs": 0},
    "slow learner": {"ca_epochs": 0},
    "SLCA": {},
    "alignment alone": {"backbone_lr_scale": 1.0},
    "slow learner 0.1": {"backbone_lr_scale": 0.1, "ca_epochs": 0},
    "SLCA 0.1": {"backbone_lr_scale": 0.1},
    "SLCA, plain cross-entropy": {"logit_norm": None},
}


@cache
def _backbone(seed: int) -> tuple[nn.Sequential, Tensor]:
    """A network trained on digits of all classes, and the indices of the others."""
    with seeded(seed):
        x, y = digits()
        source, others = torch.randperm(len(x)).split([SOURCE, len(x) - SOURCE])
        widths = (64, 256, 128, 64)
        layers = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
        net = nn.Sequential(nn.Flatten(), *layers, nn.Linear(64, 10))
        fit(net, Batches(x[source], y[source], 32, seed), 30, partial(Adam, lr=1e-3))
        return net, others


def run(seed: int, **arguments: Any) -> Metrics:
    """Learn all classes in turn.

    Args:
        seed: of the split, the weights, the order of classes and of samples, and what is drawn.
        **arguments: of SLCA; a scale of 1 without alignment is fine-tuning on one task after the other.

    Returns:
        ``accuracy`` over all classes after the last task.
    """
    source, others = _backbone(seed)
    with seeded(seed):
        x, y = digits()
        order = torch.randperm(10).tolist()
        train, test = others[:TRAIN], others[TRAIN:]
        net = deepcopy(source)
        net[-1].reset_parameters()
        recipe = SLCA(
            [order[i : i + 10 // TASKS] for i in range(0, 10, 10 // TASKS)],
            EPOCHS,
            ca_lr=LR,
            seed=seed,
            **arguments,
        )
        own = torch.Generator().manual_seed(seed)
        data = DataLoader(TensorDataset(x[train], y[train]), 32, shuffle=True, generator=own)
        fit(
            net,
            data,
            TASKS * EPOCHS,
            partial(SGD, lr=LR, momentum=0.9, weight_decay=5e-4),
            lambda optimizer, steps: MultiStepLR(optimizer, [steps * 9 // 10]),
            [recipe],
        )
        return {"accuracy": accuracy(net, x[test], y[test])}


def check(results: Results) -> list[Finding]:
    """Of the arms that were run."""
    claims = [
        ("It beats fine-tuning on one task after the other (here: without) by 40 points", "SLCA", "without", 0.40),
        ("Alignment adds 25 points to a slow backbone (here: without)", "SLCA", "slow learner", 0.25),
        ("A slow backbone alone beats fine-tuning (here: without)", "slow learner", "without", 0.0),
        ("Alignment needs the slow backbone: alone (here: without) it is worse", "SLCA", "alignment alone", 0.0),
        ("At a scale of 0.1 alignment adds 25 points too", "SLCA 0.1", "slow learner 0.1", 0.25),
        (
            "Normalised logits align better than plain cross-entropy (here: without)",
            "SLCA",
            "SLCA, plain cross-entropy",
            0.0,
        ),
    ]
    return [
        compare(
            claim,
            "accuracy over all classes",
            [r["accuracy"] for r in results[with_recipe]],
            [r["accuracy"] for r in results[without]],
            lambda w, wo, least=least: w - wo - least,
        )
        for claim, with_recipe, without, least in claims
        if with_recipe in results and without in results
    ]
