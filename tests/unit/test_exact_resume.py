"""ExactResume over everything that a Lightning run can hold, on plain modules with no other recipe.

Each run is resumed from checkpoints of its own, in this process, with every random state scrambled in between; runs
that are really killed, on one rank and two and with every recipe, are in tests/conformance.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    Subset,
    WeightedRandomSampler,
    get_worker_info,
)
from torchdata.stateful_dataloader import StatefulDataLoader
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lightning_recipes.callbacks import ExactResume
from lightning_recipes.core.errors import RecipeError
from tests.conformance.table import differing

ROOT = Path(__file__).parents[2]


class Noisy(Dataset):
    """Samples that are other ones each time: from all three global generators and one of its own."""

    def __init__(self, size: int = 26) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x, self.y = torch.randn(size, 6, generator=generator), torch.arange(size) % 3
        self.transforms = [{"jitter": np.random.default_rng(3)}, random.Random(4)]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        own = float(self.transforms[0]["jitter"].random()) + self.transforms[1].random()
        noise = torch.rand(6) + random.random() + float(np.random.rand()) + own
        return self.x[index] + 0.1 * noise, self.y[index]


class Stream(IterableDataset):
    """The same without a length, shared out between workers."""

    def __init__(self) -> None:
        self.samples = Noisy()

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        return (self.samples[i] for i in range(first, 24, step))


class Module(pl.LightningModule):
    """Dropout, batch-norm, metrics, averages, hooks, a buffer outside the state dict."""

    def __init__(self, optimizer: Any = torch.optim.AdamW, monitor: bool = True) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))
        self.metrics = MetricCollection({"acc": MulticlassAccuracy(3), "f1": MulticlassF1Score(3)}, prefix="train_")
        self.mean, self.val_acc = MeanMetric(), MulticlassAccuracy(3)
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.make, self.monitor = optimizer, monitor

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = sum(self._loss(part) for part in (batch.values() if isinstance(batch, dict) else [batch]))
        self.mean(loss.detach())
        self.log_dict({"mean": self.mean}, on_step=False, on_epoch=True)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("largest", loss, on_step=False, on_epoch=True, reduce_fx="max")
        return loss

    def _loss(self, batch: Any) -> Tensor:
        x, y = batch
        logits = self.net(x)
        self.metrics.update(logits, y)
        return F.cross_entropy(logits, y)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            self.seen += outputs["loss"]
            self.net[0].bias.add_(1e-3 * torch.rand(()))  # a hook that trains: it must run once a batch

    def on_train_epoch_end(self) -> None:
        self.log_dict(self.metrics.compute())
        self.metrics.reset()
        with torch.no_grad():
            self.net[4].bias.add_(1e-3 * torch.rand(3, device=self.device))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        logits = self.net(x)
        self.val_acc(logits, y)
        self.log("val_acc", self.val_acc)
        self.log("val_loss", F.cross_entropy(logits, y) + torch.rand(()))

    def on_validation_end(self) -> None:
        with torch.no_grad():
            self.net[4].bias.add_(1e-3 * torch.rand(3, device=self.device))

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.parameters(), lr=1e-2)
        if not self.monitor:
            steps = int(self.trainer.estimated_stepping_batches)  # builds the loader before the loops are restored
            step = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
            return [optimizer], [{"scheduler": step, "interval": "step"}]
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.7)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}


class Manual(Module):
    """Manual optimization that accumulates over two batches by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        if batch_idx % 2:
            self.optimizers().step()
            self.optimizers().zero_grad()
        return loss.detach()


