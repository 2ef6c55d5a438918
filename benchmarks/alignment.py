"""``python -m benchmarks.alignment``: time and memory of SLCA's stage between two tasks, by kind of covariance.

Each kind runs in a process of its own: Gaussians of all classes from random features, then the last task's alignment.
Memory is what the process takes at its peak beyond what it had before, on the CPU its resident set, on a GPU what torch
allocated there. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from typing import Any

import torch

from lightning_recipes.callbacks.continual.slca import align, draw_epoch, shrink_factors
from lightning_recipes.core import gaussians
from lightning_recipes.core.tasks import cut, up_to

KINDS = ("full", "low_rank", "diag")


def stage(kind: gaussians.Kind, settings: argparse.Namespace) -> dict[str, float]:
    """Seconds and bytes of one kind of covariance."""
    torch.manual_seed(0)
    device = torch.device(settings.device)
    tasks = cut(settings.tasks, range(settings.classes))
    mix = torch.randn(settings.width, settings.width) / settings.width**0.5
    torch.linalg.cholesky(torch.eye(8)), torch.randn(8, 8, device=device) @ torch.eye(8, device=device)  # libraries
    before, results = _peak(device), {}

    start = time.perf_counter()
    known = {}
    for c in range(settings.classes):
        features = torch.randn(settings.samples, settings.width) @ mix + torch.randn(settings.width)
        known[c] = gaussians.fit(features, kind, rank=settings.rank)
    results["statistics"] = time.perf_counter() - start
    results["stored"] = sum(gaussian.nbytes for gaussian in known.values())
    results["peak of statistics"] = _peak(device) - before

    order, last = up_to(tasks, settings.tasks - 1), settings.tasks - 1
    start = time.perf_counter()
    on_device = [known[c].to(device) for c in order]
    factors, drawn = shrink_factors(tasks, last, 0.1), 0.0

    def draw(epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal drawn
        begin = time.perf_counter()
        found = draw_epoch(on_device, factors, settings.draws, (0, epoch))
        drawn += time.perf_counter() - begin
        return found

    weight = torch.randn(len(order), settings.width, device=device) * 0.02
    align(
        weight,
        torch.zeros(len(order), device=device),
        [len(task) for task in tasks],
        draw,
        epochs=settings.epochs,
        batch=settings.draws,
    )
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    results["alignment"] = time.perf_counter() - start
    results["of it drawing"] = drawn
    results["peak"] = _peak(device) - before
    return results


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Measure and print one line a kind."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.alignment", description=__doc__)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--width", type=int, default=768, help="features")
    parser.add_argument("--tasks", type=int, default=10)
    parser.add_argument("--samples", type=int, default=100, help="training samples of each class")
    parser.add_argument("--draws", type=int, default=256, help="features drawn of each class an epoch")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    settings = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    units: dict[str, Any] = {"stored": 1e6, "peak": 1e6, "peak of statistics": 1e6}
    print(
        f"{settings.classes} classes x {settings.width} features, {torch.get_num_threads()} threads, {settings.device}"
    )
    for kind in settings.kinds:
        with spawn.Pool(1) as pool:
            results = pool.apply(stage, (kind, settings))
        told = [
            f"{name} {value / units[name]:,.0f} MB" if name in units else f"{name} {value:.1f} s"
            for name, value in results.items()
        ]
        print(f"{kind:>8}: " + ", ".join(told), flush=True)


if __name__ == "__main__":
    main()
