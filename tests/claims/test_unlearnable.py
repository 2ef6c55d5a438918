"""Unlearnable examples' claim: a protected set teaches little, and nothing on top of clean samples."""

import pytest

from benchmarks.claims import unlearnable as experiment
from benchmarks.claims.findings import measure

pytestmark = pytest.mark.claim


def test_a_protected_set_teaches_little_and_adds_nothing_to_a_clean_one() -> None:
    findings = experiment.check(measure(experiment, 1))
    assert len(findings) == 4
    missed = [str(finding) for finding in findings if not finding.holds]
    assert not missed, "\n".join(missed)
