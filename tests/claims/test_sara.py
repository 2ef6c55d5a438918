"""SaRA's claim: the smallest entries are not needed, and its loss keeps the norm of what is made of them low.

That training them forgets less than training others did not show at this size, and the re-selection slows the learning:
``python -m benchmarks.claims sara`` reports both.
"""

import pytest

from benchmarks.claims import sara as experiment
from benchmarks.claims.findings import measure

pytestmark = pytest.mark.claim


def test_the_smallest_entries_are_not_needed_and_the_rank_loss_lowers_their_norm() -> None:
    findings = experiment.check(measure(experiment, experiment.SEEDS, arms=("without", "rank loss")))
    assert len(findings) == 4
    missed = [str(finding) for finding in findings if not finding.holds]
    assert not missed, "\n".join(missed)
