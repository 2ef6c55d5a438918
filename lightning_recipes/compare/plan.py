"""What is to be run: arms (the base, and the base with each recipe) by seeds, and the folder that each run has.

Every arm's configs are read once, as ``fit`` reads them, and printed whole: that is what the runs get, what says before
anything runs that an argument is wrong, and what the key of a run is made from.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import io
import os
import pydoc
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml

from lightning_recipes import __version__
from lightning_recipes.catalog import find_config
from lightning_recipes.core.artefacts import Artefact, key_of
from lightning_recipes.core.errors import RecipeError

BASE = "base"
"""Name of the arm without a recipe."""

Laid = str | Mapping[str, Any]
"""A config, or several joined by '+' (with a name before them: 'name=a.yaml+b.yaml'); or one as a mapping, in which
`name` and `configs` are of the comparison and everything else is laid over those configs."""

_SMALLER = {"loss", "error", "err", "ece", "nll", "ppl", "perplexity", "mse", "mae", "rmse", "aurc", "brier", "wer"}
_SMALLER |= {"cer", "fid", "forgetting", "risk", "regret", "kl"}
_LARGER = {"acc", "accuracy", "acc1", "acc5", "top1", "top5", "f1", "auc", "auroc", "auprc", "iou", "miou", "dice"}
_LARGER |= {"precision", "recall", "map", "r2", "psnr", "ssim", "bleu", "rouge", "mcc", "kappa", "reward", "harmonic"}


# -- the arguments ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """How long every run trains.

    Attributes:
        amount: more than 0.
        unit: 'epochs', 'steps' or 'seconds'.
        words: as it was given.
    """

    amount: float
    unit: str
    words: str

    @classmethod
    def read(cls, words: str | None) -> Budget | None:
        """'5 epochs', '300 steps', '90 seconds', '10 minutes', '1.5 hours'; None for what the base config says.

        Raises:
            RecipeError: for anything else.
        """
        if words is None:
            return None
        found = re.fullmatch(r"\s*([\d.]+)\s*([a-z]+?)s?\s*", words.lower())
        units = {"epoch": 1, "step": 1, "second": 1, "sec": 1, "minute": 60, "min": 60, "hour": 3600, "h": 3600}
        with contextlib.suppress(ValueError):
            if found and found[2] in units and float(found[1]) > 0:
                amount = float(found[1]) * units[found[2]]
                unit = found[2] + "s" if found[2] in ("epoch", "step") else "seconds"
                if unit == "seconds" or amount == int(amount):
                    return cls(amount, unit, " ".join(words.split()))
        raise RecipeError(
            f"budget must be a whole number of epochs or steps, or a time, as '5 epochs', '300 steps', '10 minutes' or"
            f" '1.5 hours'; got {words!r}"
        )

    def settings(self) -> dict[str, Any]:
        """What it makes of the Trainer's arguments."""
        free = {"max_epochs": -1, "max_steps": -1, "max_time": None, "min_epochs": None, "min_steps": None}
        if self.unit == "seconds":
            whole = timedelta(seconds=max(1, round(self.amount)))
            hours, rest = divmod(whole.seconds, 3600)
            return {**free, "max_time": f"{whole.days:02}:{hours:02}:{rest // 60:02}:{rest % 60:02}"}
        return {**free, f"max_{self.unit}": int(self.amount)}


def mode_of(metric: str, mode: str | None) -> str:
    """'max' where larger is better, 'min' where smaller is; guessed from the metric's name unless it is given.

    Raises:
        RecipeError: when the name does not tell.
    """
    if mode is not None:
        return mode
    words = [word for word in re.split(r"[^a-z0-9]+", metric.lower()) if word]
    for word in reversed(words):  # 'error_acc' is an accuracy
        if word in _SMALLER or word in _LARGER:
            return "min" if word in _SMALLER else "max"
    raise RecipeError(
        f"mode: the name {metric!r} does not tell whether larger is better; give --mode max or --mode min"
    )


def seeds_of(seeds: int | Sequence[int]) -> list[int]:
    """The seeds 0 to n - 1, or those that were given.

    Raises:
        RecipeError: for none, one twice or one below 0.
    """
    found = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not found or len(set(found)) < len(found) or min(found) < 0:
        raise RecipeError(f"seeds must be how many, at least 1, or different ones from 0 on; got {seeds!r}")
    return found


