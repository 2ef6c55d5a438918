"""Milestones, rates and plateaus against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from lightning_recipes.callbacks.finetuning.progressive_unfreezing import awake, group_scales
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.schedule import At, EveryN, Plateau, cosine, exponential, geometric, linear
from tests.stock import quiet


def test_shapes_between_two_values():
    for shape in (linear, cosine, exponential):
        assert [shape(p, 1.0, 16.0) for p in (-1, 0, 1, 2)] == pytest.approx([1, 1, 16, 16])
    assert [linear(p, 2.0, 6.0) for p in (0.25, 0.5)] == [3, 4]
    assert [cosine(p, 2.0, 6.0) for p in (1 / 3, 0.5)] == pytest.approx([3, 4])
    assert [exponential(p, 1.0, 16.0) for p in (0.25, 0.5)] == pytest.approx([2, 4])


def test_the_floor_rule_of_the_paper():
    """Card: E = 20 gives 2, 6, 12 and E = 30 gives 3, 9, 18."""
    for epochs, expected in ((20, [0, 2, 6, 12]), (30, [0, 3, 9, 18])):
        assert At((0, 0.10, 0.30, 0.60)).times(4, quiet(max_epochs=epochs)) == expected
    assert At((0, 0.5, 0.99, math.inf)).times(4, quiet(max_epochs=3)) == [0, 1, 2, math.inf]
    assert At((0, 3, 5)).times(3, quiet(max_epochs=-1)) == [0, 3, 5]


def test_how_many_are_awake():
    times = [0, 2, 2, 6, math.inf]
    assert [awake(times, now) for now in (0, 1, 2, 5, 6, 1000)] == [1, 1, 3, 3, 4, 4]
    assert EveryN(5).times(3, quiet()) == [0, 5, 10]


def test_ulmfit_rates():
    rates = [0.01 * s for s in group_scales(1 / 2.6, 4)]
    assert rates == pytest.approx([0.01, 0.003846, 0.001479, 0.000569], abs=5e-7)


def test_scales():
    assert group_scales(None, 3) == [1, 1, 1]
    assert group_scales((1, 0.5), 2) == [1, 0.5]
    assert group_scales((1, 0.5, 0.1), 5) == [1, 0.5, 0.1, 0.1, 0.1]
    with pytest.raises(RecipeError, match="3 factors for 2 groups"):
        group_scales((1, 0.5, 0.1), 2)


def test_geometric_rates():
    assert geometric(1e-5, 1e-3, 3) == pytest.approx([1e-5, 1e-4, 1e-3])


def test_a_plateau_stalls_after_patience_checks_without_improvement():
    plateau = Plateau(patience=2, min_delta=0.1)
    assert [plateau.stalled(v) for v in (1.0, 0.8, 0.75, 0.75, 0.75, 0.5, 0.5)] == [
        False,
        False,
        False,
        True,  # two checks within 0.1 of 0.8; the count starts anew
        False,
        False,
        False,
    ]
    up = Plateau(patience=1, mode="max")
    assert [up.stalled(v) for v in (0.1, 0.2, 0.2, 0.1)] == [False, False, True, False]
