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

    example = module.example_input_array
    batch = a_few_samples(module) if example is None else None
    handle = part.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with eager_and_silent(module):
            if example is None:
                batch = module._apply_batch_transfer_handler(batch, device=module.device, dataloader_idx=0)
                takes_index = _takes_index(module)
                module.training_step(batch, 0) if takes_index else module.training_step(batch)
            elif isinstance(example, Mapping):
                module(**example)
            else:
                module(*example) if isinstance(example, (tuple, list)) else module(example)
    except _Reached:
        return _as_its_weights(part, seen[0])
    except Exception as error:
        raise RecipeError(
            f"the training step failed on {SAMPLES} samples before training ({type(error).__name__}: {error}); a dry"
            " run learns the shapes: set the module's example_input_array to an example of its forward's input"
        ) from error
    finally:
        handle.remove()
    raise RecipeError(
        f"the module's step never calls its {type(part).__name__}; name the submodule that maps inputs to logits"
    )


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
        with _generators_kept(loader):
            return next(iter(loader))
    with _generators_kept(loader.dataset):
        if loader.batch_size is None and loader.batch_sampler is None:
            return loader.collate_fn(loader.dataset[0])  # the data set gives whole batches
        count = min(SAMPLES, len(loader.dataset), loader.batch_size or SAMPLES)
        return loader.collate_fn([loader.dataset[i] for i in range(count)])


@contextmanager
def _generators_kept(root: Any) -> Iterator[None]:
    states = [(generator, random.state_of(generator)) for generator in random.generators_in(root)]
    try:
        yield
    finally:
        for generator, state in states:
            random.set_state_of(generator, state)


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