@dataclass(frozen=True)
class Arm:
    """One thing that is trained on every seed.

    Attributes:
        name: in the report; :data:`BASE` for the base.
        config: whole, as ``fit`` has it; without a seed.
        laid: what was laid over the base, in words.
    """

    name: str
    config: Mapping[str, Any]
    laid: str = ""


@dataclass(frozen=True)
class Run:
    """One training and its evaluation.

    Attributes:
        arm: its name.
        seed: of ``seed_everything`` and of the data order.
        folder: for everything that it writes.
        made_from: everything that decides its result.
        config: for ``fit``, with the seed in it.
        artefact: of its result.
    """

    arm: str
    seed: int
    folder: Path
    made_from: Mapping[str, Any]
    config: Mapping[str, Any]

    @property
    def artefact(self) -> Artefact:
        return Artefact(self.folder, "result", self.made_from)

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.arm}, seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """A whole comparison.

    Attributes:
        arms: the base first.
        seeds: of every arm.
        metric, mode: what is compared, and whether 'max' or 'min' is better.
        budget: of every run; None for the base config's own.
        out: the folder of everything.
        base: the base configs, in words.
    """

    arms: Sequence[Arm]
    seeds: Sequence[int]
    metric: str
    mode: str
    budget: Budget | None
    out: Path
    base: str = ""
    runs: list[Run] = field(default_factory=list)

    def of(self, arm: str) -> list[Run]:
        """The runs of an arm."""
        return [run for run in self.runs if run.arm == arm]


def make_plan(
    base: Laid,
    recipes: Sequence[Laid],
    metric: str,
    out: Path,
    seeds: int | Sequence[int] = 5,
    mode: str | None = None,
    budget: str | None = None,
) -> Plan:
    """Read everything and say what is to be run; one run of every arm on the first seed, then on the second ...

    Raises:
        RecipeError: for the first thing that is wrong, before anything runs.
    """
    if not metric:
        raise RecipeError("metric must be the name of something that the module logs, as val/acc")
    limit, seeds, mode = Budget.read(budget), seeds_of(seeds), mode_of(metric, mode)
    if not recipes:
        raise RecipeError("recipe: nothing to compare the base with; give --recipe once or several times")
    named = {**base, "name": base.get("name") or BASE} if isinstance(base, Mapping) else base
    name, under, words = _read(named, "base")
    words = words if name == BASE or not isinstance(base, Mapping) else f"{name} ({words})"
    arms = [Arm(BASE, _config(under, BASE, limit), words)]
    for each in recipes:
        name, over, words = _read(each, "recipe")
        if name in {arm.name for arm in arms}:
            raise RecipeError(f"recipe: there are two arms of the name {name!r}; name one: --recipe other=...")
        config = _config([*under, *over], name, limit)
        if _plain(config) == _plain(arms[0].config):
            raise RecipeError(
                f"recipe: {name!r} changes nothing of the base. A class that stands at the same place in both keeps the"
                " arguments that it is not given anew; `callbacks+` adds to the list"
            )
        arms.append(Arm(name, config, words))
    plan = Plan(arms, seeds, metric, mode, limit, Path(out), arms[0].laid)
    plan.runs.extend(run_of(plan.out, arm, seed) for seed in seeds for arm in arms)
    return plan


# -- configs ---------------------------------------------------------------------------------------------------------


def _read(laid: Laid, argument: str) -> tuple[str, list[str], str]:
    """Name, values for ``--config`` and words of what lies over something."""
    if isinstance(laid, Mapping):
        own = {key: value for key, value in laid.items() if key not in ("name", "configs")}
        configs = laid.get("configs") or []
        parts = _parts(configs) if isinstance(configs, str) else list(configs)
        name = str(laid.get("name") or "+".join(Path(part).stem for part in parts))
        if not name:
            raise RecipeError(f"{argument}: a config given as a mapping needs a name in it; got {dict(laid)!r}")
        whole = [*parts, yaml.safe_dump(own, sort_keys=False)] if own else parts
        return name, [_found(part, argument) for part in whole], " + ".join(parts + (["settings"] if own else []))
    name, equals, rest = laid.partition("=")
    if not equals or os.path.exists(laid) or "/" in name:
        name, rest = "", laid
    parts = _parts(rest)
    name = name or "+".join(Path(part).stem for part in parts)
    return name, [_found(part, argument) for part in parts], " + ".join(parts)


