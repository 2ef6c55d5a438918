"""The guarantees that take processes of their own: runs that are killed, and runs on two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from .lives import KILLS, TWENTY, end_of, launch
from .recipes import ROWS
from .table import LIGHTNINGS_OWN, Row, differing, furthest, same

RUNNING = ("running_mean", "running_var", "num_batches_tracked")
rows = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every row ended with; one launch for all."""
    return launch(tmp_path_factory.mktemp("lives"), "rows")


# -- 2. resume -------------------------------------------------------------------------------------------------------


@rows
@pytest.mark.ddp
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_was_killed_ends_as_if_it_had_not_been(row: Row, ranks: int, lives: Path) -> None:
    """With ExactResume beside it, killed by SIGKILL and resumed in new processes: on one rank in the middle of an epoch
    and again after an epoch's last step, on two ranks in the middle of an epoch or of an optimizer step."""
    for rank in range(ranks):
        whole, killed = (end_of(lives, row, f"{what}{ranks}", rank) for what in ("whole", "killed"))
        assert whole["steps"] == 12
        assert differing(whole, killed) == []


@pytest.mark.parametrize("row", [row for row in ROWS if row.name in TWENTY], ids=lambda row: row.name)
def test_a_run_that_was_killed_twenty_times_at_random_moments_ends_the_same(row: Row, lives: Path) -> None:
    whole, killed = end_of(lives, row, "long1"), end_of(lives, row, "twenty")
    deaths = killed.pop("deaths")
    assert len(deaths) == KILLS
    assert len(set(deaths)) > KILLS // 4, "it dies at different places"
    assert deaths == sorted(deaths), "what was saved is never lost again"
    assert differing(whole, killed) == []


# -- 3. two ranks ----------------------------------------------------------------------------------------------------


@pytest.mark.ddp
@rows
def test_both_ranks_hold_the_same_weights(row: Row, lives: Path) -> None:
    first, second = (end_of(lives, row, "two", rank) for rank in range(2))
    if row.batch_norm:
        first, second = ({k: v for k, v in each.items() if not k.endswith(RUNNING)} for each in (first, second))
    assert same(first, second)


@pytest.mark.ddp
@pytest.mark.parametrize("row", [row for row in ROWS if not row.batch_norm], ids=lambda row: row.name)
def test_two_ranks_equal_one_process_on_the_same_global_batches(row: Row, lives: Path) -> None:
    assert furthest(end_of(lives, row, "two"), end_of(lives, row, "one")) < 1e-6


@pytest.mark.ddp
def test_lightnings_own_finetuning_lets_the_ranks_drift_apart(lives: Path) -> None:
    """What ProgressiveUnfreezing mends: the contrast that shows the rank test can fail."""
    assert furthest(end_of(lives, LIGHTNINGS_OWN, "two", 0), end_of(lives, LIGHTNINGS_OWN, "two", 1)) > 1e-3
