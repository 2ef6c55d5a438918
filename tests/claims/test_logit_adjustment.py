"""LogitAdjustment's claim: rare classes are found more often."""

import pytest

from benchmarks.claims import logit_adjustment as experiment
from benchmarks.claims.findings import measure

pytestmark = pytest.mark.claim


def test_rare_classes_and_all_together_gain() -> None:
    findings = experiment.check(measure(experiment, experiment.SEEDS))
    assert len(findings) == 2
    missed = [str(finding) for finding in findings if not finding.holds]
    assert not missed, "\n".join(missed)
