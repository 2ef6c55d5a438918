"""A row of numbers for every training sample, in memory that is bounded and told beforehand.

Rows are written by id and read back in a later epoch. What was never written is known to be so. A sample that is
written twice at once keeps what stood later in the batch; over ranks that is the order in which samples are dealt to
them in turn. Every rank holds the whole table: :func:`of_all_ranks` gives each what all of them write.

On the host a write is a copy that the device does not wait for: it goes into the table before the next read.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_recipes.core.distributed import active
from lightning_recipes.core.errors import RecipeError

Storage = Literal["cpu", "device", "memmap"]


class SampleTable:
    """Rows by sample id.

    Args:
        samples: number of ids.
        columns: entries of a row.
        dtype: that rows are stored in; they are read as float32. Half precision loses entries below 6e-8.
        storage: 'cpu' for main memory, 'device' for the accelerator's, 'memmap' for a file that main memory caches and
            that has no name, so that it goes with the process.
        device: where rows are written from and read to.
        folder: where the file lies.
        copies: tables on this machine, one a process.
        otherwise: what else the user can do when it is too large, for messages.

    Raises:
        RecipeError: when there is not enough memory; says how much it takes.
    """

    def __init__(
        self,
        samples: int,
        columns: int,
        dtype: torch.dtype = torch.float32,
        storage: Storage = "cpu",
        device: torch.device | str = "cpu",
        folder: str | Path = ".",
        copies: int = 1,
        otherwise: str = "",
    ) -> None:
        self.samples, self.columns, self.dtype, self.storage = samples, columns, dtype, storage
        self.device, self._place = torch.device(device), torch.device(device if storage == "device" else "cpu")
        self._apart = self._place != self.device
        self._check_memory(Path(folder), copies if storage != "device" else 1, otherwise)
        shape = samples + 1, columns  # the last row takes what stands for no sample
        if storage == "memmap":
            self._rows = _mapped(shape, dtype, Path(folder))
        else:
            self._rows = torch.zeros(shape, dtype=dtype, device=self._place)
        self._written = torch.zeros(samples + 1, dtype=torch.bool, device=self._place)
        self._pending: list[tuple[Tensor, Tensor, Any]] = []

    @property
    def bytes_per_sample(self) -> int:
        """Of a row."""
        return self.columns * self.dtype.itemsize

    @property
    def size(self) -> str:
        """What it takes, in words."""
        total = self.bytes_per_sample * self.samples
        return (
            f"{self.bytes_per_sample:,} bytes a sample, {total / 1e9:.3g} GB for {self.samples:,} samples of"
            f" {self.columns} columns in {str(self.dtype).removeprefix('torch.')}"
        )

    def _check_memory(self, folder: Path, copies: int, otherwise: str) -> None:
        free = free_memory(self.storage, self.device, folder)
        needed = self.bytes_per_sample * self.samples * copies
        if needed > free:
            each = f" in each of {copies} processes" if copies > 1 else ""
            where = {"cpu": "of main memory are", "device": f"on {self.device} are", "memmap": f"in {folder} are"}
            raise RecipeError(
                f"the table takes {self.size}{each}, and {free / 1e9:.3g} GB {where[self.storage]} free; store it"
                f" elsewhere (storage='memmap' keeps it in a file) or in half precision (dtype='float16'){otherwise}"
            )

    # -- reading and writing -----------------------------------------------------------------------------------------

    def read(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Rows, and which of them were ever written.

        Args:
            ids: int64 ``[n]`` on the CPU, each in [0, samples).

        Returns:
            float32 ``[n, columns]`` and bool ``[n]``, on the device. A row that is not finite counts as unwritten.
        """
        self._commit()
        here = ids.to(self._place, non_blocking=True)
        if not self._apart:
            rows, written = self._rows[here], self._written[here]
        else:
            rows = _pinned(len(ids), self.columns, self.dtype)
            torch.index_select(self._rows, 0, here, out=rows)
            rows = rows.to(self.device, non_blocking=True)
            written = self._written[here].to(self.device, non_blocking=True)
        rows = rows.float()
        finite = rows.isfinite().all(1)
        return torch.where(finite[:, None], rows, 0.0), written & finite

    def write(self, ids: Tensor, values: Tensor) -> None:
        """Write rows; they are read from then on.

        Args:
            ids: int64 ``[n]``; -1 stands for no sample. On the CPU, or on the device.
            values: ``[n, columns]`` on the device; kept until they are in the table.
        """
        values = values.detach().to(self.dtype)
        if not self._apart:
            self._put(ids.to(self.device, non_blocking=True), values)
            return
        host = [_pinned(*each.shape, each.dtype) for each in (ids, values)]
        for there, here in zip(host, (ids, values)):
            there.copy_(here, non_blocking=True)
        copied = torch.get_device_module(self.device).Event()
        copied.record()
        self._pending.append((*host, copied))

    def _commit(self) -> None:
        for ids, values, copied in self._pending:
            copied.synchronize()
            self._put(ids, values)
        self._pending = []

    def _put(self, ids: Tensor, values: Tensor) -> None:
        ids = torch.where(ids < 0, self.samples, ids)
        values = values[last_of_each(ids)]  # one id twice has one value: the order of writing does not matter
        self._rows.index_copy_(0, ids, values)
        self._written[ids] = True

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """As it stands: which rows are written, and those."""
        self._commit()
        written, rows = self._written[: self.samples], self._rows[: self.samples]
        return {"written": written.cpu(), "rows": rows if bool(written.all()) else rows[written]}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state` gave.

        Raises:
            RecipeError: when it is of other samples or columns.
        """
        written, rows = state["written"].to(self._place), state["rows"]
        if len(written) != self.samples or rows.shape[1] != self.columns:
            raise RecipeError(
                f"the checkpoint's table has rows of {rows.shape[1]} for {len(written)} samples; here they are rows of"
                f" {self.columns} for {self.samples}"
            )
        self._pending = []
        self._written[: self.samples] = written
        self._rows[: self.samples][written] = rows.to(self._place, self.dtype)


def last_of_each(ids: Tensor) -> Tensor:
    """For every place the last place with the same id, int64 ``[n]``; waits for nothing."""
    order = ids.argsort(stable=True)
    ends = torch.searchsorted(ids[order], ids, right=True) - 1
    return order[ends]


def of_all_ranks(
    ids: Tensor | None, values: Tensor | None, capacity: int | None, like: Tensor
) -> tuple[Tensor, Tensor]:
    """What all ranks write in a step; on every rank the same. A collective call.

    Args:
        ids, values: of this rank, ``[n]`` and ``[n, columns]``; None where it has nothing to write.
        capacity: the most samples that any rank has, the same on all of them; None to ask them, which waits.
        like: a tensor ``[columns]`` on the device, of the dtype of the values.

    Returns:
        ids ``[ranks * capacity]`` and values, on the device. Sample j of rank r of W stands at place j W + r, as where
        samples are dealt to the ranks in turn; places that are left have id -1.
    """
    if capacity is None:
        most = torch.tensor(0 if ids is None else len(ids), device=like.device)
        if active():
            dist.all_reduce(most, dist.ReduceOp.MAX)
        capacity = int(most)
    own_ids = torch.full((capacity,), -1, dtype=torch.int64, device=like.device)
    own_values = like.new_zeros(capacity, len(like))
    if ids is not None:
        own_ids[: len(ids)] = ids.to(like.device, non_blocking=True)
        own_values[: len(values)] = values.to(like.dtype)
    if not active():
        return own_ids, own_values
    world = dist.get_world_size()
    found = []
    for own in (own_ids, own_values):
        parts = [torch.empty_like(own) for _ in range(world)]
        dist.all_gather(parts, own)
        found.append(torch.stack(parts, 1).flatten(0, 1))
    return found[0], found[1]


def free_memory(storage: Storage, device: torch.device, folder: Path) -> int:
    """Bytes that a table may take."""
    if storage == "memmap":
        folder = folder.absolute()
        return shutil.disk_usage(next(each for each in (folder, *folder.parents) if each.exists())).free
    if storage == "device" and device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def _mapped(shape: tuple[int, int], dtype: torch.dtype, folder: Path) -> Tensor:
    """Zeros in a file of no name, of which only what is written takes room on the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    handle, path = tempfile.mkstemp(".table", dir=folder)
    try:
        os.ftruncate(handle, shape[0] * shape[1] * dtype.itemsize)
        return torch.from_file(path, shared=True, size=shape[0] * shape[1], dtype=dtype).view(shape)
    finally:
        os.close(handle)
        os.unlink(path)


def _pinned(*shape_and_dtype: Any) -> Tensor:
    """Memory on the host that copies from and to the device need not wait for."""
    *shape, dtype = shape_and_dtype
    return torch.empty(*shape, dtype=dtype, pin_memory=torch.cuda.is_available())
