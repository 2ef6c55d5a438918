"""Any two recipes: refused with the reason, or in a stack of recipes that is killed and that runs on two ranks."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from .lives import end_of, launch
from .recipes import pairs, refusal, stacks
from .table import Row, differing, furthest, same

REFUSED = [row for row in pairs() if refusal(row)]
stack = pytest.mark.parametrize("row", stacks(), ids=lambda row: row.name)


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every stack ended with, and how every other pair was refused; one launch for all."""
    return launch(tmp_path_factory.mktemp("lives"), "stacks", "refused")


def test_every_two_recipes_are_in_a_stack_or_refused() -> None:
    together = {frozenset(two) for row in stacks() for two in itertools.combinations(row.name.split(" + "), 2)}
    refused = {frozenset(row.name.split(" + ")) for row in REFUSED}
    assert {frozenset(row.name.split(" + ")) for row in pairs()} == together | refused
    assert not together & refused


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row.name)
def test_a_refused_pair_says_which_two_and_why(row: Row, lives: Path) -> None:
    refused = end_of(lives, row, "refused")
    assert refusal(row) in refused["error"]
    assert all(type(recipe).__name__ in refused["error"] for recipe in row.recipes())
    assert refused["unchanged"]


@pytest.mark.ddp
@stack
def test_a_stack_composes_on_two_ranks(row: Row, lives: Path) -> None:
    assert same(end_of(lives, row, "two", 0), end_of(lives, row, "two", 1))
    assert furthest(end_of(lives, row, "two"), end_of(lives, row, "one")) < 1e-6


@stack
def test_a_stack_that_was_killed_ends_as_if_it_had_not_been(row: Row, lives: Path) -> None:
    assert differing(end_of(lives, row, "whole1"), end_of(lives, row, "killed1")) == []
