"""GradientNoise's claim: a network that begins at zero begins to train."""

import pytest

from benchmarks.claims import gradient_noise as experiment
from benchmarks.claims.findings import measure

pytestmark = pytest.mark.claim


@pytest.mark.parametrize(("layers", "seeds"), [(3, experiment.SEEDS), (6, 1)])  # more takes minutes
def test_networks_that_begin_at_zero_train_with_noise_only(layers: int, seeds: int) -> None:
    arms = [arm for arm in experiment.ARMS if arm.startswith(f"{layers} layers")]
    (finding,) = experiment.check(measure(experiment, seeds, arms))
    assert finding.holds, str(finding)
