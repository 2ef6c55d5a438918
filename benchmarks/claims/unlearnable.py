"""Unlearnable examples: a protected set teaches a classifier little, and nothing on top of clean samples.

Half of the training digits is protected. Alone it teaches a classifier little. In a mixture with the other, clean half
it adds nothing: a classifier trained on both is as good as one trained on the clean half alone, where both halves clean
make a better one. The paper's stronger statement, that the mixture is far BELOW the clean half alone (69.7 % and 91.2 %
on CIFAR-10), does not show at this size; the figures of both stand side by side in the evidence.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR

from benchmarks.claims.findings import Finding, Metrics, Results, compare
from benchmarks.claims.training import Batches, accuracy, digits, fit, seeded
from lightning_recipes.datamodules.unlearnable import Ascent, protect

RECIPE = "UnlearnableDataModule"
CLAIM = "Images of raised Bayes error teach a classifier little, alone and in a mixture with clean ones."
EACH, EPOCHS, BATCH = 500, 60, 64
ASCENT = {"epsilon": 0.4, "steps": 40, "lr": 0.03, "retrain_every": 5, "surrogate_batch_size": BATCH}
SETTING = (
    f"{EACH} digits protected (epsilon 0.4, 40 steps of AdamW at 0.03, surrogate retrained every 5), {EACH} clean, 797"
    f" to test; surrogate and classifier 64-128-64-10, by SGD at 0.1 with momentum 0.9 and a cosine over 30 and"
    f" {EPOCHS} epochs of batches of {BATCH}"
)
SEEDS = 3
ARMS: Mapping[str, Mapping[str, Any]] = {"protected": {}}


def mlp() -> nn.Sequential:
    """64-128-64-10 on images, with new weights."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def run(seed: int) -> Metrics:
    """Protect one half, and train on all that is to be compared.

    Args:
        seed: of the split, the surrogates, the classifiers' first weights and their order.

    Returns:
        ``before`` and ``after``: estimated Bayes error of the half, clean and protected; test accuracy after training
        on the ``protected`` half, on the ``same`` half clean, on the other half clean (``clean_only``), on that and the
        protected one (``mixture``) and on both halves clean (``both_clean``).
    """
    with seeded(seed):
        x, y = digits()
        ours, others, test = torch.randperm(len(x)).split([EACH, EACH, len(x) - 2 * EACH])
        made = protect(x[ours], y[ours], 10, mlp, Ascent(seed=seed, **ASCENT))
        protected, errors = made["images"], made["curve"]["bayes_error"]

        def trained(images: Tensor, labels: Tensor) -> float:
            torch.manual_seed(seed)  # the same first weights for all
            net = mlp()
            fit(
                net,
                Batches(images, labels, BATCH, seed),
                EPOCHS,
                partial(SGD, lr=0.1, momentum=0.9),
                lambda optimizer, steps: CosineAnnealingLR(optimizer, steps),
            )
            return accuracy(net, x[test], y[test])

        both = torch.cat([y[ours], y[others]])
        return {
            "before": errors[0],
            "after": errors[made["step"]],
            "protected": trained(protected, y[ours]),
            "same": trained(x[ours], y[ours]),
            "clean_only": trained(x[others], y[others]),
            "mixture": trained(torch.cat([protected, x[others]]), both),
            "both_clean": trained(torch.cat([x[ours], x[others]]), both),
        }


def check(results: Results) -> list[Finding]:
    """The estimate at least three times as high, accuracy below 0.6 on the protected half alone, and no gain from it in
    the mixture where the same images clean bring one."""
    seeds = results["protected"]
    of = {name: [seed[name] for seed in seeds] for name in seeds[0]}
    return [
        compare(
            "The estimated Bayes error of a set is at least three times as high when it is protected",
            "estimated Bayes error, protected and clean",
            of["after"],
            of["before"],
            lambda after, before: after - 3 * before,
        ),
        compare(
            "A protected set alone teaches little: accuracy below 0.6",
            "test accuracy, the half protected and clean",
            of["protected"],
            of["same"],
            lambda protected, _: 0.6 - protected,
        ),
        compare(
            "In a mixture the protected half adds nothing to the clean one: at most 0.01",
            "test accuracy, the mixture and its clean half alone",
            of["mixture"],
            of["clean_only"],
            lambda mixture, clean: clean + 0.01 - mixture,
        ),
        compare(
            "The same half adds to the other one when it is clean",
            "test accuracy, both halves clean and the clean half of the mixture alone",
            of["both_clean"],
            of["clean_only"],
            lambda both, clean: both - clean,
        ),
    ]
