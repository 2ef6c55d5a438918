"""A short soak: one trouble of each kind; and that the soak sees what it looks for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.soak import BROKEN, KINDS, SAVED, STATUSES, STEPS, WORDS, Life, Soak, Trouble, draw_of, round_of, table

ROOT = Path(__file__).parents[2]


# -- a short one -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("soak")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.soak", "--each", "--seed", "0", "--out", str(out)]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert (out / "soak.json").exists(), run.stderr[-3000:]
    report = json.loads((out / "soak.json").read_text())
    assert run.returncode == bool(report["violations"])
    assert (out / "soak.md").read_text().strip() in run.stdout
    return report


@pytest.mark.ddp
@pytest.mark.parametrize("kind", KINDS)
def test_a_trouble_costs_the_steps_since_the_last_checkpoint_and_nothing_else(
    kind: str, report: dict[str, Any]
) -> None:
    """The end is bitwise that of the run that nothing happened to, or it is among the violations."""
    assert report["violations"] == []
    (trouble,) = [each for each in report["troubles"] if each["kind"] == kind]
    assert "missed" not in trouble
    assert any(trouble["statuses"]), "it ended the life"
    assert trouble["lost"] == trouble["steps"] - trouble["checkpoint"]
    assert 0 <= trouble["lost"] <= 2
    assert report["kinds"][kind]["troubles"] == 1


def test_a_full_disk_did_stop_a_checkpoint(report: dict[str, Any]) -> None:
    (trouble,) = [each for each in report["troubles"] if each["kind"] == "disk full"]
    assert trouble["lost"] == 2, "the one of the step at which it died was not written"


# -- what it looks for -----------------------------------------------------------------------------------------------


TROUBLE = Trouble("SIGKILL", after=3, delay=0.0, rank=None, loud=True, saves=False, room=0.5)


def counted(tmp_path: Path, *, last: int, steps: int, saved: int = 0, hung: bool = False) -> tuple[dict, list[str]]:
    """What is counted of a life that died after so many steps, and of what is complained."""
    soak, keep, folder = Soak(0, tmp_path, lambda line: None), tmp_path / "keep", tmp_path / "life"
    keep.mkdir(exist_ok=True)
    folder.mkdir(exist_ok=True)
    torch.save({"global_step": last}, keep / "last.ckpt")
    words = [0] * WORDS
    words[STEPS], words[SAVED], words[STATUSES] = steps, saved, -9
    setting = next(each for each in (draw_of(0, n) for n in range(99)) if each.every == 2 and each.ranks == 1)
    found = soak._count(setting, folder, keep, Life(words, hung, 1.0), TROUBLE)
    return found, [each["what"] for each in soak.violations]


def test_the_steps_since_the_last_checkpoint_are_lost(tmp_path: Path) -> None:
    found, complaints = counted(tmp_path, last=4, steps=6, saved=4)
    assert (found["steps"], found["checkpoint"], found["lost"], found["orderly"]) == (6, 4, 2, False)
    assert complaints == []


def test_more_steps_lost_than_lie_between_two_checkpoints_are_a_violation(tmp_path: Path) -> None:
    assert counted(tmp_path, last=4, steps=7, saved=4)[1] == ["SIGKILL: 3 steps lost with a checkpoint every 2"]


def test_a_checkpoint_older_than_one_that_was_there_is_a_violation(tmp_path: Path) -> None:
    assert counted(tmp_path, last=4, steps=6, saved=6)[1] == [
        "SIGKILL: the last checkpoint is of step 4, and 6 was saved"
    ]


def test_a_checkpoint_that_is_cut_off_is_a_violation(tmp_path: Path) -> None:
    (tmp_path / "keep").mkdir()
    torch.save({"global_step": 6, "weights": torch.zeros(1000)}, tmp_path / "keep" / "step=6.ckpt")
    os.truncate(tmp_path / "keep" / "step=6.ckpt", 1000)
    (complaint,) = counted(tmp_path, last=4, steps=6, saved=4)[1]
    assert complaint.startswith("SIGKILL: cannot be read: ['step=6.ckpt: ")
    assert "1000 bytes" in complaint


def test_a_hang_and_what_a_module_holds_are_violations(tmp_path: Path) -> None:
    (tmp_path / "life").mkdir()
    (tmp_path / "life" / "held0.json").write_text('["training_step"]')
    assert counted(tmp_path, last=6, steps=6, hung=True)[1] == [
        "SIGKILL: it hangs, [-9]",
        "recipes have not let go of ['training_step']",
    ]


def test_a_life_that_ends_without_a_trouble_is_a_violation(tmp_path: Path) -> None:
    soak, words = Soak(0, tmp_path, lambda line: None), [0] * WORDS
    words[STATUSES] = BROKEN
    soak._count(draw_of(0, 0), tmp_path, tmp_path, Life(words, False, 1.0), None)
    assert [each["what"][:27] for each in soak.violations] == ["it ends without a trouble, "]
    assert soak.violations[0]["round"] == "0/0"
    assert "--seed/--round 0/0" in table(soak.report())


def test_rounds_are_repeated_by_seed_and_number() -> None:
    (first, its), (again, their) = round_of(3, 5), round_of(3, 5)
    assert str(first) == str(again)
    assert [its(life) for life in range(9)] == [their(life) for life in range(9)]
    assert str(first) != str(round_of(3, 6)[0])
    assert its(8) is None, "the last life is left in peace, so that a round ends"
