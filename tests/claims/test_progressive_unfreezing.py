"""ProgressiveUnfreezing's claim, on real images; the paper's own comparison does not show here and is not asserted."""

import os

import pytest

from benchmarks.claims import progressive_unfreezing as experiment
from benchmarks.claims.findings import measure

pytestmark = [
    pytest.mark.claim,
    pytest.mark.skipif(
        not os.environ.get("LIGHTNING_RECIPES_DATA"),
        reason="needs the CIFAR-100 images and CIFAR-10 weights of LIGHTNING_RECIPES_DATA",
    ),
]


def test_it_keeps_the_pre_trained_features_when_the_rate_is_too_high() -> None:
    arms = ("untrained_x10", "full_x10", "progressive_x10")
    too_high, pretraining = experiment.check(measure(experiment, 2, arms=arms))
    assert too_high.holds, str(too_high)
    assert all(w > wo for w, wo in zip(too_high.with_recipe, too_high.without)), str(too_high)
    assert pretraining.holds, str(pretraining)