def _parts(value: str) -> list[str]:
    """The configs of a stack; a file whose own name has a '+' in it is one config."""
    return [value] if os.path.isfile(value) else [part.strip() for part in value.split("+") if part.strip()]


def _found(part: str, argument: str) -> str:
    try:
        return find_config(part)
    except FileNotFoundError as error:
        raise RecipeError(f"{argument}: {error}") from None


def _config(configs: Sequence[str], name: str, budget: Budget | None) -> dict[str, Any]:
    """The whole config of an arm, as ``fit`` prints it."""
    from lightning_recipes.trainer_cli import RecipeCLI

    args = ["fit", *(word for each in configs for word in ("--config", each)), "--print_config"]
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            RecipeCLI(args)
    except SystemExit as stop:
        if stop.code:
            message = err.getvalue().strip()
            message = message.partition("error: ")[2] or message
            raise RecipeError(f"the config of {name!r} cannot be read: {message}") from None
    config = yaml.safe_load(out.getvalue())
    callbacks = config["trainer"].get("callbacks")
    if isinstance(callbacks, Mapping):  # one that was not given as a list
        config["trainer"]["callbacks"] = [callbacks]
    _check_callbacks(config["trainer"], name)
    config["trainer"].update(budget.settings() if budget else {})
    config["trainer"]["enable_progress_bar"] = False  # of many runs; the comparison has its own
    config.pop("seed_everything", None)
    return config


def _check_callbacks(trainer: Mapping[str, Any], name: str) -> None:
    """Build the callbacks once: a recipe checks its arguments where it is made."""
    from lightning_recipes.trainer_cli import Parser

    def build(class_type: type[pl.Callback], *args: Any, **kwargs: Any) -> pl.Callback:
        try:
            return class_type(*args, **kwargs)
        except RecipeError as error:
            raise _Refused(str(error)) from None

    parser = Parser(exit_on_error=False)
    parser.add_argument("--callbacks", type=list[pl.Callback])
    parser.add_instantiator(build, pl.Callback, subclasses=True, prepend=True)
    try:
        given = deepcopy(trainer.get("callbacks") or [])  # jsonargparse puts its own objects into what it reads
        parser.instantiate_classes(parser.parse_object({"callbacks": given}))
    except (_Refused, Exception) as error:
        raise RecipeError(f"the config of {name!r} cannot be used: {error}") from None


class _Refused(BaseException):
    """A recipe's error on its way past jsonargparse, which would bury an Exception in what it tried instead."""


# -- runs ------------------------------------------------------------------------------------------------------------


def run_of(out: Path, arm: Arm, seed: int) -> Run:
    """The run of an arm on a seed, in the folder that it has or will have."""
    made_from = {
        "config": _plain(arm.config),
        "seed": seed,
        "code": code_of(arm.config),
        "versions": [__version__, str(pl.__version__), str(torch.__version__)],
    }
    short = key_of(made_from)[:16]
    there = sorted((out / "runs").glob(f"*-{short}"))
    name = re.sub(r"[^\w.+-]+", "_", arm.name)[:60]
    folder = there[0] if there else out / "runs" / f"{name}-seed{seed}-{short}"
    config = {"seed_everything": seed, **arm.config}
    return Run(arm.name, seed, folder, made_from, config)


def code_of(config: Any) -> dict[str, str]:
    """SHA-256 of the source file of every class that a config names: somebody's own module may change under a name."""
    files = {}
    for path in sorted(set(_class_paths(config))):
        with contextlib.suppress(Exception):  # built-in, or gone: then the run says so
            source = inspect.getsourcefile(pydoc.locate(path))
            files[path] = hashlib.sha256(Path(source).read_bytes()).hexdigest()
    return files


def _class_paths(config: Any) -> Iterator[str]:
    if isinstance(config, Mapping):
        if isinstance(config.get("class_path"), str):
            yield config["class_path"]
        for value in config.values():
            yield from _class_paths(value)
    elif isinstance(config, list):
        for value in config:
            yield from _class_paths(value)


def _plain(value: Any) -> Any:
    """What ``key_of`` takes: YAML has dates too."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
