"""A row of the table of recipes that every guarantee is checked over, and the modules that the rows train.

The rows themselves stand in ``recipes/``, one file a card.

The modules are written as an outsider would: they know nothing of recipes. :class:`Classifier` on data in a fixed order
has no batch-norm and no dropout, so that two ranks can be held against one process on the same global batches.
:class:`Lively` on shuffled data has everything that a resume can lose.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import numpy as np
import timm
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BaseFinetuning, Callback
from sklearn.datasets import load_digits
from timm.layers import HybridEmbed
from torch import nn
from torch.utils.data import DataLoader, Sampler, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

EPOCHS, BATCH, SAMPLES = 4, 16, 64


class ConvNet(nn.Sequential):
    """Three layers for 8x8 grey images."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__(
            nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8) if norm else nn.Identity(), nn.ReLU()),
            nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU()),
            nn.Sequential(nn.Flatten(), nn.Linear(256, 16), nn.ReLU()),
            nn.Linear(16, 10),
        )


def small_vit() -> nn.Module:
    """A two-block vision transformer for 8x8 grey images."""
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, in_chans=1, num_classes=10
    )


class ResidualStem(nn.Module):
    """A residual block of two convolutions on 8x8 grey images, without batch norm."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(self.conv1(x).relu())


def small_hybrid() -> nn.Module:
    """:func:`small_vit` on the feature maps of a residual block: whatever attaches to that attaches to this too."""
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=8,
        patch_size=4,
        embed_dim=16,
        depth=2,
        num_heads=2,
        in_chans=1,
        num_classes=10,
        embed_layer=functools.partial(HybridEmbed, backbone=ResidualStem()),
    )


class SmallResNet(nn.Module):
    """Two residual blocks with batch norm for 8x8 grey images, the second one halved."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(NormedBlock(1, 8, 1), NormedBlock(8, 16, 2))
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(x).mean((2, 3)))


