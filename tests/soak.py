"""Runs that are troubled for an hour, and what was lost: nothing but the steps since the last checkpoint.

``python -m tests.soak --minutes 60 --seed 0 --out FOLDER`` (``make soak``). In every round a run with a random stack of
recipes, on one rank or two, is killed, told to stop, left without room on its disk, given a batch of NaNs, or loses a
worker of its loader, at random moments, and is resumed from ``ckpt_path="last"`` in new processes until it has
finished. What it ends with (weights, optimizers, schedulers, callbacks, random states) must be bitwise what the same
run ends with when nothing happens to it. Every life is a session of processes of its own.

Counted are the troubles, and for each the optimizer steps that were done and are not in the last checkpoint. A
violation is more than that: a checkpoint that cannot be read or is older than one that was there, another end, ranks
that differ, a process that hangs or is left over, a module that recipes have not let go of. It is reported with what
repeats its round: ``--seed 0 --round 17``. The moments are random in time too, so a round repeats in what is drawn, not
to the millisecond.

The disk that is full is a small one of its own where this machine lets a user have one (``unshare --mount``); else the
size of the files that the run may write is limited, from outside and at a random moment as well.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import json
import logging
import os
import platform
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import Any

import lightning
import lightning.pytorch as pl
import peft  # noqa: F401 - recipes import it when they need it: once here, not in every process
import psutil
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.utils.data import TensorDataset, get_worker_info

from lightning_recipes.core.errors import RecipeError
from tests.conformance.lives import ended, lively
from tests.conformance.recipes import drawn
from tests.conformance.table import Row, differing

KINDS = ("SIGKILL", "SIGTERM", "disk full", "NaN loss", "dead worker")
DISK = 32 * 2**20  # bytes
PATIENCE = 150.0  # seconds that a life may take, and that it may go on after a trouble
SOON = 15.0  # seconds after which no process of a dead life may be left: a loader's workers look every five
LIVES = 8  # troubled ones of a round
RUNNING = re.compile(r"running_mean|running_var|num_batches_tracked")  # each rank's own
ASIDE = "SOAK_DISK"  # set for the process that has mounts of its own


# -- what a life and its driver tell each other -----------------------------------------------------------------------

BATCHES, STEPS, SAVED, NAN, DIE, PIDS, STATUSES, WORDS = 0, 1, 2, 3, 5, 7, 9, 11
"""Places in the words that they share: batches and optimizer steps done; the step of the last checkpoint that was
written; orders to make a batch NaN and to have a worker die, and process ids and exit statuses, one a rank."""
NOT_YET = -1000
ORDERLY, BROKEN = 3, 1  # exit statuses: stopped by SIGTERM; by an exception


class Tells(Callback):
    """Counts for the driver, and obeys it. First of all callbacks."""

    def __init__(self, words: Any, rank: int, loud: bool) -> None:
        self.words, self.rank, self.loud = words, rank, loud
        self.module: pl.LightningModule | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.module = pl_module

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        if self.words[NAN + self.rank]:
            self.words[NAN + self.rank] = 0
            next(each for each in batch if each.is_floating_point()).fill_(float("nan"))

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if self.loud and not loss.isfinite():
            raise ArithmeticError(f"the loss is {loss.item()}")

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if self.rank == 0:
            self.words[STEPS] = trainer.global_step
            self.words[BATCHES] += 1


class TellsOfSaves(Checkpoint):
    """Tells the driver of every checkpoint that is written. After the one that writes."""

    def __init__(self, words: Any, writer: ModelCheckpoint) -> None:
        self.words, self.writer = words, writer

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.is_global_zero:
            self.words[SAVED] = max(self.words[SAVED], self.writer._last_global_step_saved)


class Perishable(TensorDataset):
    """Has a worker that reads it die when it is told to."""

    orders: Any = None

    def __getitem__(self, index: Any) -> Any:
        if get_worker_info() is not None:
            place = DIE + int(os.environ.get("LOCAL_RANK", 0))
            if self.orders[place]:
                self.orders[place] = 0
                os._exit(7)
        return super().__getitem__(index)


# -- a life -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draw:
    """What a round is about."""

    name: str
    row: Row
    ranks: int
    workers: int
    epochs: int
    every: int
    link: bool

    def __str__(self) -> str:
        last = ", last a link" if self.link else ""
        return (
            f"{self.row.name}: {self.ranks} rank{'s' * (self.ranks > 1)}, {self.workers} workers, {self.epochs} epochs,"
            f" a checkpoint every {self.every}{last}"
        )


def draw_of(seed: int, number: int, largest: int = 5) -> Draw:
    """The round of that number."""
    draw = random.Random(f"{seed}/{number}")
    return Draw(
        f"{seed}/{number}",
        drawn(draw, largest),
        ranks=draw.choice([1, 1, 2]),
        workers=draw.choice([0, 2]),
        epochs=draw.choice([2, 3]),
        every=draw.choice([1, 2, 3, 5]),
        link=draw.random() < 0.25,
    )


@dataclass(frozen=True)
class Trouble:
    """One life's: what comes, after how many of its batches and how many further seconds.

    Attributes:
        rank: whom it meets; None for all, and for the workers too where it is a signal.
        loud: how NaN is noticed: by a callback of the user's, or by ``Trainer(detect_anomaly=True)``.
        saves: whether a SIGTERM is answered with a checkpoint (``save_on_exception``). Not where a loader's workers
            get it too: then it is one of them that ends the run, in mid-step, and what is saved there is not exact.
        room: share of a checkpoint for which there is room on the disk.
    """

    kind: str
    after: int
    delay: float
    rank: int | None
    loud: bool
    saves: bool
    room: float


def trouble_of(draw: random.Random, setting: Draw, kinds: Sequence[str] = KINDS) -> Trouble:
    possible = [kind for kind in kinds if kind != "dead worker" or setting.workers]
    kind, rank = draw.choice(possible), draw.choice([None, *range(setting.ranks)])
    return Trouble(
        kind,
        after=draw.randint(0, 9),
        delay=draw.choice([0.0, 0.01, 0.1]) * draw.random(),
        rank=rank,
        loud=draw.random() < 0.5,
        saves=draw.random() < 0.5 and (rank is not None or not setting.workers),
        room=draw.random() * 1.9,
    )


def live(setting: Draw, folder: Path, words: Any, rank: int, trouble: Trouble | None, keep: Path | None) -> int:
    """One rank of a life, in its own process; return its exit status.

    Args:
        folder: for what it ends with.
        keep: for its checkpoints; None for none, in the run that nothing happens to.
    """
    if setting.ranks > 1:
        os.environ["LOCAL_RANK"], os.environ["NODE_RANK"], os.environ["MASTER_ADDR"] = str(rank), "0", "127.0.0.1"
    log = open(folder / f"rank{rank}.log", "w")  # noqa: SIM115 - for the whole life of the process
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    faulthandler.register(signal.SIGUSR1, log, all_threads=True)
    loud = trouble is None or trouble.loud
    tells = Tells(words, rank, loud)
    callbacks: list[Callback] = [tells, *setting.row.recipes()]
    if keep is not None:
        writer = ModelCheckpoint(
            keep,
            "{step}",
            every_n_train_steps=setting.every,
            save_last="link" if setting.link else True,
            save_on_exception=trouble is not None and trouble.kind == "SIGTERM" and trouble.saves,
        )
        callbacks += [writer, TellsOfSaves(words, writer)]
    ckpt = Path("last") if keep is not None and last_of(keep) else None

    def data(size: int) -> TensorDataset:
        dataset = setting.row.data(size)
        dataset.__class__ = Perishable
        return dataset

    Perishable.orders = words
    row = replace(setting.row, data=data, trainer={**setting.row.trainer, "detect_anomaly": not loud})
    status = 0
    try:
        result = ended(*lively(row, callbacks, ckpt, setting.ranks, setting.epochs, setting.workers))
        torch.save(result, folder / f"end{rank}.pt")
    except SIGTERMException:
        status = ORDERLY
    except RecipeError as error:
        (folder / f"refused{rank}.txt").write_text(str(error))
        status = BROKEN
    except BaseException:
        (folder / f"error{rank}.txt").write_text(traceback.format_exc())
        status = BROKEN
    if tells.module is not None:
        (folder / f"held{rank}.json").write_text(json.dumps(held_by_recipes(tells.module)))
    return status


def held_by_recipes(module: pl.LightningModule) -> list[str]:
    """What of a module, and of torch, is not as its own code makes it."""
    wrapped = {"training_step", "configure_optimizers", "configure_gradient_clipping", "log", "predict_step"}
    held = sorted(wrapped & set(module.__dict__))
    held += [f"{name} in torch" for name in ("cross_entropy",) if "recipes" in getattr(F, name).__module__]
    for name, part in module.named_modules():
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
            ours = [each for each in getattr(part, kind).values() if "recipes" in (each.__module__ or "")]
            held += [f"{kind[1:].replace('_', ' ')} of {name}"] * bool(ours)
    return held


def last_of(keep: Path) -> Path | None:
    """What ``ckpt_path="last"`` takes."""
    found = [path for path in keep.glob("last*.ckpt") if path.exists()]
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


# -- the driver ------------------------------------------------------------------------------------------------------


@dataclass
class Life:
    """What came of one.

    Attributes:
        words: the shared ones, at its end.
        hung: it had to be killed.
        seconds: that it took.
    """

    words: list[int]
    hung: bool
    seconds: float

    def statuses(self, ranks: int) -> list[int]:
        return self.words[STATUSES : STATUSES + ranks]


class Disk:
    """Where checkpoints go, and a way to leave it without room.

    Args:
        folder: empty.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.own = os.environ.get(ASIDE) == "own" and mount(folder)
        self._filling = folder / "filling"

    def fill(self, room: int, pids: Sequence[int]) -> None:
        """Leave room for so many bytes, or for files of so many bytes."""
        if not self.own:
            for pid in pids:
                with_hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (room, with_hard))
            return
        for _ in range(9):
            free = os.statvfs(self.folder)
            size = max(1, free.f_bavail * free.f_frsize - room)
            try:
                with open(self._filling, "wb") as file:
                    os.posix_fallocate(file.fileno(), 0, size)
                return
            except OSError:  # the run has just written something itself: once more with what is free now
                continue

    def make_room(self) -> None:
        self._filling.unlink(missing_ok=True)


