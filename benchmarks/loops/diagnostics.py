"""The methods of ``callbacks/diagnostics`` by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

from benchmarks.loops.baseline import Amp, Batches, plain, trained


def small_init(net: nn.Module, batches: Batches, amp: Amp = nullcontext, scale: float = 0.5) -> None:
    """Plain training from smaller weights."""
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if name.endswith("weight"):
                weight.mul_(scale)
    plain(net, batches, amp)


def watched(net: nn.Module, batches: Batches, amp: Amp = nullcontext, probe: int = 16) -> None:
    """Accuracy on a few samples after every step, of a training and of a validation set, in eval mode."""
    optimizer, kept = AdamW(trained(net)), None
    for x, y in batches:
        net.train()
        with amp():
            loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        net.eval()
        kept = (x[:probe], y[:probe]) if kept is None else kept
        with torch.no_grad(), amp():
            right = [(net(kept[0]).argmax(1) == kept[1]).float().mean() for _ in range(2)]
        torch.stack(right).tolist()


def features_every(
    net: nn.Module, batches: Batches, amp: Amp, probe: int, every: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Train, and every few steps give the features of some samples and their one-hot labels, centred, in fp64."""
    optimizer, kept = AdamW(trained(net)), []
    for number, (x, y) in enumerate(batches, 1):
        net.train()
        with amp():
            loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if sum(map(len, (labels for _, labels in kept))) < probe:
            kept.append((x, y))
        if number % every:
            continue
        net.eval()
        with torch.no_grad():
            h = torch.cat([net.forward_head(net.forward_features(images), pre_logits=True) for images, _ in kept])
            h, hot = h[:probe].double(), F.one_hot(torch.cat([labels for _, labels in kept])[:probe], 10).double()
        yield h - h.mean(0), hot - hot.mean(0)


def forecast(net: nn.Module, batches: Batches, amp: Amp = nullcontext, probe: int = 64, every: int = 10) -> None:
    """Eigenvalues of the features of some samples, and the labels along their directions, every few steps."""
    for h, hot in features_every(net, batches, amp, probe, every):
        values, vectors = torch.linalg.eigh((h @ h.T).cpu())
        torch.stack([values.sum(), (vectors.T @ hot.cpu()).square().sum()]).tolist()


def ridge_sweep(net: nn.Module, batches: Batches, amp: Amp = nullcontext, probe: int = 64, every: int = 10) -> None:
    """Cross-validation of ridge regression on the features of some samples at 31 ridges, every few steps."""
    for h, hot in features_every(net, batches, amp, probe, every):
        values, vectors = torch.linalg.eigh((h @ h.T).cpu())
        ridges = torch.logspace(-6, 2, 31, dtype=torch.float64)[:, None] * values.mean()
        left = ridges / (values.clamp_min(0) + ridges)
        off = (left.square() @ (vectors.T @ hot.cpu()).square().sum(1)) / (left.sum(1) - 1).square()
        ridges[off.argmin()].item()
