"""GeneralizationMonitor's claim: test error over time follows the theory, and the stopper stops in time."""

import pytest

from benchmarks.claims import generalization_dynamics as experiment
from benchmarks.claims.findings import measure

pytestmark = pytest.mark.claim


def test_test_error_follows_the_theory_and_the_stopper_stops_in_time() -> None:
    for finding in experiment.check(
        measure(experiment, experiment.SEEDS)
    ):  # the mean of fewer is further from theory than 5 %
        assert finding.holds, str(finding)
