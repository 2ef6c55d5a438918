"""PSKD's claim: probabilities that are worth more, and fewer errors where labels are noisy."""

import pytest

from benchmarks.claims import ps_kd as experiment
from benchmarks.claims.findings import measure

pytestmark = pytest.mark.claim


def test_probabilities_are_worth_more_and_noisy_labels_do_less_harm() -> None:
    arms = [arm for arm in experiment.ARMS if not arm.endswith("20 %")]
    findings = experiment.check(measure(experiment, 3, arms))
    assert len(findings) == 4
    missed = [str(finding) for finding in findings if not finding.holds]
    assert not missed, "\n".join(missed)
