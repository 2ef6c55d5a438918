"""Having runs done: on this machine, on a Ray cluster, or by a SLURM job array.

All three start the same process for a run (:mod:`lightning_recipes.compare.run`) and find what it left in its folder,
which must be on a disk that all machines see.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lightning_recipes.catalog import PROG
from lightning_recipes.compare.plan import Plan, Run
from lightning_recipes.core.artefacts import Content, write_text
from lightning_recipes.core.errors import RecipeError

LAST_LINES = 12
"""So much of a failed run's log is its error."""
Finished = Callable[[Run], None]
"""Called with each run that has ended, in whatever way; what it raises ends the others."""


# -- one run ---------------------------------------------------------------------------------------------------------


def launch(folder: Path, environment: Mapping[str, str], where: str | None = None) -> subprocess.Popen:
    """Start the process of a run, which ends when this process does.

    Args:
        environment: beside that of this process.
        where: the folder from which the command was given; None for the current one.
    """
    where = where or os.getcwd()
    (folder / "failed.json").unlink(missing_ok=True)
    command = [sys.executable, "-m", "lightning_recipes.compare.run", str(folder), "--with-parent"]
    paths = [where, *filter(None, [os.environ.get("PYTHONPATH")])]  # the user's own module
    env = {**os.environ, "PYTHONUNBUFFERED": "1", **environment, "PYTHONPATH": os.pathsep.join(paths)}
    with open(folder / "log.txt", "wb") as log:
        pipes = {"stdin": subprocess.PIPE, "stdout": log, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, **pipes, env=env, cwd=where, start_new_session=True)


def settle(folder: Path, code: int) -> None:
    """Say in the folder of a run that has ended how it failed, if it did."""
    (folder / "progress.json").unlink(missing_ok=True)
    if code == 0:
        return
    lines = [line.rstrip() for line in _text(folder / "log.txt").splitlines() if line.strip()]
    refused = [line for line in lines if line.startswith(f"{PROG}: error: ")]
    if refused:  # whole, and nothing beside it
        lines = lines[lines.index(refused[-1]) :]
    what = f"it ended with code {code}"
    if code < 0:
        name = signal.Signals(-code).name if -code in list(signal.Signals) else str(-code)
        what = f"it was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    with contextlib.suppress(OSError):  # on a full disk the run is only missing
        write_text(folder / "failed.json", json.dumps({"what": what, "lines": lines[-LAST_LINES:]}))


def run_in_folder(folder: str, environment: Mapping[str, str], where: str) -> int:
    """Do a run from beginning to end; what a machine of a cluster does."""
    process = launch(Path(folder), environment, where)
    try:
        code = process.wait()
    finally:
        stop([process])
    settle(Path(folder), code)
    return code


def stop(processes: Sequence[subprocess.Popen]) -> None:
    """End runs that are under way, with all that they started."""
    for process in processes:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def result(run: Run) -> Content | None:
    """What a run gave; None where it has not been, or failed."""
    return run.artefact.load()


