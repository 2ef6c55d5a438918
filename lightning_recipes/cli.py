"""The ``lightning-recipes`` command.

``fit``, ``validate``, ``test`` and ``predict`` are a LightningCLI (:mod:`lightning_recipes.trainer_cli`), ``compare``
stands in :mod:`lightning_recipes.compare`; ``list`` and ``show`` print what :mod:`lightning_recipes.catalog` knows.
Nothing heavy is imported until a command needs it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from lightning_recipes import __version__, catalog
from lightning_recipes.catalog import PROG

TRAINER_COMMANDS = {
    "fit": "train a module, with any recipes laid over it",
    "validate": "evaluate on the validation data",
    "test": "evaluate on the test data",
    "predict": "predict on the data to predict",
}
EPILOG = f"""\
configs:
  A --config that is not a file here is looked up in the configs that come with the package; each one is laid over
  those before it, and "callbacks+" in a recipe's config adds to the callbacks that are there already:

    {PROG} fit --config base/digits_cnn.yaml --config recipes/aaer.yaml
    {PROG} fit --config mine.yaml --trainer.callbacks+=AAER --trainer.callbacks.epsilon=0.1
    {PROG} fit --config base/digits_cnn.yaml --print_config > mine.yaml

  "{PROG} fit --help" lists every option of a command.
"""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: the words after the program's name; ``None`` takes them from ``sys.argv``.

    Returns:
        The exit code. Bad usage exits with code 2 by ``SystemExit``, as argparse does.
    """
    args = list(sys.argv[1:] if args is None else args)
    if args and args[0] in TRAINER_COMMANDS:
        from lightning_recipes.trainer_cli import run

        return run(args)
    if args and args[0] == "compare":
        from lightning_recipes.compare.command import run as compare

        return compare(args[1:])
    parser = build_parser()
    if not args:
        parser.print_help()
        return 0
    parsed = parser.parse_args(args)
    try:
        if parsed.command == "list":
            print(catalog.table(catalog.recipes(), markdown=parsed.markdown))
        else:
            print(catalog.card(catalog.find_recipe(parsed.name)))
    except LookupError as error:
        parser.error(str(error.args[0]))
    except BrokenPipeError:  # the reader (head, less) has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the interpreter flushes it at exit
    return 0


def build_parser() -> argparse.ArgumentParser:
    """All commands in one help page; those of the Trainer are parsed by LightningCLI and stand here by name only."""
    parser = argparse.ArgumentParser(
        prog=PROG,
        description="Train, evaluate and look up recipes: papers as callbacks for PyTorch Lightning.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, title="commands", metavar="COMMAND")
    for name, summary in TRAINER_COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    commands.add_parser("compare", help="does a recipe help, and what does it cost? with seeds", add_help=False)
    listing = commands.add_parser("list", help="a table of all recipes", description="Print a table of all recipes.")
    listing.add_argument("--markdown", action="store_true", help="print the table as Markdown, with links")
    show = commands.add_parser(
        "show",
        help="one recipe: what it does and costs, its paper, arguments, config and evidence",
        description="Print everything that is known about one recipe.",
    )
    show.add_argument("name", metavar="NAME", help=f"a recipe's class name, see '{PROG} list'")
    return parser


if __name__ == "__main__":
    sys.exit(main())
