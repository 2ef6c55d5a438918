"""Looking at the data from within a fit: every sample once, in order, without a trace in the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, IterableDataset, Subset
from tqdm import tqdm

from lightning_recipes.core import random
from lightning_recipes.core.distributed import active, rank_and_world
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.evaluation import apart, as_a_step_gets_it
from lightning_recipes.core.step import observe


@dataclass(frozen=True)
class Samples:
    """The training set, to be read in order; this rank's share of it.

    Attributes:
        loader: its batches, on the CPU.
        share: indices in the training set of this rank's samples, in the loader's order.
        total: number of samples of all ranks together.
    """

    loader: DataLoader
    share: list[int]
    total: int

    def __iter__(self) -> Iterator[tuple[Any, list[int]]]:
        """Pairs of a batch and its indices in the training set. The global random state is left alone."""
        size = self.loader.batch_size
        for number, batch in enumerate(self.loader):
            yield batch, self.share[number * size : (number + 1) * size]


def training_samples(trainer: pl.Trainer) -> Samples:
    """Every sample of the training data at hand once: in order, unshuffled, dealt to the ranks in turn.

    A data module with a ``plain_train_set`` (training samples with the evaluation's transform) gives that; otherwise
    the training loader's own data set is read, with its transform.

    Raises:
        RecipeError: when there is not one loader over a data set that is read by index.
    """
    trainer.fit_loop.setup_data()
    return samples_at_hand(trainer)


def samples_at_hand(trainer: pl.Trainer) -> Samples:
    """:func:`training_samples` of the loader that is there, where a fit must not be made to load the next one yet."""
    loaders = trainer.fit_loop._combined_loader.flattened
    loader = loaders[0] if len(loaders) == 1 else None
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        what = f"{len(loaders)} loaders" if loader is None else type(loader).__name__
        of = f" of {type(loader.dataset).__name__}" if isinstance(loader, DataLoader) else ""
        raise RecipeError(f"needs the training data as one DataLoader over a data set read by index; got {what}{of}")
    return samples_of(loader, _plain(trainer, loader.dataset))


def _plain(trainer: pl.Trainer, dataset: Any) -> Any:
    """The same samples of the data module's plain set, where it has one; a part of them if a fit is shown a part."""
    plain = getattr(trainer.datamodule, "plain_train_set", None)
    if plain is None:
        return dataset
    chosen, below = torch.arange(len(dataset)), dataset
    while type(below) is Subset and len(below) != len(plain):
        chosen, below = torch.as_tensor(below.indices, dtype=torch.int64)[chosen], below.dataset
    if len(below) != len(plain):
        return dataset
    return plain if below is dataset else Subset(plain, chosen.tolist())


def samples_of(
    loader: DataLoader,
    dataset: Any = None,
    chosen: Sequence[int] | None = None,
    batch_size: int | None = None,
    num_workers: int | None = None,
) -> Samples:
    """The samples of a loader once, in order and dealt to the ranks in turn, read as the loader reads them.

    Args:
        dataset: another data set with as many samples; None for the loader's own.
        chosen: ascending indices of those to read; None for all.
        batch_size, num_workers: None for the loader's own.
    """
    dataset = loader.dataset if dataset is None else dataset
    chosen = range(len(dataset)) if chosen is None else chosen
    rank, world = rank_and_world()
    share = list(chosen[rank::world])
    size = batch_size or loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 32
    plain = DataLoader(
        dataset,
        batch_size=size,
        sampler=share,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers if num_workers is None else num_workers,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=random.generator("training samples"),
    )
    return Samples(plain, share, len(chosen))


def read(dataset: Any, indices: Sequence[int]) -> Any:
    """Samples of a data set as a loader's ``collate_fn`` gets them."""
    several = getattr(dataset, "__getitems__", None)
    return several(list(indices)) if several else [dataset[i] for i in indices]


def reads_anew(dataset: Any, most: int = 4) -> bool:
    """Whether a data set gives other inputs each time that it is read (a random transform), by its first few samples.

    The global random state, and that of generators that the data set holds, end as they began.
    """
    with random.forked(torch.device("cpu")), random.held_left_alone(dataset):
        first, again = (read(dataset, range(min(most, len(dataset)))) for _ in range(2))
    pairs = zip(tree_leaves(first), tree_leaves(again))
    return any(isinstance(a, Tensor) and not torch.equal(a, b) for a, b in pairs)


def some_of(total: int, most: int, *stream: int | str) -> Sequence[int]:
    """Ascending indices of at most so many samples, drawn once and for all by the parts of `stream`."""
    if total <= most:
        return range(total)
    return torch.randperm(total, generator=random.generator(*stream))[:most].sort().values.tolist()


@dataclass(frozen=True)
class Encoded:
    """Features of samples, on every rank the same, in the order of the training set.

    Attributes:
        features: float32 ``[n, d]`` on the CPU, by name.
        targets: ``[n, ...]`` as the module's loss got them, on the CPU.
    """

    features: dict[str, Tensor]
    targets: Tensor


@torch.no_grad()
def encode(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    read: Callable[[], dict[str, Tensor]],
    samples: Samples | None = None,
    select: str | int | None = None,
    progress: Callable[[Samples], Any] = iter,
    run: Callable[[Any, int], Tensor] | None = None,
    full_precision: bool = False,
) -> Encoded:
    """Run the module's own training step over the training set, in eval mode and silently, and keep what `read` gives.

    Costs a forward pass over the data. All ranks must call it together.

    Args:
        read: after each batch: features ``[n, d]`` by name (from :class:`~lightning_recipes.core.features.Taps`).
        samples: which; None for all of :func:`training_samples`.
        select: which loss of the step to take the targets from, as everywhere (``criterion=``).
        progress: makes the iterator over the samples, a progress bar for long work.
        run: what to run instead of the training step: from a batch on the device and its number to targets
            ``[n, ...]``.
        full_precision: leave mixed precision out, for statistics that need what it rounds away.

    Raises:
        RecipeError: when the step's loss cannot be seen, or the features are not one vector a sample.
    """
    samples = training_samples(trainer) if samples is None else samples
    kept: dict[str, list[Tensor]] = {}
    targets: list[Tensor] = []
    with apart(trainer, "encode", full_precision=full_precision):
        for number, (batch, share) in enumerate(progress(samples)):
            batch = as_a_step_gets_it(trainer, batch)
            seen = observe(trainer, module, batch, number, select).targets if run is None else run(batch, number)
            for name, value in read().items():
                value = value.detach()
                if value.dim() != 2 or len(value) != len(share):
                    raise RecipeError(
                        f"needs one feature vector a sample; {name} is {tuple(value.shape)} for {len(share)} samples"
                    )
                kept.setdefault(name, []).append(value.float().cpu())
            targets.append(seen.detach().cpu())
    features = {name: torch.cat(values) for name, values in kept.items()}
    return _in_order(Encoded(features, torch.cat(targets)), samples)


def _in_order(mine: Encoded, samples: Samples) -> Encoded:
    """Every rank's samples, in the order of the training set."""
    if not active():
        return mine
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (samples.share, mine.features, mine.targets))
    order = torch.tensor([index for share, *_ in everyone for index in share]).argsort()
    features = {name: torch.cat([theirs[name] for _, theirs, _ in everyone])[order] for name in mine.features}
    return Encoded(features, torch.cat([theirs for *_, theirs in everyone])[order])


def validation_samples(trainer: pl.Trainer) -> Samples:
    """The first validation set.

    Raises:
        RecipeError: when it is not read by index.
    """
    loaders = trainer.val_dataloaders
    while isinstance(loaders, (list, tuple, Mapping)):
        loaders = next(iter(loaders.values() if isinstance(loaders, Mapping) else loaders))
    if not isinstance(loaders, DataLoader) or isinstance(loaders.dataset, IterableDataset):
        raise RecipeError(
            f"needs the validation data as a DataLoader over a data set read by index; got {type(loaders).__name__}"
        )
    return samples_of(loaders)


def bar(trainer: pl.Trainer, what: str) -> Callable[[Samples], Iterator[Any]]:
    """A progress bar for a pass that takes long, where the Trainer shows any."""
    shown = trainer.progress_bar_callback is not None and trainer.progress_bar_callback.is_enabled
    hidden = not (shown and trainer.is_global_zero)
    return lambda samples: iter(
        tqdm(samples, desc=what, total=len(samples.loader), leave=False, delay=2, disable=hidden)
    )
