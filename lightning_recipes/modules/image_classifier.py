"""The stock image classifier."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_recipes.core.weights import load_weights
from lightning_recipes.modules.cifar_resnet import CifarResNet, cifar_resnet18
from lightning_recipes.modules.classifier import NOT_SAVED, OfImages
from lightning_recipes.modules.deep_mlp import DeepMLP
from lightning_recipes.modules.lightweight_cnn import LightweightCNN
from lightning_recipes.modules.mlp import MLP
from lightning_recipes.modules.preact_resnet import PreActResNet18
from lightning_recipes.modules.sharded import shard
from lightning_recipes.modules.small_cnn import SmallCNN

# Nets that timm does not have, by the name that ``model`` takes.
NETS = {
    "small_cnn": SmallCNN,
    "lightweight_cnn": LightweightCNN,
    "cifar_resnet": CifarResNet,
    "cifar_resnet18": cifar_resnet18,
    "mlp": MLP,
    "preact_resnet18": PreActResNet18,
    "deep_mlp": DeepMLP,
}


def build_net(
    model: str, num_classes: int, in_chans: int = 3, pretrained: bool = False, model_args: dict[str, Any] | None = None
) -> nn.Module:
    """A net by name: one of `NETS`, or any of ``timm.list_models()``; (N,in_chans,H,W) to logits (N,num_classes)."""
    import timm  # only here: importing the recipes imports this file

    arguments = model_args or {}
    if model in NETS:
        if pretrained:
            raise ValueError(f"pretrained=True: model={model!r} has no weights to download; give weights=PATH")
        return NETS[model](num_classes=num_classes, in_chans=in_chans, **arguments)
    if ":" not in model and not timm.is_model(model):
        near = ", ".join(timm.list_models(f"*{model.split('_')[0]}*")[:5])
        hint = f"; timm has {near}, ..." if near else ""
        raise ValueError(f"model={model!r}: must be one of {', '.join(NETS)} or a name in timm.list_models(){hint}")
    return timm.create_model(model, pretrained=pretrained, num_classes=num_classes, in_chans=in_chans, **arguments)


class ImageClassifier(OfImages):
    """Cross-entropy training of any timm model, or of a net of your own, on batches (images (N,C,H,W), labels (N,)).

    Logs train/loss and, for val and test, loss, acc and ece; ``predict_step`` returns probabilities (N,num_classes).

    Args:
        model: a timm name, "small_cnn", "lightweight_cnn", "cifar_resnet", "cifar_resnet18", "mlp", "deep_mlp",
            "preact_resnet18", or a module that maps images to logits.
        num_classes: classes.
        in_chans: channels of the images.
        pretrained: download timm's pretrained weights.
        model_args: further arguments of the net, for example img_size, drop_path_rate, depth.
        optimizer: makes the optimizer from the parameters; None for AdamW at its defaults.
        lr_scheduler: makes the schedule from the optimizer; None for a constant rate.
        lr_interval: "epoch" or "step".
        monitor: what a ReduceLROnPlateau watches.
        weights: a .safetensors, .pt, .pth or .ckpt file to begin from (of the net, read without unpickling code).
        load_head: whether its last Linear layer is loaded too; False for new classes.
        mean: channel means by which the module itself normalises images in [0,1]; given together with ``std``.
        std: channel standard deviations.
    """

    def __init__(
        self,
        model: str | nn.Module = "small_cnn",
        num_classes: int = 10,
        in_chans: int = 3,
        pretrained: bool = False,
        model_args: dict[str, Any] | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        monitor: str = "val/loss",
        weights: str | None = None,
        load_head: bool = True,
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
        own = isinstance(model, nn.Module)
        self.save_hyperparameters(ignore=[*NOT_SAVED, "load_head", *(["model"] if own else [])])
        if own and (pretrained or model_args):
            raise ValueError("pretrained and model_args belong to a model given by name; this one is built already")
        if (mean is None) != (std is None) or (mean is not None and len(mean) != len(std)):
            raise ValueError(f"mean={mean!r}, std={std!r}: must be given together, one number a channel")
        self.net = model if own else build_net(model, num_classes, in_chans, pretrained, model_args)
        if weights is not None:
            load_weights(self.net, weights, load_head)
        # Not in the state dict: they are arguments, and the keys stay those of the net.
        self.register_buffer("mean", None if mean is None else torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", None if std is None else torch.tensor(std).view(-1, 1, 1), persistent=False)

    def configure_model(self) -> None:
        shard(self, self.net)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N,C,H,W) to logits (N,num_classes)."""
        return self.net(images if self.mean is None else (images - self.mean) / self.std)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(images))
        return loss
