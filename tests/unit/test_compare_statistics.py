"""What several runs come to, against numbers worked out by hand."""

import math

import pytest

from lightning_recipes.compare.statistics import (
    Difference,
    corrected,
    difference,
    estimate,
    holm,
    ratio,
    seeds_needed,
)


def test_a_mean_has_students_interval():
    found = estimate([1, 2, 3, 4])
    # sd = sqrt(5/3); t(0.975, 3) = 3.182446
    half = 3.182446305 * math.sqrt(5 / 3) / 2
    assert (found.mean, found.n) == (2.5, 4)
    assert found.sd == pytest.approx(math.sqrt(5 / 3))
    assert (found.low, found.high) == (pytest.approx(2.5 - half), pytest.approx(2.5 + half))


def test_one_value_has_no_interval():
    found = estimate([0.5])
    assert found.mean == 0.5
    assert math.isnan(found.low) and math.isnan(found.high) and math.isnan(found.sd)


def test_a_difference_is_paired_by_seed():
    found = difference({0: 1.0, 1: 2.0, 2: 3.0}, {2: 4.5, 0: 2.0, 1: 2.5})
    # differences 1, 0.5, 1.5: mean 1, sd 0.5, t = 2 sqrt(3); with 2 degrees of freedom p = 1 - t / sqrt(2 + t^2)
    assert found.estimate.mean == pytest.approx(1.0)
    assert found.estimate.sd == pytest.approx(0.5)
    assert found.estimate.high - 1 == pytest.approx(4.302652730 * 0.5 / math.sqrt(3))
    assert found.p == pytest.approx(1 - 2 * math.sqrt(3) / math.sqrt(14))


def test_what_a_seed_does_to_both_cancels_out():
    base = {seed: 10.0 * seed for seed in range(4)}
    found = difference(base, {seed: value + 1 + 0.01 * (-1) ** seed for seed, value in base.items()})
    assert found.p < 1e-4 and found.estimate.mean == pytest.approx(1.0)


def test_only_seeds_of_both_count():
    assert difference({0: 1.0, 1: 1.0, 2: 5.0}, {0: 2.0, 1: 4.0, 7: 100.0}).estimate.mean == 2.0
    assert difference({0: 1.0}, {1: 2.0}) is None


def test_one_seed_has_no_p_value_and_is_never_told_from_noise():
    (found,) = corrected([difference({0: 1.0}, {0: 100.0})])
    assert found.estimate.mean == 99.0 and found.p is None and not found.told


@pytest.mark.parametrize("shift", [0.0, 0.1])
def test_differences_all_alike_have_no_p_value(shift):
    base = {0: 0.3, 1: 0.7, 2: 0.9}
    (found,) = corrected([difference(base, {seed: value + shift for seed, value in base.items()})])
    assert found.p is None and not found.told
    assert found.estimate.mean == pytest.approx(shift)


def test_holm_by_hand():
    # sorted 0.01, 0.03, 0.04 times 3, 2, 1: 0.03, 0.06, 0.04; the last is raised to the one before it
    assert holm([0.04, None, 0.01, 0.03]) == [pytest.approx(0.06), None, pytest.approx(0.03), pytest.approx(0.06)]
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_difference_is_told_by_its_corrected_p():
    one = difference({0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0}, {0: 2.0, 1: 2.5, 2: 4.5, 3: 4.9})
    assert 0.01 < one.p < 0.05
    assert corrected([one])[0].told
    assert not corrected([one] * 5)[0].told, "five comparisons ask for more"
    assert not Difference(one.estimate, one.p).told, "not corrected yet"


def test_a_ratio_is_a_geometric_mean_with_its_range():
    found = ratio({0: 1.0, 1: 1.0, 2: 3.0}, {0: 2.0, 1: 8.0})
    assert found.mean == pytest.approx(4.0) and (found.low, found.high) == (2.0, 8.0)
    assert ratio({0: 0.0}, {0: 1.0}) is None


@pytest.mark.parametrize(("effect", "seeds"), [(1.0, 10), (0.5, 34), (0.8, 15)])
def test_seeds_needed_are_those_of_the_tables_of_the_paired_t_test(effect, seeds):
    found = estimate([effect - 1 / math.sqrt(2), effect + 1 / math.sqrt(2)])  # sd 1
    assert found.sd == pytest.approx(1.0)
    assert seeds_needed(found) == seeds


def test_no_number_of_seeds_where_nothing_is_known():
    assert seeds_needed(estimate([0.5])) is None
    assert seeds_needed(estimate([-1.0, 1.0])) is None
