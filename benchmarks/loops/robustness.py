"""The methods of ``callbacks/robustness`` by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

from benchmarks.loops.baseline import Amp, Batches, plain, trained


def aaer(
    net: nn.Module,
    batches: Batches,
    amp: Amp = nullcontext,
    epsilon: float = 8 / 255,
    start: float = 1.0,
    alpha: float = 1.25,
    project: bool = True,
    lambda1: float = 1.0,
    lambda2: float = 2.5,
    lambda3: float = 1.5,
) -> None:
    """FGSM training on images in [0, 1] from a random start, with abnormal examples kept from moving.

    Args:
        start: radius of the random start, as a multiple of epsilon.
        alpha: the step, as a multiple of epsilon.
        project: keep the perturbation in the ball (RS-FGSM) or not (N-FGSM).
    """
    optimizer = AdamW(trained(net))
    net.train()
    for x, y in batches:
        eta = (2 * torch.rand_like(x) - 1) * (start * epsilon)
        eta = torch.clamp(eta, -x, 1 - x)
        at = (x + eta).requires_grad_()
        with amp():
            z0 = net(at)
            l0 = F.cross_entropy(z0, y, reduction="none")
        delta = eta + alpha * epsilon * torch.autograd.grad(l0.sum(), at)[0].sign()
        if project:
            delta = delta.clamp(-epsilon, epsilon)
        delta = torch.clamp(delta, -x, 1 - x)
        with amp():
            z1 = net(x + delta)
            l1 = F.cross_entropy(z1, y, reduction="none")
        loss = l1.mean() + lambda1 * abnormal(z0.detach().float(), z1.float(), l0.detach(), l1, lambda2, lambda3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def abnormal(z0: Tensor, z1: Tensor, l0: Tensor, l1: Tensor, lambda2: float, lambda3: float) -> Tensor:
    """The regulariser; masks instead of indices, so that no step waits for the device."""
    fell = l0 > l1.detach()
    n, m = len(fell), fell.sum()
    moved = (z1 - z0).square().sum(1)
    lower = ((l0 - l1.detach()) * fell).sum() / m.clamp_min(1)
    further = (moved * fell).sum() / m.clamp_min(1) - (moved.detach() * ~fell).sum() / (n - m).clamp_min(1)
    total = m / n * (lambda2 * lower + lambda3 * further.clamp_min(0))
    return torch.where((m > 0) & (m < n), total, 0.0)


def logit_adjusted(
    net: nn.Module, batches: Batches, amp: Amp = nullcontext, counts: Sequence[float] = (), tau: float = 1.0
) -> None:
    """Cross-entropy of logits + tau log prior."""
    optimizer = AdamW(trained(net))
    prior = torch.tensor(counts, dtype=torch.float64)
    shift = (tau * (prior / prior.sum()).log()).float().to(next(net.parameters()).device)
    net.train()
    for x, y in batches:
        with amp():
            loss = F.cross_entropy(net(x) + shift, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


class Branch(nn.Module):
    """s * up(relu(down(LN(z)))), zero at first."""

    def __init__(self, width: int, bottleneck: int) -> None:
        super().__init__()
        self.norm, self.scale = nn.LayerNorm(width), nn.Parameter(torch.ones(1))
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        nn.init.kaiming_normal_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, z: Tensor) -> Tensor:
        return self.scale * self.up(self.down(self.norm(z)).relu())


def adaptformer(net: nn.Module, batches: Batches, amp: Amp = nullcontext, bottleneck: int = 8) -> None:
    """A branch beside the MLP of every block of a frozen timm vision transformer; branches and head are trained."""
    net.requires_grad_(False)
    net.get_classifier().requires_grad_(True)
    for block in net.blocks:
        block.adapter = Branch(block.mlp.fc1.in_features, bottleneck).to(block.mlp.fc1.weight.device)

        def forward(x: Tensor, attn_mask: None = None, is_causal: bool = False, block: nn.Module = block) -> Tensor:
            x = x + block.attn(block.norm1(x))
            return x + block.mlp(block.norm2(x)) + block.adapter(x)

        block.forward = forward
    plain(net, batches, amp)


class Cosines(nn.Linear):
    """scale * cosine of features and class weights."""

    def forward(self, x: Tensor) -> Tensor:
        return 25.0 * F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1))


def cosine_head(net: nn.Module, batches: Batches, amp: Amp = nullcontext) -> None:
    """The head of a timm vision transformer gives scaled cosines."""
    linear, net.head = net.head, Cosines(net.head.in_features, net.head.out_features, bias=False)
    net.head.weight = linear.weight
    plain(net, batches, amp)


def class_weighted(net: nn.Module, batches: Batches, amp: Amp = nullcontext, weights: Sequence[float] = ()) -> None:
    """Cross-entropy with torch's own class weights."""
    optimizer = AdamW(trained(net))
    weight = torch.tensor(weights, device=next(net.parameters()).device)
    net.train()
    for x, y in batches:
        with amp():
            loss = F.cross_entropy(net(x), y, weight=weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
