"""Adaptive smoothing's claim: mixed with an accurate network, a robust one stays robust and becomes more accurate."""

import pytest

from benchmarks.claims import adaptive_smoothing as experiment
from benchmarks.claims.findings import measure

pytestmark = pytest.mark.claim


def test_at_nine_tenths_the_mixture_is_nearly_as_robust_and_more_accurate() -> None:
    results = measure(experiment, experiment.SEEDS, arms=("without", "standard", "alpha .9", "alpha .3"))
    findings = experiment.check(results)
    assert len(findings) == 3
    missed = [str(finding) for finding in findings if not finding.holds]
    assert not missed, "\n".join(missed)
