"""``lightning-recipes fit | validate | test | predict``: a LightningCLI for any module, any data and any recipes."""

from __future__ import annotations

import difflib
import inspect
import os
import pydoc
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import lightning.pytorch as pl
from jsonargparse import ActionConfigFile, Namespace
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

# Imported for their names: jsonargparse finds a class by its short name once its module has been imported.
import lightning_recipes.callbacks
import lightning_recipes.datamodules
import lightning_recipes.modules
from lightning_recipes import __version__
from lightning_recipes.catalog import PROG, find_config
from lightning_recipes.core.errors import RecipeError


class ConfigFile(ActionConfigFile):
    """A ``--config`` that also finds the configs that come with the package."""

    def __call__(self, parser: Any, cfg: Namespace, values: Any, option_string: str | None = None) -> None:
        try:
            values = find_config(values)
        except FileNotFoundError as error:
            parser.error(str(error))
        super().__call__(parser, cfg, values, option_string)


_UNKNOWN_ARGUMENT = re.compile(r"Problem with given class_path '([\w.]+)':\s+Option '(\w+)' is not accepted")
_UNKNOWN_CLASS = re.compile(r"Expected a dot import path string: (\w+)\n")


class Parser(LightningArgumentParser):
    """Ends an error with what may have been meant; jsonargparse lists only what it tried."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if self.exit_on_error:  # the parsers of single classes raise theirs to the one of the command
            parser = getattr(ex, "subcommand_parser", None) or self
            message = "\n".join([message, *dict.fromkeys(_meant(message, list(parser._option_string_actions)))])
        super().error(message, ex)


def _meant(message: str, options: Sequence[str]) -> Iterator[str]:
    for path, slip in _UNKNOWN_ARGUMENT.findall(message):
        cls, name = pydoc.locate(path), path.rpartition(".")[2]
        known = list(inspect.signature(cls).parameters) if cls not in (None, pl.Callback) else []
        if known:
            yield f"{name} has no argument {slip!r}; {_closest(slip, known) or 'it has ' + ', '.join(known)}"
    for slip in _UNKNOWN_CLASS.findall(message):
        if close := _closest(slip, [*lightning_recipes.callbacks.__all__, *pl.callbacks.__all__]):
            yield f"there is no {slip!r}; {close}"
    for slip in re.findall(r"(--[\w.+-]+)", message) if "unrecognized arguments" in message else []:
        if close := _closest(slip, options):
            yield f"there is no option {slip}; {close}"


def _closest(slip: str, known: Sequence[str]) -> str:
    return "".join(f"did you mean {name}?" for name in difflib.get_close_matches(slip, known, 1))


class SaveRunConfig(SaveConfigCallback):
    """Saves the config into the run's folder.

    A run without a logger has no folder of its own, only the current one, where the user's own ``config.yaml`` may be:
    nothing is saved then.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.loggers:
            super().setup(trainer, pl_module, stage)


class RecipeCLI(LightningCLI):
    """LightningCLI over any LightningModule and LightningDataModule, by short name or import path."""

    def __init__(self, args: Sequence[str]) -> None:
        super().__init__(
            save_config_callback=SaveRunConfig,
            save_config_kwargs={"overwrite": True},  # a run that writes into a folder again replaces what it wrote
            parser_class=Parser,
            parser_kwargs={"prog": PROG},
            args=list(args),
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        kwargs.setdefault("dump_header", [f"lightning_recipes=={__version__}, lightning=={pl.__version__}"])
        parser = self.parser_class(allow_abbrev=False, **kwargs)  # --trainer.max_epoch is a slip, not max_epochs
        help_text = "A config file, in the current folder or one that comes with the package; may be given again."
        parser.add_argument("-c", "--config", action=ConfigFile, help=help_text)
        return parser

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        # the generated usage names every option of the Trainer, and an error below it would be out of sight
        kwargs.setdefault("usage", f"{PROG} {subcommand} [--config FILE]... [--OPTION VALUE]...")
        return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        # Lightning's own warns whenever there are both args and sys.argv, as there are in a console script
        self.config = parser.parse_args(args)

    def before_instantiate_classes(self) -> None:
        self.parser.add_instantiator(self._build_callback, pl.Callback, subclasses=True, prepend=True)

    def _build_callback(self, class_type: type[pl.Callback], *args: Any, **kwargs: Any) -> pl.Callback:
        try:
            return class_type(*args, **kwargs)
        except RecipeError as error:  # jsonargparse would bury it in what it tried instead
            self._parser(self.subcommand).error(str(error))


def run(args: Sequence[str]) -> int:
    """Run one Trainer command.

    Args:
        args: the command and its options.

    Returns:
        The exit code: 1 when a recipe refuses the run. Bad usage, a recipe's bad argument too, exits with code 2 by
        ``SystemExit``.
    """
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())  # a console script lacks it, and a user's own module is most often there
    try:
        RecipeCLI(args)
    except RecipeError as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return 1
    return 0