class NormedBlock(nn.Module):
    """conv, norm, ReLU, conv, norm, plus a 1x1 convolution, ReLU."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, width, 3, stride, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width)
        self.shortcut = nn.Conv2d(before, width, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class Classifier(pl.LightningModule):
    """A stock image classifier."""

    def __init__(self, network: nn.Module, optimizer: str = "sgd") -> None:
        super().__init__()
        self.network, self.optimizer = network, optimizer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        if self.optimizer == "plain":
            return torch.optim.SGD(self.parameters(), lr=0.05)
        if self.optimizer == "adamw":
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        else:
            parameters = self.parameters()
            if self.optimizer == "filter":  # what Lightning's BaseFinetuning asks for
                parameters = (p for p in parameters if p.requires_grad)
            optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class Lively(Classifier):
    """A stock classifier with all that a resume can lose: random augmentation, dropout, running statistics, averages
    and metrics over an epoch, a scheduler that waits for the validation, hooks of its own.
    """

    def __init__(self, network: nn.Module, optimizer: str = "sgd") -> None:
        super().__init__(network, optimizer)
        self.norm = nn.BatchNorm2d(1, affine=False)
        self.accuracy = MulticlassAccuracy(10)
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        x = x + 0.02 * torch.rand_like(x) * (1 + random.random() + float(np.random.rand()))
        logits = self(F.dropout(self.norm(x), 0.1, self.training))
        loss = F.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen += batch[0].sum() + outputs["loss"]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(self.norm(x)), y) * torch.rand(()))

    def configure_optimizers(self) -> Any:
        made = super().configure_optimizers()
        if self.optimizer == "plain":
            return made
        optimizer = made["optimizer"]
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}


class LightningsOwn(BaseFinetuning):
    """Lightning's own callback doing what ProgressiveUnfreezing does, for contrast."""

    def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
        self.freeze(list(pl_module.network)[:3])

    def finetune_function(self, pl_module: pl.LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(list(pl_module.network)[:3], optimizer, initial_denom_lr=1.0)


def first_digits(samples: int) -> TensorDataset:
    """The first digits, in their order."""
    data = load_digits()
    x = torch.tensor(data.images[:samples], dtype=torch.float32)[:, None] / 16
    return TensorDataset(x, torch.tensor(data.target[:samples]))


@dataclass(frozen=True, eq=False)
class Row:
    """One recipe in one setting, or a stack of several.

    Attributes:
        name: of the row.
        recipes: makes fresh callbacks.
        neutral: makes them at their neutral setting; None where the baseline is another one (adapters: plain peft).
        monitors: whether it changes nothing at any setting.
        network: makes the network.
        optimizer: 'sgd', 'adamw', 'filter' (sgd over what requires a gradient), or 'plain' (sgd without momentum, decay
            or a scheduler).
        batch_norm: whether there is a batch norm, in the network or put into it: each rank has statistics of its own,
            so two ranks are not one process, and running statistics are no parameters.
        couples: whether the loss of a sample depends on its batch, so that micro-batches are not one large batch.
        trainer: further Trainer arguments.
        keeps: takes off what the recipe leaves in the module by documented choice; None where it leaves nothing.
        data: makes the training data from a number of samples; a row that trains on a part of its data at a time has
            as many in each part.
        validation: whether it needs validation data.
        module: makes the module, for a recipe of one kind of module only; None for a classifier of `network`.
        loader: makes its training batches, from the rank, the number of ranks and the size of a batch of all of them.
        datamodule: makes its data with a validation, for runs that are killed.
    """

    name: str
    recipes: Callable[[], list[Callback]]
    neutral: Callable[[], list[Callback]] | None = None
    network: Callable[[], nn.Module] = ConvNet
    optimizer: str = "sgd"
    batch_norm: bool = False
    couples: bool = False
    monitors: bool = False
    trainer: dict[str, Any] = field(default_factory=dict)
    keeps: Callable[[pl.LightningModule], None] | None = None
    data: Callable[[int], TensorDataset] = first_digits
    validation: bool = False
    module: Callable[[], pl.LightningModule] | None = None
    loader: Callable[[int, int, int], DataLoader] | None = None
    datamodule: Callable[[], pl.LightningDataModule] | None = None


LIGHTNINGS_OWN = Row("lightnings_own", lambda: [LightningsOwn()], optimizer="filter")


class InTurn(Sampler[int]):
    """Deals samples to the ranks in turn, unshuffled, so that two ranks see the global batches of one process."""

    def __init__(self, size: int, rank: int, world: int) -> None:
        self.places = range(rank, size, world)

    def __iter__(self) -> Any:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def digits(
    rank: int = 0,
    world: int = 1,
    batch: int = BATCH,
    samples: int = SAMPLES,
    data: Callable[[int], TensorDataset] = first_digits,
) -> DataLoader:
    """The first digits, in their order; `batch` is that of all ranks together."""
    dataset = data(samples)
    return DataLoader(dataset, batch // world, sampler=InTurn(len(dataset), rank, world))


def stock(row: Row) -> pl.LightningModule:
    """The row's module, the same every time."""
    torch.manual_seed(0)
    return Classifier(row.network(), row.optimizer) if row.module is None else row.module()


def batches(row: Row, rank: int = 0, world: int = 1, batch: int = BATCH) -> DataLoader:
    """The row's training batches, in a fixed order."""
    return digits(rank, world, batch, data=row.data) if row.loader is None else row.loader(rank, world, batch)


def train(
    row: Row,
    callbacks: list[Callback] | None = None,
    *,
    rank: int = 0,
    world: int = 1,
    batch: int = BATCH,
    ckpt_path: str | None = None,
    module: pl.LightningModule | None = None,
    **trainer: Any,
) -> tuple[pl.LightningModule, pl.Trainer]:
    """Train the row's module on its batches; everything seeded."""
    module = stock(row) if module is None else module
    settings = {
        "max_epochs": EPOCHS,
        "accelerator": "cpu",
        "devices": world,
        "strategy": "ddp" if world > 1 else "auto",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        **row.trainer,
        **trainer,
    }
    extra = settings.pop("callbacks", [])
    fit = pl.Trainer(callbacks=[*(row.recipes() if callbacks is None else callbacks), *extra], **settings)
    validation = digits(rank, world, batch, data=row.data) if row.validation else None
    fit.fit(module, batches(row, rank, world, batch), validation, ckpt_path=ckpt_path)
    return module, fit


@functools.cache
def trained(row: Row, accelerator: str = "cpu") -> pl.LightningModule:
    """The row's module as its run leaves it; made once, for the tests that compare with it."""
    return train(row, accelerator=accelerator)[0]


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict, detached."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference of two state dicts, as a share of the tensor's largest entry where that is above 1."""
    assert a.keys() == b.keys()
    pairs = [(a[name].double(), b[name].double()) for name in a if a[name].numel()]
    return max(((x - y).abs().max() / x.abs().max().clamp_min(1)).item() for x, y in pairs)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def differing(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two nested values are not bitwise the same."""
    if isinstance(a, torch.Tensor):
        return [] if isinstance(b, torch.Tensor) and torch.equal(a, b) else [path]
    if isinstance(a, dict):
        if not isinstance(b, dict) or a.keys() != b.keys():
            return [f"{path}: {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [place for key in a for place in differing(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [f"{path}: {len(a)} and {len(b)} of them"]
        return [place for i, (x, y) in enumerate(zip(a, b)) for place in differing(x, y, f"{path}/{i}")]
    return [] if a == b or (a != a and b != b) else [f"{path}: {a} and {b}"]
