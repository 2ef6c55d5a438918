"""Guidance's claim: a network too deep to train on its own trains beside an untrained guide.

In half the epochs of the evidence, for the time that it takes; there the margin is wider.
"""

import pytest

from benchmarks.claims import guidance as experiment

pytestmark = pytest.mark.claim


def test_a_network_that_does_not_train_alone_trains_beside_an_untrained_guide() -> None:
    results = {
        arm: [experiment.run(seed, experiment.EPOCHS // 2, **experiment.ARMS[arm]) for seed in range(2)]
        for arm in ("without", "all steps")
    }
    (finding,) = experiment.check(results)
    assert finding.holds, str(finding)
