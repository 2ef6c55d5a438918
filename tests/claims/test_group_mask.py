"""GroupMask's claim: on recurring tasks knowledge accumulates, and faster with absent classes masked."""

import pytest

from benchmarks.claims import group_mask as experiment
from benchmarks.claims.findings import measure

pytestmark = pytest.mark.claim


def test_it_accumulates_faster_than_plain_training() -> None:
    findings = experiment.check(measure(experiment, 1, arms=("without", "GroupMask")))
    assert len(findings) == 3
    missed = [str(finding) for finding in findings if not finding.holds]
    assert not missed, "\n".join(missed)
