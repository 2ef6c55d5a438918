"""The guarantees where each process holds only a part of every weight (FSDP2 by ModelParallelStrategy, on the CPU)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_recipes.core.recipe import Recipe

from .sharded import SHARDED, SOCKETS, WHOLE
from .table import Row, differing, furthest

pytestmark = pytest.mark.ddp
SNAPSHOTS = ["ps_kd_snapshot"]  # the one row of a recipe that works sharded at another setting only


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs, from one new process."""
    folder = tmp_path_factory.mktemp("sharded")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "tests.conformance.sharded", str(folder)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-4000:]
    return folder


def _of(folder: Path, name: str, rank: int = 0) -> dict[str, Any]:
    for error in folder.glob("*.error"):
        raise AssertionError(error.read_text()[-4000:])
    return torch.load(folder / f"{name}.rank{rank}.pt", weights_only=True)


def test_some_rows_are_trained_sharded_and_every_recipe_is_in_one_list_or_the_other() -> None:
    """A new recipe is in one of them without a line here."""
    assert len(SHARDED) > 10
    assert {"GLAD", "PEGO", "WiSEFT", "GradientNoise", "RobustAccuracyMonitor"} <= WHOLE.keys()
    assert not any(type(each).__name__ in WHOLE for row in SHARDED for each in row.recipes())


@pytest.mark.parametrize("row", [r for r in SHARDED if r.name not in SNAPSHOTS], ids=lambda row: row.name)
def test_sharded_weights_end_as_under_ddp(row: Row, runs: Path) -> None:
    for rank in range(2):
        found = _of(runs, row.name, rank)
        ddp, sharded = found["ddp"], found["sharded"]
        assert (ddp["sharded"], sharded["sharded"]) == (False, True)
        assert sharded["here"] < 0.75 * ddp["here"], "a process holds about half of the weights"
        assert furthest(sharded["before"], ddp["before"]) == 0
        assert furthest(sharded["after"], sharded["before"]) > 1e-4, "it trains"
        assert furthest(sharded["after"], ddp["after"]) < 1e-6
        assert sharded["metrics"] == pytest.approx(ddp["metrics"], abs=1e-5, nan_ok=True)
        assert sharded["left"] == [], "the module is stock again"


def test_a_sharded_run_that_was_killed_in_a_window_ends_as_if_it_had_not_been(runs: Path) -> None:
    """Mixup and AAER, on data in another order every epoch; the checkpoint is a folder to which both processes write,
    and holds each one's part of the gradients."""
    for rank in range(2):
        uninterrupted, killed = _of(runs, "uninterrupted", rank), _of(runs, "killed", rank)
        assert uninterrupted["steps"] == 12
        assert differing(uninterrupted, killed) == []


@pytest.mark.parametrize("name", sorted(WHOLE))
def test_a_recipe_that_needs_whole_weights_is_refused_in_setup(name: str, runs: Path) -> None:
    said = json.loads((runs / "refused.json").read_text())[name]
    assert name in said
    assert "ModelParallelStrategy" in said
    assert "strategy='ddp'" in said


@pytest.mark.parametrize("socket", SOCKETS)
def test_a_socket_of_weights_or_gradients_refuses_whatever_the_recipe_says(socket: str, runs: Path) -> None:
    said = json.loads((runs / "refused.json").read_text())[socket]
    assert said.startswith("AsksFor: it ")
    assert "each process holds only a part of every weight. Use strategy='auto' on one device or" in said


def test_a_copy_of_the_weights_is_refused(runs: Path) -> None:
    """PSKD works sharded from its table, and not by a snapshot."""
    said = json.loads((runs / "refused.json").read_text())["snapshot"]
    assert said.startswith("PSKD: a copy of the weights needs whole weights, and each process holds only a part of")
    for row in SHARDED:
        if row.name in SNAPSHOTS:
            assert _of(runs, row.name)["sharded"] == {"refused": said}


def test_layers_that_are_split_over_processes_are_refused_with_the_sizes_that_work(runs: Path) -> None:
    for rank in range(2):
        said = (runs / f"tensor.rank{rank}.txt").read_text()
        assert "AAER: ModelParallelStrategy splits layers over 2 processes that train on the same batch" in said
        assert "data_parallel_size=2 and tensor_parallel_size=1" in said


def test_the_command_line_shards_a_stock_module_and_refuses_a_recipe_that_cannot(runs: Path) -> None:
    for rank in range(2):
        works, refused = (json.loads((runs / f"{name}.rank{rank}.json").read_text()) for name in ("cutmix", "wise_ft"))
        assert works["status"] == 0, works["said"]
        assert refused["status"] == 1
        assert "lightning-recipes: error: WiSEFT: it needs whole weights or gradients" in refused["said"]
    (checkpoint,) = (runs / "lightning_logs").rglob("*.ckpt")
    assert sorted(path.name for path in checkpoint.iterdir()) == [
        *(".metadata", "__0_0.distcp", "__1_0.distcp", "meta.pt"),
    ], "each process has written its part"


def test_recipes_do_not_work_sharded_unless_they_say_so() -> None:
    assert Recipe.works_sharded is False