class EveryBatch(Checkpoint):
    """Saves after every batch, in the middle of an accumulation window too."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        batches = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        trainer.save_checkpoint(self.folder / f"{batches:03}.ckpt")


def scramble(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def loader(data: Dataset | None = None, **settings: Any) -> DataLoader:
    return DataLoader(Noisy() if data is None else data, **{"batch_size": 4, "shuffle": True, **settings})


def fit(
    callbacks: list[pl.Callback],
    ckpt: Path | None = None,
    module: Callable[[], pl.LightningModule] = Module,
    data: Callable[[], Any] = loader,
    validation: Callable[[], Any] | None = lambda: DataLoader(Noisy(8), 4),
    **trainer: Any,
) -> dict[str, Any]:
    """One run; all that it ends with."""
    scramble(7 if ckpt is None else random.randrange(2**30))
    module, data = module(), data()
    settings = {
        "max_epochs": 3,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(each, Checkpoint) for each in callbacks),
        **trainer,
    }
    run = pl.Trainer(callbacks=callbacks, **settings)
    run.fit(module, data, validation() if validation else None, ckpt_path=None if ckpt is None else str(ckpt))
    return {
        "weights": {name: value.clone() for name, value in module.state_dict().items()},
        "seen": module.seen,
        "optimizers": [each.state_dict() for each in run.optimizers],
        "schedulers": [each.scheduler.state_dict() for each in run.lr_scheduler_configs],
        "metrics": dict(run.callback_metrics),
        "logged": dict(run.logged_metrics),
        "shown": dict(run.progress_bar_metrics),
        "callbacks": {
            each.state_key: each.state_dict() for each in callbacks if not isinstance(each, (ExactResume, Checkpoint))
        },
        "random": [torch.get_rng_state(), list(random.getstate()), list(np.random.get_state()[1])],
        "progress": [run.current_epoch, run.global_step, run.fit_loop.epoch_loop._batches_that_stepped],
    }


def assert_resumes(folder: Path, saves: Callable[[Path], Checkpoint] = EveryBatch, few: int = 6, **run: Any) -> None:
    """Resume from the run's checkpoints, up to so many of them, and end the same each time; ExactResume itself changes
    nothing."""
    others = run.pop("callbacks", list)
    plain = fit(others(), **run)
    whole = fit([*others(), ExactResume(), saves(folder)], **run)
    assert differing(plain, whole) == []
    found = sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    assert found
    for path in found[:: max(1, len(found) // few)] + found[-1:]:
        torch.load(path, weights_only=True)
        resumed = fit([*others(), ExactResume(), saves(folder / "again")], ckpt=path, **run)
        assert differing(whole, resumed) == [], path.name


class LazySampler(Sampler[int]):
    """Draws from the global generator at every index, as a hand-written balanced sampler does."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[int]:
        return (random.randrange(self.size) if i % 2 else int(torch.randint(self.size, ())) for i in range(self.size))

    def __len__(self) -> int:
        return self.size


class OwnSampler(Sampler[int]):
    """Keeps a generator and an epoch of its own, and draws when an iteration begins."""

    def __init__(self, size: int) -> None:
        self.size, self.random, self.round = size, np.random.RandomState(5), 0

    def __iter__(self) -> Iterator[int]:
        self.round += 1
        return iter((self.random.permutation(self.size) + self.round).__mod__(self.size).tolist())

    def __len__(self) -> int:
        return self.size


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def draws(size: int = 26) -> BatchSampler:
    return BatchSampler(WeightedRandomSampler(torch.linspace(0.1, 1, size), size), 4, drop_last=True)


class OwnClass(DataLoader):
    """Of whose workings nobody knows anything."""


