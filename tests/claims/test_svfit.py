"""SVFit's claim: as accurate as LoRA of rank 8 with at least sixteen times fewer trained parameters."""

import pytest

from benchmarks.claims import svfit as experiment
from benchmarks.claims.findings import measure

pytestmark = pytest.mark.claim


def test_it_is_as_accurate_as_lora_with_sixteen_times_fewer_parameters() -> None:
    findings = experiment.check(measure(experiment, experiment.SEEDS))
    assert len(findings) == 6
    missed = [str(finding) for finding in findings if not finding.holds]
    assert not missed, "\n".join(missed)
