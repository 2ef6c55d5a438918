"""A comparison whose results are made up: what a report shows can then be worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from lightning_recipes.compare.plan import BASE, Arm, Budget, Plan, run_of

STEPS = range(20, 201, 20)


def content(value: float, seconds: float = 0.01, memory: int = 2**30, **other: Any) -> dict[str, Any]:
    """What a run keeps whose accuracy rose to `value`."""
    curve = [
        {"step": step, "epoch": i + 1, "seconds": 0.1 * i, "val/acc": value * (1 - math.exp(-(i + 1) / 3))}
        for i, step in enumerate(STEPS)
    ]
    machine = {"device": "cpu", "host": "here", "threads": 2, "torch": "2", "lightning": "2", "python": "3"}
    return {
        "metrics": {"val/acc": value, "val/loss": 1 - value},
        "curve": curve,
        "step_seconds": seconds,
        "fit_seconds": 200 * seconds,
        "steps": 200,
        "peak_memory": memory,
        "memory_before": 2**29,
        "trainable": 1000,
        "parameters": 1000,
        "order": [[3, 1, 2]],
        "notes": [],
        "machine": machine,
        **other,
    }


BASE_VALUES = (0.90, 0.91, 0.89, 0.92, 0.90)
BETTER = (0.93, 0.941, 0.919, 0.951, 0.93)
WORSE = (0.85, 0.861, 0.842, 0.869, 0.85)
NOISE = (0.90, 0.925, 0.87, 0.935, 0.905)


def made_up(out: Path, seeds: int = 5) -> Plan:
    """Base, one recipe that is better, one worse, one that is noise, one whose runs failed, and a long name."""
    names = [BASE, "better", "worse", "noise", "a_recipe_with_a_rather_long_name+another", "failing"]
    arms = [Arm(name, {"trainer": {"accelerator": "cpu"}, "model": name}, f"recipes/{name}.yaml") for name in names]
    plan = Plan(arms, list(range(seeds)), "val/acc", "max", Budget.read("200 steps"), out, "base/made_up.yaml")
    plan.runs.extend(run_of(out, arm, seed) for seed in range(seeds) for arm in arms)
    for run in plan.runs:
        made = {
            BASE: content(BASE_VALUES[run.seed]),
            "better": content(BETTER[run.seed], 0.02, 2**31),
            "worse": content(WORSE[run.seed], 0.011, trainable=100),
            "noise": content(NOISE[run.seed], 0.01, order=[[1, 2, 3]]),
            "a_recipe_with_a_rather_long_name+another": content(NOISE[run.seed] + 0.01, 0.035),
        }.get(run.arm)
        if made is not None:
            run.artefact.save(made)
        else:
            run.folder.mkdir(parents=True)
            told = {"what": "it ended with code 1", "lines": ["Traceback", "RecipeError: <b>this is why</b>"]}
            (run.folder / "failed.json").write_text(json.dumps(told))
    return plan
