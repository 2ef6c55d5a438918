"""Every tutorial is run from top to bottom, and what it shows is what comes out."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_recipes.catalog import config_folder
from tests.tutorials.page import Block, Picture, Run, parse
from tests.tutorials.update import pages

LARGEST = 60_000
"""Bytes of a picture in the repository."""


@pytest.fixture(autouse=True)
def loggers_left_alone() -> Iterator[None]:
    """A tutorial may quieten Lightning's loggers."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels):
        logger.setLevel(level)


@pytest.mark.filterwarnings("default")  # those that a reader gets are no errors, and none are hidden
@pytest.mark.parametrize("path", pages(), ids=lambda path: path.stem)
def test_a_tutorial_runs_and_shows_what_comes_out(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = Run(path)
    run()
    if run.left_out:
        pytest.skip(run.left_out)


PICTURES = [
    path.parent / part.file
    for path in pages()
    for part in parse(path.read_text(encoding="utf-8"), path.name)
    if isinstance(part, Picture)
]


@pytest.mark.parametrize("file", PICTURES, ids=lambda file: file.stem)
def test_a_picture_of_a_tutorial_is_there_and_small(file: Path) -> None:
    assert file.is_file(), f"{file}: python -m tests.tutorials.update draws it"
    assert file.stat().st_size < LARGEST, f"{file} has {file.stat().st_size} bytes"


def named_configs(text: str) -> list[str]:
    """What follows a ``--config`` anywhere on a page, in the text too."""
    return re.findall(r"--config[ =\n]+([\w./-]+\.yaml)", text)


@pytest.mark.parametrize("path", pages(), ids=lambda path: path.stem)
def test_the_configs_that_a_tutorial_names_are_there(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    own = {part.title for part in parse(text, path.name) if isinstance(part, Block)} | {"mine.yaml"}
    for name in named_configs(text):
        assert name in own or (config_folder() / name).is_file(), name


def test_there_is_a_tutorial_for_each_of_the_four_tasks() -> None:
    assert [path.stem for path in pages()] == ["eight_gpus", "few_images", "robust_classifier", "ten_tasks"]
