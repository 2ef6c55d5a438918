"""LangevinMixture's claim: on noisy labels the mixture of samples is far better than the iterate of plain SGD."""

import pytest

from benchmarks.claims import universality as experiment

pytestmark = pytest.mark.claim


def test_on_noisy_labels_the_mixture_predicts_better_than_sgd() -> None:
    results = {arm: [experiment.run(0, **arguments)] for arm, arguments in experiment.SHORT.items()}
    findings = experiment.check(results)
    assert len(findings) == 2
    for finding in findings:
        assert finding.holds, str(finding)
