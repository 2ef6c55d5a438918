"""Labels and other values of every sample of a data set, labels of a batch, and how many samples each class has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from lightning_recipes.core.errors import RecipeError, speaking_for
from lightning_recipes.core.random import forked

LABEL_KEYS = ("labels", "label", "targets", "target", "y")
_ATTRIBUTES = ("targets", "labels", "_labels")  # torchvision uses all three


def labels_in(item: Any) -> Any:
    """Where labels stand in a batch or a sample: second in a pair, or under one of `LABEL_KEYS`; None if nowhere."""
    if isinstance(item, (tuple, list)):
        return item[1] if len(item) > 1 else None
    if isinstance(item, Mapping) or hasattr(item, "keys"):
        return next((item[key] for key in LABEL_KEYS if key in item), None)
    return None


def training_set(trainer: pl.Trainer) -> Dataset:
    """The whole training set of a Trainer, not one rank's share of it.

    In a fit it is the one that its loader reads; outside of one it is asked of the data module, or of the module.

    Raises:
        RecipeError: when there is none that can be read by index.
    """
    loader = trainer.train_dataloader
    if loader is None:
        loader = _asked_loader(trainer)
    dataset = getattr(loader, "dataset", None)  # several loaders, or batches in a list, have none
    if dataset is None or isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        raise RecipeError(f"the training data ({type(loader).__name__}) are no one data set that is read by index")
    return dataset


def _asked_loader(trainer: pl.Trainer) -> Any:
    for source in (trainer.datamodule, trainer.lightning_module):
        if source is not None and is_overridden("train_dataloader", source):
            try:
                with forked(torch.device("cpu")):
                    return source.train_dataloader()
            except Exception as error:  # a data module that was set up for this stage alone
                raise RecipeError(
                    f"{type(source).__name__} has no training set here ({type(error).__name__}: {error})"
                ) from error
    raise RecipeError("there is no training set here")


def labels_of(dataset: Dataset) -> Tensor:
    """Every sample's class, in order; the random state ends as it began.

    Looks for ``targets`` or ``labels`` on the data set, also below subsets and concatenations, for a column of that
    name, and for the second tensor of a TensorDataset. Anything else is read once, sample by sample.

    Returns:
        int64 ``[n]``.

    Raises:
        RecipeError: for labels that are no class indices from 0.
    """
    found = _known(dataset)
    if found is None:
        with forked(torch.device("cpu")):
            loader = DataLoader(dataset, batch_size=256, collate_fn=_only_labels)
            found = torch.cat([as_indices(part) for part in loader])
    return as_indices(found)


def known_labels(dataset: Dataset) -> Tensor | None:
    """Every sample's class where the data set says it, int64 ``[n]``; None where samples would have to be read."""
    found = _known(dataset)
    return None if found is None else as_indices(found)


def _only_labels(samples: Sequence[Any]) -> list[Any]:
    labels = [labels_in(sample) for sample in samples]
    if any(label is None for label in labels):
        raise RecipeError(f"a sample of the training set has no label: no second item, none of {LABEL_KEYS}")
    return labels


def _known(dataset: Any) -> Any:
    if isinstance(dataset, Subset):
        below = _known(dataset.dataset)
        return None if below is None else as_indices(below)[torch.as_tensor(dataset.indices, dtype=torch.int64)]
    if isinstance(dataset, ConcatDataset):
        parts = [_known(part) for part in dataset.datasets]
        return None if any(part is None for part in parts) else torch.cat([as_indices(part) for part in parts])
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[1] if len(dataset.tensors) > 1 else None
    if hasattr(dataset, "column_names"):  # Hugging Face datasets
        key = next((key for key in LABEL_KEYS if key in dataset.column_names), None)
        return None if key is None else dataset[key][:]
    for name in _ATTRIBUTES:
        value = getattr(dataset, name, None)
        if isinstance(value, Iterable) and hasattr(value, "__len__") and len(value) == len(dataset):
            return value
    return None


def as_indices(labels: Any) -> Tensor:
    """Labels as int64 ``[n]``.

    Raises:
        RecipeError: says what came instead of class indices.
    """
    try:
        values = labels if isinstance(labels, Tensor) else torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RecipeError(f"the labels must be class indices; got {type(labels).__name__} ({error})") from error
    if values.is_floating_point() or values.is_complex() or values.dim() != 1:
        raise RecipeError(
            f"the labels of the training set must be class indices, one a sample; got {str(values.dtype)[6:]} of shape"
            f" {tuple(values.shape)}"
        )
    values = values.to(torch.int64)
    if len(values) and int(values.min()) < 0:
        raise RecipeError(f"class indices count from 0; a label of the training set is {int(values.min())}")
    return values


