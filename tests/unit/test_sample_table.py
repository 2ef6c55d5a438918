"""Rows by sample id: what is written when, in how much memory, over ranks and through checkpoints."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightning_recipes.core import sample_table
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.sample_table import SampleTable, last_of_each, of_all_ranks

STORAGES = ["cpu", "device", "memmap"]


def rows(*values: float) -> torch.Tensor:
    """One row a number, [v, -v]."""
    column = torch.tensor(values)
    return torch.stack([column, -column], 1)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_are_read_back_and_unwritten_ones_are_known(tmp_path: Path, storage: Any, dtype: torch.dtype) -> None:
    table = SampleTable(5, 2, dtype, storage, folder=tmp_path)
    table.write(torch.tensor([3, 1]), rows(0.5, 0.25))
    found, written = table.read(torch.tensor([1, 2, 3, 4]))
    assert torch.equal(found, rows(0.25, 0, 0.5, 0).abs() * torch.tensor([1, -1]))
    assert found.dtype == torch.float32
    assert written.tolist() == [True, False, True, False]


def test_a_later_write_replaces_the_row_and_others_stay() -> None:
    table = SampleTable(3, 2)
    table.write(torch.tensor([0, 1]), rows(1, 2))
    table.write(torch.tensor([1]), rows(3))
    assert table.read(torch.tensor([0, 1]))[0].tolist() == rows(1, 3).tolist()


def test_a_sample_written_twice_at_once_keeps_what_stood_later() -> None:
    table = SampleTable(4, 2)
    table.write(torch.tensor([2, 0, 2, 1, 2, 0]), rows(1, 2, 3, 4, 5, 6))
    assert table.read(torch.arange(3))[0].tolist() == rows(6, 4, 5).tolist()


def test_the_last_place_of_every_id() -> None:
    assert last_of_each(torch.tensor([7, 3, 7, 3, 5])).tolist() == [2, 3, 2, 3, 4]
    ids = torch.randint(20, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    expected = [max(place for place, other in enumerate(ids) if other == one) for one in ids]
    assert last_of_each(torch.tensor(ids)).tolist() == expected


def test_an_id_of_minus_one_stands_for_no_sample() -> None:
    table = SampleTable(2, 2)
    table.write(torch.tensor([-1, 1, -1]), rows(9, 1, 9))
    found, written = table.read(torch.tensor([0, 1]))
    assert found.tolist() == rows(0, 1).abs().mul(torch.tensor([1, -1])).tolist()
    assert written.tolist() == [False, True]


def test_a_row_that_is_not_finite_counts_as_unwritten() -> None:
    table = SampleTable(2, 2)
    table.write(torch.tensor([0, 1]), torch.tensor([[float("nan"), 0.5], [0.25, 0.75]]))
    found, written = table.read(torch.tensor([0, 1]))
    assert written.tolist() == [False, True]
    assert found.tolist() == [[0, 0], [0.25, 0.75]]


def test_what_is_written_holds_no_graph() -> None:
    table = SampleTable(2, 2)
    weight = torch.ones(2, 2, requires_grad=True)
    table.write(torch.tensor([0, 1]), weight * 2)
    assert not table._rows.requires_grad
    assert not table.read(torch.tensor([0]))[0].requires_grad


def test_where_the_device_is_not_waited_for_a_write_is_there_at_the_next_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a table in main memory beside an accelerator, without one."""

    class Event:
        waited = 0

        def record(self) -> None: ...

        def synchronize(self) -> None:
            Event.waited += 1

    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(Event=Event))
    table = SampleTable(4, 2)
    table._apart = True
    table.write(torch.tensor([1, 3]), rows(1, 2))
    table.write(torch.tensor([3]), rows(3))
    assert not table._written.any() and Event.waited == 0, "on their way"
    assert table.read(torch.tensor([1, 3]))[0].tolist() == rows(1, 3).tolist()
    assert Event.waited == 2
    table.write(torch.tensor([0]), rows(4))
    assert table.state()["rows"].tolist() == rows(4, 1, 3).tolist(), "a checkpoint waits for it too"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("storage", STORAGES)
def test_rows_come_from_the_device_and_go_to_it(tmp_path: Path, storage: Any) -> None:
    table = SampleTable(6, 2, storage=storage, device="cuda:0", folder=tmp_path)
    table.write(torch.tensor([5, 1, 5]), rows(1, 2, 3).cuda())
    found, written = table.read(torch.tensor([1, 0, 5]))
    assert found.device == written.device == torch.device("cuda:0")
    assert found.tolist() == rows(2, 0, 3).abs().mul(torch.tensor([1, -1])).tolist()
    assert written.tolist() == [True, False, True]
    again = SampleTable(6, 2, storage=storage, device="cuda:0", folder=tmp_path)
    again.load(table.state())
    assert torch.equal(again.read(torch.arange(6))[0], table.read(torch.arange(6))[0])


# -- memory ------------------------------------------------------------------------------------------------------------


def test_it_says_what_it_takes() -> None:
    table = SampleTable(50_000, 100)
    assert table.bytes_per_sample == 400
    assert table.size == "400 bytes a sample, 0.02 GB for 50,000 samples of 100 columns in float32"
    assert SampleTable(50_000, 100, torch.float16).bytes_per_sample == 200