def mount(folder: Path) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "soak", str(folder)]
    return subprocess.run(command, capture_output=True).returncode == 0


def with_own_mounts() -> None:
    """Become a process whose mounts nobody else sees and that vanish with it, if this machine lets us."""
    if ASIDE in os.environ or not shutil.which("unshare"):
        return
    for way in (["unshare", "--mount"], ["unshare", "--mount", "--map-root-user"]):
        with tempfile.TemporaryDirectory() as folder:
            test = [*way, "mount", "-t", "tmpfs", "-o", "size=1m", "soak", folder]
            if subprocess.run(test, capture_output=True).returncode == 0:
                os.environ[ASIDE] = "own"
                os.execvp(way[0], [*way, sys.executable, "-m", "tests.soak", *sys.argv[1:]])


def lead(setting: Draw, folder: Path, words: Any, trouble: Trouble | None, keep: Path | None) -> int:
    """Start a life's ranks in a session of their own, as a launcher does; return the process id of the launcher, which
    is the session's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    child = os.fork()
    if child:
        return child
    os.setsid()
    os.environ["MASTER_PORT"] = str(port)
    ranks, pids = {}, []
    for rank in range(setting.ranks):
        pid = os.fork()
        if pid == 0:
            status = BROKEN
            try:
                status = live(setting, folder, words, rank, trouble, keep)
            finally:
                os._exit(status)
        ranks[pid] = rank
        pids.append(pid)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it waits for its ranks, as launchers do
    words[PIDS : PIDS + setting.ranks] = pids  # now they may be troubled
    while ranks:
        pid, status = os.wait()
        if pid in ranks:
            words[STATUSES + ranks.pop(pid)] = os.waitstatus_to_exitcode(status)
    os._exit(0)


def living(session: int) -> list[int]:
    """Processes of a session that are not over."""
    found = []
    for pid in psutil.pids():
        try:
            if os.getsid(pid) == session and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
        except (ProcessLookupError, PermissionError, psutil.Error):
            continue
    return found


class Soak:
    """Rounds of a run that is troubled.

    Args:
        out: folder for results, and for what a violation left behind.
        say: for progress.
    """

    def __init__(self, seed: int, out: Path, say: Callable[[str], None]) -> None:
        self.seed, self.out, self.say = seed, out.resolve(), say
        self.out.mkdir(parents=True, exist_ok=True)
        self.disk = Disk(self.out / "disk")
        self.started = time.time()
        self.rounds, self.refused, self.whole_steps = 0, 0, 0
        self.ranks: Counter[str] = Counter()
        self.recipes: Counter[str] = Counter()
        self.troubles: list[dict[str, Any]] = []
        self.violations: list[dict[str, str]] = []
        self._kept: list[str] = []  # what recipes leave by choice: it is there when nothing has happened
        self._watched: dict[int, tuple[float, Draw]] = {}  # sessions of dead lives, until when they may have processes

    # -- one life ------------------------------------------------------------------------------------------------------

    def life(self, setting: Draw, folder: Path, trouble: Trouble | None, keep: Path | None) -> Life:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        words = RawArray("q", WORDS)
        words[STATUSES] = words[STATUSES + 1] = NOT_YET
        start, acted = time.monotonic(), trouble is None
        leader = lead(setting, folder, words, trouble, keep)
        over = hung = False
        moment = None
        while not over:
            time.sleep(0.002)
            over = os.waitpid(leader, os.WNOHANG)[0] == leader
            now = time.monotonic()
            if not acted and words[PIDS + setting.ranks - 1] and words[BATCHES] >= trouble.after:
                moment = moment or now + trouble.delay
                if now >= moment:
                    acted, start = True, now
                    self._strike(trouble, setting, words, leader, keep)
            alone = acted and not words[BATCHES] and any(s not in (0, NOT_YET) for s in words[STATUSES : STATUSES + 2])
            if not over and now - start > (SOON if alone else PATIENCE):
                hung = not alone  # ranks that wait for one that never came are ended by a launcher
                for pid in living(leader) if hung else []:
                    if pid != leader:
                        os.kill(pid, signal.SIGUSR1)  # writes its stack
                time.sleep(1.0 * hung)
                os.killpg(leader, signal.SIGKILL)
                os.waitpid(leader, 0)
                over = True
        self.disk.make_room()
        self._watched[leader] = (time.monotonic() + SOON, setting)
        return Life(list(words), hung, time.monotonic() - start)

    def _strike(self, trouble: Trouble, setting: Draw, words: Any, leader: int, keep: Path) -> None:
        pids = [words[PIDS + rank] for rank in range(setting.ranks)]
        whom = pids if trouble.rank is None else [pids[trouble.rank]]
        number = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM}.get(trouble.kind)
        rank = trouble.rank or 0
        try:
            if number is not None and trouble.rank is None:
                os.killpg(leader, number)
            elif number is not None:
                os.kill(whom[0], number)
            elif trouble.kind == "disk full":
                there = last_of(keep)
                self.disk.fill(int(trouble.room * (there.stat().st_size if there else 2**16)), pids[:1])
            elif trouble.kind == "NaN loss":
                words[NAN + rank] = 1
            else:
                words[DIE + rank] = 1
        except ProcessLookupError:
            pass  # it was over

    # -- one round -----------------------------------------------------------------------------------------------------

    def round(self, setting: Draw, troubles: Callable[[int], Trouble | None]) -> None:
        """Trouble a run until it has finished.

        Args:
            troubles: of the life of that number; None for none.
        """
        start, before = time.time(), len(self.violations)
        folder, keep = self.out / "life", self.disk.folder / "checkpoints"
        shutil.rmtree(keep, ignore_errors=True)
        whole = self.life(setting, folder, None, None)
        if (folder / "refused0.txt").exists():  # three that compose two by two and not together
            self.refused += 1
            self.say(f"{setting}: refused, {(folder / 'refused0.txt').read_text()[:160]}")
            return
        self._kept = [one for each in folder.glob("held*.json") for one in json.loads(each.read_text())]
        ends = self._ends(setting, folder, whole)
        if ends is None:
            self._violation(setting, "the run that nothing happens to does not end", folder, None)
            return
        counted: list[dict[str, Any]] = []
        for number in range(LIVES + 1):
            trouble = troubles(number) if number < LIVES else None
            life = self.life(setting, folder, trouble, keep)
            if (result := self._ends(setting, folder, life)) is not None:
                if trouble is not None:
                    counted.append({"kind": trouble.kind, "missed": True})
                for rank, (one, other) in enumerate(zip(ends, result)):
                    if places := differing(one, other):
                        self._violation(setting, f"rank {rank} ends otherwise: {places[:6]}", folder, trouble)
                break
            counted.append(self._count(setting, folder, keep, life, trouble))
        else:
            self._violation(setting, "it does not end", folder, None)
        strangers = [path.name for path in keep.iterdir() if not path.name.endswith(".ckpt")]
        if strangers:
            self._violation(setting, f"files beside the checkpoints: {strangers}", folder, None)
        self._look_for_processes()
        self.rounds += 1
        self.whole_steps += ends[0]["steps"]
        self.ranks[str(setting.ranks)] += 1
        self.recipes.update(setting.row.name.split(" + "))
        self.troubles += [{"round": setting.name, **each} for each in counted]
        kinds = Counter(each["kind"] for each in counted if not each.get("missed"))
        lost = sum(each.get("lost", 0) for each in counted)
        bad = len(self.violations) - before
        self.say(
            f"round {setting.name}, {setting}: {', '.join(f'{n} {k}' for k, n in kinds.items()) or 'no trouble'};"
            f" {lost} steps lost; {f'{bad} VIOLATIONS' if bad else 'the same end'} ({time.time() - start:.0f} s)"
        )

    def _ends(self, setting: Draw, folder: Path, life: Life) -> list[dict[str, Any]] | None:
        """What every rank of a finished life ended with; None for one that did not finish."""
        if any(life.statuses(setting.ranks)):
            return None
        ends = [torch.load(folder / f"end{rank}.pt", weights_only=True) for rank in range(setting.ranks)]
        first, last = ({k: v for k, v in e["weights"].items() if not RUNNING.search(k)} for e in (ends[0], ends[-1]))
        if places := differing(first, last):
            self._violation(setting, f"ranks differ: {places[:6]}", folder, None)
        self._held(setting, folder, None)
        return ends

    def _count(self, setting: Draw, folder: Path, keep: Path, life: Life, trouble: Trouble | None) -> dict[str, Any]:
        """What a life lost that did not finish; complains of whatever else it did."""
        statuses = life.statuses(setting.ranks)
        if trouble is None:
            self._violation(setting, f"it ends without a trouble, {statuses}", folder, None)
            return {"kind": "none"}
        if life.hung:
            self._violation(setting, f"{trouble.kind}: it hangs, {statuses}", folder, trouble)
        for text in folder.glob("refused*.txt"):
            self._violation(setting, f"{trouble.kind}: {text.read_text()[:300]}", folder, trouble)
        self._held(setting, folder, trouble)
        step, unreadable = 0, []
        for path in keep.glob("*.ckpt"):
            if not path.exists():
                continue  # a link that leads nowhere; last_of() does not take it either
            try:
                torch.load(path, weights_only=True)
            except Exception as error:
                unreadable.append(f"{path.name}: {type(error).__name__}, {path.stat().st_size} bytes")
        if unreadable:
            self._violation(setting, f"{trouble.kind}: cannot be read: {unreadable}", folder, trouble)
        if (last := last_of(keep)) is not None and not any(each.startswith(last.name) for each in unreadable):
            step = torch.load(last, weights_only=True)["global_step"]
        lost = max(0, max(life.words[STEPS], life.words[SAVED]) - step)
        if step < life.words[SAVED]:
            self._violation(
                setting,
                f"{trouble.kind}: the last checkpoint is of step {step}, and {life.words[SAVED]} was saved",
                folder,
                trouble,
            )
        elif lost > setting.every:
            self._violation(
                setting, f"{trouble.kind}: {lost} steps lost with a checkpoint every {setting.every}", folder, trouble
            )
        return {
            "kind": trouble.kind,
            "steps": life.words[STEPS],
            "checkpoint": step,
            "lost": lost,
            "statuses": statuses,
            "orderly": statuses == [ORDERLY] * setting.ranks,
            "seconds": round(life.seconds, 2),
            "drawn": str(trouble),
        }

    def _held(self, setting: Draw, folder: Path, trouble: Trouble | None) -> None:
        for each in folder.glob("held*.json"):
            held = [one for one in json.loads(each.read_text()) if " hooks of " not in one or one not in self._kept]
            if held:
                self._violation(setting, f"recipes have not let go of {held}", folder, trouble)

    def _look_for_processes(self, wait: bool = False) -> None:
        """Processes that outlive their life by too long; reaps what became ours."""
        for session, (until, setting) in list(self._watched.items()):
            if wait:
                while living(session) and time.monotonic() < until:
                    time.sleep(0.2)
            left = living(session)
            if left and time.monotonic() < until:
                continue
            del self._watched[session]
            if left:
                names = [" ".join(psutil.Process(pid).cmdline()[:4]) for pid in left if psutil.pid_exists(pid)]
                self._violation(setting, f"processes are left: {names}", None, None)
                os.killpg(session, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass

    def _violation(self, setting: Draw, what: str, folder: Path | None, trouble: Trouble | None) -> None:
        number = len(self.violations)
        self.violations.append(
            {"what": what, "round": setting.name, "of": str(setting), "trouble": str(trouble) if trouble else ""}
        )
        self.say(f"VIOLATION in round {setting.name}, {setting}: {what}")
        if folder is not None and folder.exists():
            shutil.copytree(folder, self.out / f"violation{number}", dirs_exist_ok=True)

    # -- the report ----------------------------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """All that was counted."""
        kinds = {}
        for kind in KINDS:
            of = [each for each in self.troubles if each["kind"] == kind]
            struck = [each for each in of if not each.get("missed")]
            lost = [each["lost"] for each in struck]
            kinds[kind] = {
                "troubles": len(struck),
                "too late": len(of) - len(struck),
                "orderly": sum(each["orderly"] for each in struck),
                "steps lost": sum(lost),
                "mean": round(sum(lost) / len(lost), 2) if lost else 0.0,
                "most": max(lost, default=0),
                "nothing lost": sum(each == 0 for each in lost),
            }
        return {
            "seed": self.seed,
            "minutes": round((time.time() - self.started) / 60, 1),
            "machine": f"{platform.platform()}, {os.cpu_count()} cores",
            "versions": {"torch": torch.__version__, "lightning": lightning.__version__},
            "disk full": "a disk of its own" if self.disk.own else "a limit on the size of files",
            "rounds": self.rounds,
            "rounds on ranks": dict(sorted(self.ranks.items())),
            "refused draws": self.refused,
            "steps of the runs": self.whole_steps,
            "kinds": kinds,
            "recipes": dict(sorted(self.recipes.items())),
            "violations": self.violations,
            "troubles": self.troubles,
        }

    def save(self) -> None:
        part = self.out / "soak.json.part"
        part.write_text(json.dumps(self.report(), indent=1))
        os.replace(part, self.out / "soak.json")


def table(report: dict[str, Any]) -> str:
    """What :meth:`Soak.report` says, as Markdown."""
    lines = [
        f"{report['rounds']} runs in {report['minutes']} minutes ({report['rounds on ranks']} by ranks),"
        f" {len(report['recipes'])} recipes; a full disk is {report['disk full']}",
        "",
        "| trouble | times | in order | steps lost | mean | most | nothing lost | came too late |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind, of in report["kinds"].items():
        lines.append(
            f"| {kind} | {of['troubles']} | {of['orderly']} | {of['steps lost']} | {of['mean']} | {of['most']}"
            f" | {of['nothing lost']} | {of['too late']} |"
        )
    lines += ["", f"violations: {len(report['violations']) or 'none'}"]
    lines += [f"- {each['what']} ({each['of']}; --seed/--round {each['round']})" for each in report["violations"]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="for how long to begin rounds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("soak"), help="folder for soak.json and soak.md")
    parser.add_argument("--round", type=int, help="play the round of this number only")
    parser.add_argument("--each", action="store_true", help="one small round for each kind of trouble, and no more")
    arguments = parser.parse_args()
    with_own_mounts()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    ctypes.CDLL(None).prctl(36, 1)  # processes whose parent died become ours (PR_SET_CHILD_SUBREAPER)
    soak = Soak(arguments.seed, arguments.out, lambda line: print(line, flush=True))
    os.chdir(soak.out)  # where a Trainer without a logger puts what a recipe saves
    end = time.monotonic() + arguments.minutes * 60
    try:
        if arguments.each:
            for number, kind in enumerate(KINDS):
                soak.round(*one_of(arguments.seed, number, kind))
        elif arguments.round is not None:
            soak.round(*round_of(arguments.seed, arguments.round))
        else:
            number = 0
            while time.monotonic() < end:
                soak.round(*round_of(arguments.seed, number))
                soak.save()
                number += 1
    except KeyboardInterrupt:
        soak.say("interrupted")
    soak._look_for_processes(wait=True)
    soak.save()
    report = soak.report()
    (soak.out / "soak.md").write_text(table(report) + "\n")
    print("\n" + table(report))
    sys.exit(bool(report["violations"]))


def round_of(seed: int, number: int) -> tuple[Draw, Callable[[int], Trouble | None]]:
    """The round of that number, and its troubles."""
    setting = draw_of(seed, number)
    draw = random.Random(f"{seed}/{number}/troubles")
    troubles = [trouble_of(draw, setting) for _ in range(draw.randint(2, LIVES))]
    return setting, lambda life: troubles[life] if life < len(troubles) else None


def one_of(seed: int, number: int, kind: str) -> tuple[Draw, Callable[[int], Trouble | None]]:
    """A small round in which a life has this trouble, surely, and the next has none."""
    setting = replace(draw_of(seed, number, 2), ranks=1 + (number % 2), workers=2 * (kind == "dead worker"), epochs=2)
    draw = random.Random(f"{seed}/{number}/troubles")
    trouble = replace(trouble_of(draw, setting, [kind]), after=3, room=0.5)
    return replace(setting, every=2), lambda life: None if life else trouble


if __name__ == "__main__":
    main()
