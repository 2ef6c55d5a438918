"""Training without any recipe, and what the loops by hand share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

Batches = Iterable[tuple[Tensor, Tensor]]

Amp = Callable[[], AbstractContextManager]


def plain(
    net: nn.Module,
    batches: Batches,
    amp: Amp = nullcontext,
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = AdamW,
) -> None:
    """Cross-entropy on whatever requires a gradient."""
    descend(net, optimizer(trained(net)), batches, amp)


def descend(net: nn.Module, optimizer: Optimizer, batches: Batches, amp: Amp) -> None:
    """One pass over the batches."""
    net.train()
    for x, y in batches:
        with amp():
            loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def trained(net: nn.Module) -> list[nn.Parameter]:
    """The parameters that require a gradient."""
    return [p for p in net.parameters() if p.requires_grad]


def residual_blocks(net: nn.Module) -> list[list[nn.Module]]:
    """Those of a timm ResNet, stage by stage."""
    return [list(stage) for stage in (net.layer1, net.layer2, net.layer3, net.layer4)]
