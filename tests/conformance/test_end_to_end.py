"""The recipes with the package's own modules and data, as a user would put them together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_recipes.callbacks import GLAD, PEGO
from lightning_recipes.datamodules import DigitsDataModule, DomainDataModule, FewShotDataModule
from lightning_recipes.modules import BaseToNovelAccuracy, ImageClassifier

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
ROOT = Path(__file__).parents[2]


def quiet(**settings: Any) -> pl.Trainer:
    off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(accelerator="cpu", **off, **settings)


@pytest.mark.skipif(
    not os.environ.get("LIGHTNING_RECIPES_DATA"), reason="needs the PACS images of LIGHTNING_RECIPES_DATA"
)
def test_pego_leaves_one_domain_of_pacs_out() -> None:
    data = DomainDataModule(
        os.path.join(os.environ["LIGHTNING_RECIPES_DATA"], "pacs64_subset.npz"), "sketch", size=32, per_domain=8
    )
    module = ImageClassifier("vit_tiny_patch16_224", num_classes=6, model_args=VIT)
    keys = list(module.state_dict())
    start = {name: value.clone() for name, value in module.state_dict().items()}
    trainer = quiet(max_epochs=1, limit_train_batches=20, callbacks=[PEGO(rank=2, groups=2, weight=1e-4)])
    trainer.fit(module, data)
    assert {"pego/preserve", "pego/diversify", "pego/overlap_with_w", "val/acc"} <= trainer.callback_metrics.keys()
    assert data.train_domains == ["art_painting", "cartoon", "photo"]
    assert list(module.state_dict()) == keys
    moved = [name for name, value in module.state_dict().items() if not torch.equal(value, start[name])]
    assert all("attn.qkv.weight" in name or name.startswith(("net.head", "metrics")) for name in moved), moved
    (tested,) = quiet().test(module, data, verbose=False)
    assert 0 <= tested["test/acc"] <= 1


def test_a_checkpoint_with_adapters_is_tested_alone(tmp_path: Path) -> None:
    """`test` with a checkpoint builds the adapters from it, and gives the figures of the module that was trained."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    arguments = {"in_chans": 1, "model_args": {**VIT, "img_size": 16, "patch_size": 4}}
    data = DigitsDataModule(size=16, fraction=0.2)
    trained = ImageClassifier("vit_tiny_patch16_224", **arguments)
    keep = ModelCheckpoint(tmp_path, "last", save_last=False, every_n_epochs=1)
    off = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    fit = pl.Trainer(accelerator="cpu", max_epochs=2, callbacks=[PEGO(2, 3), keep], **off)
    fit.fit(trained, data)
    (in_memory,) = quiet().test(trained, data, verbose=False)

    fresh = ImageClassifier("vit_tiny_patch16_224", **arguments)
    keys = list(fresh.state_dict())
    (from_file,) = quiet(callbacks=[PEGO(2, 3)]).test(fresh, data, ckpt_path=str(tmp_path / "last.ckpt"), verbose=False)
    assert from_file["test/acc"] == pytest.approx(in_memory["test/acc"], abs=1e-6)
    assert from_file["test/loss"] == pytest.approx(in_memory["test/loss"], abs=1e-5)
    assert list(fresh.state_dict()) == keys, "merged again afterwards"


def test_glad_from_base_to_novel_classes() -> None:
    data = FewShotDataModule(DigitsDataModule(size=16), shots=4, batch_size=10)
    model_args = {**VIT, "img_size": 16, "patch_size": 4}
    module = ImageClassifier("vit_tiny_patch16_224", in_chans=1, model_args=model_args)
    trainer = quiet(max_epochs=2, callbacks=[GLAD(rank=2)])
    trainer.fit(module, data)
    assert "glad/cosine" in trainer.callback_metrics
    score = BaseToNovelAccuracy(10, data.num_base)
    module.eval()
    with torch.no_grad():
        for loader in data.test_dataloader():
            for images, labels in loader:
                score.update(module(images), labels)
    found = score.compute()
    base, novel, harmonic = (float(found[name]) for name in ("base", "novel", "harmonic_mean"))
    assert harmonic == pytest.approx(2 * base * novel / (base + novel))


@pytest.mark.ddp
def test_the_command_line_on_two_processes(tmp_path: Path) -> None:
    """README's way onto several devices."""
    command = [sys.executable, "-m", "lightning_recipes.cli", "fit", "--config", "base/digits_cnn.yaml"]
    command += ["--config", "recipes/progressive_unfreezing.yaml", "--config", "recipes/aaer.yaml"]
    command += ["--trainer.strategy", "ddp", "--trainer.devices", "2", "--trainer.accelerator", "cpu"]
    command += ["--trainer.max_epochs", "2", "--trainer.limit_train_batches", "3", "--trainer.limit_val_batches", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    (saved,) = tmp_path.rglob("*.ckpt")
    callbacks = torch.load(saved, weights_only=True)["callbacks"]
    assert callbacks["ProgressiveUnfreezing"]["state"]["stage"] >= 1
    assert {"AAER", "ProgressiveUnfreezing"} <= callbacks.keys()
