"""Prior-data fitted network: a transformer trained on data sets of a prior comes close to the exact posterior.

Bayesian linear regression in one dimension, whose posterior is known. Both networks are the same but for the training;
what is measured is how much each loses to the posterior on the same fresh data sets.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch

from benchmarks.claims.findings import Finding, Metrics, Results, column, compare
from benchmarks.claims.training import seeded
from lightning_recipes.core.random import generator
from lightning_recipes.datamodules import LinearPrior, PriorDataModule
from lightning_recipes.modules import PFNModule

RECIPE = "PFNModule"
CLAIM = (
    "Trained on data sets of a prior, a transformer predicts the Bayesian posterior of a new one in one forward pass."
)
PRIOR = LinearPrior(weight_std=1.0, bias_std=1.0, noise_std=0.3, low=-1.0, high=1.0)
TOKENS, BATCH, DATASETS = 13, 48, 4000
LENGTHS = (1, 2, 5, 10)
STEPS = 3000
SETTING = (
    "y = w x + b + noise of 0.3, w and b standard normal, x uniform on [-1, 1], at most 12 context samples; width 48, 4"
    f" heads, 2 layers, hidden 96, 100 buckets with full support, 52,516 parameters; {STEPS} steps of Adam at 1e-3,"
    f" batch {BATCH}, warm-up of a tenth, clip 1; {DATASETS} fresh data sets a context length; without: untrained"
)
SEEDS = 3
ARMS: Mapping[str, Mapping[str, Any]] = {"without": {"steps": 0}, "with": {"steps": STEPS}}
SHORT: Mapping[str, Any] = {"steps": 1400, "lr": 2e-3}
"""A training for tests: less than half as long, at twice the rate."""
MOST, SHARE = 0.12, 0.25


def run(seed: int, steps: int, lr: float = 1e-3) -> Metrics:
    """Train a network, or not, and hold it against the exact posterior.

    Args:
        seed: of first weights and training data.
        steps: of the training.
        lr: of Adam.

    Returns:
        for each context length n: ``gap_<n>`` in nats a target, and ``exact_<n>``, what the posterior itself loses.
    """
    with seeded(seed):
        module = PFNModule(1, 48, 4, 2, 96, num_buckets=100, lr=lr, warmup=0.1, seed=seed)
        if steps:
            trainer = pl.Trainer(
                accelerator="cpu",
                devices=1,
                max_steps=steps,
                gradient_clip_val=1.0,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            data = PriorDataModule(PRIOR, 1, BATCH, TOKENS, TOKENS, steps_per_epoch=steps, val_datasets=0, seed=seed)
            trainer.fit(module, datamodule=data)
        else:
            module.estimate(PRIOR, TOKENS, TOKENS)
    found: Metrics = {}
    module.eval()
    for n in LENGTHS:
        x, y = PRIOR.sample(n + 1, DATASETS, 1, generator("claim", n))  # the same for all seeds and arms
        with torch.no_grad():
            loss = module.distribution(module(x, y, n), y[n:]).double().mean()
        exact = PRIOR.nll(x, y, n).mean()
        found |= {f"gap_{n}": float(loss - exact), f"exact_{n}": float(exact)}
    return found


def check(results: Results) -> list[Finding]:
    """For every context length: a small gap, and a small share of the untrained network's."""
    return [
        compare(
            f"With {n} context samples it loses less than {MOST} nats a target to the exact posterior predictive, and"
            f" less than {SHARE:.0%} of what the untrained network (here: without) loses",
            "negative log likelihood above the exact one",
            *column(results, "with", f"gap_{n}"),
            lambda w, wo: min(MOST - w, SHARE * wo - w),
        )
        for n in LENGTHS
    ]
