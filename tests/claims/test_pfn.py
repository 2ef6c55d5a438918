"""The prior-data fitted network's claim on Bayesian linear regression, trained for less long than in the evidence."""

import pytest

from benchmarks.claims import pfn as experiment

pytestmark = pytest.mark.claim


def test_a_trained_network_is_close_to_the_exact_posterior_at_every_context_length() -> None:
    results = {"without": [experiment.run(0, steps=0)], "with": [experiment.run(0, **experiment.SHORT)]}
    exact = [results["with"][0][f"exact_{n}"] for n in experiment.LENGTHS]
    assert exact == pytest.approx([1.047, 0.744, 0.407, 0.309], abs=0.04), "what the posterior itself loses"
    findings = experiment.check(results)
    assert len(findings) == 4
    missed = [str(finding) for finding in findings if not finding.holds]
    assert not missed, "\n".join(missed)
