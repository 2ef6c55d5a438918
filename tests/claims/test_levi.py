"""LEVI's claim: better than fine-tuning, one depth or averaged outputs where the pre-trained features mislead."""

import pytest

from benchmarks.claims import levi as experiment
from benchmarks.claims.findings import measure

pytestmark = pytest.mark.claim


def test_an_ensemble_over_depths_holds_best_out_of_distribution() -> None:
    findings = experiment.check(measure(experiment, experiment.SEEDS))
    assert len(findings) == 5
    missed = [str(finding) for finding in findings if not finding.holds]
    assert not missed, "\n".join(missed)
