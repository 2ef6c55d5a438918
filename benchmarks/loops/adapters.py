"""The methods of ``callbacks/adapters`` by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.optim import SGD, AdamW

from benchmarks.loops.baseline import Amp, Batches, descend, residual_blocks, trained


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
            self.a[role] = torch.empty(groups * rank, width, device=fused.weight.device)
            self.b[role] = torch.zeros(width, groups * rank, device=fused.weight.device)
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


def normalized_steps(
    net: nn.Module, batches: Batches, amp: Amp = nullcontext, eta: float = 0.01, init_scale: float = 1e-2
) -> None:
    """SGD, of the adapters at the rate eta rho^t / ||Q||, Q the gradients of their products."""
    layers = [layer for layer in net.modules() if isinstance(layer, LoRA)]
    products: list[Tensor] = []

    def keep(layer: LoRA, args: tuple[Tensor], output: Tensor) -> None:
        h = args[0].detach().flatten(0, -2).float()
        output.register_hook(lambda g: products.append(layer.scale * g.detach().flatten(0, -2).float().T @ h))

    for layer in layers:
        layer.register_forward_hook(keep)
    factors = [p for layer in layers for side in (layer.a, layer.b) for p in side.parameters()]
    groups = [{"params": factors}, {"params": list(net.get_classifier().parameters())}]
    optimizer, rho, rate = SGD(groups, lr=0.01), 1 - eta / (2 * math.log(1 / init_scale) + 4), eta
    net.train()
    for x, y in batches:
        with amp():
            loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.stack([torch.linalg.norm(q) for q in products]).norm()
        optimizer.param_groups[0]["lr"] = rate / norm.item()
        optimizer.step()
        products.clear()
        rate *= rho


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


class SingularValues(nn.Module):
    """A fused qkv layer of which the singular values of some projections are trained.

    Args:
        fused: ``[..., d] -> [..., 3 d]``.
        roles: of 'q', 'k', 'v'.
    """

    def __init__(self, fused: nn.Linear, roles: str) -> None:
        super().__init__()
        self.fused, self.delta = fused, nn.ParameterDict()
        for role, weight in zip("qkv", fused.weight.detach().chunk(3)):
            if role in roles:
                u, values, vt = torch.linalg.svd(weight, full_matrices=False)
                self.register_buffer(f"u_{role}", u)
                self.register_buffer(f"vt_{role}", vt)
                self.delta[role] = torch.zeros_like(values)

    def forward(self, x: Tensor) -> Tensor:
        parts = dict(zip("qkv", self.fused(x).chunk(3, -1)))
        for role, delta in self.delta.items():
            u, vt = getattr(self, f"u_{role}"), getattr(self, f"vt_{role}")
            parts[role] = parts[role] + F.linear(F.linear(x, vt) * delta, u)
        return torch.cat(list(parts.values()), -1)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The stock layer with the trained values in its weight."""
        rows = dict(zip("qkv", self.fused.weight.chunk(3)))
        for role, delta in self.delta.items():
            rows[role].add_((getattr(self, f"u_{role}") * delta) @ getattr(self, f"vt_{role}"))
        return self.fused


def svfit(net: nn.Module, batches: Batches, amp: Amp = nullcontext) -> None:
    """Singular values of q and v of a timm vision transformer, without decay, and its head."""
    net.requires_grad_(False)
    head = list(net.get_classifier().requires_grad_(True).parameters())
    for block in net.blocks:
        block.attn.qkv = SingularValues(block.attn.qkv, "qv")
    values = [delta for block in net.blocks for delta in block.attn.qkv.delta.parameters()]
    descend(net, AdamW([{"params": head}, {"params": values, "weight_decay": 0.0}]), batches, amp)
    for block in net.blocks:
        block.attn.qkv = block.attn.qkv.merged()


class Sparse(nn.Module):
    """A weight as a function of its free entries, for ``torch.nn.utils.parametrize``.

    Args:
        dense: the weight, which stays as it is elsewhere.
        free: True at its free entries.
    """

    def __init__(self, dense: Tensor, free: Tensor) -> None:
        super().__init__()
        self.dense, self.index = dense, free.flatten().nonzero().squeeze(1)

    def right_inverse(self, dense: Tensor) -> Tensor:
        return dense.flatten()[self.index]

    def forward(self, values: Tensor) -> Tensor:
        return _Written.apply(values, self.dense, self.index)


