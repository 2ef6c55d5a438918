"""SVFit's claim: as accurate as LoRA of rank 8 with at least sixteen times fewer trained parameters.

Asserted with all singular values. The gain over the head alone comes out at ten points, on either side of them, since
the head has its own best rate here (10.0 over five seeds); what is asserted is that it stays within two points of that.
The top 32 values a layer come out 1.7 points below LoRA and are not asserted.
"""

import pytest

from benchmarks.claims import svfit as experiment
from benchmarks.claims.findings import measure

pytestmark = pytest.mark.claim


def test_it_is_as_accurate_as_lora_with_sixteen_times_fewer_parameters() -> None:
    arms = ("without", "LoRA", "all values")
    accurate, smaller, adapts = experiment.check(measure(experiment, 2, arms=arms))
    missed = [str(finding) for finding in (accurate, smaller) if not finding.holds]
    assert not missed, "\n".join(missed)
    assert adapts.margin > -0.02, adapts