@pytest.mark.parametrize(("storage", "where"), [("cpu", "of main memory are"), ("memmap", "in .* are")])
def test_more_than_there_is_is_refused_with_its_size(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, storage: Any, where: str
) -> None:
    """ImageNet: 1,281,167 samples of 1,000 classes."""
    monkeypatch.setattr(sample_table, "free_memory", lambda *args: 4_000_000_000)
    message = f"4,000 bytes a sample, 5.12 GB for 1,281,167 samples .* 4 GB {where} free; .*'memmap'.*'float16'"
    with pytest.raises(RecipeError, match=message):
        SampleTable(1_281_167, 1000, storage=storage, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_every_process_of_a_machine_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_table, "free_memory", lambda *args: 3_000)
    SampleTable(100, 2, copies=3)
    with pytest.raises(RecipeError, match="in each of 4 processes"):
        SampleTable(100, 2, copies=4)


def test_free_memory_of_each_storage_is_that_of_the_machine(tmp_path: Path) -> None:
    device = torch.device("cpu")
    assert 1e6 < sample_table.free_memory("cpu", device, tmp_path) < 1e15
    assert 1e6 < sample_table.free_memory("memmap", device, tmp_path) < 1e18


def test_a_file_has_no_name_and_takes_no_room_before_it_is_written(tmp_path: Path) -> None:
    """Half of the disk, of which one row is written."""
    free = sample_table.free_memory("memmap", torch.device("cpu"), tmp_path)
    samples = min(10**8, free // 400 // 2)
    table = SampleTable(samples, 100, storage="memmap", folder=tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
    table.write(torch.tensor([samples - 1]), torch.full((1, 100), 0.01))
    assert table.read(torch.tensor([samples - 1]))[0].sum().item() == pytest.approx(1)
    assert sample_table.free_memory("memmap", torch.device("cpu"), tmp_path) > free - 50_000_000


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES)
def test_half_written_it_goes_through_a_checkpoint_and_on_elsewhere(tmp_path: Path, storage: Any) -> None:
    table = SampleTable(6, 2, storage=storage, folder=tmp_path)
    table.write(torch.tensor([5, 2]), rows(0.5, 0.25))
    torch.save(table.state(), tmp_path / "state")
    state = torch.load(tmp_path / "state", weights_only=True)
    assert state["rows"].shape == (2, 2), "only rows that were written are saved"
    again = SampleTable(6, 2)
    again.write(torch.tensor([0]), rows(9))
    again.load(state)
    found, written = again.read(torch.arange(6))
    assert written.tolist() == [False, False, True, False, False, True]
    assert found[[2, 5]].tolist() == rows(0.25, 0.5).tolist()


def test_full_it_is_saved_without_a_second_copy_of_it() -> None:
    table = SampleTable(3, 2)
    table.write(torch.arange(3), rows(1, 2, 3))
    state = table.state()
    assert state["rows"].data_ptr() == table._rows.data_ptr()
    again = SampleTable(3, 2)
    again.load(state)
    assert again.read(torch.arange(3))[0].tolist() == rows(1, 2, 3).tolist()


@pytest.mark.parametrize(("samples", "columns"), [(4, 2), (3, 3)])
def test_another_shape_in_a_checkpoint_is_refused(samples: int, columns: int) -> None:
    with pytest.raises(RecipeError, match=r"rows of 2 for 3 samples; here they are rows of"):
        SampleTable(samples, columns).load(SampleTable(3, 2).state())


# -- ranks -------------------------------------------------------------------------------------------------------------


def test_alone_a_batch_is_filled_up_to_the_capacity() -> None:
    ids, values = of_all_ranks(torch.tensor([4, 2]), rows(1, 2), 3, torch.zeros(2))
    assert ids.tolist() == [4, 2, -1]
    assert values[:2].tolist() == rows(1, 2).tolist()


def _rank(rank: int, port: int, folder: Path) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    found = {}
    own = (torch.tensor([0, 2, 4]), rows(1, 2, 3)) if rank == 0 else (torch.tensor([1, 2]), rows(4, 5))
    for capacity in (3, 4, None):
        table = SampleTable(6, 2)
        ids, values = of_all_ranks(*own, capacity, torch.zeros(2))
        table.write(ids, values)
        found[str(capacity)] = [ids, table.read(torch.arange(6))[0]]
    nothing = of_all_ranks(*((None, None) if rank else own), 3, torch.zeros(2))
    found["nothing"] = list(nothing)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.ddp
def test_every_rank_has_what_all_of_them_write(tmp_path: Path) -> None:
    """Unequal batches; sample 2 is on both ranks, and at the same place of both: the second rank's comes later."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(_rank, (port, tmp_path), nprocs=2, start_method="fork")
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, (ids, values) in one.items():
        assert torch.equal(ids, two[name][0])
        assert torch.equal(values, two[name][1])
    assert one["3"][0].tolist() == [0, 1, 2, 2, 4, -1]
    assert one["4"][0].tolist() == [0, 1, 2, 2, 4, -1, -1, -1]
    assert one["None"][0].tolist() == [0, 1, 2, 2, 4, -1]
    for name in ("3", "4", "None"):
        assert one[name][1][:, 0].tolist() == [1, 4, 5, 0, 3, 0]
    assert one["nothing"][0].tolist() == [0, -1, 2, -1, 4, -1]
