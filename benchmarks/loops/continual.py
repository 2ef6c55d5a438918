"""The methods of ``callbacks/continual`` by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import AdamW

from benchmarks.loops.baseline import Amp, Batches, trained


def group_masked(net: nn.Module, batches: Batches, amp: Amp) -> None:
    """Cross-entropy over the classes that have a label in the batch."""
    optimizer = AdamW(trained(net))
    net.train()
    for x, y in batches:
        with amp():
            logits = net(x)
            absent = torch.ones(logits.shape[1], dtype=torch.bool, device=y.device)
            absent[y] = False
            loss = F.cross_entropy(logits.masked_fill(absent, max(-1e9, torch.finfo(logits.dtype).min / 2)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def slow_learner(
    net: nn.Module,
    batches: Batches,
    amp: Amp = nullcontext,
    scale: float = 0.01,
    classes: Sequence[int] = tuple(range(10)),
    begin: Callable[[nn.Linear], None] = lambda head: None,
) -> None:
    """One task of a sequence: the backbone's rate is `scale` times the head's, the loss sees the task's `classes` only
    and the head's other rows do not move. `begin` gives new rows their first values.
    """
    head = net.get_classifier()
    begin(head)
    own = {id(p) for p in head.parameters()}
    backbone = [p for p in net.parameters() if id(p) not in own]
    optimizer = AdamW([{"params": backbone, "lr": 1e-3 * scale}, {"params": list(head.parameters())}])
    outside = torch.ones(head.out_features, dtype=torch.bool, device=head.weight.device)
    outside[list(classes)] = False
    weight, bias = head.weight.detach().clone(), head.bias.detach().clone()
    net.train()
    for x, y in batches:
        with amp():
            loss = F.cross_entropy(net(x).masked_fill(outside, -1e4), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            head.weight.copy_(torch.where(outside[:, None], weight, head.weight))
            head.bias.copy_(torch.where(outside, bias, head.bias))
