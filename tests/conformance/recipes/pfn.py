"""The prior-data fitted network, BayesGapMonitor and InContextPrediction: their card in the conformance tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset

from lightning_recipes.callbacks import BayesGapMonitor, InContextPrediction
from lightning_recipes.core.random import generator
from lightning_recipes.datamodules import LinearPrior, PriorDataModule
from lightning_recipes.modules import PFNModule
from lightning_recipes.modules.pfn import warm_up_cosine
from tests.conformance.misuse import Misuse, argument
from tests.conformance.table import BATCH, SAMPLES, Row

RIDGE = LinearPrior(1.0, 1.0, 0.3, -1.0, 1.0)


class SmallPFN(PFNModule):
    """A prior-data fitted network of some thousand parameters, trained by SGD: Adam makes whole steps of the rounding
    errors that are left where a gradient is 0 in exact arithmetic, as that of a key's bias is."""

    def __init__(self) -> None:
        super().__init__(1, 16, 2, 1, 32, borders=[-4 + 0.8 * i for i in range(11)])

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer, steps = SGD(self.parameters(), 0.05, momentum=0.9), self.trainer.estimated_stepping_batches
        schedule = LambdaLR(optimizer, lambda step: warm_up_cosine(step, 2, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Shared(Dataset[dict[str, Any]]):
    """Batches of data sets, each cut into parts of one size; the context length is that of the whole."""

    def __init__(self, rank: int, world: int, batch: int) -> None:
        self.rank, self.world, self.batch = rank, world, batch

    def __len__(self) -> int:
        return SAMPLES // self.batch

    def __getitem__(self, index: int) -> dict[str, Any]:
        whole, part = divmod(index * self.batch, BATCH)
        x, y = RIDGE.sample(6, BATCH, 1, generator("Shared", whole))
        mine = slice(part + self.rank, part + self.batch, self.world)
        return {"x": x[:, mine], "y": y[:, mine], "n_context": (2, 0, 4, 5)[whole % 4]}


def _loader(rank: int, world: int, batch: int) -> DataLoader:
    return DataLoader(Shared(rank, world, batch), batch_size=None)


def _data() -> PriorDataModule:
    """As many steps as the other rows take, drawn by two workers."""
    return PriorDataModule(RIDGE, 1, 8, 6, 6, steps_per_epoch=7, val_datasets=16, num_workers=2)


def _monitor(**changes: Any) -> BayesGapMonitor:
    return BayesGapMonitor(**{"context_lengths": (0, 2, 5), "datasets": 20, "prior": RIDGE, **changes})


ROWS = [
    Row("pfn", lambda: [_monitor()], monitors=True, module=SmallPFN, loader=_loader, datamodule=_data),
]
MEMBERS = {"InContextPrediction": InContextPrediction}
OTHER = {"BayesGapMonitor": {"seed": 1}}


def misuses() -> list[Misuse]:
    return [
        argument(BayesGapMonitor, r"context_lengths must be ascending .*; got \[2, 1\]", context_lengths=[2, 1]),
        argument(BayesGapMonitor, r"context_lengths must be .* one or more; got \[\]", context_lengths=[]),
        argument(BayesGapMonitor, "datasets must be at least 1; got 0", datasets=0),
        argument(BayesGapMonitor, "queries must be at least 1; got 0", queries=0),
        argument(BayesGapMonitor, r"budget must be None or a positive share, as 0\.1; got 0", budget=0),
        Misuse(
            "BayesGapMonitor",
            "a module that takes no context",
            "measures a PFNModule, which predicts from a context; Classifier is none: leave it out",
            lambda: [_monitor()],
        ),
        Misuse(
            "BayesGapMonitor",
            "a fit without a prior",
            "needs a prior: train on a PriorDataModule, or give prior=",
            lambda: [_monitor(prior=None)],
            SmallPFN,
            lambda: _loader(0, 1, BATCH),
        ),
        argument(InContextPrediction, r"interval must be in \(0, 1\); got 1\.5", interval=1.5),
        argument(InContextPrediction, "chunk_size must be None or at least 1; got 0", chunk_size=0),
        argument(InContextPrediction, r"context must be None or \(x, y\); got 'list'", context=[torch.zeros(2, 1)]),
    ]
