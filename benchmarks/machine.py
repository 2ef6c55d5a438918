"""What the figures of a benchmark belong to, in words, and how long one will take."""

from __future__ import annotations

import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.cases import NETWORKS

SAME = ("device", "cpu", "cores", "threads", "python", "torch", "lightning")
"""What two runs must have in common for their rows to stand in one table."""


def machine() -> dict[str, Any]:
    """The machine and what runs on it. The load is that of the minute before: a busy machine spoils times."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cpu": cpu(),
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "ram": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": platform.platform(terse=True),
        "load": round(os.getloadavg()[0], 1),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "lightning", "timm", "peft")},
        "networks": {name: " ".join(map(str, network)) for name, network in NETWORKS[device].items()},
    }


def cpu() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def words(seconds: float) -> str:
    """A duration as one says it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Progress:
    """Says on stderr how far a run is and how long the rest will take.

    Before anything is done it can only go by `seconds`, what each part took on another machine; then by how much longer
    or shorter the parts so far have taken here.

    Args:
        seconds: of each part, by its name.
    """

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds, self.taken, self.began = dict(seconds), {}, time.perf_counter()
        if seconds:
            self._say(f"{len(seconds)} parts, roughly {words(self.left())}")

    def left(self) -> float:
        """Seconds that the parts that are not done will take."""
        expected = sum(self.seconds[name] for name in self.taken)
        pace = sum(self.taken.values()) / expected if expected else 1.0
        return pace * sum(seconds for name, seconds in self.seconds.items() if name not in self.taken)

    def done(self, name: str, taken: float) -> None:
        """A part is done and took so many seconds."""
        self.taken[name] = taken
        so_far = words(time.perf_counter() - self.began)
        self._say(
            f"{len(self.taken)} of {len(self.seconds)}, {so_far} so far, about {words(self.left())} to go: {name}"
        )

    def _say(self, what: str) -> None:
        print(f"[{what}]", file=sys.stderr, flush=True)
