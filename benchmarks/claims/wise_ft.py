"""WiSEFT: the mean of the weights wins back what fine-tuning on one distribution lost on others, at little price.

Digits at many angles, then fine-tuning on upright ones beside coloured patches that go with the label most of the time.
Tested on turned digits with random patches, which the fine-tuned network has learnt to trust.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cache, partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Adam

from benchmarks.claims.findings import Finding, Metrics, Results, column, compare
from benchmarks.claims.training import Batches, accuracy, digits, fit, seeded, turned
from lightning_recipes.callbacks import WiSEFT
from lightning_recipes.callbacks.finetuning.bang import shares

RECIPE = "WiSEFT"
CLAIM = (
    "The mean of pre-trained and fine-tuned weights is better elsewhere than the fine-tuned ones and as good at home."
)
ANGLES, SOURCE, TARGET, PATCHES, AGREES = (-45, -30, -15, 0, 15, 30, 45), 600, 700, 8, 0.7
PRE_EPOCHS, EPOCHS, BATCH = 30, 30, 64
SETTING = (
    f"MLP 88-128-128-10, pre-trained on {SOURCE} digits at {len(ANGLES)} angles of -45 to 45 degrees without patches,"
    f" fine-tuned on {TARGET} upright ones beside {PATCHES} RGB patches, each the label's colour with probability"
    f" {AGREES}; Adam 1e-3, {EPOCHS} epochs of batches of {BATCH}; elsewhere: other digits at all angles, random"
    " patches; without: alpha=1"
)
SEEDS = 4
ARMS: dict[str, dict[str, Any]] = {"without": {"alpha": 1.0}, "alpha 0.5": {"alpha": 0.5}, "alpha 0.3": {"alpha": 0.3}}

# red, green, blue, yellow, cyan, magenta, black, white, gray, orange
COLOURS = torch.tensor(
    [
        [1, 0, 0],
        [0, 1, 0],
        [0, 0, 1],
        [1, 1, 0],
        [0, 1, 1],
        [1, 0, 1],
        [0, 0, 0],
        [1, 1, 1],
        [128 / 255] * 3,
        [1, 165 / 255, 0],
    ]
)


def patches(labels: Tensor, count: int, agree: float, draws: torch.Generator, kinds: int | None = None) -> Tensor:
    """Coloured patches, ``[n, 3 count]``: each its label's colour with probability `agree`, else any of the ten.

    Args:
        draws: of the colours; which colour goes with a label at which patch is the same for all of them.
        kinds: how many different patches there are; with 1 all patches of an image show one colour.
    """
    kinds = count if kinds is None else kinds
    table = torch.stack([torch.randperm(10, generator=torch.Generator().manual_seed(i)) for i in range(kinds)])
    of_label = table[:, labels].T  # [n, kinds]
    at_random = torch.randint(10, of_label.shape, generator=draws)
    chosen = torch.where(torch.rand(of_label.shape, generator=draws) < agree, of_label, at_random)
    return COLOURS[chosen.repeat(1, count // kinds)].flatten(1)


def at_angles(indices: Tensor, agree: float, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Those digits at every angle beside patches, and their labels."""
    y = digits()[1][indices].repeat(len(ANGLES))
    x = torch.cat([turned(angle)[indices] for angle in ANGLES])
    return torch.cat([x, patches(y, PATCHES, agree, draws)], 1), y


@cache
def pretrained_at_all_angles(seed: int) -> tuple[nn.Module, Tensor]:
    """A network of digits at all angles without patches, and the indices of the digits that it has not seen."""
    with seeded(seed):
        order = torch.randperm(len(digits()[1]))
        x, y = at_angles(order[:SOURCE], 0.0, torch.Generator())
        x[:, 64:] = 0
        net = nn.Sequential(
            nn.Linear(64 + 3 * PATCHES, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
        )
        fit(net, Batches(x, y, BATCH, seed), PRE_EPOCHS, partial(Adam, lr=1e-3))
        return net, order[SOURCE:]


class Ends(pl.Callback):
    """Keeps the fine-tuned end, from before a recipe that stands after it averages."""

    net: nn.Module

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.net = deepcopy(pl_module.net).eval()


def adapt(seed: int, make: Callable[[], pl.Callback]) -> tuple[Metrics, Sequence[nn.Module]]:
    """Fine-tune the pre-trained network with a recipe.

    Returns:
        what :func:`run` does, and the networks before, after, and as the recipe leaves it.
    """
    source, unseen = pretrained_at_all_angles(seed)
    y = digits()[1]
    with seeded(seed):
        draws = torch.Generator().manual_seed(seed)
        train, test = unseen[:TARGET], unseen[TARGET:]
        upright = lambda i: torch.cat([turned(0)[i], patches(y[i], PATCHES, AGREES, draws)], 1)  # noqa: E731
        x, at_home, elsewhere = upright(train), upright(test), at_angles(test, 0.0, draws)
        net, ends = deepcopy(source), Ends()
        fit(net, Batches(x, y[train], BATCH, seed), EPOCHS, partial(Adam, lr=1e-3), callbacks=[ends, make()])
        correct = [n(elsewhere[0]).argmax(1) == elsewhere[1] for n in (source.eval(), ends.net, net)]
        counted = shares(*correct)
        return {
            "elsewhere": accuracy(net, *elsewhere),
            "at home": accuracy(net, at_home, y[test]),
            "pre-trained, elsewhere": accuracy(source, *elsewhere),
            "fft": float(counted["fft"]) / len(correct[0]),
            "ttf": float(counted["ttf"]) / len(correct[0]),
            "confidence": float(ends.net(elsewhere[0]).softmax(1).amax(1).mean().detach()),
        }, (source, ends.net, net)


def run(seed: int, **arguments: Any) -> Metrics:
    """Fine-tune and average.

    Args:
        seed: of splits, weights, order and patches.
        **arguments: WiSEFT's.

    Returns:
        ``elsewhere`` and ``at home``: accuracy; ``fft``, ``ttf``: shares of the samples elsewhere that both ends get
        wrong and the mean gets right, and the reverse; ``confidence``: of the fine-tuned end elsewhere.
    """
    return adapt(seed, lambda: WiSEFT(**arguments))[0]


def check(results: Results) -> list[Finding]:
    """Three points elsewhere for less than two at home, and more samples saved than lost."""
    half = results["alpha 0.5"]
    return [
        compare(
            "alpha 0.5 is at least 3 points more accurate elsewhere than the fine-tuned weights",
            "accuracy elsewhere",
            *column(results, "alpha 0.5", "elsewhere"),
            lambda w, wo: w - wo - 0.03,
        ),
        compare(
            "alpha 0.5 is less than 2 points less accurate at home",
            "accuracy at home",
            *column(results, "alpha 0.5", "at home"),
            lambda w, wo: w - wo + 0.02,
        ),
        compare(
            "More samples elsewhere are right with the mean alone than wrong with the mean alone",
            "share of samples (with: FalseFalseTrue, without: TrueTrueFalse)",
            [r["fft"] for r in half],
            [r["ttf"] for r in half],
            lambda w, wo: w - wo,
        ),
    ]
