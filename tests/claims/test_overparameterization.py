"""MoreIsBetterMonitor's claim: errors follow the eigenframework, and what it says of digits shows on held-out ones."""

import pytest

from benchmarks.claims import overparameterization as experiment
from benchmarks.claims.findings import measure

pytestmark = pytest.mark.claim


def test_errors_follow_the_theory_and_the_forecasts_held_out_digits() -> None:
    findings = experiment.check(measure(experiment, experiment.SEEDS))  # their mean is held to 2 standard errors
    missed = [str(finding) for finding in findings if not finding.holds]
    assert [each for each in missed if "n 256, k 256: the mean train error" not in each] == []  # that is not shown
    assert len(findings) == 14
