"""How long ``import lightning_recipes.callbacks`` takes over ``import lightning``, and where the time goes.

Every import has a fresh interpreter; the first one, which may have to compile, does not count. On a busy machine look
at the processor's time: it does not count what other processes take.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from typing import Any

from benchmarks.report import spread

PACKAGE, BASE = "lightning_recipes.callbacks", "lightning"
TARGET = 0.3
"""Seconds over Lightning's own import, at most."""

_TIMED = f"""
import json, sys, time
start, busy = time.perf_counter(), time.process_time()
import {BASE}
between, before, worked = time.perf_counter(), set(sys.modules), time.process_time()
import {PACKAGE}
end, done, new = time.perf_counter(), time.process_time(), set(sys.modules) - before
packages = sorted(name for name in new if "." not in name)
print(json.dumps([between - start, end - between, worked - busy, done - worked, len(new), packages]))
"""
_LINE = re.compile(r"import time:\s+(\d+) \|\s+(\d+) \|\s+(\S+)")


def imports(repeats: int = 5) -> dict[str, Any]:
    """Seconds of both imports, with their range over repeats, what ours loads besides, and its costliest packages."""
    _python(_TIMED)  # byte code and the disk's cache
    found = [json.loads(_python(_TIMED).stdout) for _ in range(repeats)]
    base, ours, base_cpu, ours_cpu = ([each[i] for each in found] for i in range(4))
    return {
        "package": PACKAGE,
        "repeats": repeats,
        "lightning": spread(base),
        "added": spread(ours),
        "lightning, processor": spread(base_cpu),
        "added, processor": spread(ours_cpu),
        "target": TARGET,
        "modules": found[0][4],
        "packages": found[0][5],
        "by package": by_package(_python(f"import {BASE}\nimport {PACKAGE}", "-X", "importtime").stderr),
    }


def by_package(told: str, most: int = 8) -> dict[str, float]:
    """Seconds of the modules that :data:`PACKAGE` imported first, summed by package, the costliest first.

    Args:
        told: what ``python -X importtime`` wrote: a line a module, those that it imported before it.
        most: packages.
    """
    lines = [match.groups() for match in map(_LINE.match, told.splitlines()) if match]
    names = [name for _, _, name in lines]
    start = names.index(BASE) + 1
    seconds: dict[str, float] = defaultdict(float)
    for own, _, name in lines[start : names.index(PACKAGE) + 1]:
        seconds[name.partition(".")[0]] += int(own) / 1e6
    return dict(sorted(seconds.items(), key=lambda item: -item[1])[:most])


def _python(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    # Byte code is written as it is for a user: without it every import would compile the package again.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
