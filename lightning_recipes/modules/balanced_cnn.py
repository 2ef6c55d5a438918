"""The 12-layer network with balanced attention, and its training on images.

Vir, "Balanced Multi-Task Attention for Satellite Image Classification: A Systematic Approach to Achieving 97.23%
Accuracy on EuroSAT Without Pre-Training", 2025 (https://arxiv.org/abs/2510.15527; code
https://github.com/virAditya/satellite-image-classification-eurosat, commit a01ffe4).

    stem    conv3x3 -> 64, BN, ReLU, at full size
    block   y = DropBlock(relu(BN(conv3x3(x)))),  y = attention(BN(conv3x3(y))),  out = relu(y + shortcut(x))
    stages  3, 3, 3 and 2 blocks of 64, 128, 256 and 512 channels, halved at the start of all but the first
    head    global mean, dropout 0.5, linear

The twelve layers are the stem and eleven blocks, so there are eleven alphas. With its defaults it has 13,115,813
parameters (the paper says 11.2 million). Convolutions have no bias and start Kaiming-normal (fan out), linear layers
from N(0, 0.01). The released class cannot be built, since its initialiser fills the bias of every linear layer and
those of squeeze and excitation have none; here that is left out.

Of the four it has attention and DropBlock in it; the paper's class weights are the callback ``ClassWeights``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassCohenKappa, MulticlassStatScores

from lightning_recipes.core.recipe import Paper
from lightning_recipes.modules.balanced_attention import BalancedAttention, initialise_
from lightning_recipes.modules.classifier import NOT_SAVED, OfImages
from lightning_recipes.modules.drop_block import DropBlock2d, rates


class BalancedBlock(nn.Module):
    """A residual block whose second convolution is followed by balanced attention.

    Args:
        width_in, width: channels before and after.
        stride: of the first convolution.
        drop_prob, block_size: of DropBlock between the two.
    """

    def __init__(self, width_in: int, width: int, stride: int, drop_prob: float, block_size: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.drop = DropBlock2d(drop_prob, block_size)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.attention = BalancedAttention(width)
        changes = stride != 1 or width_in != width
        conv = nn.Conv2d(width_in, width, 1, stride, bias=False) if changes else None
        self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(width)) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(F.relu(self.bn1(self.conv1(x))))
        y = self.attention(self.bn2(self.conv2(y)))
        return F.relu(y + self.shortcut(x))


class BalancedNet(nn.Module):
    """(N,in_chans,H,W) to logits (N,num_classes); see :class:`BalancedCNN` for the arguments."""

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        widths: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (3, 3, 3, 2),
        drop_prob: float | tuple[float, float] = (0.05, 0.20),
        block_size: int = 7,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        if not widths or len(widths) != len(depths) or min(*widths, *depths) < 1:
            raise ValueError(f"widths={widths!r}, depths={depths!r}: must be one number a stage each, at least 1")
        self.stem = nn.Sequential(nn.Conv2d(in_chans, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]))
        self.stem.append(nn.ReLU())
        stages, width_in = [], widths[0]
        for stage, (width, depth, p) in enumerate(zip(widths, depths, rates(drop_prob, len(widths)), strict=True)):
            blocks = []
            for i in range(depth):
                blocks.append(BalancedBlock(width_in, width, 2 if stage and not i else 1, p, block_size))
                width_in = width
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(widths[-1], num_classes)
        initialise_(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.dropout(self.stages(self.stem(images)).mean((2, 3))))


class BalancedCNN(OfImages):
    """The paper's network, trained by cross-entropy on batches (images (N,C,H,W), labels (N,)).

    Logs ``train/loss`` and, once an epoch, the mean of the blocks' shares of coordinate attention, ``train/alpha``; for
    val and test the loss, acc, ece, Cohen's ``kappa`` and the accuracy within every class, ``val/acc/NAME``, and the
    ``worst_class`` among them (names from the data module, else indices; classes without a sample are left out).
    ``predict_step`` gives probabilities (N,num_classes).

    Args:
        num_classes: classes.
        in_chans: channels of the images.
        widths: channels of every stage.
        depths: blocks of every stage.
        drop_prob: of DropBlock, from the first stage to the last; 0 leaves it out, for the callback ``DropBlock``.
        block_size: of DropBlock, odd.
        dropout: before the linear layer.
        decay_alpha: whether weight decay acts on the alphas' parameters too, as in the paper's code. There it moves
            alpha from 0.62 to the 0.57 that the paper reports without any gradient; by default it does not.
        optimizer: makes the optimizer from the parameters; None for AdamW at its defaults.
        lr_scheduler: makes the schedule from the optimizer; None for a constant rate.
        lr_interval: "epoch" or "step".
        monitor: what a ReduceLROnPlateau watches.
        mean: channel means by which the module itself normalises images in [0,1]; given together with ``std``.
        std: channel standard deviations.

    Raises:
        ValueError: for sizes that fit no network.
    """

    paper = Paper(
        "Balanced Multi-Task Attention for Satellite Image Classification",
        "A. Vir",
        2025,
        "https://arxiv.org/abs/2510.15527",
        "https://github.com/virAditya/satellite-image-classification-eurosat",
    )
    does = "A residual network with spatial and spectral attention in every block, mixed by one learnt scalar each."
    use_when = "You train a small image classifier from scratch, as on satellite images, without pre-trained weights."
    costs = "13.1 million parameters at the defaults; a third of its blocks work at the full size of the image."
    purpose = "modules"

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        widths: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (3, 3, 3, 2),
        drop_prob: float | tuple[float, float] = (0.05, 0.20),
        block_size: int = 7,
        dropout: float = 0.5,
        decay_alpha: bool = False,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        monitor: str = "val/loss",
        mean: list[float] | None = None,
        std: list[float] | None = None,
    ) -> None:
        super().__init__(
            num_classes=num_classes,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            lr_interval=lr_interval,
            monitor=monitor,
        )
        self.save_hyperparameters(ignore=NOT_SAVED)
        if (mean is None) != (std is None) or (mean is not None and len(mean) != len(std)):
            raise ValueError(f"mean={mean!r}, std={std!r}: must be given together, one number a channel")
        self.net = BalancedNet(num_classes, in_chans, widths, depths, drop_prob, block_size, dropout)
        self.decay_alpha = decay_alpha
        self.per_class = nn.ModuleDict({stage: nn.ModuleList() for stage in ("val", "test")})
        self.register_buffer("mean", None if mean is None else torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", None if std is None else torch.tensor(std).view(-1, 1, 1), persistent=False)

    @property
    def alphas(self) -> Tensor:
        """The share of coordinate attention in every block, in order, without gradient."""
        return torch.stack([part.alpha for part in self.modules() if isinstance(part, BalancedAttention)])

    def forward(self, images: Tensor) -> Tensor:
        """Images (N,C,H,W) to logits (N,num_classes)."""
        return self.net(images if self.mean is None else (images - self.mean) / self.std)

    def optimized_parameters(self) -> Any:
        """All parameters, those of the alphas in a group of their own unless they decay like the others."""
        if self.decay_alpha:
            return self.parameters()
        thetas = [part.theta for part in self.modules() if isinstance(part, BalancedAttention)]
        own = {id(theta) for theta in thetas}
        others = [p for p in self.parameters() if id(p) not in own]
        return [{"params": others}, {"params": thetas, "weight_decay": 0.0}]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(images))
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("train/alpha", self.alphas.mean())

    def _new_metrics(self) -> nn.ModuleDict:
        return nn.ModuleDict({**super()._new_metrics(), "kappa": MulticlassCohenKappa(self.num_classes)})

    def evaluate(self, stage: Literal["val", "test"], loader: int, logits: Tensor, labels: Tensor) -> None:
        """Logs what every classifier here does, and kappa; counts for the accuracy within every class."""
        super().evaluate(stage, loader, logits, labels)
        counts = self.per_class[stage]
        while len(counts) <= loader:
            counts.append(MulticlassStatScores(self.num_classes, average=None).to(self.device))
        counts[loader].update(logits, labels)

    def on_validation_epoch_end(self) -> None:
        self._log_classes("val")

    def on_test_epoch_end(self) -> None:
        self._log_classes("test")

    def _log_classes(self, stage: str) -> None:
        names = getattr(self.trainer.datamodule, "class_names", None) or range(self.num_classes)
        counts = self.per_class[stage]
        for loader, metric in enumerate(counts):
            suffix = f"/dataloader_idx_{loader}" if len(counts) > 1 else ""
            right, _, _, _, support = metric.compute().T  # of all ranks
            metric.reset()
            accuracy = {f"{stage}/acc/{name}": a / n for name, a, n in zip(names, right, support, strict=True) if n}
            accuracy[f"{stage}/worst_class"] = torch.stack(list(accuracy.values())).min()
            self.log_dict({name + suffix: value for name, value in accuracy.items()}, add_dataloader_idx=False)
