"""MoreIsBetterMonitor's claim: errors follow the eigenframework, and what it says of digits shows on held-out ones."""

import pytest

from benchmarks.claims import overparameterization as experiment
from benchmarks.claims.findings import measure

pytestmark = pytest.mark.claim


def test_errors_follow_the_theory_and_the_forecasts_held_out_digits() -> None:
    for finding in experiment.check(measure(experiment, experiment.SEEDS)):  # their mean is held to 2 standard errors
        assert finding.holds, str(finding)
