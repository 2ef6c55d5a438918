"""ClassWeights' claim: rare classes that weigh more are found more often."""

import pytest

from benchmarks.claims import class_weights as experiment
from benchmarks.claims.findings import measure

pytestmark = pytest.mark.claim


def test_rare_classes_are_found_more_often() -> None:
    findings = experiment.check(measure(experiment, experiment.SEEDS))
    assert len(findings) == 1
    missed = [str(finding) for finding in findings if not finding.holds]
    assert not missed, "\n".join(missed)
