"""What a fit has logged and counted so far, for a checkpoint: Lightning's results and torchmetrics' states.

Lightning keeps neither: after a resume in the middle of an epoch its averages begin anew, and a metric that is no
``persistent`` state forgets.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _ResultMetric, _Sync
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_recipes.core.recipe import plain

_SHOWN = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")
_META = ("fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph", "add_dataloader_idx")
_META += ("dataloader_idx", "metric_attribute")
_COUNTS = ("_update_count", "_computed", "_forward_cache")  # what any metric keeps beside its states
_COUNTED = ("value", "cumulated_batch_size", "has_reset", *_COUNTS)


def logged(trainer: pl.Trainer) -> dict[str, Any]:
    """What has been logged: the values shown, and the epoch's running averages of this rank."""
    connector = trainer._logger_connector
    return {
        "shown": {name: plain(getattr(connector, name)) for name in _SHOWN},
        "first": connector._first_loop_iter,
        "fx": connector._current_fx,
        "results": [{key: _result(result) for key, result in results.items()} for results in _results(trainer)],
    }


def relog(trainer: pl.Trainer, state: Mapping[str, Any]) -> None:
    """Put back what :func:`logged` gave."""
    connector, device = trainer._logger_connector, trainer.strategy.root_device
    for name in _SHOWN:
        setattr(connector, name, {k: _to(v, device) for k, v in state["shown"][name].items()})
    connector._first_loop_iter, connector._current_fx = state["first"], state["fx"]
    for results, saved in zip(_results(trainer), state["results"]):
        results.clear()
        results.update({key: _result_from(trainer, each) for key, each in saved.items() if _is_there(trainer, each)})


def _results(trainer: pl.Trainer) -> list[dict[str, _ResultMetric]]:
    """Of the training epoch and of the validation under way."""
    epoch = trainer.fit_loop.epoch_loop
    return [epoch._results, epoch.val_loop._results]


def _result(result: _ResultMetric) -> dict[str, Any]:
    meta = result.meta
    sync = {"should": meta.sync.should, "rank_zero_only": meta.sync.rank_zero_only, "op": meta.sync.op}
    counted = {name: result.__dict__[name] for name in _COUNTED if name in result.__dict__}
    if not result.is_tensor:
        counted.pop("value")  # the module's own metric, found again by its name
    return {
        "meta": {**{name: getattr(meta, name) for name in _META}, "reduce_fx": meta.reduce_fx.__name__},
        "sync": sync,
        "is_tensor": result.is_tensor,
        "counted": plain(counted),
    }


def _is_there(trainer: pl.Trainer, saved: Mapping[str, Any]) -> bool:
    """Whether a result's metric is in the module. One that the module makes when a validation first needs it may not be
    yet; that validation is over, and its values are among those shown.
    """
    known = trainer.lightning_module.named_modules()
    return saved["is_tensor"] or any(name == saved["meta"]["metric_attribute"] for name, _ in known)


def _result_from(trainer: pl.Trainer, saved: Mapping[str, Any]) -> _ResultMetric:
    meta = _Metadata(**saved["meta"])
    sync = saved["sync"]
    meta.sync = _Sync(
        fn=trainer.strategy.reduce, _should=sync["should"], rank_zero_only=sync["rank_zero_only"], _op=sync["op"]
    )
    result = _ResultMetric(meta, saved["is_tensor"])
    result.to(trainer.strategy.root_device)
    for name, value in saved["counted"].items():
        setattr(result, name, _to(value, trainer.strategy.root_device))
    if not result.is_tensor:
        result.value = trainer.lightning_module.get_submodule(meta.metric_attribute)
    return result


def metric_states(module: nn.Module) -> dict[str, Any]:
    """The states of every torchmetrics metric in a module, by its name there."""
    return {
        name: {
            "states": {key: _copy(getattr(metric, key)) for key in metric._defaults},
            "counts": plain({key: metric.__dict__[key] for key in _COUNTS if key in metric.__dict__}),
        }
        for name, metric in module.named_modules()
        if isinstance(metric, Metric)
    }


def _copy(value: Any) -> Any:
    """A state that further updates leave alone: they write into a tensor, and add to a list."""
    return list(value) if isinstance(value, list) else value.detach().clone()


def restore_metrics(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Put back what :func:`metric_states` gave, where the metric is still there."""
    for name, metric in module.named_modules():
        if isinstance(metric, Metric) and name in state:
            for key, value in {**state[name]["states"], **state[name]["counts"]}.items():
                setattr(metric, key, _to(value, metric.device))


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return [_to(each, device) for each in value] if isinstance(value, list) else value
