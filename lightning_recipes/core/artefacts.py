"""Files that are made once and read by many runs: scores, perturbed images, samples of a posterior.

An artefact is found by what it was made from: a hash of that is in its name, so that other arguments or other data are
another file. It is whole or not there, because it is written beside its place and moved to it. One process makes it,
the others wait for it and read it; a process that dies lets the next one go on from what it had kept.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from lightning_recipes.core.errors import RecipeError

Content = dict[str, Any]
"""Tensors and plain values by name, as ``torch.load(weights_only=True)`` reads them."""


class Artefact:
    """A file that is made once.

    Args:
        folder: where it lies, on a disk that all processes that use it see; is made when it is needed.
        name: what it is, for people; the file is called ``<name>-<start of the key>.pt``.
        made_from: everything that its content depends on, by name: plain values, tensors and arrays, nested as you
            like. Of a large thing its hash will do.

    Attributes:
        key: SHA-256 of `made_from`.
        path: of the file, whether it is there or not.
    """

    def __init__(self, folder: str | os.PathLike, name: str, made_from: Mapping[str, Any]) -> None:
        self.key = key_of(made_from)
        self.path = Path(folder) / f"{name}-{self.key[:16]}.pt"

    @property
    def unfinished(self) -> Path:
        """Where :meth:`keep` writes, until the whole is saved."""
        return self.path.with_suffix(".unfinished.pt")

    def get(self, make: Callable[[Content | None], Content]) -> Content:
        """The content, made now if it is not there yet.

        May be called by several processes at once, on every rank for instance: one makes it while the others wait, as
        long as that takes and without any communication.

        Args:
            make: called with what :meth:`keep` wrote before an earlier process died, else None; returns the content.

        Raises:
            RecipeError: for a file that cannot be read, or is not this artefact.
        """
        content = self.load()
        if content is None:
            with self._alone():
                content = self.load()  # somebody else may have made it meanwhile
                if content is None:
                    content = make(self._read(self.unfinished))
                    self.save(content)
        return content

    def update(self, change: Callable[[Content | None], Content]) -> Content:
        """Read it, change it and write it, while no other process does the same; return what is there now.

        Args:
            change: called with the content, None where there is none; returns the new one.
        """
        with self._alone():
            content = change(self.load())
            self.save(content)
        return content

    def load(self) -> Content | None:
        """The content; None where it has not been made.

        Raises:
            RecipeError: for a file that cannot be read, or is not this artefact.
        """
        return self._read(self.path)

    def save(self, content: Mapping[str, Any]) -> Path:
        """Put the whole content in its place, and throw away what :meth:`keep` wrote; return the path."""
        self._write(self.path, content)
        self.unfinished.unlink(missing_ok=True)
        return self.path

    def keep(self, state: Mapping[str, Any]) -> None:
        """Write how far the making has come, for a process that goes on after this one has died."""
        self._write(self.unfinished, state)

    def _read(self, path: Path) -> Content | None:
        try:
            key, content = _read(path)
        except FileNotFoundError:
            return None
        if key != self.key:
            raise RecipeError(f"{path} was made from something else (key {key[:16]}); remove it or take another folder")
        return content

    def _write(self, path: Path, content: Mapping[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as file:
            torch.save({"key": self.key, "content": dict(content)}, file)

    def _alone(self) -> FileLock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(self.path.with_suffix(".lock"))


@contextmanager
def written_whole(path: Path, sync: bool = True) -> Iterator[BinaryIO]:
    """A file to write, that takes its place whole when it is written, or is not there.

    Args:
        path: of the file; its folder exists.
        sync: bring it to the disk first, so that it outlives a machine that goes down too.
    """
    # of this machine's process: several machines may write on one disk
    part = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text whole or not at all; what a machine that goes down loses of it can be written again."""
    with written_whole(path, sync=False) as file:
        file.write(text.encode("utf-8"))


def content_at(path: str | os.PathLike) -> Content:
    """The content of an artefact's file, for somebody who has its path and not what it was made from.

    Args:
        path: of the file, or of a folder that holds a single one.

    Raises:
        RecipeError: when it is not there, or cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        there = sorted(each for each in path.glob("*.pt") if not each.name.endswith(".unfinished.pt"))
        if len(there) != 1:
            names = ", ".join(each.name for each in there[:6]) or "none"
            raise RecipeError(f"the folder {path} holds {len(there)} files ({names}); name the one to read")
        path = there[0]
    try:
        return _read(path)[1]
    except FileNotFoundError:
        raise RecipeError(f"there is no file {path}") from None


def _read(path: Path) -> tuple[str, Content]:
    """Key and content of a file."""
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
        return stored["key"], stored["content"]
    except FileNotFoundError:
        raise
    except Exception as error:
        raise RecipeError(
            f"{path} cannot be read ({type(error).__name__}): it is damaged or not one of ours; remove it, and it"
            " will be made again"
        ) from error


def key_of(made_from: Any) -> str:
    """SHA-256 of plain values, tensors and arrays, nested in mappings and sequences.

    Equal things have equal keys in every process; the order of a mapping does not count, types do (1 is not 1.0).

    Raises:
        TypeError: for a thing without a value of its own, such as a function or a module; names it.
    """
    digest = hashlib.sha256()
    _feed(digest.update, made_from, "made_from")
    return digest.hexdigest()


def _feed(update: Callable[[Any], None], value: Any, where: str) -> None:
    if isinstance(value, Tensor):
        update(f"tensor {value.dtype} {tuple(value.shape)}:".encode())
        update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, np.ndarray) and value.dtype != object:
        update(f"array {value.dtype.str} {value.shape}:".encode())
        update(np.ascontiguousarray(value).reshape(-1).view(np.uint8))
    elif value is None or isinstance(value, bool | int | float | str | bytes):
        text = repr(value)
        update(f"{type(value).__name__} {len(text)}:{text}".encode())
    elif isinstance(value, os.PathLike):
        _feed(update, os.fspath(value), where)
    elif isinstance(value, Mapping):
        update(f"mapping {len(value)}:".encode())
        for name in sorted(value, key=lambda name: (type(name).__name__, name)):
            _feed(update, name, where)
            _feed(update, value[name], f"{where}[{name!r}]")
    elif isinstance(value, Sequence):
        update(f"sequence {len(value)}:".encode())
        for index, each in enumerate(value):
            _feed(update, each, f"{where}[{index}]")
    else:
        raise TypeError(
            f"{where} is a {type(value).__name__}, which has no value to hash; give its hash or its arguments"
        )
