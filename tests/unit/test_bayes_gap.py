"""The gap to the exact posterior: its value, its words, and priors without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_recipes.callbacks import BayesGapMonitor
from lightning_recipes.callbacks.data.bayes_gap import gap_in_words
from lightning_recipes.core.random import generator
from lightning_recipes.datamodules import LinearPrior, MLPPrior, PriorDataModule
from lightning_recipes.modules import PFNModule
from tests.stock import quiet

RIDGE = LinearPrior(1.0, 1.0, 0.3, -1.0, 1.0)


def fit(monitor: BayesGapMonitor, prior: Any = RIDGE, **trainer: Any) -> tuple[PFNModule, Any]:
    torch.manual_seed(0)
    module = PFNModule(1, 16, 2, 1, 32, num_buckets=20, lr=3e-3)
    data = PriorDataModule(prior, 1, 16, 8, 6, steps_per_epoch=20, val_datasets=0)
    run = quiet(callbacks=[monitor], **trainer)
    run.fit(module, datamodule=data)
    return module, run


def test_a_gap_is_the_mean_difference_of_the_log_likelihoods_on_the_same_targets() -> None:
    monitor = BayesGapMonitor((0, 3), 300, queries=2, seed=4)
    module, run = fit(monitor)
    for n in (0, 3):
        x, y = RIDGE.sample(n + 2, 300, 1, generator(4, "BayesGapMonitor", n))
        with torch.no_grad():
            loss = module.eval().distribution(module(x, y, n), y[n:]).double().mean()
        assert monitor.history.values[f"nll_ctx_{n}"][-1] == pytest.approx(loss.item(), rel=1e-5)
        gap = (loss - RIDGE.nll(x, y, n).mean()).item()
        assert monitor.history.values[f"bayes_gap_{n}"][-1] == pytest.approx(gap, rel=1e-4)
        assert run.callback_metrics[f"bayes_gap_monitor/bayes_gap_{n}"].item() == pytest.approx(gap, rel=1e-4)
    first, last = (monitor.history.values["bayes_gap_3"][i] for i in (0, -1))
    assert first > last > 0
    assert monitor.history.steps == [0, 1, 2, 3, 5, 10, 20]
    assert monitor.verdict.startswith("At step 20 the network loses")


def test_a_network_that_is_the_posterior_has_no_gap() -> None:
    """Without a context the posterior of a prior of noise is a normal distribution, which a Gaussian output can be."""

    class Exact(PFNModule):
        def forward(self, x: Any, y: Any, n_context: int) -> Any:
            mean, variance = RIDGE.posterior(x[:n_context], y[:n_context], x[n_context:])
            return torch.stack([mean, variance], -1) + 0 * sum(p.sum() for p in self.parameters())

    monitor = BayesGapMonitor((0, 1, 4), 50)
    module = Exact(1, 16, 2, 1, 32, output="gaussian")
    quiet(callbacks=[monitor], max_steps=1).fit(
        module, datamodule=PriorDataModule(RIDGE, 1, 4, 6, 6, steps_per_epoch=1, val_datasets=0)
    )
    assert all(abs(monitor.history.values[f"bayes_gap_{n}"][0]) < 1e-4 for n in (0, 1, 4))


def test_what_the_gaps_come_to_is_said_in_words() -> None:
    falling = gap_in_words([0, 500, 1000], {1: [0.6, 0.2, 0.1], 5: [1.0, 0.4, 0.1]})
    assert "At step 1000 the network loses 0.100 at 1, 0.100 at 5 context samples" in falling
    assert "12% of the 0.800 at step 0 on average; it was 0.300 at step 500 and still falls: train longer." in falling
    settled = gap_in_words([0, 500, 1000], {1: [0.6, 0.101, 0.1]})
    assert "has not fallen much since step 500 (0.101): a larger network or more buckets" in settled
    assert gap_in_words([0, 2], {1: [0.6, 0.5]}).endswith("(nats a target).")


def test_a_prior_without_a_posterior_is_said_to_have_none(tmp_path: Path) -> None:
    monitor = BayesGapMonitor((1, 2), 20)
    fit(monitor, MLPPrior(2, 4), logger=CSVLogger(tmp_path), max_steps=2)
    assert monitor.history.values.keys() == {"nll_ctx_1", "nll_ctx_2"}
    assert "MLPPrior has no posterior in closed form, so there is no gap to it to measure" in monitor.verdict
    assert list(tmp_path.rglob("bayes_gap_monitor.png"))


def test_contexts_longer_than_any_in_the_training_are_said_and_the_budget_is_kept() -> None:
    monitor = BayesGapMonitor((2, 9), 40, budget=0.5)
    fit(monitor)
    assert "the training has no context longer than 5" in monitor.verdict.lower()
    assert monitor.spent <= 0.5 and monitor.left_out > 0
