"""GrokkingMonitor's claim: all labels are fitted after one step at chance, and ten steps later the test is right."""

import pytest

from benchmarks.claims import xor_grokking as experiment
from benchmarks.claims.findings import measure

pytestmark = pytest.mark.claim


def test_the_overfitting_is_harmful_first_and_benign_later() -> None:
    findings = experiment.check(measure(experiment, 3))
    missed = [str(finding) for finding in findings if not finding.holds]
    assert not missed, "\n".join(missed)
