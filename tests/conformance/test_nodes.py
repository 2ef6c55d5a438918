"""`lightning-recipes fit` by torchrun on two machines, of which one is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from .table import differing

pytestmark = pytest.mark.ddp


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs, from one new process."""
    folder = tmp_path_factory.mktemp("nodes") / "runs"
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "tests.conformance.nodes", str(folder)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-4000:]
    return folder


def _ended(machines: Path, name: str) -> dict[str, Any]:
    return json.loads((machines / "ended.json").read_text())[name]


def _said(machines: Path, place: str, name: str) -> str:
    return (machines / place / f"{name}.txt").read_text()


def _last(machines: Path, place: str) -> dict[str, Any]:
    """What a run ended with; without the paths that it saved to."""
    checkpoint = torch.load(machines / place / "checkpoints" / "last.ckpt", weights_only=True)
    del checkpoint["callbacks"]["ExactResume"]["state"]["shared"]["saves"]
    checkpoint["callbacks"] = {k: v for k, v in checkpoint["callbacks"].items() if not k.startswith("ModelCheckpoint")}
    return checkpoint


def test_when_a_machine_is_lost_the_run_ends_on_the_other_one_at_once(machines: Path) -> None:
    ended = _ended(machines, "lost")
    assert ended["statuses"] == [1, -9], _said(machines, "shared", "lost.node0")[-3000:]
    assert ended["seconds"][0] - ended["seconds"][1] < 60


def test_a_run_on_two_machines_that_lost_one_ends_bitwise_like_one_machine_with_two_processes(machines: Path) -> None:
    """Weights, optimizer, schedulers, loops, and ExactResume's and the recipes' state of both ranks."""
    assert _ended(machines, "whole")["statuses"] == [0], _said(machines, "whole", "whole.node0")[-3000:]
    assert _ended(machines, "resumed")["statuses"] == [0, 0], _said(machines, "shared", "resumed.node0")[-3000:]
    whole, resumed = _last(machines, "whole"), _last(machines, "shared")
    assert whole["global_step"] == 12
    assert differing(whole, resumed) == []
    assert {"PEGO", "ProgressiveUnfreezing", "AAER", "ExactResume"} == whole["callbacks"].keys()
    assert len(whole["callbacks"]["ExactResume"]["state"]["ranks"]) == 2


def test_the_second_life_went_on_where_the_last_checkpoint_was(machines: Path) -> None:
    """And not from the beginning, which would end the same."""
    lost = _last(machines, "apart0")  # a copy of what the first life left
    assert (lost["epoch"], lost["global_step"]) == (1, 6)
    assert "Restored all states from the checkpoint" in _said(machines, "shared", "resumed.node0")


def test_one_process_of_all_writes_the_run_folder_and_the_checkpoints(machines: Path) -> None:
    shared = machines / "shared"
    folders = sorted(path.relative_to(shared).as_posix() for path in (shared / "lightning_logs").rglob("*"))
    logs = "lightning_logs"
    assert folders == [
        *(f"{logs}/version_0", f"{logs}/version_0/config.yaml", f"{logs}/version_0/metrics.csv"),
        *(f"{logs}/version_1", f"{logs}/version_1/config.yaml", f"{logs}/version_1/metrics.csv"),
    ]
    assert sorted(path.name for path in (shared / "checkpoints").iterdir()) == ["epoch=2-step=12.ckpt", "last.ckpt"]
    assert "Epoch 2/2" in _said(machines, "shared", "resumed.node0")
    assert "Epoch" not in _said(machines, "shared", "resumed.node1"), "one progress bar"


def test_machines_that_do_not_see_one_disk_are_told_so_instead_of_waiting_for_ever(machines: Path) -> None:
    """--ckpt_path last, and the second machine has an empty folder: it would begin from the start."""
    ended = _ended(machines, "apart")
    assert ended["statuses"] == [1, 1]
    for node in range(2):
        said = _said(machines, f"apart{node}", f"apart.node{node}")
        assert "the processes do not resume from the same checkpoint: rank 0 found one of epoch 1, step 6 and" in said
        assert "rank 1 none. Its folder (ckpt_path, ModelCheckpoint's dirpath) must be on a disk that all" in said
