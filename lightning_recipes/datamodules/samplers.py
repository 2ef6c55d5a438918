"""Orders of training samples that are functions of (seed, epoch): the same after a resume and split alike over ranks.

Both are ``DistributedSampler``s, also on one process, because that is the type which Lightning leaves in place under
DDP (any other sampler or batch sampler it replaces or builds again), and whose ``set_epoch`` it calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Dataset, DistributedSampler

from lightning_recipes.datamodules.splits import keyed_permutation


class EpochShuffle(DistributedSampler):
    """A new permutation every epoch, rank r taking every world-size-th index from r on.

    So W ranks with batch size b see together, step by step, what one process sees with batch size W*b.
    Where nobody calls ``set_epoch`` (a loop without a Trainer) it moves on to the next epoch by itself.
    """

    def __iter__(self) -> Iterator[int]:
        order = list(super().__iter__())
        self.epoch += 1
        return iter(order)


class DomainBalancedSampler(DistributedSampler):
    """``per_domain`` samples of every domain in turn, so that fixed chunks of it are balanced batches.

    With ``batch_size = per_domain * number of domains`` a batch is [domain 0, domain 1, ...], each ``per_domain`` long.
    Of the ``world_size * per_domain`` samples that a step takes from a domain each rank takes its own block, hence no
    sample stands on two ranks and W ranks with ``per_domain = p`` see what one process sees with ``W * p``.

    Args:
        dataset: the data set that the indices belong to.
        domains: for each domain the indices of its samples.
        per_domain: samples of a domain in a batch of one process.
        steps: batches in an epoch; None for one pass over the largest domain (smaller ones are shuffled anew and go
            round again).
    """

    def __init__(
        self,
        dataset: Dataset,
        domains: Sequence[np.ndarray],
        per_domain: int,
        steps: int | None = None,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, seed=seed)
        self.domains = [np.asarray(index) for index in domains]
        self.per_domain = per_domain
        self.block = per_domain * num_replicas
        smallest = min(len(index) for index in self.domains)
        if self.block > smallest:
            raise ValueError(
                f"per_domain={per_domain} on {num_replicas} process(es) takes {self.block} images of each training "
                f"domain a step, but the smallest has {smallest}; per_domain may be at most {smallest // num_replicas}"
            )
        self.steps = max(len(index) for index in self.domains) // self.block if steps is None else steps

    def __len__(self) -> int:
        return self.steps * self.per_domain * len(self.domains)

    def __iter__(self) -> Iterator[int]:
        streams = [self._stream(d) for d in range(len(self.domains))]
        start = self.rank * self.per_domain
        order: list[int] = []
        for step in range(self.steps):
            low = step * self.block + start
            for stream in streams:
                order.extend(stream[low : low + self.per_domain].tolist())
        self.epoch += 1
        return iter(order)

    def _stream(self, domain: int) -> np.ndarray:
        """All samples that this epoch takes from a domain, over all ranks; no sample twice within one step."""
        index, need = self.domains[domain], self.steps * self.block
        # A pass over the domain ends with its last full block, so that no block straddles two permutations.
        a_pass = len(index) // self.block * self.block
        passes = [
            index[keyed_permutation(len(index), self.seed, "domain", self.epoch, domain, p)[:a_pass]]
            for p in range(-(-need // a_pass))
        ]
        return np.concatenate(passes)[:need]