class _Written(torch.autograd.Function):
    """Writes the free entries into the weight, and keeps those of its gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, dense: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        dense.view(-1).index_copy_(0, index, values)
        return dense.view_as(dense)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return grad.reshape(-1)[index], None, None


def below_which(weights: Sequence[Tensor], share: float) -> float:
    """A number that so many of all entries are smaller than, found by halving."""
    wanted = round(share * sum(w.numel() for w in weights))
    low, high = 0.0, max(float(w.abs().max()) for w in weights)
    while True:
        middle = (low + high) / 2
        count = sum(int((w.abs() < middle).sum()) for w in weights)
        if count == wanted:
            return middle
        low, high = (middle, high) if count < wanted else (low, middle)


def sara(
    net: nn.Module, batches: Batches, amp: Amp = nullcontext, share: float = 0.1, weight: float = 5e-4, side: int = 16
) -> None:
    """The smallest entries of a network's weights, and its head; what has grown too large is held from the start.

    Args:
        share: of the entries.
        weight: of the nuclear norm of one matrix a step, the next in turn.
        side: the least length of a side of such a matrix.
    """
    head = list(net.get_classifier().parameters())
    owners = [(path, part, name) for path, part in net.named_modules() for name, _ in part.named_parameters("", False)]
    target = {f"{path}.{name}": (part, name) for path, part, name in owners if name == "weight"}
    target = {n: at for n, at in target.items() if all(getattr(*at) is not p for p in head)}
    threshold = below_which([getattr(*at).detach() for at in target.values()], share)
    matrices = [n for n, at in target.items() if getattr(*at).dim() == 2 and min(getattr(*at).shape) >= side]
    leaves, sparse, active = {}, {}, {}
    for n, (part, name) in target.items():
        dense = getattr(part, name).requires_grad_(False)
        free = dense.abs() < threshold
        if free.any():
            sparse[n] = Sparse(dense.data, free)
            parametrize.register_parametrization(part, name, sparse[n], unsafe=True)
            leaves[n] = part.parametrizations[name].original.requires_grad_(True)
            active[n] = leaves[n].detach().abs() < threshold
    optimizer = AdamW([*leaves.values(), *head])
    net.train()
    for step, (x, y) in enumerate(batches):
        with amp():
            loss = F.cross_entropy(net(x), y)
        n = matrices[step % len(matrices)]
        if n in leaves and len(leaves[n]) > 100:
            matrix = torch.zeros_like(sparse[n].dense).view(-1).index_copy(0, sparse[n].index, leaves[n] * active[n])
            loss = loss + weight * torch.linalg.svdvals(matrix.view_as(sparse[n].dense)).sum()
        optimizer.zero_grad()
        loss.backward()
        for n, values in leaves.items():
            values.grad.masked_fill_(~active[n], 0)
        optimizer.step()
        with torch.no_grad():
            for n, values in leaves.items():
                values.copy_(torch.where(active[n], values, sparse[n].right_inverse(sparse[n].dense)))
    for n in leaves:
        parametrize.remove_parametrizations(*target[n])


class Spatial(nn.Module):
    """a_h and a_w of coordinate attention, [n, C, H, 1] and [n, C, 1, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        width = max(channels // 8, 1)
        self.conv, self.norm = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv_h, self.conv_w = (nn.Conv2d(width, channels, 1, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        profiles = torch.cat([x.mean(3, keepdim=True), x.mean(2, keepdim=True).mT], 2)
        h, w = F.relu(self.norm(self.conv(profiles))).split(list(x.shape[2:]), 2)
        return self.conv_h(h).sigmoid(), self.conv_w(w.mT).sigmoid()


class Spectral(nn.Module):
    """s of squeeze and excitation, [n, C, 1, 1]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        width = max(channels // 16, 1)
        self.squeeze, self.excite = nn.Linear(channels, width, bias=False), nn.Linear(width, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.excite(F.relu(self.squeeze(x.mean((2, 3))))).sigmoid()[:, :, None, None]


class Balanced(nn.Module):
    """alpha a_h a_w + (1 - alpha) s."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.coord, self.se = Spatial(channels), Spectral(channels)
        self.theta = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        alpha, (a_h, a_w) = self.theta.sigmoid(), self.coord(x)
        return alpha * a_h * a_w + (1 - alpha) * self.se(x)


class FromIdentity(nn.Module):
    """x (1 + g (G - 1)), x itself at first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attention, self.g = Balanced(channels), nn.Parameter(torch.zeros(()))
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, 0, 0.01)

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + self.g * (self.attention(x) - 1))


def with_attention(net: nn.Module, batches: Batches, amp: Amp = nullcontext) -> None:
    """Balanced attention behind the last batch norm of every block of a timm ResNet; its alphas do not decay."""
    thetas = []
    for block in (block for stage in residual_blocks(net) for block in stage):
        norm = block.bn3 if hasattr(block, "bn3") else block.bn2
        norm.attention = FromIdentity(norm.num_features).to(norm.weight.device)
        norm.register_forward_hook(lambda norm, args, x: norm.attention(x))
        thetas.append(norm.attention.attention.theta)
    own = {id(theta) for theta in thetas}
    others = [p for p in net.parameters() if id(p) not in own]
    descend(net, AdamW([{"params": others}, {"params": thetas, "weight_decay": 0.0}]), batches, amp)
