"""Checkpoint files that are whole or not there, however a run ends.

Lightning writes a checkpoint into the folder for temporary files and moves it to its place. Where the two are on
different disks (a network disk for checkpoints, a memory disk for temporary files) the move is a copy over the earlier
file: a run that is killed in it, or a disk that is full, leaves a ``last.ckpt`` that is cut off, and the earlier one is
gone. A killed run also leaves its temporary file for good. And ``save_last="link"`` removes the file that the link
leads to before it makes a new link, so that a run that is killed in between has no last checkpoint at all.

Here a file is written beside its place, brought to the disk and renamed; a link leads to a whole file at any moment.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from fsspec.core import url_to_fs
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO

from lightning_recipes.core.patch import Patch


class WholeFiles:
    """Writes the checkpoints of a fit. A ``CheckpointIO`` of the user's own, and places that are not on a disk of this
    machine, are left alone.

    Args:
        trainer: the user's.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self.trainer = trainer
        self._newest: Path | None = None  # of the files that this run has written

    def install(self, undo: ExitStack) -> None:
        """Take the place of Lightning's writer; leave the removal with `undo`."""
        writer = self.trainer.strategy.checkpoint_io
        while isinstance(writer, _WrappingCheckpointIO):
            writer = writer.checkpoint_io
        if type(writer) is not TorchCheckpointIO:
            return
        save = Patch(writer, "save_checkpoint", lambda *args, **kwargs: self._save(save, *args, **kwargs))
        remove = Patch(writer, "remove_checkpoint", lambda path: self._remove(remove, path))
        undo.callback(save.restore)
        undo.callback(remove.restore)
        for each in self.trainer.checkpoint_callbacks:
            if isinstance(each, ModelCheckpoint):
                undo.callback(_link_whole(each).restore)

    def _save(
        self, stock: Patch, checkpoint: Mapping[str, Any], path: str | os.PathLike, storage_options: Any = None
    ) -> None:
        if storage_options is not None or not _is_local_file_protocol(path):
            stock.original(checkpoint, path, storage_options)
            return
        place = _place(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()  # torch's own writer hides what the disk says
        torch.save(checkpoint, content)
        part = _beside(place)
        try:
            with open(part, "wb") as file:
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, place)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise OSError(error.errno, f"{error.strerror}; this checkpoint was not written", str(place)) from error
        self._newest = place

    def _remove(self, stock: Patch, path: str | os.PathLike) -> None:
        if self._newest is not None and _is_local_file_protocol(path):
            place = _place(path)
            for link in place.parent.glob("*.ckpt"):
                if link.is_symlink() and link.resolve() == place.resolve() != self._newest.resolve():
                    _link(self._newest, link)
        stock.original(path)


def _link_whole(callback: ModelCheckpoint) -> Patch:
    """Have this one change its link to the last checkpoint at once, not remove it first."""

    def link(trainer: pl.Trainer, file: str, link: str) -> None:
        if not trainer.is_global_zero or os.path.isdir(link) or os.path.abspath(file) == os.path.abspath(link):
            patch.original(trainer, file, link)
            return
        try:
            _link(Path(file), Path(link))
        except OSError:  # no links on this disk: Lightning copies
            patch.original(trainer, file, link)
            return
        trainer.strategy.barrier()

    patch = Patch(callback, "_link_checkpoint", link)
    return patch


def _link(file: Path, link: Path) -> None:
    part = _beside(link)
    part.unlink(missing_ok=True)
    os.symlink(os.path.relpath(file, link.parent), part)
    os.replace(part, link)


def _place(path: str | os.PathLike) -> Path:
    return Path(url_to_fs(str(path))[1])


def _beside(place: Path) -> Path:
    """Where a file is written: the same for every run, so that what a killed one left is written over."""
    return place.with_name(f".{place.name}.part")
