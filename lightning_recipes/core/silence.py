"""Running a piece of the user's module without leaving a trace: for replays in a step and for probes between steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchmetrics import Metric

from lightning_recipes.core.random import forked

_TABLES: list[dict[Any, Any]] = []
_UNDER_WAY: list[pl.LightningModule] = []


@contextmanager
def silent(module: pl.LightningModule, *, track_statistics: bool = False) -> Iterator[None]:
    """Nothing is logged; metric states, buffers, batch-norm statistics, tables of :func:`left_alone` and the random
    state end as they began.

    Python side effects of a step (a counter, a queue) cannot be undone.

    Args:
        module: the LightningModule.
        track_statistics: let batch-norm statistics and other buffers move, for papers whose extra pass moves them.
    """
    undo: list[tuple[Any, dict[str, Any]]] = []
    norms = []
    tables = [(table, dict(table)) for table in _TABLES]
    for part in module.modules():
        if isinstance(part, Metric):
            undo.append((part, _detach_metric(part)))
        elif isinstance(part, _BatchNorm):
            if part.track_running_stats and not track_statistics:
                norms.append(part)
        elif part._buffers and not track_statistics:
            _detach_buffers(part, undo)
    muted = {name: module.__dict__.get(name) for name in ("log", "log_dict")}
    for norm in norms:
        # In train mode this normalises by batch statistics as before and leaves the running ones alone. Copying the
        # statistics back in place instead would break the graph that still holds them.
        norm.track_running_stats = False
    _UNDER_WAY.append(module)
    try:
        for name in muted:
            module.__dict__[name] = _log_nothing
        with forked(module.device):
            yield
    finally:
        _UNDER_WAY.pop()
        for norm in norms:
            norm.track_running_stats = True
        for part, attributes in undo:
            part.__dict__.update(attributes)
        for table, held in tables:
            table.clear()
            table.update(held)
        for name, stood_before in muted.items():
            if stood_before is None:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = stood_before


def is_silent() -> bool:
    """Whether a silent piece of work is under way, for hooks that belong to the module's own step alone."""
    return bool(_UNDER_WAY)


def left_alone(table: dict[Any, Any]) -> Callable[[], None]:
    """Have every silent piece of work leave a table as it was; returns what ends that.

    For what hooks write down of the module's own step, and must not of a replay.
    """
    _TABLES.append(table)
    return lambda: _TABLES.__delitem__(next(i for i, each in enumerate(_TABLES) if each is table))


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _detach_metric(metric: Metric) -> dict[str, Any]:
    """Give the metric copies of its states to write on; return the originals and its bookkeeping."""
    bookkeeping = ("_computed", "_update_count", "_forward_cache", "_is_synced")
    keep = {name: metric.__dict__[name] for name in bookkeeping if name in metric.__dict__}
    for name in metric._defaults:
        value = getattr(metric, name)
        keep[name] = value
        setattr(metric, name, list(value) if isinstance(value, list) else value.detach().clone())
    return keep


def _detach_buffers(part: nn.Module, undo: list[tuple[Any, dict[str, Any]]]) -> None:
    """Give the module clones of its buffers to write on, and remember the table that holds the originals."""
    undo.append((part, {"_buffers": part._buffers}))
    part.__dict__["_buffers"] = {
        name: value.clone() if isinstance(value, Tensor) else value for name, value in part._buffers.items()
    }


@contextmanager
def modes_kept(module: nn.Module, *, training: bool) -> Iterator[None]:
    """Put the whole module in train or eval mode and give each submodule its own mode back afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    if all(map(_plain_mode, (part for part, _ in modes))):
        for part, _ in modes:
            part.__dict__["training"] = training
    else:
        module.train(training)
    try:
        yield
    finally:
        for part, mode in modes:
            if _plain_mode(part):
                part.__dict__["training"] = mode
            else:
                part.training = mode


def _plain_mode(part: nn.Module) -> bool:
    """Whether a part's mode is the attribute that ``nn.Module`` has, set by nobody's own ``train()``.

    Then it is written at once: by ``train()`` it takes some 30 calls for every part of the network, in every pass.
    """
    own = part.__dict__
    by_torch = type(part).train is nn.Module.train and not hasattr(type(part), "training")
    return by_torch and "training" in own and "train" not in own


class HeldInEval:
    """Parts that are kept in eval mode while the rest of their module trains."""

    def __init__(self) -> None:
        self._modes: dict[nn.Module, bool] = {}  # that they had

    def hold(self, parts: Iterable[nn.Module]) -> None:
        """Put these in eval mode (a ``train()`` of the module's may have switched them back) and let go of the rest."""
        parts = dict.fromkeys(each for part in parts for each in part.modules())
        for part in parts:
            self._modes.setdefault(part, part.training)
            part.training = False
        for part in self._modes.keys() - parts.keys():
            part.training = self._modes.pop(part)


@contextmanager
def gradients_allowed() -> Iterator[None]:
    """Leave `no_grad` and `inference_mode`, under both of which Lightning validates.

    Tensors made outside are still inference tensors there: clone them before use.
    """
    with torch.inference_mode(False), torch.enable_grad():
        yield
