"""What an experiment is, and what it finds: the same training with a recipe and without, compared over seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any, Protocol

Metrics = dict[str, float]
Results = Mapping[str, Sequence[Metrics]]
"""What each arm of an experiment measured, seed by seed."""


class Experiment(Protocol):
    """A file of this folder.

    Attributes:
        RECIPE: class name of the recipe.
        CLAIM: what the paper promises, one sentence.
        SETTING: data, network and training, one line.
        SEEDS: over how many the evidence is measured; a test that would take long has fewer.
        ARMS: arguments of ``run`` by name of the arm.
    """

    RECIPE: str
    CLAIM: str
    SETTING: str
    SEEDS: int
    ARMS: Mapping[str, Mapping[str, Any]]

    @staticmethod
    def run(seed: int, **arguments: Any) -> Metrics:
        """Train once; the seed decides splits, first weights, order of the data and the recipe's own draws."""

    @staticmethod
    def check(results: Results) -> list[Finding]:
        """Hold the arms that were run against each other."""


@dataclass(frozen=True)
class Finding:
    """One part of a claim, measured.

    Attributes:
        claim: what should show, with the margin that it must show by.
        metric: what the figures are.
        with_recipe, without: one figure a seed.
        margin: by how much the means pass; negative where they do not.
    """

    claim: str
    metric: str
    with_recipe: Sequence[float]
    without: Sequence[float]
    margin: float

    @property
    def holds(self) -> bool:
        """Whether the claim shows."""
        return self.margin >= 0

    def __str__(self) -> str:
        verdict = "holds" if self.holds else "does NOT hold"
        return (
            f"{self.claim}: {verdict}; {self.metric} {spread(self.with_recipe)} with, {spread(self.without)} without,"
            f" {len(self.without)} seeds, {self.margin:+.3f} from the bound"
        )

    def as_evidence(self, setting: str) -> dict[str, Any]:
        """As it stands in ``evidence.json``."""
        return {
            "claim": self.claim,
            "metric": self.metric,
            "with": round(mean(self.with_recipe), 4),
            "with_sd": round(deviation(self.with_recipe), 4),
            "without": round(mean(self.without), 4),
            "without_sd": round(deviation(self.without), 4),
            "seeds": len(self.without),
            "holds": self.holds,
            "setting": setting,
        }


def compare(
    claim: str,
    metric: str,
    with_recipe: Sequence[float],
    without: Sequence[float],
    margin: Callable[[float, float], float],
) -> Finding:
    """Compare the means over seeds.

    Args:
        margin: from (mean with, mean without) to by how much the claim is passed.
    """
    return Finding(claim, metric, list(with_recipe), list(without), margin(mean(with_recipe), mean(without)))


def measure(
    experiment: Experiment,
    seeds: int,
    arms: Sequence[str] | None = None,
    done: Callable[[str, int], None] = lambda arm, seed: None,
) -> Results:
    """Run arms of an experiment on the same seeds.

    Args:
        seeds: how many, from 0 on.
        arms: those to run, None all.
        done: called with the arm's name and the seed after every run.
    """
    arms = list(experiment.ARMS if arms is None else arms)
    results: dict[str, list[Metrics]] = {arm: [] for arm in arms}
    for seed in range(seeds):
        for arm in arms:
            results[arm].append(experiment.run(seed, **experiment.ARMS[arm]))
            done(arm, seed)
    return results


def column(results: Results, arm: str, metric: str) -> tuple[list[float], list[float]]:
    """One metric seed by seed, of that arm and of 'without'."""
    return [r[metric] for r in results[arm]], [r[metric] for r in results["without"]]


def deviation(values: Sequence[float]) -> float:
    """Standard deviation over seeds; 0 for one seed."""
    return stdev(values) if len(values) > 1 else 0.0


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation for a table."""
    return f"{mean(values):.3g} ± {deviation(values):.2g}"
