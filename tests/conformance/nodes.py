"""Runs on two machines, for the tests: `lightning-recipes fit` under torchrun, in which a machine is lost.

``python -m tests.conformance.nodes FOLDER`` is started by the tests. It imports everything, then only forks: two agents
of torchrun on the loopback device stand for two machines, each with one process that runs the command. An agent is
torchrun's own, from torchrun's own arguments; only its worker is a fork, which saves the imports.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args

from lightning_recipes import cli, trainer_cli  # noqa: F401 - the command imports it: here once for all
from lightning_recipes.core.recipe import Recipe

from .recipes import ROWS
from .table import Lively, small_vit

ROOT = Path(__file__).parents[2]
STACK = next(row for row in ROWS if row.name == "pego+unfreeze+aaer")
BATCHES, EPOCHS, EVERY, LOST_AT = 7, 3, 2, 13
LIMIT = 240  # seconds after which a process is taken to hang


class Digits(Lively):
    """The table's module with all that a resume can lose, as a config names it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(small_vit())


class LoseMachine(Callback):
    """The machine of one rank is gone at once, its agent of torchrun too: nobody there can tell the others.

    Args:
        rank: whose.
        batch: in the middle of that one of the whole run, counted from 1: gradients are there and not yet used.
    """

    def __init__(self, rank: int, batch: int) -> None:
        self.rank, self.batch = rank, batch

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_rank == self.rank and trainer.fit_loop.epoch_loop.batch_progress.total.ready == self.batch:
            os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)


def config(nodes: int) -> dict[str, Any]:
    """The run of the stack, as a user writes it, for two processes on so many machines."""
    saves = {"dirpath": "checkpoints", "save_last": True, "every_n_train_steps": EVERY}
    callbacks = [*map(_in_yaml, STACK.recipes()), {"class_path": "ExactResume"}]
    callbacks.append({"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": saves})
    return {
        "seed_everything": 0,
        "model": {"class_path": "tests.conformance.nodes.Digits"},
        "data": {"class_path": "DigitsDataModule", "init_args": {"batch_size": 8}},
        "trainer": {
            "accelerator": "cpu",
            "strategy": "ddp",
            "num_nodes": nodes,
            "devices": 2 // nodes,
            "max_epochs": EPOCHS,
            "limit_train_batches": BATCHES,
            "limit_val_batches": 2,
            "accumulate_grad_batches": 2,
            "enable_model_summary": False,
            "callbacks": callbacks,
        },
    }


def _in_yaml(value: Any) -> Any:
    if isinstance(value, Recipe):
        return {"class_path": type(value).__name__, "init_args": _in_yaml(value.arguments)}
    return [_in_yaml(each) for each in value] if isinstance(value, (list, tuple)) else value


def torchrun(nodes: int, node: int, port: int, *command: str) -> list[str]:
    """The arguments of torchrun on one of the machines."""
    there = ["--node-rank", str(node), "--master-addr", "127.0.0.1", "--master-port", str(port)]
    size = ["--nnodes", str(nodes), "--nproc-per-node", str(2 // nodes)]
    return [*size, *there, "-m", "lightning_recipes.cli", *command]


def _agent(arguments: list[str]) -> None:
    """What torchrun does with its arguments, with a fork of this process for a worker."""
    settings, _, words = config_from_args(parse_args(arguments))
    settings.start_method = "fork"
    elastic_launch(settings, _command)(*words[words.index("lightning_recipes.cli") + 1 :])


def _command(*words: str) -> None:
    sys.exit(cli.main(words))


def on_machines(name: str, folders: Sequence[Path], *more: str) -> dict[str, Any]:
    """Run the command on as many machines as there are folders to run it in; the same one is one disk.

    Returns:
        how each agent ended (its exit status, a negative one for a signal, None for one that had to be stopped), and
        after how many seconds.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began, agents = time.monotonic(), {}
    for node, folder in enumerate(folders):
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            os.chdir(folder)
            out = os.open(f"{name}.node{node}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            status = 0
            try:
                _agent(torchrun(len(folders), node, port, "fit", "--config", "run.yaml", *more))
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", flush=True)
                status = 1
            os._exit(status)
        agents[child] = node
    ended: dict[str, Any] = {"statuses": [None] * len(folders), "seconds": [None] * len(folders)}
    for child, status, seconds in _wait(set(agents), began):
        ended["statuses"][agents[child]], ended["seconds"][agents[child]] = status, seconds
    return ended


def _wait(children: set[int], began: float) -> list[tuple[int, int | None, float]]:
    """Wait for all, and stop with their workers those that take longer than the limit."""
    ended = []
    while children:
        for child in list(children):
            done, status = os.waitpid(child, os.WNOHANG)
            seconds = time.monotonic() - began
            if done:
                ended.append((child, os.waitstatus_to_exitcode(status), seconds))
            elif seconds > LIMIT:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                ended.append((child, None, seconds))
            else:
                continue
            children.discard(child)
        time.sleep(0.02)
    return ended


def main(folder: Path) -> None:
    """All lives."""
    torch.set_num_threads(1)
    os.environ.update(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), GLOO_SOCKET_IFNAME="lo")
    folder = folder.resolve()
    places = {name: folder / name for name in ("whole", "shared", "apart0", "apart1")}
    for name, place in places.items():
        place.mkdir(parents=True)
        (place / "run.yaml").write_text(yaml.safe_dump(config(1 if name == "whole" else 2)))
    loses: dict[str, Any] = {"class_path": "tests.conformance.nodes.LoseMachine"}
    loses["init_args"] = {"rank": 1, "batch": LOST_AT}
    lost = f"--trainer.callbacks+={json.dumps(loses)}"
    last = ("--ckpt_path", "last")
    ended = {"whole": on_machines("whole", [places["whole"]])}
    ended["lost"] = on_machines("lost", [places["shared"]] * 2, lost)
    apart = [places["apart0"], places["apart1"]]
    (places["apart0"] / "checkpoints").mkdir()
    shutil.copy(places["shared"] / "checkpoints" / "last.ckpt", places["apart0"] / "checkpoints" / "last.ckpt")
    ended["apart"] = on_machines("apart", apart, *last)
    ended["resumed"] = on_machines("resumed", [places["shared"]] * 2, *last)
    (folder / "ended.json").write_text(json.dumps(ended))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
