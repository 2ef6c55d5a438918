"""NormalizedGD's claim: fewer updates until all samples are right, on unbalanced classes and with small steps."""

import pytest

from benchmarks.claims import normalized_gd as experiment
from benchmarks.claims.findings import measure

pytestmark = pytest.mark.claim


def test_all_samples_are_right_after_fewer_updates() -> None:
    findings = experiment.check(measure(experiment, experiment.SEEDS))
    claimed = [finding for finding in findings if not finding.claim.startswith("Ten classes")]  # those are reported
    assert len(claimed) == 4
    missed = [str(finding) for finding in claimed if not finding.holds]
    assert not missed, "\n".join(missed)
