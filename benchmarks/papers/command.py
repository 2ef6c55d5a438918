"""What the commands of this folder share: their arguments, and the file that their figures go to."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any


class Command(ArgumentParser):
    """``python -m benchmarks.papers.<file> [NAME...] [--seeds N] [--output FILE] [--picture FILE]``.

    Args:
        results: file that the figures go to by default, beside the command and of its name.
        description: its docstring.
        seeds: by default; None for a command without.
        names: that can be given.
        noun: what they are names of.
        chosen: of them when none is given; None for all.
        picture: file that the picture goes to by default; None for a command without, or with several.
    """

    def __init__(
        self,
        results: Path,
        description: str | None,
        *,
        seeds: int | None = None,
        names: Collection[str] = (),
        noun: str = "name",
        chosen: Collection[str] | None = None,
        picture: Path | None = None,
    ) -> None:
        super().__init__(prog=f"python -m benchmarks.papers.{results.stem}", description=description)
        self.names, self.noun, self.chosen = list(names), noun, list(names if chosen is None else chosen)
        if names:
            default = "all" if chosen is None else ", ".join(chosen)
            says = f"of {', '.join(names)}; {default} if none is given"
            self.add_argument("names", nargs="*", metavar=noun.upper(), help=says)
        if seeds is not None:
            self.add_argument("--seeds", type=int, default=seeds, metavar="N", help="default: %(default)s")
        self.add_argument("--output", type=Path, default=results, metavar="FILE", help="default: %(default)s")
        if picture is not None:
            self.add_argument("--picture", type=Path, default=picture, metavar="FILE", help="default: %(default)s")

    def parse(self, args: Iterable[str] | None) -> Namespace:
        """Read the arguments, check names and seeds, and keep Lightning's advice for real runs off the console."""
        parsed = self.parse_args(None if args is None else list(args))
        if self.names:
            if unknown := [name for name in parsed.names if name not in self.names]:
                self.error(f"no {self.noun} named {unknown[0]!r}; there are {', '.join(self.names)}")
            parsed.names = parsed.names or self.chosen
        if getattr(parsed, "seeds", 1) < 1:
            self.error(f"--seeds must be at least 1; got {parsed.seeds}")
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", module=r"lightning\.")
        return parsed


def load(path: Path) -> dict[str, Any]:
    """The figures that are there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def save(path: Path, found: Any, digits: int | None = None) -> None:
    """Write figures, rounded to so many digits behind the point."""
    if digits is not None:
        found = json.loads(json.dumps(found), parse_float=lambda value: round(float(value), digits))
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def missing(what: str, error: FileNotFoundError) -> int:
    """Say that data are missing; the exit status."""
    print(f"{what}: {error}", file=sys.stderr)
    return 1
