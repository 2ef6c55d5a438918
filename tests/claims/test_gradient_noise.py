"""GradientNoise's claim: a network that begins at zero begins to train."""

import pytest

from benchmarks.claims import gradient_noise as experiment
from benchmarks.claims.findings import measure

pytestmark = pytest.mark.claim


def test_networks_that_begin_at_zero_train_with_noise_only() -> None:
    arms = [arm for arm in experiment.ARMS if "layers" in arm]  # the control takes four runs more
    findings = experiment.check(measure(experiment, experiment.SEEDS, arms))
    assert len(findings) == 2
    missed = [str(finding) for finding in findings if not finding.holds]
    assert not missed, "\n".join(missed)
