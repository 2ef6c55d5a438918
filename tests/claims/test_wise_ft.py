"""WiSEFT's claim: better elsewhere than the fine-tuned weights, and as good at home."""

import pytest

from benchmarks.claims import wise_ft as experiment
from benchmarks.claims.findings import measure

pytestmark = pytest.mark.claim


def test_the_mean_wins_back_what_fine_tuning_lost_elsewhere() -> None:
    findings = experiment.check(measure(experiment, 2, arms=("without", "alpha 0.5")))
    assert len(findings) == 3
    missed = [str(finding) for finding in findings if not finding.holds]
    assert not missed, "\n".join(missed)
