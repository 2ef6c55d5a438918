"""Runs in which each process holds only a part of every weight (FSDP2 by ModelParallelStrategy), for the tests.

``python -m tests.conformance.sharded FOLDER`` is started by the tests. It imports everything, then only forks. The rows
of the table whose recipes all work so are trained by two processes, under DDP and sharded; a run with two of them is
killed and continued; everything that must be refused is tried in one process.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lightning_recipes import cli, trainer_cli  # noqa: F401 - the command imports it: here once for all
from lightning_recipes.callbacks import AAER, PSKD, ExactResume, Mixup
from lightning_recipes.core.distributed import own_part
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.parameters import Claim
from lightning_recipes.core.prepare import Plan
from lightning_recipes.core.recipe import Recipe
from tests.stock import Watch

from .lives import BATCH, SaveAndDie, ended, process
from .recipes import ROWS
from .table import Classifier, ConvNet, Lively, Row, first_digits, train


def shards(row: Row) -> bool:
    """Whether a row is one of a classifier whose recipes all say that they work sharded. Statistics of a batch norm are
    those of rank 0 under DDP and each rank's own here."""
    stock = row.module is None and not row.batch_norm
    return stock and all(isinstance(each, Recipe) and each.works_sharded for each in row.recipes())


SHARDED = [row for row in ROWS if shards(row)]
WHOLE = {type(each).__name__: each for row in ROWS for each in row.recipes() if not getattr(each, "works_sharded", 1)}
"""One of every recipe that does not."""
KILLED_AT = 10  # batches: in the middle of an epoch and of a window


class Shards:
    """What a user writes for FSDP2: each part of the network on its own, and the network around them."""

    network: nn.Module

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            for part in (*self.network.children(), self.network):
                if any(True for _ in part.parameters()):
                    fully_shard(part, mesh=self.device_mesh["data_parallel"])


class ShardedClassifier(Shards, Classifier):
    pass


class ShardedLively(Shards, Lively):
    pass


def over(processes: int) -> ModelParallelStrategy:
    return ModelParallelStrategy(data_parallel_size=processes, tensor_parallel_size=1)


def whole(module: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict with every tensor whole."""
    state = module.state_dict()
    return {name: (v.full_tensor() if isinstance(v, DTensor) else v).detach().clone() for name, v in state.items()}


def here(value: Any) -> Any:
    """A nested value with this process's part of every tensor."""
    if isinstance(value, torch.Tensor):
        return own_part(value).detach().clone()
    if isinstance(value, dict):
        return {key: here(each) for key, each in value.items()}
    return [here(each) for each in value] if isinstance(value, (list, tuple)) else value


def both_ways(folder: Path, rows: list[Row]) -> None:
    """Every row under DDP and sharded, one after the other in the same two processes."""

    def run(rank: int) -> None:
        for row in rows:
            result: dict[str, Any] = {}
            for way in ("ddp", "sharded"):
                torch.manual_seed(0)
                module = ShardedClassifier(row.network(), row.optimizer)
                before = whole(module)
                more = {"strategy": "ddp" if way == "ddp" else over(2), "plugins": LightningEnvironment()}
                try:
                    _, trainer = train(row, module=module, rank=rank, world=2, max_epochs=2, **more)
                except RecipeError as error:
                    result[way] = {"refused": str(error)}
                    continue
                kinds = {isinstance(p, DTensor) for p in module.parameters()}
                result[way] = {
                    "before": before,
                    "after": whole(module),
                    "here": sum(own_part(p).numel() for p in module.parameters()),
                    "sharded": kinds == {True},
                    "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
                    "left": sorted({"training_step", "configure_gradient_clipping"} & module.__dict__.keys()),
                }
            torch.save(result, folder / f"{row.name}.rank{rank}.pt")

    process(run, folder, "both_ways", 2)


def life(callbacks: list[Callback], ckpt: Path | None) -> tuple[pl.LightningModule, pl.Trainer]:
    """A run on shuffled data in windows of two batches, as :func:`tests.conformance.lives.lively` but sharded."""
    pl.seed_everything(0 if ckpt is None else time.time_ns() % 2**32, verbose=False)
    module = ShardedLively(ConvNet())
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        devices=2,
        strategy=over(2),
        plugins=LightningEnvironment(),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(each, SaveAndDie) for each in callbacks),
        accumulate_grad_batches=2,
        callbacks=[ExactResume(), Mixup(0.4, across_ranks=True), AAER(0.1), *callbacks],
    )
    dataset = first_digits(112)
    data = DataLoader(dataset, 8, shuffle=True), DataLoader(dataset, 32)
    trainer.fit(module, *data, ckpt_path=None if ckpt is None else str(ckpt))
    return module, trainer


