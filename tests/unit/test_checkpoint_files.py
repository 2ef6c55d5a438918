"""Checkpoint files of a run that dies at any of its file operations, or finds the disk full."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint

from lightning_recipes.callbacks import ExactResume
from lightning_recipes.core.patch import Patch
from tests.stock import Classifier, loader, quiet, samples

ROOT = Path(__file__).parents[2]
OTHER_DISK = Path("/dev/shm")  # in memory, so that it is another file system than a test's own folder
STEPS = 2
CASES = [(True, False, False), (True, False, True), (True, True, False), (False, False, True), (False, True, False)]
"""Whether ExactResume is there, the last checkpoint is a link, the run dies in the middle of writing."""
MID_WRITE = 1000  # bytes after which a run dies that is to die in the middle of writing


def fit(folder: Path, *callbacks: Callback, link: bool = False, **trainer: Any) -> pl.LightningModule:
    torch.manual_seed(0)
    module = Classifier()
    saves = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_last="link" if link else True)
    settings = {"max_epochs": -1, "max_steps": STEPS, "enable_checkpointing": True, **trainer}
    quiet(callbacks=[saves, *callbacks], **settings).fit(module, loader(*samples()))
    return module


# -- deaths ----------------------------------------------------------------------------------------------------------


class Promise(Checkpoint):
    """Notes outside the folder which step is safe."""

    def __init__(self, note: Path) -> None:
        self.note = note

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.note.write_text(str(trainer.global_step))


def die_at(number: int, mid_write: bool, folder: Path) -> None:
    """Have this process be killed right before its so-many-th operation that changes a file in the folder, counted
    from 0; or after the first bytes of it, if it opens a file and writes."""
    names = {"open", "os.rename", "os.remove", "os.symlink"}
    count = 0

    def audit(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in names or not any(str(each).startswith(str(folder)) for each in args[:2]):
            return
        if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR):
            return
        if count == number:
            if not mid_write:
                os.kill(os.getpid(), signal.SIGKILL)
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python makes an OSError of it
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (MID_WRITE, MID_WRITE))
        count += 1

    sys.addaudithook(audit)


def die_everywhere(out: Path) -> None:
    """Runs that die at each of their file operations in turn, each forked from here; with us and without, with a last
    checkpoint that is a copy and one that is a link."""
    torch.set_num_threads(1)
    if OTHER_DISK.is_dir():
        tempfile.tempdir = tempfile.mkdtemp(dir=OTHER_DISK)
    TorchCheckpointIO().save_checkpoint({}, out / "first.ckpt")  # imports once what every child needs
    found = []
    for exact, link, mid_write in CASES:
        for number in range(100):
            folder, note = out / f"{exact}{link}{mid_write}{number}", out / "note"
            note.write_text("0")
            child = os.fork()
            if child == 0:
                with contextlib.suppress(BaseException):
                    folder.mkdir()
                    die_at(number, mid_write, folder)
                    fit(folder, *[ExactResume()] * exact, Promise(note), link=link)
                os._exit(0)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if status == 0 and int(note.read_text()) == STEPS:
                break  # it has fewer operations
            places = {"exact": exact, "link": link, "mid_write": mid_write, "number": number}
            found.append({**places, "promised": int(note.read_text()), **look(folder)})
    if OTHER_DISK.is_dir():
        os.rmdir(tempfile.tempdir) if not os.listdir(tempfile.tempdir) else None
    (out / "found.json").write_text(json.dumps(found))


def look(folder: Path) -> dict[str, Any]:
    """The step that ``ckpt_path="last"`` would resume from, None for no such; files that cannot be read."""
    steps, broken = {}, []
    for path in folder.glob("*.ckpt"):
        if path.exists():
            try:
                steps[path.name] = torch.load(path, weights_only=True)["global_step"]
            except Exception:
                broken.append(path.name)
    return {"last": steps.get("last.ckpt"), "broken": broken, "files": sorted(p.name for p in folder.iterdir())}


@pytest.fixture(scope="module")
def deaths(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("deaths")
    code = "import sys, pathlib, tests.unit.test_checkpoint_files as t; t.die_everywhere(pathlib.Path(sys.argv[1]))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code, str(out)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads((out / "found.json").read_text())


@pytest.mark.parametrize("link", [False, True], ids=["copy", "link"])
def test_a_run_that_dies_at_any_file_operation_has_its_last_checkpoint_whole(
    link: bool, deaths: list[dict[str, Any]]
) -> None:
    mine = [each for each in deaths if each["exact"] and each["link"] == link]
    assert {each["promised"] for each in mine} == set(range(STEPS)), "it dies in each of its saves"
    assert sum(not each["mid_write"] for each in mine) >= 4 * STEPS
    assert link or any(each["mid_write"] for each in mine)
    for each in mine:
        assert each["broken"] == [], each
        assert (each["last"] or 0) >= each["promised"], each


def test_lightnings_own_link_leads_nowhere_for_a_moment(deaths: list[dict[str, Any]]) -> None:
    """The contrast: what was promised is gone, and ``ckpt_path="last"`` begins anew."""
    own = [each for each in deaths if not each["exact"] and each["link"]]
    assert any(each["promised"] and each["last"] is None for each in own)


@pytest.mark.skipif(
    not OTHER_DISK.is_dir() or os.stat(OTHER_DISK).st_dev == os.stat(tempfile.gettempdir()).st_dev,
    reason="needs a second file system for temporary files",
)
def test_lightnings_own_file_is_cut_off_where_temporary_files_are_on_another_disk(deaths: list[dict[str, Any]]) -> None:
    """The contrast: the last checkpoint is half of the new one, and the earlier one is gone."""
    own = [each for each in deaths if not each["exact"] and not each["link"]]
    assert any("last.ckpt" in each["broken"] for each in own)


# -- a full disk -----------------------------------------------------------------------------------------------------


class NoRoom(Callback):
    """From this step on no file of this process may be larger than some bytes."""

    def __init__(self, step: int, room: int) -> None:
        self.step, self.room = step, room

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.room, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_full_disk_ends_the_run_with_the_files_name_and_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match="this checkpoint was not written") as raised:
            fit(tmp_path, NoRoom(2, 2000), ExactResume())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert raised.value.errno == errno.EFBIG
    assert raised.value.filename == str(tmp_path / "step=2.ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "step=1.ckpt"]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 1


# -- what it takes hold of -------------------------------------------------------------------------------------------


def test_a_checkpoint_needs_no_folder_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    fit(tmp_path / "keep", ExactResume())
    assert sorted(path.name for path in (tmp_path / "keep").iterdir()) == ["last.ckpt", f"step={STEPS}.ckpt"]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        fit(tmp_path / "own")


def test_what_a_killed_run_left_half_written_is_written_over(tmp_path: Path) -> None:
    (tmp_path / ".last.ckpt.part").write_bytes(b"half")
    (tmp_path / ".step=1.ckpt.part").write_bytes(b"half")
    fit(tmp_path, ExactResume())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", f"step={STEPS}.ckpt"]


def test_the_link_to_the_last_checkpoint_leads_to_the_newest_file(tmp_path: Path) -> None:
    fit(tmp_path, ExactResume(), link=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", f"step={STEPS}.ckpt"]
    assert os.readlink(tmp_path / "last.ckpt") == f"step={STEPS}.ckpt"


class Counts(TorchCheckpointIO):
    """A user's own way of writing."""

    written = 0

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.written += 1
        assert not isinstance(self.__dict__.get("save_checkpoint"), Patch)
        super().save_checkpoint(*args, **kwargs)


def test_a_users_own_way_of_writing_is_left_alone(tmp_path: Path) -> None:
    own = Counts()
    fit(tmp_path, ExactResume(), plugins=[own])
    assert own.written == 2 * STEPS


def test_afterwards_lightning_writes_again(tmp_path: Path) -> None:
    class Look(Callback):
        def on_train_start(self, trainer: pl.Trainer, *args: Any) -> None:
            self.writer = trainer.strategy.checkpoint_io
            self.during = set(vars(self.writer)), set(vars(trainer.checkpoint_callback))

    look = Look()
    module = fit(tmp_path, ExactResume(), look)
    assert {"save_checkpoint", "remove_checkpoint"} <= look.during[0]
    assert "_link_checkpoint" in look.during[1]
    assert not vars(look.writer)
    assert "_link_checkpoint" not in vars(module.trainer.checkpoint_callback)
