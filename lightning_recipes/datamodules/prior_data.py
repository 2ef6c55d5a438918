"""Data sets drawn from a prior, batch by batch, for a network that learns to predict from a context.

Every batch is a function of (seed, rank, step) alone. So workers change nothing, a run that is killed goes on with the
batch that was next without drawing the earlier ones again, and no two workers, ranks or epochs see the same data sets.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_recipes.core.random import generator
from lightning_recipes.datamodules.base import require
from lightning_recipes.datamodules.priors import Prior, draw

EvalPos = int | Literal["weighted", "uniform"]


def length_probabilities(max_context: int, eval_pos: EvalPos) -> Tensor:
    """How often each context length n = 0 .. max_context - 1 comes, float64 ``[max_context]``.

    'weighted': in proportion to 1 / (max_context - n), so that long contexts come more often; 'uniform': all alike; a
    number: that one always.
    """
    if eval_pos == "weighted":
        weights = 1 / torch.arange(max_context, 0, -1, dtype=torch.float64)
    elif eval_pos == "uniform":
        weights = torch.ones(max_context, dtype=torch.float64)
    else:
        weights = torch.zeros(max(max_context, int(eval_pos) + 1), dtype=torch.float64)
        weights[int(eval_pos)] = 1.0
    return weights / weights.sum()


class PriorBatches(Dataset[dict[str, Any]]):
    """Batch number i: ``x`` float32 [T, B, F], ``y`` float32 [T, B], and the ``n_context`` tokens that are context.

    Args:
        prior: draws the data sets.
        seq_len, batch_size, num_features: T, B and F.
        probabilities: of the context lengths, from 0 on.
        key: what the draws hang on besides i; the context length on all but the last part of it, which is the rank:
            ranks wait for each other, and a long context on one of them would hold up all.
        count: how many there are; None for no end.
    """

    def __init__(
        self,
        prior: Prior,
        seq_len: int,
        batch_size: int,
        num_features: int,
        probabilities: Tensor,
        key: tuple[int | str, ...],
        count: int | None = None,
    ) -> None:
        self.prior, self.seq_len, self.batch_size, self.num_features = prior, seq_len, batch_size, num_features
        self.probabilities, self.key, self.count = probabilities, key, count

    def __len__(self) -> int:
        if self.count is None:
            raise TypeError("batches of a prior do not end")
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        lengths = generator(*self.key[:-1], "n_context", index)
        n_context = int(torch.multinomial(self.probabilities, 1, generator=lengths))
        numbers = generator(*self.key, "data", index)
        x, y = draw(self.prior, self.seq_len, self.batch_size, self.num_features, numbers)
        return {"x": x, "y": y, "n_context": n_context}


class Steps(DistributedSampler):
    """The numbers of an epoch's steps, counted over the whole run. Of this type because Lightning leaves it in place
    under DDP and calls its ``set_epoch``; every rank goes through all of them."""

    def __init__(self, steps: int) -> None:
        super().__init__(range(steps), num_replicas=1, rank=0, shuffle=False)
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[int]:
        first = self.epoch * self.steps  # looked up at the first of them: a loader with workers begins twice
        self.epoch += 1  # where nobody calls set_epoch
        yield from range(first, first + self.steps)


class PriorDataModule(LightningDataModule):
    """Synthesises batches of data sets, dict(x [T, B, F], y [T, B], n_context).

    Training batches never repeat: batch i of a run is a function of (seed, rank, i), whatever the workers. Its context
    length is the same on all ranks, its data sets are not. Validation batches are the same in every epoch.

    Args:
        prior: draws data sets; any subclass of `Prior`.
        num_features: F.
        batch_size: B, data sets in a batch of one process.
        seq_len: T, samples of a data set, context and queries together.
        max_context: T_max; a context has fewer samples than that.
        steps_per_epoch: training batches in what the Trainer calls an epoch.
        eval_pos: how the context length is drawn: "weighted" (longer ones more often), "uniform", or a fixed number.
        val_datasets: data sets of the validation, in whole batches; 0 for no validation.
        num_workers: processes that draw; 0 draws in the training process.
        seed: of everything that is drawn.
    """

    def __init__(
        self,
        prior: Prior,
        num_features: int = 1,
        batch_size: int = 200,
        seq_len: int = 100,
        max_context: int = 90,
        steps_per_epoch: int = 100,
        eval_pos: EvalPos = "weighted",
        val_datasets: int = 1000,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        require(isinstance(prior, Prior), "prior", prior, "a Prior, with sample(n_tokens, batch, num_features, ...)")
        for name, value in (
            ("num_features", num_features),
            ("batch_size", batch_size),
            ("max_context", max_context),
            ("steps_per_epoch", steps_per_epoch),
        ):
            require(value >= 1, name, value, "an integer of at least 1")
        fixed = not isinstance(eval_pos, str)
        require(fixed or eval_pos in ("weighted", "uniform"), "eval_pos", eval_pos, "'weighted', 'uniform' or a number")
        longest = eval_pos if fixed else max_context - 1
        require(not fixed or eval_pos >= 0, "eval_pos", eval_pos, "at least 0")
        require(seq_len > longest, "seq_len", seq_len, f"above {longest}, the longest context, or no query is left")
        require(val_datasets >= 0, "val_datasets", val_datasets, "an integer of at least 0")
        require(num_workers >= 0, "num_workers", num_workers, "an integer of at least 0")
        require(seed >= 0, "seed", seed, "an integer of at least 0")
        self.prior, self.num_features, self.batch_size, self.seq_len = prior, num_features, batch_size, seq_len
        self.max_context, self.steps_per_epoch, self.eval_pos = max_context, steps_per_epoch, eval_pos
        self.val_datasets, self.num_workers, self.seed = val_datasets, num_workers, seed

    def batches(self, stage: str, rank: int = 0, count: int | None = None) -> PriorBatches:
        """Batches by number, of a stage of their own."""
        return PriorBatches(
            self.prior,
            self.seq_len,
            self.batch_size,
            self.num_features,
            length_probabilities(self.max_context, self.eval_pos),
            (self.seed, "PriorDataModule", stage, rank),
            count,
        )

    def train_dataloader(self) -> DataLoader:
        steps = Steps(self.steps_per_epoch)
        rank = 0
        if self.trainer is not None:
            rank = self.trainer.global_rank
            # workers read before Lightning first calls set_epoch: after a resume that would be the wrong place
            steps.set_epoch(self.trainer.fit_loop.epoch_progress.current.processed)
        return self._loader(self.batches("train", rank), sampler=steps)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        return self._evaluation("val")

    def test_dataloader(self) -> DataLoader | list[DataLoader]:
        return self._evaluation("test")

    def _evaluation(self, stage: str) -> DataLoader | list[DataLoader]:
        """The same data sets every time and whatever the ranks, which share them out; other ones in each stage."""
        count = -(-self.val_datasets // self.batch_size)
        return self._loader(self.batches(stage, count=count)) if count else []

    def _loader(self, batches: PriorBatches, **arguments: Any) -> DataLoader:
        # an own generator: a loader draws the seed of its workers, and nothing here hangs on the global state
        own = torch.Generator().manual_seed(self.seed)
        return DataLoader(batches, batch_size=None, num_workers=self.num_workers, generator=own, **arguments)
