"""Running statistics of batch-norm layers, measured anew for weights that no training step has seen.

The statistics of a mean of two sets of weights are not the mean of theirs. As in ``torch.optim.swa_utils.update_bn``
each becomes the plain average over batches. Here every other layer is in eval mode meanwhile, so that the statistics
are those that the network meets when it is evaluated, and no random number is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_recipes.core.distributed import all_sum
from lightning_recipes.core.silence import modes_kept


def running_norms(module: nn.Module) -> dict[str, _BatchNorm]:
    """The batch-norm layers that keep running statistics, by name."""
    return {
        name: part for name, part in module.named_modules() if isinstance(part, _BatchNorm) and part.track_running_stats
    }


def statistics_names(module: nn.Module) -> list[str]:
    """Names of the buffers that :func:`recalibrate` writes."""
    return [f"{name}.{buffer}" for name in running_norms(module) for buffer in ("running_mean", "running_var")]


@torch.no_grad()
def recalibrate(module: nn.Module, run: Callable[[Any], Any], batches: Iterable[Any]) -> None:
    """Measure the running statistics of all batch-norm layers, in place; the same on every rank.

    Args:
        module: holds the layers; its modes, momenta, counters and other buffers end as they began.
        run: passes one batch through them.
        batches: of this rank. The average over batches is one over those of all ranks.
    """
    norms = running_norms(module)
    if not norms:
        return
    written = set(statistics_names(module))
    others = {name: buffer for name, buffer in module.named_buffers() if name not in written}
    before = {name: buffer.clone() for name, buffer in others.items()}
    momenta = {name: norm.momentum for name, norm in norms.items()}
    count = 0
    with modes_kept(module, training=False):
        try:
            for norm in norms.values():
                norm.reset_running_stats()
                norm.train()
                norm.momentum = None  # then each batch counts as much as any other
            for batch in batches:
                run(batch)
                count += 1
        finally:
            for name, norm in norms.items():
                norm.momentum = momenta[name]
            for name, buffer in others.items():
                buffer.copy_(before[name])
    _average_over_ranks_([s for norm in norms.values() for s in (norm.running_mean, norm.running_var)], count)


def _average_over_ranks_(statistics: list[Tensor], count: int) -> None:
    """Each rank's averages weighted by its number of batches."""
    flat = torch.cat([s.reshape(-1) * count for s in statistics])
    total = all_sum(torch.cat([flat, flat.new_tensor([count])]))
    means = (total[:-1] / total[-1]).split([s.numel() for s in statistics])
    for statistic, mean in zip(statistics, means):
        statistic.copy_(mean.view_as(statistic))
