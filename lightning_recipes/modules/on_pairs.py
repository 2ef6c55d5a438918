"""What networks that theory speaks of share: one loss of batches (x, y), and what is logged of it."""

from __future__ import annotations

from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn import functional as F


class OnPairs(LightningModule):
    """Trains on batches (x, y) by one loss of ``forward(x)``, the mean squared error unless a subclass has another.

    Logs train/loss and, for val and test, loss and what a subclass's :meth:`measures` adds.
    """

    def loss(self, f: Tensor, y: Tensor) -> Tensor:
        """Of outputs ``[n]`` and targets ``[n]``."""
        return F.mse_loss(f, y)

    def measures(self, f: Tensor, y: Tensor) -> dict[str, Tensor]:
        """More to log of an evaluation batch, by name."""
        return {}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = self.loss(self(x), y)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(x))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("val", *batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("test", *batch)

    def _evaluate(self, stage: str, x: Tensor, y: Tensor) -> None:
        f = self(x)
        values = {"loss": self.loss(f, y), **self.measures(f, y)}
        named = {f"{stage}/{name}": value for name, value in values.items()}
        self.log_dict(named, prog_bar=True, batch_size=len(x), sync_dist=True)

    def predict_step(self, batch: Tensor | tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self(batch if isinstance(batch, Tensor) else batch[0])
