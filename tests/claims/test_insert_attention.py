"""InsertAttention's claim: alpha finds the right share; the paper's own figure comes of weight decay alone."""

import pytest

from benchmarks.claims import insert_attention as experiment
from benchmarks.claims.findings import measure

pytestmark = pytest.mark.claim


def test_alpha_is_recovered_and_weight_decay_alone_makes_the_papers() -> None:
    findings = experiment.check(measure(experiment, 2))
    assert len(findings) == 4
    missed = [str(finding) for finding in findings if not finding.holds]
    assert not missed, "\n".join(missed)
