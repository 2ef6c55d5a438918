"""What there is: the recipes with all that they say about themselves, their configs and their measured claims.

``list``, ``show`` and the pages of the documentation are made of it. Nothing heavy is imported until it is asked for.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import json
import os
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

PROG = "lightning-recipes"
"""The command's name."""

# -- recipes ---------------------------------------------------------------------------------------------------------


def recipes() -> dict[str, type]:
    """Every public recipe, by class name: the callbacks, and the modules and data modules that a paper brings."""
    from lightning_recipes import callbacks, datamodules, modules

    public = [
        (name, getattr(package, name)) for package in (callbacks, datamodules, modules) for name in package.__all__
    ]
    return {name: found for name, found in public if hasattr(found, "paper")}


def find_recipe(name: str) -> type:
    """Find a recipe by its class name, in any case.

    Raises:
        LookupError: there is none of that name; the message lists the closest ones.
    """
    known = recipes()
    by_lower = {n.lower(): cls for n, cls in known.items()}
    if name.lower() in by_lower:
        return by_lower[name.lower()]
    close = [known_name for n in difflib.get_close_matches(name.lower(), by_lower, cutoff=0.5) for known_name in known
             if known_name.lower() == n]  # fmt: skip
    hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(sorted(known, key=str.lower))}."
    raise LookupError(f"no recipe named {name!r}: {hint}")


def purpose(recipe: type) -> str:
    """What a user would want it for: the folder of ``lightning_recipes/callbacks`` that the recipe stands in, or what a
    module or data module says."""
    parts = recipe.__module__.split(".")
    in_folder = parts[:2] == ["lightning_recipes", "callbacks"] and len(parts) > 3
    return parts[2] if in_folder else getattr(recipe, "purpose", "")


