"""Data diet's claim: the hardest part is the one to train on, and wrong labels show; the evidence has more runs."""

import pytest

from benchmarks.claims import data_diet as experiment
from benchmarks.claims.findings import measure

pytestmark = pytest.mark.claim
ARMS = ("hardest 30 %", "random 30 %", "easiest 30 %", "noisy, window 40 to 90 %", "noisy, random 50 %")


def test_the_hardest_are_to_be_kept_and_wrong_labels_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "RUNS", 3)
    findings = experiment.check(measure(experiment, 2, ARMS))
    assert len(findings) == 4
    missed = [str(finding) for finding in findings if not finding.holds]
    assert not missed, "\n".join(missed)
