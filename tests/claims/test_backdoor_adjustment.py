"""The backdoor adjustment's claim: different pre-training, and not any three models, makes the mixture better."""

import pytest

from benchmarks.claims import backdoor_adjustment as experiment
from benchmarks.claims.findings import measure

pytestmark = pytest.mark.claim


def test_three_different_models_beat_one_and_three_with_the_same_pre_training() -> None:
    results = measure(experiment, 2, arms=("one", "different", "same data"))
    findings = experiment.check(results)
    assert len(findings) == 2
    missed = [str(finding) for finding in findings if not finding.holds]
    assert not missed, "\n".join(missed)
    better = [d["accuracy"] > s["accuracy"] for d, s in zip(results["different"], results["same data"])]
    assert all(better), f"better than with the same pre-training on seeds {better}"
