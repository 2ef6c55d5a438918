"""The lightweight-CNN paper's claim on digits; that unfreezing step by step gains does not show and is not asserted."""

import pytest

from benchmarks.claims import lightweight_cnn as experiment
from benchmarks.claims.findings import measure

pytestmark = pytest.mark.claim


def test_the_unified_model_is_as_good_as_the_better_branch_and_robuster_than_the_plain_one() -> None:
    clean, augmented = experiment.check(measure(experiment, 2, arms=("A", "B", "gradual")))
    assert clean.holds, str(clean)
    assert all(w >= wo - 0.005 for w, wo in zip(clean.with_recipe, clean.without)), str(clean)
    assert augmented.holds, str(augmented)
    assert all(w > wo for w, wo in zip(augmented.with_recipe, augmented.without)), str(augmented)
