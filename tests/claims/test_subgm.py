"""SubGM's claim: it finds the truth from a small start and not from a large one, whatever the rank that is set.

The error with 20 columns comes out at 1.16 times that with 3 over the three seeds of the evidence. Signs near 0 make
the last steps chaotic: rounding alone moves either error by a fifth. Over the two seeds here the factor is asserted to
be below 2.
"""

from statistics import mean

import pytest

from benchmarks.claims import subgm as experiment
from benchmarks.claims.findings import measure

pytestmark = pytest.mark.claim
SEEDS = 2


def test_from_a_small_start_it_finds_the_truth_whatever_the_rank() -> None:
    small, large, of_rank, small_too = experiment.check(
        measure(experiment, SEEDS, arms=("without", "0.001", "rank 3", "rank 20"))
    )
    missed = [str(finding) for finding in (small, large, small_too) if not finding.holds]
    assert not missed, "\n".join(missed)
    assert mean(of_rank.with_recipe) < 2 * mean(of_rank.without), of_rank
