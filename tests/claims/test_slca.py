"""SLCA's claim: classes that are learnt in turn are kept."""

import pytest

from benchmarks.claims import slca as experiment
from benchmarks.claims.findings import measure

pytestmark = pytest.mark.claim


def test_it_keeps_what_fine_tuning_forgets() -> None:
    findings = experiment.check(measure(experiment, 2, arms=("without", "slow learner", "SLCA")))
    assert len(findings) == 3
    missed = [str(finding) for finding in findings if not finding.holds]
    assert not missed, "\n".join(missed)