def table(recipes: Mapping[str, type], markdown: bool = False) -> str:
    """All recipes, ordered by purpose and name, wrapped to the terminal's width or as a Markdown table."""
    ordered = sorted(recipes.items(), key=lambda item: (purpose(item[1]), item[0].lower()))
    if markdown:
        lines = ["| recipe | for | does | paper |", "|---|---|---|---|"]
        for name, cls in ordered:
            paper = f"[{cls.paper.title}]({cls.paper.url}), {cls.paper.year}" if cls.paper else ""
            cells = (cell.replace("|", r"\|") for cell in (f"`{name}`", purpose(cls), cls.does, paper))
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)
    rows = [("RECIPE", "FOR", "YEAR", "DOES", "PAPER")]
    for name, cls in ordered:
        year, title = (str(cls.paper.year), cls.paper.title) if cls.paper else ("", "")
        rows.append((name, purpose(cls), year, cls.does, title))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    left = max(40, shutil.get_terminal_size((120, 24)).columns - sum(widths) - 2 * 4)
    widths += [left * 3 // 5, left - left * 3 // 5]
    return "\n".join(line for row in rows for line in _wrapped_row(row, widths))


def _wrapped_row(cells: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    wrapped = [textwrap.wrap(cell, width) or [""] for cell, width in zip(cells, widths, strict=True)]
    for i in range(max(map(len, wrapped))):
        columns = (lines[i] if i < len(lines) else "" for lines in wrapped)
        yield "  ".join(text.ljust(width) for text, width in zip(columns, widths, strict=True)).rstrip()


def card(recipe: type) -> str:
    """One recipe's card: what it does and costs, its paper, its arguments, its configs, which other recipes it cannot
    share a Trainer with, and its evidence. The documentation's pages are made of the same parts."""
    name = recipe.__name__
    lines = [f"{name} ({purpose(recipe)})" if purpose(recipe) else name, "", *_paragraph(recipe.does), ""]
    lines += [line for label, text in facts(recipe) for line in _paragraph(text, f"  {label:<10}")]
    lines += ["", "Arguments", *([line for argument in arguments(recipe) for line in argument] or ["  none"])]
    lines += ["", "Import", f"  {import_line(recipe)}"]
    for path in config_files(recipe):
        shown = path.relative_to(config_folder()).as_posix()
        lines += ["", f"Config: --config {shown}", textwrap.indent(path.read_text(encoding="utf-8").rstrip(), "  ")]
    if others := beside(recipe):
        lines += ["", "Beside other recipes"]
        lines += [line for how, other, why in others for line in _paragraph(f"{how} {other}: {why}", "  - ", "    ")]
    lines += ["", "Evidence", *evidence(name)]
    return "\n".join(lines)


def facts(recipe: type) -> list[tuple[str, str]]:
    """When to use a recipe, what it costs and where it comes from, each with its label ('' goes on with the last)."""
    found, paper = [("Use when", recipe.use_when), ("Costs", recipe.costs)], recipe.paper
    if paper:
        found += [("Paper", f"{paper.title}. {paper.authors}, {paper.year}."), ("", paper.url)]
        found += [("Code", paper.code)] if paper.code else []
    return [*found, ("Runs on", strategies(recipe))] if strategies(recipe) else found


def import_line(recipe: type) -> str:
    """The line of Python that imports it."""
    return f"from {'.'.join(recipe.__module__.split('.')[:2])} import {recipe.__name__}"


def beside(recipe: type) -> list[tuple[str, str, str]]:
    """What holds for a recipe beside other public ones in one Trainer: 'not with', 'after' or 'before', the other's
    name, and the reason, whichever of the two says so."""
    known, name = recipes(), recipe.__name__
    found = {other: ("not with", why) for other, why in getattr(recipe, "refuses", {}).items()}
    for other, cls in known.items():
        if name in (says := getattr(cls, "refuses", None) or {}):
            found.setdefault(other, ("not with", says[name]))
    found |= {other: ("after", why) for other, why in (getattr(recipe, "comes_after", None) or {}).items()}
    for other, cls in known.items():
        if name in (says := getattr(cls, "comes_after", None) or {}):
            found.setdefault(other, ("before", says[name]))
    ordered = sorted(found.items(), key=lambda item: (("not with", "after", "before").index(item[1][0]), item[0]))
    return [(how, other, why) for other, (how, why) in ordered if other in known]


def strategies(recipe: type) -> str:
    """Where a callback works, in the words of ``Trainer(strategy=...)``; '' for a module or data module."""
    sharded = getattr(recipe, "works_sharded", None)
    if sharded is None:
        return ""
    whole = "one device, or DDP over several devices and machines (strategy=ddp)"
    return f"{whole}; sharded weights (ModelParallelStrategy with fully_shard)" if sharded else whole


def _paragraph(text: str, first: str = "  ", rest: str | None = None) -> list[str]:
    rest = " " * len(first) if rest is None else rest
    options = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.wrap(" ".join(text.split()), 110, initial_indent=first, subsequent_indent=rest, **options)


def arguments(recipe: type) -> Iterator[list[str]]:
    """The lines for each constructor argument: ``name: type = default``, then what its docstring says."""
    for name, declared, says in documented_arguments(recipe):
        yield [f"  {name}{declared}"] + (_paragraph(says, "      ") if says else [])


def documented_arguments(recipe: type) -> Iterator[tuple[str, str, str]]:
    """Each constructor argument: its name, ``: type = default`` as it is declared, and what its docstring says."""
    import docstring_parser

    documented = {
        name.strip(" *"): param.description or ""
        for source in (recipe.__doc__, recipe.__init__.__doc__)
        for param in docstring_parser.parse(source or "").params
        for name in param.arg_name.split(",")  # "mean, std: ..." tells of both
    }
    for name, parameter in inspect.signature(recipe).parameters.items():
        kind = parameter.annotation  # text where the recipe's file postpones annotations
        if not isinstance(kind, str):
            kind = "Any" if kind is parameter.empty else inspect.formatannotation(kind)
        default = "  (required)" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        if parameter.kind is parameter.VAR_KEYWORD:
            yield f"**{name}", "", documented.get(name, "")
        else:
            yield name, f": {kind}{default}", documented.get(name, "")


def evidence(name: str) -> list[str]:
    """The lines of a recipe's measured claims."""
    lines: list[str] = []
    for claim in claims(name):
        lines += _paragraph(str(claim.get("claim", "")), "  - ")
        figures = {"with": name, "without": "without", "seeds": "seeds"}
        facts = [f"{figures.get(key, key)}: {value}" for key, value in claim.items() if key != "claim"]
        lines += _paragraph("; ".join(facts), "    ") if facts else []
    return lines or ["  none recorded yet"]


def claims(name: str) -> list[dict[str, Any]]:
    """A recipe's measured claims, from ``evidence.json`` beside this file where it is there."""
    path = Path(__file__).parent / "evidence.json"
    return json.loads(path.read_text(encoding="utf-8")).get(name, []) if path.is_file() else []


# -- configs ---------------------------------------------------------------------------------------------------------


def config_folder() -> Path:
    """The folder of the configs that come with the package.

    Raises:
        FileNotFoundError: the installation is incomplete.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "configs", package.parent / "configs"):  # in a wheel, in a checkout
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"lightning_recipes has no configs folder beside {package}; install it again")


def config_files(recipe: type) -> list[Path]:
    """The shipped recipe configs whose first callback is this recipe; without any, those that have it further down, or
    those of the papers whose module or data module it is."""
    first, further, whole = [], [], []
    for path in sorted((config_folder() / "papers").glob("*.yaml")):
        config = _parsed(path, path.stat().st_mtime_ns)
        parts = [config.get(name) for name in ("model", "data")]
        paths = [str(part.get("class_path")) for part in parts if isinstance(part, dict)]
        if recipe.__name__ in [class_path.rsplit(".", 1)[-1] for class_path in paths]:
            whole.append(path)
    for path in sorted((config_folder() / "recipes").glob("*.yaml")):
        trainer = (_parsed(path, path.stat().st_mtime_ns) or {}).get("trainer") or {}
        callbacks: Any = trainer.get("callbacks+", trainer.get("callbacks")) or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        paths = [str(c.get("class_path") if isinstance(c, dict) else c) for c in callbacks]
        names = [class_path.rsplit(".", 1)[-1] for class_path in paths]
        if recipe.__name__ in names:
            (first if names[0] == recipe.__name__ else further).append(path)
    return first or further or whole


@functools.cache
def _parsed(path: Path, changed: int) -> Any:
    """A config; read once for all recipes, as long as it does not change."""
    import yaml

    return yaml.safe_load(path.read_text(encoding="utf-8"))


def find_config(value: str) -> str:
    """Turn the value of a ``--config`` into one that can be opened.

    Args:
        value: a path, a URL or a whole config as text. A path that is no file seen from the current folder is looked
            up in :func:`config_folder`.

    Raises:
        FileNotFoundError: it names a config file that is in neither place; the message lists what there is.
    """
    if "://" in value or os.path.isfile(value):
        return value
    folder = config_folder()
    if os.path.isfile(folder / value):
        return str(folder / value)
    if not value.endswith((".yaml", ".yml", ".json")):
        return value  # a config given as text, or something for jsonargparse to refuse
    there = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.yaml"))
    listed = "\n".join(f"  {name}" for name in there) or "  (nothing)"
    raise FileNotFoundError(
        f"config file {value!r} not found: looked in the current folder ({os.getcwd()}) and in the configs of"
        f" lightning_recipes ({folder}), which has:\n{listed}"
    )
