"""The command ``lightning-recipes compare``."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lightning_recipes.catalog import PROG
from lightning_recipes.compare import engines, report
from lightning_recipes.compare.plan import BASE, Plan, Run, make_plan
from lightning_recipes.compare.run import prepare
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.trainer_cli import ConfigFile, Parser

DESCRIPTION = """\
Train a base config without and with recipes, on the same seeds and the same data, and report what the recipes change,
what may be chance, and what they cost. A run whose result is there is not run again: after a crash, or with more seeds
or recipes, give the command again and it goes on.
"""
EPILOG = f"""\
  {PROG} compare --base base/digits_cnn.yaml --metric val/acc --seeds 5 --budget "5 epochs" \\
      --recipe recipes/mixup.yaml --recipe both=recipes/mixup.yaml+recipes/cutmix.yaml
  {PROG} compare --config mine.yaml --jobs 4
"""


def build_parser() -> Parser:
    """The options; all of them may stand in a ``--config`` too."""
    parser = Parser(prog=f"{PROG} compare", description=DESCRIPTION, allow_abbrev=False)
    parser.usage = f"{PROG} compare [--config FILE] --base FILE --recipe FILE... --metric NAME [--OPTION VALUE]..."
    parser.epilog = EPILOG
    add = parser.add_argument
    add("-c", "--config", action=ConfigFile, help="A config file with these options.")
    add("--base", type=str | dict[str, Any], required=True, help="Your module and data, as `fit --config` has them; "
        "several joined by '+' are laid over each other.")  # fmt: skip
    add("--recipe", type=list[str | dict[str, Any]], default=[], help="A config to lay over the base, or several "
        "joined by '+', with a name if you like: name=a.yaml+b.yaml. Give it again for each recipe.")  # fmt: skip
    add("--metric", type=str, required=True, help="What is compared: the name of something that the module logs, as "
        "val/acc. Taken from an evaluation after the fit.")  # fmt: skip
    add("--mode", type=Literal["min", "max"] | None, default=None, help="Whether smaller or larger is better; guessed "
        "from the metric's name.")  # fmt: skip
    add("--seeds", type=int | list[int], default=5, help="How many, or which: [0,3,7].")
    add("--budget", type=str | None, default=None, help="How long each run trains: '5 epochs', '300 steps', '10 "
        "minutes'; as the base says if it is not given.")  # fmt: skip
    add("--jobs", type=int, default=1, help="Runs at once.")
    add("--out", type=str, default="comparison", help="Folder for runs and report.")
    add("--engine", type=Literal["local", "ray", "slurm"], default="local", help="What does the runs: processes here, "
        "a Ray cluster, or a SLURM job array whose script is written for you.")  # fmt: skip
    add("--only", type=int | None, default=None, help="Do one run, by its number, and write no report; for job arrays.")
    return parser


def run(args: Sequence[str]) -> int:
    """Run the command.

    Args:
        args: the words after ``compare``.

    Returns:
        The exit code: 0 when every run has a result, 1 when not. Bad usage exits with code 2 by ``SystemExit``.
    """
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())  # a user's own module, as `fit` finds it
    parser = build_parser()
    options = parser.parse_args([_adding(word) for word in args])
    try:
        if options.jobs < 1:
            raise RecipeError(f"jobs must be at least 1; got {options.jobs}")
        plan = make_plan(
            _plain(options.base),
            [_plain(each) for each in options.recipe],
            options.metric,
            Path(options.out),
            options.seeds,
            options.mode,
            options.budget,
        )
        if options.only is not None and not 0 <= options.only < len(plan.runs):
            raise RecipeError(
                f"only must be from 0 to {len(plan.runs) - 1}, the runs that there are; got {options.only}"
            )
        if options.engine == "ray":
            engines.need_ray()
    except RecipeError as error:
        parser.error(str(error))
    try:
        return _go(plan, options, args)
    except RecipeError as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on. So far: {plan.out / 'report.html'}", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"{PROG}: error: {error}; the runs that are done are kept, the same command goes on", file=sys.stderr)
    return 1


def _adding(word: str) -> str:
    """``--recipe`` adds to those before it, and to those of a config."""
    name, equals, value = word.partition("=")
    return f"--recipe+{equals}{value}" if name == "--recipe" else word


def _plain(value: Any) -> Any:
    return value if isinstance(value, str) else dict(value)


def _go(plan: Plan, options: Any, args: Sequence[str]) -> int:
    def finished(run: Run) -> None:
        _check(run, plan)
        if options.only is None:
            with contextlib.suppress(OSError):  # a full disk: the other runs go on, and the end says so
                report.save(report.collect(plan))

    for each in plan.of(BASE):
        _check(each, plan)
    chosen = plan.runs if options.only is None else [plan.runs[options.only]]
    todo = [run for run in chosen if engines.result(run) is None]
    for each in todo:
        prepare(each)
    if options.engine == "slurm":
        return _slurm(plan, todo, options.jobs, args)
    there = len(chosen) - len(todo)
    if there and todo:
        print(f"{there} of {len(chosen)} runs are there already; {len(todo)} to do", file=sys.stderr)
    do = engines.run_ray if options.engine == "ray" else engines.run_local
    if todo:
        do(todo, options.jobs, finished)
    if options.only is not None:
        return _told(chosen[0])
    return _reported(plan)


def _check(run: Run, plan: Plan) -> None:
    """Stop everything at the first run of the base that does not log the metric."""
    found = engines.result(run) if run.arm == BASE else None
    if found is not None:
        report.check_metric(plan, found)


def _slurm(plan: Plan, todo: Sequence[Run], jobs: int, args: Sequence[str]) -> int:
    if not todo:
        return _reported(plan)
    names = [run.name for run in todo]
    indices = [number for number, run in enumerate(plan.runs) if run.name in names]
    script = engines.write_slurm(plan, indices, jobs, ["compare", *args])
    print(f"{len(todo)} of {len(plan.runs)} runs to do. Submit them:\n\n  sbatch {script}\n")
    print("and when they are done give this command again for the report.")
    if len(todo) < len(plan.runs):
        _reported(plan)
    return 0


def _told(run: Run) -> int:
    failed = engines.failure(run) if engines.result(run) is None else None
    if failed is None:
        return 0
    print("\n".join([f"{run.name}: {failed['what']}", *failed["lines"]]), file=sys.stderr)
    return 1


def _reported(plan: Plan) -> int:
    found = report.collect(plan)
    page = report.save(found)
    print(found.headline)
    for row in found.rows[1:]:
        print(f"  {row.name}: {row.words}")
    failed = sum(len(row.failed) for row in found.rows)
    if failed:
        print(f"{failed} runs failed; the report has their last lines, and the same command tries them again.")
    print(f"Report: {page} (and report.md, runs.csv, curves.csv beside it)")
    return 0 if found.done == len(plan.runs) else 1
