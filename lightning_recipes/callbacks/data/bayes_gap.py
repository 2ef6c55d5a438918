"""How far a network that predicts from a context still is from the exact Bayesian posterior of its prior.

Mueller et al., "Transformers Can Do Bayesian Inference", ICLR 2022 (https://arxiv.org/abs/2112.10510), Figures 3 and
following. For data sets drawn from a prior whose posterior predictive p is known (a Gaussian process, ridge
regression), a context of n samples and the predictive q of the network:

    gap(n) = mean over data sets and queries of  log p(y | x, D_n) - log q(y | x, D_n)

which estimates the mean KL divergence of q from p, at least 0 but for the noise of a finite sample. Both are taken on
the same targets, so the targets' own noise cancels.

A measurement costs a forward pass of `datasets` data sets for each context length; the exact posteriors are computed
once, in double precision on the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_recipes.core.diagnostics import Monitor
from lightning_recipes.core.distributed import all_sum, rank_and_world
from lightning_recipes.core.errors import RecipeError, check_argument
from lightning_recipes.core.evaluation import apart
from lightning_recipes.core.random import generator
from lightning_recipes.datamodules.priors import Prior, draw
from lightning_recipes.modules.pfn import PAPER, PFNModule

CHUNK = 250
"""Data sets in a forward pass of a measurement."""
SETTLED = 0.1
"""A gap that fell by less than this share over the second half of the training does not fall any more."""


def gap_in_words(steps: Sequence[int], gaps: Mapping[int, Sequence[float]]) -> str:
    """What gaps over a training come to.

    Args:
        steps: of the measurements, ascending.
        gaps: in nats a target, for each context length those of every measurement.
    """
    last = ", ".join(f"{values[-1]:.3f} at {n}" for n, values in gaps.items())
    mean = [sum(each) / len(each) for each in zip(*gaps.values())]
    said = f"At step {steps[-1]} the network loses {last} context samples to the exact posterior (nats a target)"
    if len(steps) < 3 or mean[0] <= 0:
        return f"{said}."
    said += f", {mean[-1] / mean[0]:.0%} of the {mean[0]:.3f} at step {steps[0]} on average"
    half = next(i for i, step in enumerate(steps) if step >= (steps[0] + steps[-1]) / 2 or i == len(steps) - 2)
    if mean[-1] < (1 - SETTLED) * mean[half]:
        return f"{said}; it was {mean[half]:.3f} at step {steps[half]} and still falls: train longer."
    return (
        f"{said}, and it has not fallen much since step {steps[half]} ({mean[half]:.3f}): a larger network or more"
        " buckets would help more than more steps at this rate."
    )


class BayesGapMonitor(Monitor):
    """Measures how much a `PFNModule` loses to the exact posterior, on data sets of its prior that are fixed by a seed.

    Logs ``bayes_gap_monitor/nll_ctx_<n>`` and ``bayes_gap_monitor/bayes_gap_<n>`` for every context length n, says at
    the end of the fit how far the network is from the posterior and whether it still comes closer, and draws the gaps.
    For a prior without a closed form only the former are measured, and it says so.

    Args:
        context_lengths: n, ascending.
        datasets: for each context length.
        queries: targets of each data set that are predicted.
        prior: another prior than that of the PriorDataModule; None for that one.
        every_n_steps: measure after every so many optimizer steps too.
        geometric_steps: measure after 0, 1, 2, 3, 5, 10, 20, 30, 50, ... steps.
        budget: the most that measurements may add, as a share of the run's own forward and backward passes.
        draw: save a picture in the run's log folder at the end of a fit (needs the `plots` extra).
        seed: of the data sets.

    Raises:
        RecipeError: for bad arguments; before the first step, for a module that is no PFNModule, a fit without a prior,
            or one whose data sets have other shapes.
    """

    paper = PAPER
    does = "Measures how far a prior-data fitted network is from the exact Bayesian posterior, by context length."
    use_when = "You train a PFNModule on a prior with a known posterior and want to know whether to go on."
    costs = "a forward pass of `datasets` data sets a context length and measurement; exact posteriors once."
    ylabel = "nats a target above the exact posterior"

    def __init__(
        self,
        context_lengths: Sequence[int] = (1, 2, 5, 10),
        datasets: int = 1000,
        queries: int = 1,
        prior: Prior | None = None,
        every_n_steps: int | None = None,
        geometric_steps: bool = True,
        budget: float | None = None,
        draw: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        lengths = list(context_lengths)
        ascending = bool(lengths) and lengths[0] >= 0 and all(a < b for a, b in pairwise(lengths))
        check_argument(ascending, self, "context_lengths", lengths, "ascending numbers of at least 0, one or more")
        check_argument(datasets >= 1, self, "datasets", datasets, "at least 1")
        check_argument(queries >= 1, self, "queries", queries, "at least 1")
        self.context_lengths, self.datasets, self.queries, self.prior = lengths, datasets, queries, prior
        self.every_n_steps, self.geometric_steps, self.budget = every_n_steps, geometric_steps, budget
        self.draw, self.seed = draw, seed
        self.check_moments()
        self._measured: Prior | None = None  # the prior of this fit
        self._data: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # x, y and the exact loss of this rank's data sets

    def begin(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not isinstance(module, PFNModule):
            raise RecipeError(
                f"measures a PFNModule, which predicts from a context; {type(module).__name__} is none: leave it out"
            )
        prior = getattr(trainer.datamodule, "prior", None) if self.prior is None else self.prior
        if not isinstance(prior, Prior):
            raise RecipeError("needs a prior: train on a PriorDataModule, or give prior=")
        self._measured, self._data = prior, {}
        rank, world = rank_and_world()
        for n in self.context_lengths:
            numbers = generator(self.seed, "BayesGapMonitor", n)
            x, y = draw(prior, n + self.queries, self.datasets, module.num_features, numbers)
            x, y = x[:, rank::world], y[:, rank::world]
            exact = prior.nll(x, y, n) if prior.closed_form else torch.zeros_like(y[n:])
            self._data[n] = x, y, exact
        if not prior.closed_form:
            self.limit(f"{type(prior).__name__} has no posterior in closed form, so there is no gap to it to measure")
        longest = int(module.max_context) - 1
        if 0 <= longest < self.context_lengths[-1]:
            self.limit(f"the training has no context longer than {longest}, and gaps beyond it are of an extrapolation")

    def samples_in(self, batch: Any) -> int:
        return batch["x"].shape[1]  # data sets

    def forwards(self, trainer: pl.Trainer) -> int:
        return len(self.context_lengths) * self.datasets

    def measure(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, float]:
        found: dict[str, float] = {}
        with apart(trainer, "BayesGapMonitor"), torch.no_grad():
            for n, (x, y, exact) in self._data.items():
                sums = torch.zeros(3, dtype=torch.float64, device=module.device)
                for some in torch.arange(x.shape[1]).split(CHUNK):
                    targets = y[:, some].to(module.device)
                    loss = module.distribution(module(x[:, some].to(module.device), targets, n), targets[n:])
                    sums[0] += loss.double().sum()
                sums[1], sums[2] = exact.double().sum(), exact.numel()
                total, exactly, count = all_sum(sums).tolist()
                found[f"nll_ctx_{n}"] = total / count
                if self._measured.closed_form:
                    found[f"bayes_gap_{n}"] = (total - exactly) / count
        return found

    def conclude(self) -> str:
        values = self.history.values
        gaps = {n: values[f"bayes_gap_{n}"] for n in self.context_lengths if f"bayes_gap_{n}" in values}
        if not gaps:
            last = ", ".join(f"{values[f'nll_ctx_{n}'][-1]:.3f} at {n}" for n in self.context_lengths)
            return f"At step {self.history.steps[-1]} the network loses {last} context samples (nats a target)."
        return gap_in_words(self.history.steps, gaps)

    def picture(self, path: Path, title: str) -> None:
        gaps = [name for name in self.history.values if name.startswith("bayes_gap")] or None
        ylabel = self.ylabel if gaps else "nats a target"
        self.history.draw(path, title, ylabel, log_x=self.geometric_steps, names=gaps)
