"""What the stock modules share: the optimizer from the config, and the metrics of a classifier."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

# Arguments that do not go into a checkpoint's hyperparameters: callables cannot be read with weights_only=True, and the
# weights that a net began from are in the checkpoint already.
NOT_SAVED = ("optimizer", "lr_scheduler", "weights", "pretrained")


class OptimizedModule(LightningModule):
    """Automatic optimization of all parameters by an optimizer and a schedule that the config names.

    Args:
        optimizer: makes the optimizer from the parameters; None for AdamW at its defaults.
        lr_scheduler: makes the schedule from the optimizer; None for a constant rate.
        lr_interval: whether the schedule steps after an "epoch" or after every optimizer "step". A ReduceLROnPlateau
            steps after an epoch.
        monitor: the logged quantity that a ReduceLROnPlateau watches.
    """

    def __init__(
        self,
        optimizer: OptimizerCallable | None,
        lr_scheduler: LRSchedulerCallable | None,
        lr_interval: Literal["epoch", "step"],
        monitor: str,
    ) -> None:
        super().__init__()
        if lr_interval not in ("epoch", "step"):
            raise ValueError(f"lr_interval={lr_interval!r}: must be 'epoch' or 'step'")
        # no default argument: another class that a config names would get those of its defaults that it takes too
        self._make_optimizer = AdamW if optimizer is None else optimizer
        self._make_lr_scheduler = lr_scheduler
        self.lr_interval = lr_interval
        self.monitor = monitor

    def optimized_parameters(self) -> Any:
        """What the optimizer is made from: parameters, or groups of them."""
        return self.parameters()

    def configure_optimizers(self) -> Any:
        optimizer = self._make_optimizer(self.optimized_parameters())
        if self._make_lr_scheduler is None:
            return optimizer
        scheduler = self._make_lr_scheduler(optimizer)
        plateau = isinstance(scheduler, ReduceLROnPlateau)
        interval = "epoch" if plateau else self.lr_interval
        schedule = {"scheduler": scheduler, "interval": interval}
        if plateau:
            schedule["monitor"] = getattr(scheduler, "monitor", self.monitor)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class Classifier(OptimizedModule):
    """Logs ``val/`` and ``test/`` loss, acc (top-1) and ece (expected calibration error, 15 bins).

    Several evaluation loaders are measured apart, under Lightning's suffix ``/dataloader_idx_N``.
    """

    def __init__(self, num_classes: int, **optimization: Any) -> None:
        super().__init__(**optimization)
        if num_classes < 2:
            raise ValueError(f"num_classes={num_classes}: must be at least 2")
        self.num_classes = num_classes
        self.metrics = nn.ModuleDict({stage: nn.ModuleList([self._new_metrics()]) for stage in ("val", "test")})

    def _new_metrics(self) -> nn.ModuleDict:
        return nn.ModuleDict(
            {
                "acc": MulticlassAccuracy(self.num_classes, average="micro"),
                "ece": MulticlassCalibrationError(self.num_classes, n_bins=15),
            }
        )

    def on_validation_start(self) -> None:
        self._metrics_for("val", len(self.trainer.num_val_batches))

    def on_test_start(self) -> None:
        self._metrics_for("test", len(self.trainer.num_test_batches))

    def _metrics_for(self, stage: str, loaders: int) -> nn.ModuleList:
        of_stage = self.metrics[stage]
        while len(of_stage) < loaders:
            of_stage.append(self._new_metrics().to(self.device))
        return of_stage

    def evaluate(self, stage: Literal["val", "test"], loader: int, logits: Tensor, labels: Tensor) -> None:
        """Logs the loss and the metrics of one batch: logits (N,C) and labels int64 (N,)."""
        logits = logits.float()
        self.log(
            f"{stage}/loss", F.cross_entropy(logits, labels), prog_bar=True, batch_size=len(labels), sync_dist=True
        )
        for name, metric in self._metrics_for(stage, loader + 1)[loader].items():
            metric.update(logits, labels)
            # The name is given since Lightning looks metrics up once only, and a loader may have come later.
            self.log(
                f"{stage}/{name}",
                metric,
                metric_attribute=f"metrics.{stage}.{loader}.{name}",
                prog_bar=name == "acc",
                on_step=False,
                on_epoch=True,
                batch_size=len(labels),
            )


class OfImages(Classifier):
    """A classifier of batches (images, labels) whose ``forward`` takes images to logits (N,num_classes)."""

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        images, labels = batch
        self.evaluate("val", dataloader_idx, self(images), labels)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        images, labels = batch
        self.evaluate("test", dataloader_idx, self(images), labels)

    def predict_step(self, batch: Tensor | tuple[Tensor, ...], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        images = batch if isinstance(batch, Tensor) else batch[0]
        return self(images).softmax(-1)