def killed(folder: Path) -> None:
    """The run uninterrupted, and the same run of which one process dies."""
    path = folder / "checkpoint"

    def run(name: str, die: int | None, ckpt: Path | None) -> Any:
        def of_rank(rank: int) -> None:
            saves = [SaveAndDie(path, die, BATCH if rank else None)] if name == "killed" else []
            result = ended(*life(saves, ckpt))
            torch.save(here(result), folder / f"{name}.rank{rank}.pt")

        return process(of_rank, folder, name, 2)

    run("uninterrupted", None, None)
    for _ in range(3):  # torch's collectives abort a process now and then before it comes to its end here
        shutil.rmtree(path, ignore_errors=True)
        statuses = run("killed", KILLED_AT, None)
        if statuses[1] == -signal.SIGKILL:
            break
        for rank in range(2):
            (folder / f"killed.rank{rank}.error").unlink(missing_ok=True)
    else:
        (folder / "killed.rank1.error").write_text(f"was not killed: {statuses}")
        return
    run("killed", None, path)


class AsksFor(Recipe):
    """Says that it works sharded, and takes hold of one of the sockets that do not.

    Args:
        socket: name of a method of the plan.
    """

    works_sharded = True

    def __init__(self, socket: str) -> None:
        self.socket = socket

    def declare(self, plan: Plan) -> None:
        arguments = {"parameters": (Claim,), "change_parameters": (Claim(),), "after_surgery": (lambda: None,)}
        getattr(plan, self.socket)(*arguments.get(self.socket, (lambda *args: {},)))


SOCKETS = (
    *("edit_gradients", "after_step", "replay_window", "surgery", "write_weights", "after_surgery"),
    *("parameters", "change_parameters", "phases"),
)


def refusals(folder: Path) -> None:
    """What each recipe and each socket says under a strategy that shards; '' where it trains."""

    def said(strategy: ModelParallelStrategy, *callbacks: Callback) -> str:
        module = ShardedClassifier(ConvNet())
        steps: list[int] = []
        watch = Watch(on_train_batch_start=lambda *args: steps.append(1))
        row = Row("refused", lambda: [*callbacks, watch], trainer={"strategy": strategy, "max_epochs": 1})
        try:
            train(row, module=module, plugins=LightningEnvironment())
        except RecipeError as error:
            assert not steps, "before the first step"
            assert "training_step" not in module.__dict__
            return str(error)
        return ""

    def run(rank: int) -> None:
        found = {name: said(over(1), recipe) for name, recipe in WHOLE.items()}
        found |= {socket: said(over(1), AsksFor(socket)) for socket in SOCKETS}
        found["snapshot"] = said(over(1), PSKD(mode="snapshot"))
        (folder / "refused.json").write_text(json.dumps(found))

    os.environ.update(LOCAL_RANK="0", NODE_RANK="0", MASTER_ADDR="127.0.0.1")
    process(run, folder, "refused")

    def tensor_parallel(rank: int) -> None:
        row = Row("tensor", lambda: [AAER(0.1)])
        strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)
        try:
            train(row, module=ShardedClassifier(ConvNet()), rank=rank, world=2, strategy=strategy,
                  plugins=LightningEnvironment())  # fmt: skip
        except RecipeError as error:
            (folder / f"tensor.rank{rank}.txt").write_text(str(error))

    process(tensor_parallel, folder, "tensor", 2)


def by_command(folder: Path) -> None:
    """The command with a config that names the strategy, once with a recipe that works and once with one that does not;
    how it ended, and what kind of weights a sharded checkpoint holds."""
    strategy = {
        "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
        "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1},
    }
    trainer = {"accelerator": "cpu", "devices": 2, "strategy": strategy, "max_epochs": 1, "limit_train_batches": 3}
    trainer |= {"limit_val_batches": 1, "enable_progress_bar": False, "enable_model_summary": False}
    (folder / "sharded.yaml").write_text(json.dumps({"trainer": trainer}))

    def run(rank: int) -> None:
        for name in ("cutmix", "wise_ft"):
            command = ["fit", "--config", "base/digits_vit.yaml", "--config", f"recipes/{name}.yaml"]
            said = io.StringIO()
            with contextlib.redirect_stderr(said):
                status = cli.main([*command, "--config", "sharded.yaml"])
            (folder / f"{name}.rank{rank}.json").write_text(json.dumps({"status": status, "said": said.getvalue()}))

    process(run, folder, "by_command", 2)


def main(folder: Path) -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    both_ways(folder, SHARDED)
    killed(folder)
    refusals(folder)
    by_command(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
