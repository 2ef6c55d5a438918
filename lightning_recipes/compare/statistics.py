"""What several runs of several recipes come to: means, paired differences, and what may be chance.

Every interval is Student's at 95 %, over runs with different seeds. A recipe is compared with the base on the seeds
that both have, so that what a seed does to both of them cancels out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95
"""Of every interval; a difference is told from noise where the corrected p is below 1 - LEVEL."""


@dataclass(frozen=True)
class Estimate:
    """A mean over runs.

    Attributes:
        mean: of `n` values.
        low, high: its interval; nan for fewer than two values.
        sd: standard deviation of one run (n - 1); nan for fewer than two.
        n: how many values.
    """

    mean: float
    low: float
    high: float
    sd: float
    n: int


@dataclass(frozen=True)
class Difference:
    """A recipe less the base, over the seeds of both.

    Attributes:
        estimate: of the differences.
        p: two-sided p-value of the paired t-test; None where it says nothing: one seed, or differences all alike.
        p_corrected: the same after Holm's correction for all recipes of the comparison.
    """

    estimate: Estimate
    p: float | None
    p_corrected: float | None = None

    @property
    def told(self) -> bool:
        """Whether it can be told from noise."""
        return self.p_corrected is not None and self.p_corrected < 1 - LEVEL


def estimate(values: Sequence[float]) -> Estimate:
    """Mean of values, with Student's interval.

    Args:
        values: finite, at least one.
    """
    found = np.asarray(values, dtype=float)
    n, mean = len(found), float(np.mean(found))
    if n < 2:
        return Estimate(mean, math.nan, math.nan, math.nan, n)
    sd = float(np.std(found, ddof=1))
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * sd / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, sd, n)


def difference(base: Mapping[int, float], recipe: Mapping[int, float]) -> Difference | None:
    """The paired difference, on the seeds of both; None where they share none.

    Args:
        base, recipe: the metric by seed, finite values.
    """
    seeds = [seed for seed in base if seed in recipe]
    if not seeds:
        return None
    found = [recipe[seed] - base[seed] for seed in seeds]
    scale = max(max(abs(recipe[seed]), abs(base[seed])) for seed in seeds)
    alike = max(found) - min(found) <= 1e-12 * scale  # the t-test would divide by what is left of rounding
    if len(found) < 2 or alike:
        return Difference(estimate(found), None)
    tested = stats.ttest_rel([recipe[seed] for seed in seeds], [base[seed] for seed in seeds])
    return Difference(estimate(found), float(tested.pvalue))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction for as many comparisons as there are p-values; None stays None and does not count.

    The k-th smallest of m is multiplied by m - k + 1, and none may be smaller than one before it.
    """
    order = sorted((i for i, p in enumerate(p_values) if p is not None), key=lambda i: p_values[i])
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def corrected(differences: Sequence[Difference | None]) -> list[Difference | None]:
    """The same differences, each with its p-value after Holm's correction for all of them."""
    found = holm([None if each is None else each.p for each in differences])
    return [
        None if each is None else Difference(each.estimate, each.p, p)
        for each, p in zip(differences, found, strict=True)
    ]


def ratio(base: Mapping[int, float], recipe: Mapping[int, float]) -> Estimate | None:
    """Geometric mean of recipe over base, on the seeds of both, with its lowest and highest value in `low` and `high`.

    None where they share no seed.
    """
    found = [recipe[seed] / base[seed] for seed in base if seed in recipe and base[seed] > 0 and recipe[seed] > 0]
    if not found:
        return None
    logs = np.log(found)
    sd = float(np.std(logs, ddof=1)) if len(found) > 1 else math.nan
    return Estimate(float(np.exp(logs.mean())), min(found), max(found), sd, len(found))


def seeds_needed(difference: Estimate, power: float = 0.8) -> int | None:
    """How many seeds would tell a true difference of this size from noise of this size in `power` of all cases.

    For one comparison, uncorrected; None where there is nothing to go by, or more than a thousand.
    """
    if not difference.sd > 0 or difference.mean == 0:
        return None
    effect = abs(difference.mean) / difference.sd
    for n in range(2, 1001):
        critical = stats.t.ppf((1 + LEVEL) / 2, n - 1)
        shift = effect * math.sqrt(n)
        if stats.nct.sf(critical, n - 1, shift) + stats.nct.cdf(-critical, n - 1, shift) >= power:
            return n
    return None