class OwnState:
    """A sized loader that knows its place, in data that depend on nothing else."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(2)
        self.batches = [(torch.randn(4, 6, generator=generator), torch.arange(4) % 3) for _ in range(7)]
        self.place = 0

    def __len__(self) -> int:
        return 7

    def __iter__(self) -> Iterator[Any]:
        while self.place < 7:
            self.place += 1
            yield self.batches[self.place - 1]
        self.place = 0

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


LOADERS: dict[str, Callable[[], Any]] = {
    "shuffled": loader,
    "in order": lambda: loader(shuffle=False),
    "generator": lambda: loader(generator=generator()),
    "workers": lambda: loader(num_workers=2),
    "persistent workers": lambda: loader(num_workers=2, persistent_workers=True, generator=generator()),
    "lazy sampler": lambda: loader(shuffle=False, sampler=LazySampler(26)),
    "lazy sampler and workers": lambda: loader(shuffle=False, sampler=LazySampler(26), num_workers=2),
    "own sampler": lambda: loader(shuffle=False, sampler=OwnSampler(26), num_workers=1),
    "batch sampler": lambda: DataLoader(Noisy(), batch_sampler=draws()),
    "subset": lambda: loader(Subset(Noisy(), range(2, 22)), num_workers=1),
    "torchdata's and workers": lambda: StatefulDataLoader(Noisy(), 4, shuffle=True, num_workers=2),
    "a class of its own": lambda: OwnClass(Noisy(), 4, shuffle=True, num_workers=1),
    "a state of its own": OwnState,
    "two at once": lambda: {"a": loader(), "b": loader(Noisy(10), num_workers=1)},
    "two, the longer": lambda: CombinedLoader({"a": loader(), "b": loader(Noisy(10))}, "max_size_cycle"),
    "a stream": lambda: loader(Stream(), shuffle=False),
    "a stream and workers": lambda: loader(Stream(), shuffle=False, num_workers=2),
}


@pytest.mark.parametrize("name", LOADERS)
def test_the_place_in_the_data_is_kept(name: str, tmp_path: Path) -> None:
    assert_resumes(tmp_path, data=LOADERS[name], few=4 if "workers" in name else 7)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_that_is_validated_on_too(workers: int, tmp_path: Path) -> None:
    made: list[DataLoader] = []

    def data() -> DataLoader:
        made.append(loader(num_workers=workers))
        return made[-1]

    assert_resumes(tmp_path, data=data, validation=lambda: made[-1], val_check_interval=3, few=4)


SETTINGS: dict[str, dict[str, Any]] = {
    "a window under way": {"accumulate_grad_batches": 3},
    "validation in mid-epoch": {"val_check_interval": 3},
    "validation over epochs": {"val_check_interval": 5, "check_val_every_n_epoch": None},
    "every second epoch": {"check_val_every_n_epoch": 2, "module": lambda: Module(monitor=False)},
    "no validation": {"validation": None, "module": lambda: Module(monitor=False)},
    "steps": {"max_epochs": -1, "max_steps": 17},
    "few batches": {"limit_train_batches": 4, "data": LOADERS["persistent workers"]},
    "a schedule of all steps": {"module": lambda: Module(monitor=False), "data": LOADERS["workers"]},
    "manual optimization": {"module": Manual},
    "reloaded": {"reload_dataloaders_every_n_epochs": 2},
    "momentum in bf16": {"module": lambda: Module(torch.optim.SGD), "precision": "bf16-mixed"},
    "early stopping": {"callbacks": lambda: [EarlyStopping("val_loss", patience=0)], "max_epochs": 6},
    "early stopping on the training loss": {
        "callbacks": lambda: [EarlyStopping("loss_epoch", patience=0, min_delta=0.1)],
        "max_epochs": 6,
    },
}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_the_random_state_of_a_device_is_kept(precision: str, tmp_path: Path) -> None:
    data = lambda: loader(num_workers=2, pin_memory=True)  # noqa: E731
    assert_resumes(tmp_path, accelerator="gpu", devices=1, precision=precision, data=data, accumulate_grad_batches=2)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_place_in_the_run_is_kept(name: str, tmp_path: Path) -> None:
    assert_resumes(tmp_path, **SETTINGS[name])


SAVES: dict[str, Callable[[Path], Checkpoint]] = {
    "steps": lambda folder: ModelCheckpoint(folder, save_top_k=-1, every_n_train_steps=2),
    "validations": lambda folder: ModelCheckpoint(folder, save_top_k=-1, monitor="val_loss"),
    "epochs": lambda folder: ModelCheckpoint(folder, save_top_k=-1, save_on_train_epoch_end=True),
    "the best two and the last": lambda folder: ModelCheckpoint(
        folder, save_top_k=2, monitor="val_loss", save_last=True, every_n_train_steps=3
    ),
}


@pytest.mark.parametrize("name", SAVES)
def test_wherever_lightning_saves(name: str, tmp_path: Path) -> None:
    assert_resumes(tmp_path, SAVES[name], val_check_interval=4)


def test_the_cut_off_epoch_is_finished(tmp_path: Path) -> None:
    """From the checkpoint after an epoch's last step: its validation, its hooks, its schedulers, in order and once."""

    class Diary(pl.Callback):
        def __init__(self) -> None:
            self.lines: list[Any] = []

        def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            self.lines.append(("validated", trainer.current_epoch, trainer.global_step))

        def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            self.lines.append(("ended", trainer.current_epoch, trainer.global_step))

        def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            self.lines.append(("began", trainer.current_epoch, trainer.global_step))

    whole, resumed, without = Diary(), Diary(), Diary()
    fit([whole, ExactResume(), EveryBatch(tmp_path)], num_sanity_val_steps=0)
    fit([resumed, ExactResume()], ckpt=tmp_path / "014.ckpt")
    assert resumed.lines == [line for line in whole.lines if line[2] >= 14 and line != ("began", 1, 7)]
    assert resumed.lines[:2] == [("validated", 1, 14), ("ended", 1, 14)]
    fit([without], ckpt=tmp_path / "014.ckpt")
    assert ("validated", 1, 14) not in without.lines, "Lightning alone leaves the validation out: the contrast"


