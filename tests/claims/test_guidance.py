"""Guidance's claim: a network too deep to train on its own trains beside an untrained guide."""

import pytest

from benchmarks.claims import guidance as experiment
from benchmarks.claims.findings import measure

pytestmark = pytest.mark.claim


def test_a_network_that_does_not_train_alone_trains_beside_an_untrained_guide() -> None:
    findings = experiment.check(measure(experiment, experiment.SEEDS, arms=("without", "all steps")))
    assert len(findings) == 1
    missed = [str(finding) for finding in findings if not finding.holds]
    assert not missed, "\n".join(missed)
