"""Files that are made once: found by what they were made from, whole or not there, made by one process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_recipes.core.artefacts import Artefact, content_at, key_of
from lightning_recipes.core.errors import RecipeError


def never(kept: dict | None) -> dict:
    raise AssertionError("was made a second time")


def test_it_is_made_once_and_read_afterwards(tmp_path: Path) -> None:
    made = Artefact(tmp_path / "new" / "folder", "scores", {"seed": 1}).get(lambda kept: {"x": torch.arange(3), "n": 2})
    again = Artefact(tmp_path / "new" / "folder", "scores", {"seed": 1}).get(never)
    assert torch.equal(made["x"], again["x"]) and again["n"] == 2


def test_other_arguments_are_another_file(tmp_path: Path) -> None:
    one, two = (Artefact(tmp_path, "scores", {"seed": seed}) for seed in (1, 2))
    assert one.path != two.path and one.path.name == f"scores-{one.key[:16]}.pt"
    one.save({"n": 1})
    assert two.load() is None


def test_a_key_depends_on_values_types_shapes_and_names_and_on_no_order() -> None:
    image = torch.arange(6.0).reshape(2, 3)
    different = [
        {"a": 1, "b": image},
        {"a": 1.0, "b": image},
        {"a": True, "b": image},
        {"a": "1", "b": image},
        {"a": None, "b": image},
        {"a": 1, "c": image},
        {"a": 1, "b": image.T},
        {"a": 1, "b": image.double()},
        {"a": 1, "b": image.numpy()},
        {"a": 1, "b": image + 1e-6},
        {"a": 1, "b": image.tolist()},
        {"a": [1, [2]], "b": image},
        {"a": [[1], 2], "b": image},
        {"a": [1, 2], "b": image},
        {"a": "bc", "b": ["d"]},
        {"a": "b", "b": ["cd"]},
    ]
    assert len({key_of(each) for each in different}) == len(different)
    assert key_of({"a": 1, "b": image}) == key_of({"b": image.clone(), "a": 1})
    assert key_of(Path("a/b")) == key_of("a/b")
    assert key_of(torch.tensor(2.0)) != key_of(np.float64(2.0).reshape(()))


def test_what_has_no_value_to_hash_is_named() -> None:
    with pytest.raises(TypeError, match=r"made_from\['model'\]\[1\] is a Linear"):
        key_of({"model": [0, torch.nn.Linear(1, 1)]})


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artefact = Artefact(tmp_path, "scores", {})
    artefact.save({"n": 1})

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        artefact.save({"n": 2})
    assert artefact.load() == {"n": 1}
    assert [each.name for each in tmp_path.iterdir()] == [artefact.path.name]


def test_a_damaged_file_and_one_of_another_key_say_what_to_do(tmp_path: Path) -> None:
    artefact, other = Artefact(tmp_path, "scores", {"seed": 1}), Artefact(tmp_path, "scores", {"seed": 2})
    artefact.path.write_bytes(b"cut off")
    with pytest.raises(RecipeError, match=r"damaged .* remove it"):
        artefact.get(never)
    other.save({"n": 1})
    other.path.replace(artefact.path)
    with pytest.raises(RecipeError, match="made from something else"):
        artefact.load()


def _dies(folder: Path) -> None:
    artefact = Artefact(folder, "sum", {"to": 5})

    def make(kept: dict | None) -> dict:
        state = kept or {"sum": 0, "next": 1}
        while state["next"] <= 5:
            state = {"sum": state["sum"] + state["next"], "next": state["next"] + 1}
            artefact.keep(state)
            if state["next"] == 4:
                os.kill(os.getpid(), signal.SIGKILL)
        return {"sum": state["sum"]}

    artefact.get(make)


def test_a_making_that_was_killed_goes_on_from_what_it_kept(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_dies, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    artefact, seen = Artefact(tmp_path, "sum", {"to": 5}), []
    assert artefact.load() is None

    def make(kept: dict | None) -> dict:
        seen.append(kept)
        return {"sum": kept["sum"] + 4 + 5}

    assert artefact.get(make) == {"sum": 15}
    assert seen == [{"sum": 6, "next": 4}]
    assert not artefact.unfinished.exists()


def _makes(folder: Path, results: multiprocessing.Queue) -> None:
    artefact = Artefact(folder, "slow", {})

    def make(kept: dict | None) -> dict:
        time.sleep(0.3)
        return {"by": os.getpid()}

    results.put(artefact.get(make)["by"])


def _counts(folder: Path) -> None:
    for _ in range(20):
        Artefact(folder, "count", {}).update(lambda content: {"n": (content or {"n": 0})["n"] + 1})


def test_of_several_processes_one_makes_it_and_the_others_wait(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_makes, args=(tmp_path, results)) for _ in range(3)]
    for process in processes:
        process.start()
    assert len({results.get(timeout=30) for _ in processes}) == 1
    for process in processes:
        process.join()


def test_no_update_of_several_processes_is_lost(tmp_path: Path) -> None:
    processes = [multiprocessing.get_context("fork").Process(target=_counts, args=(tmp_path,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert Artefact(tmp_path, "count", {}).load() == {"n": 60}


def test_a_file_is_read_by_its_path_or_by_its_folder(tmp_path: Path) -> None:
    first = Artefact(tmp_path, "scores", {"seed": 0})
    with pytest.raises(RecipeError, match=r"the folder .* holds 0 files \(none\); name the one to read"):
        content_at(tmp_path)
    first.save({"x": 1})
    first.keep({"x": 2})  # what is unfinished is none of them
    assert content_at(tmp_path) == content_at(str(first.path)) == {"x": 1}
    Artefact(tmp_path, "scores", {"seed": 1}).save({"x": 3})
    with pytest.raises(RecipeError, match=r"holds 2 files \(scores-\w+\.pt, scores-\w+\.pt\); name the one"):
        content_at(tmp_path)
    with pytest.raises(RecipeError, match=r"there is no file .*nothing\.pt"):
        content_at(tmp_path / "nothing.pt")
