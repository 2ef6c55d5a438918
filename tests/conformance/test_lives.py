"""The guarantees that take processes of their own: killed runs, two ranks, and every pair of recipes in both."""

from __future__ import annotations

import glob
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from .lives import KILLS, TWENTY
from .recipes import ROWS, pairs, refusal
from .table import LIGHTNINGS_OWN, Row, differing, furthest, same

ROOT = Path(__file__).parents[2]
rows = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every row and pair ended with, in processes of their own; one launch for all."""
    folder = tmp_path_factory.mktemp("lives")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.conformance.lives", str(folder)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert run.returncode == 0, run.stderr[-4000:]
    return folder


def _of(lives: Path, row: Row, what: str, rank: int = 0) -> dict[str, Any]:
    """What one life ended with, or the error that ended it."""
    name = f"{row.name}.{what}.rank{rank}"
    for error in lives.glob(f"{glob.escape(row.name)}.{what}.rank*.error"):
        pytest.fail(error.read_text()[-4000:])
    return torch.load(lives / f"{name}.pt", weights_only=True)


# -- 2. resume -------------------------------------------------------------------------------------------------------


@rows
@pytest.mark.ddp
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_was_killed_ends_as_if_it_had_not_been(row: Row, ranks: int, lives: Path) -> None:
    """With ExactResume beside it, killed by SIGKILL and resumed in new processes: on one rank in the middle of an epoch
    and again after an epoch's last step, on two ranks in the middle of an epoch or of an optimizer step."""
    for rank in range(ranks):
        whole, killed = (_of(lives, row, f"{what}{ranks}", rank) for what in ("whole", "killed"))
        assert whole["steps"] == 12
        assert differing(whole, killed) == []


@pytest.mark.parametrize("row", [row for row in ROWS if row.name in TWENTY], ids=lambda row: row.name)
def test_a_run_that_was_killed_twenty_times_at_random_moments_ends_the_same(row: Row, lives: Path) -> None:
    whole, killed = _of(lives, row, "long1"), _of(lives, row, "twenty")
    deaths = killed.pop("deaths")
    assert len(deaths) == KILLS
    assert len(set(deaths)) > KILLS // 4, "it dies at different places"
    assert deaths == sorted(deaths), "what was saved is never lost again"
    assert differing(whole, killed) == []


# -- 3. two ranks ----------------------------------------------------------------------------------------------------


@pytest.mark.ddp
@rows
def test_both_ranks_hold_the_same_weights(row: Row, lives: Path) -> None:
    assert same(_of(lives, row, "two", 0), _of(lives, row, "two", 1))


@pytest.mark.ddp
@rows
def test_two_ranks_equal_one_process_on_the_same_global_batches(row: Row, lives: Path) -> None:
    assert furthest(_of(lives, row, "two"), _of(lives, row, "one")) < 1e-6


@pytest.mark.ddp
def test_lightnings_own_finetuning_lets_the_ranks_drift_apart(lives: Path) -> None:
    """What ProgressiveUnfreezing mends: the contrast that shows the rank test can fail."""
    assert furthest(_of(lives, LIGHTNINGS_OWN, "two", 0), _of(lives, LIGHTNINGS_OWN, "two", 1)) > 1e-3


# -- 9. together -----------------------------------------------------------------------------------------------------


PAIRS = pairs()
composing = pytest.mark.parametrize("row", [row for row in PAIRS if refusal(row) is None], ids=lambda row: row.name)


@pytest.mark.parametrize("row", [row for row in PAIRS if refusal(row)], ids=lambda row: row.name)
def test_a_refused_pair_says_which_two_and_why(row: Row, lives: Path) -> None:
    refused = _of(lives, row, "refused")
    assert refusal(row) in refused["error"]
    assert all(type(recipe).__name__ in refused["error"] for recipe in row.recipes())
    assert refused["unchanged"]


@pytest.mark.ddp
@composing
def test_a_pair_composes_on_two_ranks(row: Row, lives: Path) -> None:
    assert same(_of(lives, row, "two", 0), _of(lives, row, "two", 1))
    assert furthest(_of(lives, row, "two"), _of(lives, row, "one")) < 1e-6


@composing
def test_a_pair_that_was_killed_ends_as_if_it_had_not_been(row: Row, lives: Path) -> None:
    assert differing(_of(lives, row, "whole1"), _of(lives, row, "killed1")) == []
