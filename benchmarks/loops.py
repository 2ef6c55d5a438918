"""Every benchmarked method once more, by hand: a plain PyTorch loop without Lightning and without this package.

What a recipe costs is held against these. Each trains `net` in place on all of `batches`, pairs of images [n, C, H, W]
and labels [n] on the network's device, with AdamW at its defaults, as the stock module does. `amp` makes the context of
a forward pass, ``torch.autocast`` for mixed precision. Nothing is logged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import AdamW

Batches = Iterable[tuple[Tensor, Tensor]]
Amp = Callable[[], AbstractContextManager]


def plain(net: nn.Module, batches: Batches, amp: Amp = nullcontext) -> None:
    """Cross-entropy on whatever requires a gradient."""
    descend(net, AdamW(trained(net)), batches, amp)


def descend(net: nn.Module, optimizer: AdamW, batches: Batches, amp: Amp) -> None:
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


# -- adapters --------------------------------------------------------------------------------------------------------


class LoRA(nn.Module):
    """A fused qkv layer with low-rank updates of some of its projections.

    A group of N adapters is one of rank N r: the first r rows of A and columns of B are the first adapter's.

    Args:
        fused: ``[..., d] -> [..., 3 d]``.
        roles: of 'q', 'k', 'v'.
        rank: r of each adapter.
        groups: N.
        scale: factor on the updates.
    """

    def __init__(self, fused: nn.Linear, roles: str, rank: int, groups: int, scale: float) -> None:
        super().__init__()
        self.fused, self.groups, self.scale = fused, groups, scale
        width = fused.in_features
        self.a, self.b = nn.ParameterDict(), nn.ParameterDict()
        for role in roles:
            self.a[role] = torch.empty(groups * rank, width)
            self.b[role] = torch.zeros(width, groups * rank)
            nn.init.kaiming_uniform_(self.a[role], math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        parts = dict(zip("qkv", self.fused(x).chunk(3, -1)))
        for role, a in self.a.items():
            parts[role] = parts[role] + self.scale * F.linear(F.linear(x, a), self.b[role])
        return torch.cat(list(parts.values()), -1)

    def weight(self, role: str) -> Tensor:
        """The frozen weight of one projection, ``[d, d]``."""
        return dict(zip("qkv", self.fused.weight.chunk(3)))[role]


def with_lora(net: nn.Module, roles: str, rank: int, groups: int = 1, scale: float = 1.0) -> nn.Module:
    """A timm vision transformer, all frozen but its head and adapters in every attention block."""
    net.requires_grad_(False)
    net.get_classifier().requires_grad_(True)
    for block in net.blocks:
        block.attn.qkv = LoRA(block.attn.qkv, roles, rank, groups, scale)
    return net


def pego(net: nn.Module, batches: Batches, amp: Amp = nullcontext, weight: float = 1e-3) -> None:
    """A group of adapters (:func:`with_lora`) kept orthogonal to the frozen weights and to one another."""
    layers = [module for module in net.modules() if isinstance(module, LoRA)]
    optimizer = AdamW(trained(net))
    net.train()
    for x, y in batches:
        with amp():
            loss = F.cross_entropy(net(x), y)
        loss = loss + weight * sum(orthogonality(layer, role) for layer in layers for role in layer.a)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def orthogonality(layer: LoRA, role: str) -> Tensor:
    """sum_i ||W D_i^T||_1 + sum_{i<j} ||D_i D_j^T||_1 with D_i = B_i A_i."""
    a = layer.a[role].unflatten(0, (layer.groups, -1))  # [N, r, d]
    b = layer.b[role].unflatten(1, (layer.groups, -1)).movedim(1, 0)  # [N, d, r]
    preserve = ((layer.weight(role) @ a.mT) @ b.mT).abs().sum()
    diversify = [((b[i] @ (a[i] @ a[i + 1 :].mT)) @ b[i + 1 :].mT).abs().sum() for i in range(layer.groups - 1)]
    return preserve + sum(diversify)


def glad(net: nn.Module, batches: Batches, amp: Amp = nullcontext, mix: float = 0.5, rho: float = 0.05) -> None:
    """(1 - mix) g + mix g', where g' is the gradient at the weights moved by rho along g."""
    parameters = trained(net)
    optimizer = AdamW(parameters)
    norms = [part for part in net.modules() if isinstance(part, _BatchNorm)]
    net.train()
    for x, y in batches:
        with amp():
            loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            gradients = [p.grad for p in parameters]
            at = [p.clone() for p in parameters]
            length = torch.stack(torch._foreach_norm(gradients)).norm()
            torch._foreach_add_(parameters, torch._foreach_mul(gradients, rho / (length + 1e-12)))
        for norm in norms:
            norm.track_running_stats = False  # the statistics are those of the first pass
        with amp():
            loss = F.cross_entropy(net(x), y)
        sharp = torch.autograd.grad(loss, parameters)
        for norm in norms:
            norm.track_running_stats = True
        with torch.no_grad():
            torch._foreach_copy_(parameters, at)
            torch._foreach_lerp_(gradients, sharp, mix)
            del at, sharp  # the optimizer needs room of its own
        optimizer.step()


# -- adversarial training --------------------------------------------------------------------------------------------


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


# -- fine-tuning -----------------------------------------------------------------------------------------------------

RESNET_GROUPS = (("fc",), ("layer4",), ("layer3",), ("layer2",), ("layer1",), ("conv1", "bn1"))


def unfreezing(net: nn.Module, batches: Batches, amp: Amp = nullcontext, rates: Sequence[float] = (1.0,)) -> None:
    """One stage of progressive unfreezing of a ResNet.

    Args:
        rates: factors on the learning rate of the groups that are awake, the head first; the others are frozen.
    """
    net.requires_grad_(False)
    groups = []
    for names, rate in zip(RESNET_GROUPS, rates):
        parameters = [p for name in names for p in net.get_submodule(name).requires_grad_(True).parameters()]
        groups.append({"params": parameters, "lr": 1e-3 * rate})
    descend(net, AdamW(groups), batches, amp)
