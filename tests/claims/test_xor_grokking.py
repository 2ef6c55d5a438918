"""GrokkingMonitor's claim: all labels are fitted after one step at chance, and ten steps later the test is right."""

import pytest

from benchmarks.claims import xor_grokking as experiment
from benchmarks.claims.findings import measure

pytestmark = pytest.mark.claim


def test_the_overfitting_is_harmful_first_and_benign_later() -> None:
    findings = experiment.check(measure(experiment, 3))
    claimed = [finding for finding in findings if finding.metric != "linear share"]  # ours, and reported
    assert len(claimed) == 4
    missed = [str(finding) for finding in claimed if not finding.holds]
    assert not missed, "\n".join(missed)
