"""A page of documentation whose code runs: its blocks, what they print, and whether the page says the same.

A page is Markdown. Its fenced blocks are run in order, in a folder of their own:

    ```python                  runs, all blocks of a page in one namespace
    ```python title="x.py"     is written to that file (``yaml`` and others too)
    ```yaml title="x.yaml"     is written, and must be a config that `lightning-recipes fit --print_config` takes
    ```sh                      `lightning-recipes ...`, run as processes of their own, one after the other
    ```text                    what the block before it prints; a Python block without one may print nothing

Of what is printed words and integers must be the same, and blanks do not count. A number with a decimal point may
differ by one unit of the last place that the page shows, or by what a comment before the block says, in the unit of the
number. A line `...` stands for any lines; a block after ``sh`` shows lines of the output in their order, any others
between them. Comments that a reader does not see, each for the next block:

    <!-- tolerance: 3 -->               how far a number with a decimal point may be off
    <!-- run with: --trainer.devices=2 -->   further arguments of every command, where the machine is another one
    <!-- ends: killed -->               the last command must end by SIGKILL
    <!-- needs: LIGHTNING_RECIPES_DATA -->   the page ends here where that variable is not set
    <!-- picture: slca/forgetting.png -->  the picture shown below is that file of the run
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import signal
import subprocess
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

FENCE = re.compile(r"^```(\w*)(?:\s+title=\"([^\"]+)\")?\s*$")
COMMENT = re.compile(r"^<!-- ([a-z ]+): (.*?) -->$")
PICTURE = re.compile(r"^!\[[^\]]*\]\(([^)]+)\)")
NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
SAYS = {"tolerance", "run with", "ends", "needs", "picture"}
ROOT = Path(__file__).parents[2]
LIMIT = 180
"""Seconds that one command may take."""


class PageError(AssertionError):
    """What a page says is not what happens; begins with ``file:line``."""


@dataclass
class Block:
    """A fenced block.

    Attributes:
        language, title: of its fence.
        text: what stands inside, with a newline after every line.
        line: of its first line inside, from 1.
        says: the comments before it.
    """

    language: str
    title: str | None
    text: str
    line: int
    says: Mapping[str, str] = field(default_factory=dict)

    @property
    def end(self) -> int:
        """The line of the fence that closes it."""
        return self.line + self.text.count("\n")


@dataclass
class Picture:
    """A picture in the text: the ``file`` beside the page, and the ``source`` that the page's code draws."""

    file: str
    source: str
    line: int


def parse(text: str, name: str = "page") -> list[Block | Picture]:
    """The blocks and pictures of a page in order.

    Raises:
        PageError: for a block that does not end, a comment with another word, a comment that nothing follows, and a
            picture that nothing draws.
    """
    found: list[Block | Picture] = []
    opened: Block | None = None
    says: dict[str, str] = {}
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        if opened is not None:
            if line == "```":
                found.append(opened)
                opened = None
            else:
                opened.text += line + "\n"
        elif fence := FENCE.match(line):
            opened, says = Block(fence[1], fence[2], "", number + 1, says), {}
        elif comment := COMMENT.match(line):
            if comment[1] not in SAYS:
                raise PageError(f"{name}:{number}: {comment[1]!r} says nothing; there are {', '.join(sorted(SAYS))}")
            says[comment[1]] = comment[2]
        elif picture := PICTURE.match(line):
            if "picture" not in says:
                raise PageError(f"{name}:{number}: no <!-- picture: ... --> says which file of the run {picture[1]} is")
            found.append(Picture(picture[1], says.pop("picture"), number))
        elif line.startswith("```"):
            raise PageError(f'{name}:{number}: {line!r} opens no block: a language, and title="..." or nothing')
    if opened is not None:
        raise PageError(f"{name}:{opened.line - 1}: this block does not end")
    if says:
        raise PageError(f"{name}: {says} is before no block")
    return found


# -- what is shown and what was printed --------------------------------------------------------------------------------


def words(line: str) -> str:
    """A line without its numbers and with single blanks."""
    return " ".join(NUMBER.sub("#", line).split())


def agrees(shown: str, printed: str, tolerance: float | None = None) -> bool:
    """Whether a line shown is a line printed.

    Args:
        tolerance: how far numbers with a decimal point may be off; None for one unit of the last place shown.
    """
    if words(shown) != words(printed):
        return False
    for a, b in zip(NUMBER.findall(shown), NUMBER.findall(printed)):
        if "." not in a and "." not in b:
            if int(float(a)) != int(float(b)):
                return False
            continue
        places = len(a.partition(".")[2].partition("e")[0])
        exponent = int(a.partition("e")[2] or 0)
        allowed = 10.0 ** (exponent - places) if tolerance is None else tolerance
        if abs(float(a) - float(b)) > allowed * (1 + 1e-9):
            return False
    return True


