"""SubGM's claim: it finds the truth from a small start and not from a large one, whatever the rank that is set."""

import pytest

from benchmarks.claims import subgm as experiment
from benchmarks.claims.findings import measure

pytestmark = pytest.mark.claim
SEEDS = 2


def test_from_a_small_start_it_finds_the_truth_whatever_the_rank() -> None:
    findings = experiment.check(measure(experiment, SEEDS, arms=("without", "0.001", "rank 3", "rank 20")))
    assert len(findings) == 4
    missed = [str(finding) for finding in findings if not finding.holds]
    assert not missed, "\n".join(missed)
