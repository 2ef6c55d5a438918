"""What a part of the user's network is called with, found out before training and without a trace.

For surgery that must know shapes. The module's own training step runs on a few samples up to that call and no further;
so nothing is guessed about the form of batches, and no loss, metric or log entry is reached.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.apply_func import apply_to_collection
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_recipes.core import random
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.silence import modes_kept, silent

SAMPLES = 4


class _Reached(BaseException):  # no `except Exception` of the user's step shall catch it
    pass


@contextmanager
def eager_and_silent(module: pl.LightningModule) -> Iterator[None]:
    """Everything in eval mode, without gradients, uncompiled (a first compiled call fixes which hooks ever fire), and
    with random state, buffers and metrics as they were afterwards.
    """
    with silent(module), modes_kept(module, training=False), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        yield


def arguments_of(module: pl.LightningModule, part: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the first call of `part` in the module's own step, for a few samples.

    Runs ``module(*example_input_array)`` where the module has one, else the training step on the first samples of the
    training data.

    Args:
        module: of a Trainer whose data and network are set up.
        part: of the module.

    Raises:
        RecipeError: when there is no data to look at, or the step fails or ends before it comes to `part`.
    """
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def stop(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise _Reached

    handle = part.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        samples = FewSamples(module)
        with eager_and_silent(module):
            samples.run(samples.first())
    except _Reached:
        return _as_its_weights(part, seen[0])
    finally:
        handle.remove()
    raise RecipeError(
        f"the module's step never calls its {type(part).__name__}; name the submodule that maps inputs to logits"
    )


class FewSamples:
    """What a dry run runs on: the module's ``example_input_array`` where it has one, else the first training data.

    Args:
        module: of a Trainer whose data and network are set up.

    Attributes:
        count: how many samples there are: the length of the first tensor.

    Raises:
        RecipeError: when there are no data to look at.
    """

    def __init__(self, module: pl.LightningModule) -> None:
        self.module = module
        self.is_example = module.example_input_array is not None
        self._values = module.example_input_array if self.is_example else a_few_samples(module)
        self.count = len(first) if (first := first_tensor(self._values)) is not None and first.dim() else 0

    def first(self, count: int | None = None) -> Any:
        """The first so many of them, as the module's step gets a batch; None for all. They come again where there are
        not as many."""
        values = self._values

        def cut(value: Tensor) -> Tensor:
            if not value.dim() or len(value) != self.count:
                return value
            return value[torch.arange(count, device=value.device) % self.count]

        if count is not None and self.count:
            values = apply_to_collection(values, Tensor, cut)
        if self.is_example:
            return values
        with _failures_explained():
            return self.module._apply_batch_transfer_handler(values, device=_device(self.module), dataloader_idx=0)

    def run(self, values: Any) -> Any:
        """Run the module on what :meth:`first` gave: its forward on an example, else its training step.

        Raises:
            RecipeError: when it fails.
        """
        module = self.module
        with _failures_explained():
            if not self.is_example:
                return module.training_step(values, 0) if _takes_index(module) else module.training_step(values)
            if isinstance(values, Mapping):
                return module(**values)
            return module(*values) if isinstance(values, (tuple, list)) else module(values)


def _device(module: pl.LightningModule) -> torch.device:
    """Where its weights are: before a fit has moved them ``module.device`` already is where they will be."""
    return next((p.device for p in module.parameters()), module.device)


@contextmanager
def _failures_explained() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise RecipeError(
            f"the training step failed on {SAMPLES} samples before training ({type(error).__name__}: {error}); a dry"
            " run learns the shapes: set the module's example_input_array to an example of its forward's input"
        ) from error


def first_tensor(values: Any) -> Tensor | None:
    """The first tensor in a batch or an example, None where there is none."""
    if isinstance(values, Tensor):
        return values
    if hasattr(values, "keys"):
        values = [values[key] for key in values]
    if isinstance(values, (tuple, list)):
        return next((found for each in values if (found := first_tensor(each)) is not None), None)
    return None


def a_few_samples(module: pl.LightningModule) -> Any:
    """The first samples of the training data as one batch, with every random state as it was.

    From the data set itself and not its loader, so that no worker starts, no sampler moves on and no stateful loader
    counts; of another iterable, the first batch of a new iterator.

    Raises:
        RecipeError: for an iterator that can be gone through once only.
    """
    source = module.trainer.fit_loop._data_source
    with random.forked(module.device):
        return _first_of(source.dataloader())


def _first_of(loader: Any) -> Any:
    if isinstance(loader, CombinedLoader):
        return _first_of(loader.iterables)
    if isinstance(loader, Mapping):  # a collection of loaders gives a collection of batches
        return {name: _first_of(each) for name, each in loader.items()}
    if isinstance(loader, (list, tuple)):
        return type(loader)(_first_of(each) for each in loader)
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        if iter(loader) is loader:
            raise RecipeError(
                "a dry run learns shapes from the training data, which is an iterator that goes through once; set the"
                " module's example_input_array to an example of its forward's input"
            )
        with random.held_left_alone(loader):
            return next(iter(loader))
    with random.held_left_alone(loader.dataset):
        if loader.batch_size is None and loader.batch_sampler is None:
            return loader.collate_fn(loader.dataset[0])  # the data set gives whole batches
        count = min(SAMPLES, len(loader.dataset), loader.batch_size or SAMPLES)
        return loader.collate_fn([loader.dataset[i] for i in range(count)])


def _takes_index(module: pl.LightningModule) -> bool:
    from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

    return is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)


def _as_its_weights(
    part: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """In the floating-point type of the part's weights, where the Trainer's precision makes the step's input so."""
    dtype = next((p.dtype for p in part.parameters() if p.is_floating_point()), None)

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() and dtype else value

    args, kwargs = call
    return tuple(map(cast, args)), {name: cast(value) for name, value in kwargs.items()}