def has_sample_values(dataset: Any, name: str) -> bool:
    """Whether a data set, or what it is a subset of, has an attribute of that name."""
    while not hasattr(dataset, name):
        dataset = getattr(dataset, "dataset", getattr(dataset, "source", None))
        if dataset is None:
            return False
    return True


def sample_values(dataset: Dataset, name: str) -> Tensor:
    """One number a sample from an attribute of a data set, or of what it is a subset of.

    Raises:
        RecipeError: when none has it, or it is not one number a sample.
    """
    place, order = dataset, None
    while not hasattr(place, name):
        below = getattr(place, "dataset", getattr(place, "source", None))
        if below is None:
            raise RecipeError(f"the data set {type(dataset).__name__} has no attribute {name!r}")
        order, place = _below(place, order), below
    kept = getattr(place, name)
    try:
        values = torch.as_tensor(kept)
    except (TypeError, ValueError, RuntimeError):
        values = None
    if values is not None and values.dim() == 1 and len(values) > len(place):  # a selection carried it along
        order = _below(place, order)
    if values is not None and values.dim() == 1:
        values = values if order is None else values[order]
    if values is None or values.dim() != 1 or len(values) != len(dataset):
        got = f"a {type(kept).__name__}" if values is None else f"{list(values.shape)}"
        raise RecipeError(
            f"the attribute {name!r} of {type(place).__name__} must be one number a sample, [{len(dataset)}]; got {got}"
        )
    return values


def _below(dataset: Any, order: Tensor | None) -> Tensor | None:
    """Indices into what a data set selects from."""
    indices = getattr(dataset, "indices", None)
    if indices is None:
        return order
    indices = torch.as_tensor(indices)
    return indices if order is None else indices[order]


def class_counts(trainer: pl.Trainer) -> Tensor:
    """Samples of each class in the whole training set, int64 ``[largest label + 1]``, the same on every rank.

    Raises:
        RecipeError: when they cannot be counted.
    """
    return torch.bincount(labels_of(training_set(trainer)))


# -- for recipes that go by the frequency of classes -----------------------------------------------------------------


def counted_for(recipe: object, trainer: pl.Trainer, changes: bool, instead: str) -> Tensor:
    """:func:`class_counts` for a recipe, as the fit begins.

    Args:
        recipe: that asks.
        changes: whether the training data change in the course of the fit.
        instead: what its user can give in place of a count, as in "class_counts=[...]".

    Raises:
        RecipeError: when the classes cannot be counted, or the count would not last; says what to give instead.
    """
    name = type(recipe).__name__
    if changes:
        raise RecipeError(
            f"{name}: the training data may change from phase to phase, and the classes that are counted would be those"
            f" of the first; give {instead}"
        )
    try:
        with speaking_for(recipe):
            return class_counts(trainer)
    except RecipeError as error:
        raise RecipeError(f"{error}; give {instead}") from error


def check_same_counts(recipe: object, here: Tensor, saved: Tensor | None) -> None:
    """Refuse to go on with another training set than the checkpoint's.

    Raises:
        RecipeError: gives both counts.
    """
    if saved is not None and not torch.equal(saved, here):
        raise RecipeError(
            f"{type(recipe).__name__}: the training set is not the one of the checkpoint: samples a class are"
            f" {here.tolist()} here and were {saved.tolist()}. Resume with the data of the checkpoint, or start a new"
            " fit from its weights"
        )


def one_for_every_class(recipe: object, values: Tensor, classes: int, what: str, counted: bool) -> Tensor:
    """Values by class, as many as the logits have classes: the last classes of a count may have no sample.

    Args:
        what: the values, for the error.
        counted: whether they were counted on the training set.

    Raises:
        RecipeError: when there are more or, not counted, fewer than classes.
    """
    if counted and len(values) < classes:
        values = torch.cat([values, values.new_zeros(classes - len(values))])
    if len(values) != classes:
        raise RecipeError(
            f"{type(recipe).__name__}: there are {len(values)} {what} and the logits have {classes} classes"
        )
    return values
