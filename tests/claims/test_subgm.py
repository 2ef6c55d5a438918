"""SubGM's claim: the error falls with the size of the first factors, and does not depend on the rank that is set."""

import pytest

from benchmarks.claims import subgm as experiment
from benchmarks.claims.findings import measure

pytestmark = pytest.mark.claim
SEEDS = 2


def test_from_a_small_start_it_finds_the_truth_whatever_the_rank() -> None:
    arms = ("without", "0.1", "0.01", "0.001", "rank 3", "rank 20")
    findings = experiment.check(measure(experiment, SEEDS, arms=arms))
    assert len(findings) == 7
    missed = [str(finding) for finding in findings if not finding.holds]
    assert not missed, "\n".join(missed)
