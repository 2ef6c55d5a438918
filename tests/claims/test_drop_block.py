"""DropBlock's claim: what is really dropped at every depth."""

import pytest

from benchmarks.claims import drop_block as experiment
from benchmarks.claims.findings import measure

pytestmark = pytest.mark.claim


def test_the_papers_code_drops_what_its_gamma_says_at_every_depth() -> None:
    findings = experiment.check(measure(experiment, 2))
    assert len(findings) == 4
    missed = [str(finding) for finding in findings if not finding.holds]
    assert not missed, "\n".join(missed)
