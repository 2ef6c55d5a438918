"""AAER's claim: single-step adversarial training that also withstands a multi-step attack.

Asserted at lambda3 = 2, chosen on other seeds; with the default of 1.5, the paper's at epsilon 8/255, the same seeds
went the same way and missed each margin by a little.
"""

import pytest

from benchmarks.claims import aaer as experiment
from benchmarks.claims.findings import measure

pytestmark = pytest.mark.claim


def test_single_step_training_does_not_collapse() -> None:
    findings = experiment.check(measure(experiment, 1, arms=("without", "lambda3 2")))
    assert len(findings) == 3
    missed = [str(finding) for finding in findings if not finding.holds]
    assert not missed, "\n".join(missed)