def test_without_it_a_resume_differs_and_a_recipe_says_what_will(tmp_path: Path) -> None:
    from lightning_recipes.callbacks import ProgressiveUnfreezing

    recipe = [lambda: ProgressiveUnfreezing(at=(0, 1), lr_scale=(1.0, 0.5))]
    whole = fit([recipe[0](), EveryBatch(tmp_path)])
    with pytest.warns(
        UserWarning, match="middle of epoch 1, after 2 batches.*begin again with their first.*ExactResume"
    ):
        assert differing(whole, fit([recipe[0]()], ckpt=tmp_path / "009.ckpt"))
    with pytest.warns(UserWarning, match="after 7 batches.*the epoch's validation, its epoch-end hooks and plateau"):
        fit([recipe[0]()], ckpt=tmp_path / "014.ckpt")
    with pytest.warns(UserWarning, match="middle of epoch 1, after 2 batches"):  # written without it
        fit([ExactResume()], ckpt=tmp_path / "009.ckpt")


def test_at_the_end_of_an_epoch_there_is_nothing_to_warn_of(tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    fit([ExactResume(), saves])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit([ExactResume()], ckpt=tmp_path / "epoch=1.ckpt")
    assert not [str(each.message) for each in told if "resume" in str(each.message).lower()]


# -- what cannot be exact --------------------------------------------------------------------------------------------


class SavesAt(pl.Callback):
    """A user's callback that saves in the middle of things."""

    def __init__(self, hook: str, path: Path) -> None:
        setattr(self, hook, lambda trainer, *rest: trainer.save_checkpoint(path))


class Averages(pl.Callback):
    """A user's callback that needs its batch."""

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        self.last = batch[0].mean()


@pytest.mark.parametrize("hook", ["on_before_optimizer_step", "on_train_batch_start", "on_validation_start"])
def test_a_checkpoint_in_the_middle_of_a_step_says_so(hook: str, tmp_path: Path) -> None:
    path = tmp_path / "middle.ckpt"
    with pytest.warns(UserWarning, match=f"will not be exact: it was taken in {hook}"):
        fit([ExactResume(), SavesAt(hook, path)])
    with pytest.warns(UserWarning, match=f"this resume is not exact: .* taken in {hook}"):
        fit([ExactResume()], ckpt=path, max_epochs=4)


def test_a_checkpoint_before_others_saw_the_batch_names_them(tmp_path: Path) -> None:
    class Early(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            trainer.save_checkpoint(tmp_path / "early.ckpt")

    with pytest.warns(UserWarning, match="taken before Averages and Module had seen the batch"):
        fit([ExactResume(), Early(), Averages()])
    with pytest.warns(UserWarning, match="taken in on_train_batch_end by a function"):
        fit([ExactResume(), SavesAt("on_train_batch_end", tmp_path / "early.ckpt")])


def test_an_error_in_mid_step_leaves_a_checkpoint_that_says_so(tmp_path: Path) -> None:
    class Breaks(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.global_step == 9:
                raise RuntimeError("out of luck")
            return super().training_step(batch, batch_idx)

    with (
        pytest.warns(UserWarning, match="will not be exact: it was taken in on_exception"),
        pytest.raises(RuntimeError, match="out of luck"),
    ):
        fit([ExactResume(), OnExceptionCheckpoint(tmp_path)], module=Breaks)
    assert (tmp_path / "on_exception.ckpt").exists()


@pytest.mark.parametrize("batch", [3, 7, 9])
def test_a_sigterm_leaves_an_exact_checkpoint(batch: int, tmp_path: Path) -> None:
    """Preemption: Lightning ends the run at the next boundary and its OnExceptionCheckpoint saves. The exit code says
    that the run is not done."""

    class Preempted(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.fit_loop.epoch_loop.batch_progress.total.ready == batch:
                os.kill(os.getpid(), signal.SIGTERM)

    whole = fit([ExactResume()])
    with warnings.catch_warnings(), pytest.raises(SIGTERMException) as stop:
        warnings.filterwarnings("error", message=".*will not be exact")
        fit([ExactResume(), Preempted(), OnExceptionCheckpoint(tmp_path)])
    assert stop.value.code == 143
    assert differing(whole, fit([ExactResume()], ckpt=tmp_path / "on_exception.ckpt")) == []


# -- bad use ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: loader(num_workers=1), "num_workers is 1, there it was 0"),
        (lambda: loader(batch_size=2), "batches is 13, there it was 7"),
        (lambda: loader(Noisy(27)), "samples is 27, there it was 26"),
        (lambda: {"a": loader(), "b": loader()}, "1 loaders.*here 2"),
    ],
)
def test_other_data_are_refused(data: Callable[[], Any], message: str, tmp_path: Path) -> None:
    fit([ExactResume(), EveryBatch(tmp_path)], max_epochs=1)
    with pytest.raises(RecipeError, match=f"^ExactResume: .*{message}"):
        fit([ExactResume()], ckpt=tmp_path / "003.ckpt", data=data)


def test_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    fit([ExactResume(), EveryBatch(tmp_path)], max_epochs=1)
    checkpoint = torch.load(tmp_path / "003.ckpt", weights_only=True)
    checkpoint["callbacks"]["ExactResume"]["state"]["ranks"] *= 2
    torch.save(checkpoint, tmp_path / "two.ckpt")
    with pytest.raises(RecipeError, match=r"ExactResume: .* written by 2 processes and this run has 1"):
        fit([ExactResume()], ckpt=tmp_path / "two.ckpt")


# -- what it leaves behind -------------------------------------------------------------------------------------------


def test_afterwards_loader_module_and_trainer_are_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PL_SEED_WORKERS", raising=False)  # of an earlier seed_everything: Lightning seeds workers then
    data, module = loader(num_workers=1), Module()
    before = dict(vars(data))
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[ExactResume()],
    )  # fmt: skip
    trainer.fit(module, data, DataLoader(Noisy(8), 4))
    assert type(data) is DataLoader
    assert vars(data).keys() == before.keys()
    changed = [name for name, value in before.items() if vars(data)[name] is not value and name != "_iterator"]
    assert changed == []
    assert "on_train_batch_end" not in vars(module)
    assert not {"save_checkpoint"} & vars(trainer).keys()
    assert not {"run", "_load_combined_loader_states"} & vars(trainer.fit_loop).keys()
    assert len(list(data)) == 7


def test_a_checkpoint_with_it_resumes_without_it(tmp_path: Path) -> None:
    fit([ExactResume(), EveryBatch(tmp_path)], data=LOADERS["workers"])
    fit([], ckpt=tmp_path / "009.ckpt", data=LOADERS["workers"])


def test_a_finished_run_can_be_continued(tmp_path: Path) -> None:
    """With more epochs: the first ones are those of a run that was planned so from the start."""
    whole = fit([ExactResume()], max_epochs=4)
    fit([ExactResume(), ModelCheckpoint(tmp_path, "{epoch}", save_on_train_epoch_end=True)], max_epochs=2)
    assert differing(whole, fit([ExactResume()], ckpt=tmp_path / "epoch=1.ckpt", max_epochs=4)) == []
    assert fit([ExactResume()], ckpt=tmp_path / "epoch=1.ckpt", max_epochs=2)["progress"][:2] == [2, 14]


@pytest.mark.ddp
def test_killed_and_resumed_by_the_command_line(tmp_path: Path) -> None:
    """README's way: the same command, with --ckpt_path last, before the kill and after it."""
    config = (ROOT / "configs/recipes/exact_resume.yaml").read_text()
    (tmp_path / "often.yaml").write_text(config.replace("every_n_train_steps: 100", "every_n_train_steps: 5"))
    command = [sys.executable, "-m", "lightning_recipes.cli", "fit", "--config", "base/digits_cnn.yaml"]
    command += ["--config", str(tmp_path / "often.yaml"), "--trainer.max_epochs", "2", "--trainer.accelerator", "cpu"]
    command += ["--trainer.enable_progress_bar", "false", "--seed_everything", "3", "--ckpt_path", "last"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def run(folder: Path) -> subprocess.Popen:
        folder.mkdir(exist_ok=True)
        return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)

    whole, killed = run(tmp_path / "whole"), run(tmp_path / "killed")
    while killed.poll() is None and not list((tmp_path / "killed").rglob("last.ckpt")):
        time.sleep(0.01)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    again = run(tmp_path / "killed")
    for process in (whole, again):
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
    ends = []
    for folder in ("whole", "killed"):
        saved = torch.load(tmp_path / folder / "checkpoints" / "last.ckpt", weights_only=True)
        assert saved["global_step"] > 30
        ends.append({key: saved[key] for key in ("state_dict", "optimizer_states", "global_step")})
    assert differing(*ends) == []
