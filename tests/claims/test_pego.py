"""PEGO's claim: updates off the pre-trained weights and apart from one another, and the source kept better.

Asserted at weight 1e-4. At 1e-5 the overlap with W comes out near one half of plain LoRA's, on either side of it, and
over six seeds in plain PyTorch the source was 1 point better, on three of them worse.
"""

import pytest

from benchmarks.claims import pego as experiment
from benchmarks.claims.findings import measure

pytestmark = pytest.mark.claim


def test_the_overlaps_shrink_and_the_source_is_kept() -> None:
    findings = experiment.check(measure(experiment, 2, arms=("without", "weight 1e-4")))
    assert len(findings) == 3
    missed = [str(finding) for finding in findings if not finding.holds]
    assert not missed, "\n".join(missed)
