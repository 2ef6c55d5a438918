"""Projection head's claim: features before it serve another task better than those behind it."""

import pytest

from benchmarks.claims import projection_head as experiment
from benchmarks.claims.findings import measure

pytestmark = pytest.mark.claim


def test_features_before_the_head_serve_another_task_better() -> None:
    findings = experiment.check(measure(experiment, 2))
    assert len(findings) == 4
    missed = [str(finding) for finding in findings if not finding.holds]
    assert not missed, "\n".join(missed)
