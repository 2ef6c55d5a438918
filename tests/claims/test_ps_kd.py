"""PSKD's claim: probabilities that are worth more, and fewer errors where labels are noisy."""

import pytest

from benchmarks.claims import ps_kd as experiment
from benchmarks.claims.findings import measure

pytestmark = pytest.mark.claim


def test_probabilities_are_worth_more_and_noisy_labels_do_less_harm() -> None:
    findings = experiment.check(measure(experiment, experiment.SEEDS))
    assert len(findings) == 5
    missed = [str(finding) for finding in findings if not finding.holds]
    assert not missed, "\n".join(missed)
