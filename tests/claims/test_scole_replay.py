"""The claim of replay by frequency: classes that come rarely are kept."""

import pytest

from benchmarks.claims import scole_replay as experiment
from benchmarks.claims.findings import measure

pytestmark = pytest.mark.claim


def test_replay_by_frequency_keeps_what_comes_rarely() -> None:
    findings = experiment.check(measure(experiment, 2, arms=("without", "frequency")))
    assert len(findings) == 2
    missed = [str(finding) for finding in findings if not finding.holds]
    assert not missed, "\n".join(missed)
