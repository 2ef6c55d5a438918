"""The methods of ``callbacks/data`` by hand."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import AdamW

from benchmarks.loops.baseline import Amp, Batches, trained


def forgetting(net: nn.Module, batches: Batches, amp: Amp = nullcontext) -> None:
    """Plain training, in which the batches' samples are counted as forgotten; they come in order."""
    net.train()
    optimizer = AdamW(trained(net))
    last, forgotten, ever = (torch.zeros(0, device=next(net.parameters()).device) for _ in range(3))
    place = 0
    for x, y in batches:
        with amp():
            logits = net(x)
            loss = F.cross_entropy(logits, y)
        correct = (logits.detach().argmax(1) == y).float()
        if place + len(y) > len(last):
            last, forgotten, ever = (torch.cat([each, torch.zeros_like(correct)]) for each in (last, forgotten, ever))
        here = slice(place, place + len(y))
        forgotten[here] += last[here] > correct
        ever[here] = torch.maximum(ever[here], correct)
        last[here] = correct
        place += len(y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
