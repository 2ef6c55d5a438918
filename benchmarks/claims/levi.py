"""LEVI: a small network beside the frozen one, depth by depth, holds better where the pre-trained features mislead.

Pre-training sees the left half of each digit and a code P that gives the label away; on the task P means nothing, the
right half is there too, and a code Q gives the label away in the training data but not out of distribution. Where the
pre-trained features are good and complete (all pixels seen), fine-tuning is better, and nothing here says otherwise.

That several depths are better than the last one alone is not resolved at this size, where seeds differ by 1 to 3;
that arm, and the outputs of a linear probe and the small network averaged, are measured all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

from benchmarks.claims.findings import Finding, Metrics, Results, column, compare
from benchmarks.claims.training import Batches, accuracy, digits, fit, seeded
from lightning_recipes.callbacks import LEVI
from lightning_recipes.modules.levi_ensemble import VectorView

RECIPE = "LEVI"
CLAIM = "A small network trained beside a frozen one, depth by depth, holds better than fine-tuning on shifted data."
SOURCE, TASK, BATCH, STEPS, RATE, WIDTH = 700, 150, 64, 800, 1e-3, 128
SETTING = (
    f"Digits with two 10-way codes P and Q; MLP 84-128-128-128-10 pre-trained on the left halves of {SOURCE} digits,"
    f" P right in 90 % and Q random; then {TASK} whole digits, Q right in 80 % and P in 10 %, else random; out of"
    f" distribution both are random; {STEPS} AdamW steps at {RATE:g} on batches of {BATCH}; small network"
    f" 84-{WIDTH}-{WIDTH}; without: full fine-tuning"
)
SEEDS = 5
ARMS: Mapping[str, Mapping[str, Any]] = {
    "without": {"how": "full"},
    "LEVI": {"how": "levi", "layers": 3},
    "last depth": {"how": "levi", "layers": 1},
    "outputs averaged": {"how": "outputs"},
    "small alone": {"how": "small"},
}


def code(y: Tensor, right: float) -> Tensor:
    """One-hot ``[n, 10]``: the label in that share of the samples, else any of the ten."""
    drawn = torch.where(torch.rand(len(y)) < right, y, torch.randint(10, (len(y),)))
    return F.one_hot(drawn, 10).float()


def inputs(x: Tensor, y: Tensor, p: float, q: float) -> Tensor:
    """Pixels ``[n, 64]`` and both codes, ``[n, 84]``."""
    return torch.cat([x, code(y, p), code(y, q)], 1)


def network() -> nn.Sequential:
    """84-128-128-128-10; a block is a linear layer with its ReLU."""
    blocks = [nn.Sequential(nn.Linear(width, 128), nn.ReLU()) for width in (84, 128, 128)]
    return nn.Sequential(*blocks, nn.Linear(128, 10))


@cache
def pretrained(seed: int) -> tuple[nn.Sequential, dict[str, tuple[Tensor, Tensor]]]:
    """The network that knows half of the digit and the wrong code; the task's data: 'train', 'id' and 'ood'."""
    with seeded(seed):
        images, y = digits()
        left = images.clone()
        left[..., 4:] = 0
        source, task, test = torch.randperm(len(y)).split([SOURCE, TASK, len(y) - SOURCE - TASK])
        x = images.flatten(1)
        net = network()
        train(net, inputs(left.flatten(1)[source], y[source], 0.9, 0.0), y[source], seed)
        data = {
            "train": (inputs(x[task], y[task], 0.1, 0.8), y[task]),
            "id": (inputs(x[test], y[test], 0.1, 0.8), y[test]),
            "ood": (inputs(x[test], y[test], 0.0, 0.0), y[test]),
        }
        return net, data


def train(net: nn.Module, x: Tensor, y: Tensor, seed: int, *recipes: LEVI) -> None:
    """The same steps for every arm."""
    batches = Batches(x, y, BATCH, seed, draws=STEPS)
    fit(net, batches, 1, partial(AdamW, lr=RATE), callbacks=recipes)


class Averaged(nn.Module):
    """The log of the mean of two networks' probabilities."""

    def __init__(self, *nets: nn.Module) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([net(x).softmax(1) for net in self.nets]).mean(0).log()


def run(seed: int, how: str, **arguments: Any) -> Metrics:
    """Adapt the pre-trained network to the task.

    Args:
        seed: of split, codes, weights and order.
        how: 'levi', 'full' fine-tuning, the 'small' network alone, or 'outputs': the probabilities of the small network
            and of a linear probe averaged.
        **arguments: LEVI's.

    Returns:
        ``id`` and ``ood``: accuracy where Q gives the label away as in training, and where no code does.
    """
    net, data = pretrained(seed)
    with seeded(seed):
        net, (x, y) = deepcopy(net), data["train"]
        if how == "levi":
            holder = nn.Sequential(net)  # the fit replaces what it holds
            train(holder, x, y, seed, LEVI(small_width=WIDTH, seed=seed, backbone_path="net.0", **arguments))
            net = holder
        elif how == "full":
            train(net, x, y, seed)
        else:
            small = nn.Sequential(VectorView(84, WIDTH), nn.Linear(WIDTH, 10))
            train(small, x, y, seed)
            if how == "outputs":
                net[:-1].requires_grad_(False)
                train(net, x, y, seed)
                net = Averaged(net, small)
            else:
                net = small
        return {name: accuracy(net, *data[name]) for name in ("id", "ood")}


def check(results: Results) -> list[Finding]:
    """Out of distribution above full fine-tuning by 3 points, the last depth alone by 1 and averaged outputs by 2."""
    metric = "accuracy with both codes random"
    findings = [
        compare(
            "Out of distribution it is at least 3 points above full fine-tuning",
            metric,
            *column(results, "LEVI", "ood"),
            lambda w, wo: w - wo - 0.03,
        ),
        compare(
            "In distribution it is not below full fine-tuning",
            "accuracy with Q right in 80 %",
            *column(results, "LEVI", "id"),
            lambda w, wo: w - wo,
        ),
    ]
    for other, points, words in (
        ("last depth", 1, "LEVI on the last depth only"),
        ("outputs averaged", 2, "averaging the outputs of a linear probe and the small network"),
        ("small alone", 0, "the small network alone"),
    ):
        if other in results:
            with_recipe, without = ([r["ood"] for r in results[arm]] for arm in ("LEVI", other))
            above = f"at least {points} point{'s' * (points > 1)} above" if points else "above"
            margin = lambda w, wo, points=points: w - wo - points / 100  # noqa: E731
            findings.append(compare(f"Out of distribution it is {above} {words}", metric, with_recipe, without, margin))
    return findings