def mismatch(shown: str, printed: str, tolerance: float | None = None, among: bool = False) -> tuple[int, str] | None:
    """The first line shown that was not printed where it should be.

    Args:
        among: whether other lines may stand between those shown.

    Returns:
        its place in `shown` from 0 and what was found there; None where all agree.
    """
    lines, skips, wanted = printed.rstrip().splitlines(), among, shown.rstrip().splitlines()
    for place, line in enumerate(wanted):
        if line.strip() == "...":
            skips = True
            continue
        at = next((i for i, one in enumerate(lines) if agrees(line, one, tolerance)), None) if skips else 0
        if at is None or not lines or not agrees(line, lines[at], tolerance):
            alike = [one for one in lines if words(one) == words(line)]
            return place, alike[0] if alike else lines[0] if lines and not skips else "nothing like it"
        lines, skips = lines[at + 1 :], among
    if lines and not skips:
        return len(wanted), lines[0]
    return None


def renewed(shown: str, printed: str, among: bool = False) -> str:
    """What a block shows, with what was printed in its place.

    A block with ``...``, or of lines among others, keeps its lines and gets their numbers.

    Raises:
        LookupError: for a line of such a block that was not printed, whatever its numbers.
    """
    if not among and "..." not in (line.strip() for line in shown.splitlines()):
        return printed.rstrip() + "\n"
    lines, kept = printed.splitlines(), []
    for line in shown.splitlines():
        if line.strip() != "...":
            at = next((i for i, one in enumerate(lines) if words(one) == words(line)), None)
            if at is None:
                raise LookupError(line)
            line, lines = lines[at].rstrip(), lines[at + 1 :]
        kept.append(line)
    return "\n".join(kept) + "\n"


# -- running -----------------------------------------------------------------------------------------------------------