def failure(run: Run) -> dict[str, Any] | None:
    """How a run failed when it was last tried: ``what`` happened and the last ``lines`` of its log."""
    try:
        return json.loads((run.folder / "failed.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _share(run: Run) -> float | None:
    try:
        return json.loads((run.folder / "progress.json").read_text(encoding="utf-8"))["share"]
    except (OSError, ValueError, KeyError):
        return None


# -- progress --------------------------------------------------------------------------------------------------------


class Progress:
    """A bar over all runs and one for each that is under way; lines instead where nobody watches.

    Args:
        total: runs to do.
    """

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self.watched = sys.stderr.isatty()
        self.overall = tqdm(total=total, desc="all runs", unit="run", dynamic_ncols=True, disable=not self.watched)
        self.bars: dict[str, tqdm] = {}

    def show(self, running: Sequence[Run]) -> None:
        """Show how far those under way are."""
        if not self.watched:
            return
        for name in set(self.bars) - {run.name for run in running}:
            self.bars.pop(name).close()
        for run in running:
            if run.name not in self.bars:
                form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
                self.bars[run.name] = tqdm(
                    total=1.0, desc=f"  {run.name}", leave=False, dynamic_ncols=True, bar_format=form
                )
            bar = self.bars[run.name]
            bar.n = max(bar.n, _share(run) or 0.0)
            bar.refresh()
        self.overall.refresh()

    def ended(self, run: Run) -> None:
        """Count one."""
        self.done += 1
        self.overall.update()
        failed = failure(run)
        words = f"failed: {failed['what']}" if failed else "done" if run.artefact.path.exists() else "lost"
        if not self.watched:
            print(f"[{self.done}/{self.total}] {run.name}: {words}", file=sys.stderr, flush=True)
        elif failed:
            tqdm.write(f"{run.name}: {words}", file=sys.stderr)

    def close(self) -> None:
        """Leave the screen."""
        for bar in self.bars.values():
            bar.close()
        self.overall.close()


@contextlib.contextmanager
def _told_to_end() -> Iterator[None]:
    """A SIGTERM ends the runs as Ctrl-C does."""

    def end(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# -- this machine ----------------------------------------------------------------------------------------------------


def run_local(runs: Sequence[Run], jobs: int, finished: Finished) -> None:
    """Do runs in processes of their own, so many at once.

    The cores are shared out between them, unless OMP_NUM_THREADS is set, and so are the GPUs where there are several
    and a run wants one.
    """
    waiting, running = list(runs), {}  # slot: (run, process)
    progress = Progress(len(waiting))
    try:
        with _told_to_end():
            while waiting or running:
                for slot in range(jobs):
                    if waiting and slot not in running:
                        run = waiting.pop(0)
                        running[slot] = (run, launch(run.folder, environment_of(slot, jobs, run.config)))
                for slot, (run, process) in list(running.items()):
                    if process.poll() is not None:
                        del running[slot]
                        settle(run.folder, process.returncode)
                        progress.ended(run)
                        finished(run)
                progress.show([run for run, _ in running.values()])
                time.sleep(0.1)
    finally:
        stop([process for _, process in running.values()])
        progress.close()


def environment_of(slot: int, jobs: int, config: Mapping[str, Any]) -> dict[str, str]:
    """What a run on this machine gets beside the environment of this process."""
    found = {}
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        found["OMP_NUM_THREADS"] = str(max(1, cores // jobs))
    trainer = config["trainer"]
    wants_one = trainer.get("devices") in ("auto", 1, "1") and trainer.get("accelerator") != "cpu"
    if jobs > 1 and wants_one and (gpus := _gpus()):
        found["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    return found


def _gpus() -> list[str]:
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]


# -- Ray -------------------------------------------------------------------------------------------------------------


def need_ray() -> None:
    """Look for Ray, without importing it.

    Raises:
        RecipeError: says how to install it.
    """
    if importlib.util.find_spec("ray") is None:
        raise RecipeError("engine ray needs Ray: pip install 'lightning_recipes[ray]'")


def run_ray(runs: Sequence[Run], jobs: int, finished: Finished) -> None:
    """Do runs as tasks of the Ray cluster that this machine belongs to (RAY_ADDRESS), or of Ray on this machine alone.

    A run gets a GPU where the cluster has one, and its share of the cores.
    """
    import ray

    ray.init(ignore_reinit_error=True, log_to_driver=False, include_dashboard=False)
    progress = Progress(len(runs))
    try:
        resources = ray.cluster_resources()
        wanted = resources_of(resources, jobs)
        threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(wanted["num_cpus"])}
        task = ray.remote(max_retries=0, **wanted)(run_in_folder)
        waiting, running = list(runs), {}
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                running[task.remote(str(run.folder.resolve()), threads, os.getcwd())] = run
            ready, _ = ray.wait(list(running), timeout=0.5)
            for reference in ready:
                run = running.pop(reference)
                try:
                    ray.get(reference)
                except Exception as error:  # its machine is gone: the others go on
                    _note_lost(run, error)
                progress.ended(run)
                finished(run)
            progress.show(list(running.values()))
    finally:
        progress.close()
        ray.shutdown()


def resources_of(cluster: Mapping[str, float], jobs: int) -> dict[str, int]:
    """What Ray is asked to keep for a run: its share of the cores, and a GPU where there is one."""
    return {"num_cpus": max(1, int(cluster.get("CPU", 1)) // jobs), "num_gpus": 1 if cluster.get("GPU", 0) >= 1 else 0}


def _note_lost(run: Run, error: Exception) -> None:
    told = {"what": "Ray lost it", "lines": str(error).splitlines()[-LAST_LINES:]}
    write_text(run.folder / "failed.json", json.dumps(told))


# -- SLURM -----------------------------------------------------------------------------------------------------------


def write_slurm(plan: Plan, indices: Sequence[int], jobs: int, command: Sequence[str]) -> Path:
    """Write the script of a job array that does the runs at `indices`, `jobs` at once.

    Args:
        command: the words of this command, which the array's jobs give again with ``--only``.

    Returns:
        its path.
    """
    again = shlex.join([sys.executable, "-m", "lightning_recipes.cli", *command, "--engine", "local"])
    out = plan.out.resolve()
    lines = [
        "#!/bin/bash",
        "# One job a run; a job whose run is done ends at once. Add what your cluster asks for (partition, time, GPU).",
        "#SBATCH --job-name=compare",
        f"#SBATCH --array={_ranges(indices)}%{jobs}",
        f"#SBATCH --output={out}/slurm-%a.log",
        "set -e",
        f"cd {shlex.quote(os.getcwd())}",
        f'exec {again} --only "$SLURM_ARRAY_TASK_ID"',
    ]
    path = plan.out / "compare.sbatch"
    write_text(path, "\n".join(lines) + "\n")
    return path


def _ranges(indices: Sequence[int]) -> str:
    """'0-3,7' for 0, 1, 2, 3, 7."""
    parts: list[list[int]] = []
    for index in sorted(indices):
        if parts and index == parts[-1][1] + 1:
            parts[-1][1] = index
        else:
            parts.append([index, index])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