class Run:
    """One run of a page, block by block, in the current folder.

    Args:
        path: of the page; tracebacks point into it.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.text = path, path.read_text(encoding="utf-8")
        self.parts = parse(self.text, path.name)
        self.printed: dict[int, str] = {}
        """What the blocks printed, by the line of the text block that shows it."""
        self.left_out: str | None = None
        """Why the page was not run to its end."""
        self._module = types.ModuleType("__tutorial__")

    def blocks(self) -> Iterator[tuple[Block, Block | None, bool]]:
        """Every block that does something, the one that shows what it prints, and whether it is commands."""
        parts = [part for part in self.parts if isinstance(part, Block)]
        for place, block in enumerate(parts):
            if block.language == "text":
                if place == 0 or parts[place - 1].language not in ("python", "sh") or parts[place - 1].title:
                    raise PageError(f"{self.path}:{block.line}: this text block is after no block that prints")
                continue
            after = parts[place + 1] if place + 1 < len(parts) else None
            shown = after if after is not None and after.language == "text" else None
            yield block, shown, block.language == "sh"

    def __call__(self, check: bool = True) -> None:
        """Run everything.

        Args:
            check: whether to compare what is printed.

        Raises:
            PageError: for what differs, and for commands that fail; what the page's own code raises passes.
        """
        with _left_as_it_was(self._module):
            for block, shown, among in self.blocks():
                needs = block.says.get("needs")
                if needs and not os.environ.get(needs):
                    self.left_out = f"{self.path.name}: from line {block.line} on it needs {needs}"
                    return
                printed = self._do(block)
                if shown is not None:
                    self.printed[shown.line] = printed
                    if check:
                        self._compare(shown, printed, among)
                elif printed.strip() and not among:
                    raise PageError(f"{self.path}:{block.line}: the page does not show what this prints:\n{printed}")
        for part in self.parts:
            if isinstance(part, Picture) and not Path(part.source).is_file():
                there = ", ".join(sorted(str(p) for p in Path().rglob("*.png"))) or "none"
                raise PageError(f"{self.path}:{part.line}: no picture {part.source} was drawn; there are {there}")

    def _do(self, block: Block) -> str:
        if block.title is not None:
            Path(block.title).write_text(block.text, encoding="utf-8")
            return self._check_config(block) if block.language == "yaml" else ""
        if block.language == "python":
            return self._python(block)
        return self._commands(block) if block.language == "sh" else ""

    def _python(self, block: Block) -> str:
        # blank lines before it, so that line numbers are those of the page
        code = compile("\n" * (block.line - 1) + block.text, str(self.path), "exec")
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(code, self._module.__dict__)
        return out.getvalue()

    def _check_config(self, block: Block) -> str:
        from lightning_recipes.cli import main

        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                code = main(["fit", "--config", block.title, "--print_config"])
            except SystemExit as exit:
                code = exit.code
        if code:
            raise PageError(f"{self.path}:{block.line}: no config for `lightning-recipes fit`:\n{said.getvalue()}")
        config = yaml.safe_load(block.text)
        if not config or not config.keys() <= {"seed_everything", "trainer", "model", "data", "ckpt_path"}:
            raise PageError(f"{self.path}:{block.line}: a yaml block with a title must be a config")
        return ""

    def _commands(self, block: Block) -> str:
        further = shlex.split(block.says.get("run with", ""))
        said, lines = "", block.text.replace("\\\n", " ").splitlines()
        commands = [(i, shlex.split(line, comments=True)) for i, line in enumerate(lines)]
        commands = [(i, command) for i, command in commands if command]
        for place, (_, command) in enumerate(commands):
            if command[0] != "lightning-recipes":
                raise PageError(f"{self.path}:{block.line}: {command[0]} is no command that a page may run")
            code, out = run_command([*command, *further])
            killed = block.says.get("ends") == "killed" and place == len(commands) - 1
            if code != (-signal.SIGKILL if killed else 0):
                raise PageError(f"{self.path}:{block.line}: {shlex.join(command)} ended with {code}:\n{out[-4000:]}")
            said += out
        return said

    def _compare(self, shown: Block, printed: str, among: bool) -> None:
        tolerance = float(shown.says["tolerance"]) if "tolerance" in shown.says else None
        wrong = mismatch(shown.text, printed, tolerance, among)
        if wrong is None:
            return
        place, found = wrong
        lines = shown.text.splitlines()
        says = lines[place] if place < len(lines) else "nothing more"
        raise PageError(
            f"{self.path}:{shown.line + place}: the page shows\n  {says}\nand printed was\n  {found}\nin\n{printed}\n"
            f"If that is as it should be: python -m tests.tutorials.update {self.path.stem}"
        )

    def updated(self) -> str:
        """The page with what its blocks printed. After a run without checks."""
        lines = self.text.splitlines(keepends=True)
        for block, shown, among in reversed(list(self.blocks())):
            if shown is None or shown.line not in self.printed:
                continue
            try:
                text = renewed(shown.text, self.printed[shown.line], among)
            except LookupError as error:
                raise PageError(
                    f"{self.path}:{shown.line}: the {block.language} block before it prints no line like {error}; it"
                    f" prints\n{self.printed[shown.line]}"
                ) from None
            lines[shown.line - 1 : shown.end - 1] = [text]
        return "".join(lines)


def run_command(command: Sequence[str]) -> tuple[int, str]:
    """Run `lightning-recipes ...` as a user does, from the current folder.

    Returns:
        the exit code (negative: the signal that ended it) and what it printed, to either stream.
    """
    folders = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "COLUMNS": "120"}
    environment.pop("PL_GLOBAL_SEED", None)
    # in a file, since a pipe that children of a killed process hold open would not end
    with open("said.txt", "w+", encoding="utf-8") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "lightning_recipes.cli", *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            code = process.wait(LIMIT)
        finally:
            with contextlib.suppress(ProcessLookupError):  # ranks that a killed one has left behind
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        said.seek(0)
        return code, said.read()


@contextlib.contextmanager
def _left_as_it_was(module: types.ModuleType) -> Iterator[None]:
    """One thread, whose sums come in one order; and what code of a page changes of the process is put back."""
    import torch
    from lightning.pytorch.utilities.seed import isolate_rng

    threads, environment, path = torch.get_num_threads(), dict(os.environ), list(sys.path)
    modules = set(sys.modules)
    torch.set_num_threads(1)
    os.environ.pop("PL_GLOBAL_SEED", None)
    sys.modules[module.__name__] = module  # classes look for what their annotations name there
    sys.path.insert(0, os.getcwd())
    try:
        with isolate_rng():
            yield
    finally:
        torch.set_num_threads(threads)
        os.environ.clear()
        os.environ.update(environment)
        sys.path[:] = path
        here = os.getcwd()
        for name in set(sys.modules) - modules:  # files that the page wrote; another page's may have the same names
            file = getattr(sys.modules[name], "__file__", None)
            if name == module.__name__ or (file and file.startswith(here)):
                del sys.modules[name]
