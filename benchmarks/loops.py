"""Every benchmarked method once more, by hand: a plain PyTorch loop without Lightning and without this package.

What a recipe costs is held against these. Each trains `net` in place on all of `batches`, pairs of images [n, C, H, W]
and labels [n] on the network's device, with AdamW at its defaults as the stock module does, or as it says. `amp` makes
the context of a forward pass, ``torch.autocast`` for mixed precision. Nothing is logged.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.optim import SGD, AdamW, Optimizer

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


def freeze_out(net: nn.Module, batches: Batches, amp: Amp = nullcontext, t0: float = 0.8) -> None:
    """The stages of a ResNet annealed to rate 0 and frozen one after the other, by a cubic schedule; `batches` has a
    length."""
    stages = [[net.get_submodule(name) for name in names] for names in reversed(RESNET_GROUPS)]
    ends = [(t0 + (1 - t0) * i / (len(stages) - 1)) ** 3 for i in range(len(stages))]
    optimizer = AdamW([{"params": [p for part in parts for p in part.parameters()]} for parts in stages])
    net.train()
    for step, (x, y) in enumerate(batches):
        t, first = step / len(batches), len(ends) - len(optimizer.param_groups)
        while t >= ends[first]:
            del optimizer.param_groups[0]
            for part in stages[first]:
                part.eval().requires_grad_(False)
                for p in part.parameters():
                    p.grad = None
                    optimizer.state.pop(p, None)
            first += 1
        for group, end in zip(optimizer.param_groups, ends[first:]):
            group["lr"] = 1e-3 / end / 2 * (1 + math.cos(math.pi * t / end))
        with amp():
            loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def small_init(net: nn.Module, batches: Batches, amp: Amp = nullcontext, scale: float = 0.5) -> None:
    """Plain training from smaller weights."""
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if name.endswith("weight"):
                weight.mul_(scale)
    plain(net, batches, amp)


def levi(net: nn.Module, batches: Batches, amp: Amp = nullcontext, depths: int = 4, width: int = 128) -> None:
    """A frozen timm vision transformer and a small convolutional network, with a head and a loss at some depths.

    Both become parts of `net`: ``small`` and ``heads``.
    """
    net.requires_grad_(False).eval()
    blocks = len(net.blocks)
    depths = min(depths, blocks)
    before, layers = net.patch_embed.proj.in_channels, list[nn.Module]()
    for after in (width // 4, width // 2, width):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(1, after), nn.ReLU()]
        before = after
    net.small = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.heads = nn.ModuleList(nn.Linear(net.embed_dim + width, net.num_classes) for _ in range(depths))
    both = nn.ModuleList([net.small, net.heads]).to(net.cls_token.device)
    seen: list[Tensor] = []
    hooks = [
        net.blocks[(i + 1) * blocks // depths - 1].register_forward_hook(lambda part, args, out: seen.append(out))
        for i in range(depths)
    ]
    optimizer = AdamW(both.parameters())
    for x, y in batches:
        seen.clear()
        with amp():
            with torch.no_grad():
                net(x)
                features = [F.layer_norm(out[:, 0], out.shape[2:]) for out in seen]
            z = net.small(x)
            logits = [head(torch.cat([h, z], 1)) for head, h in zip(net.heads, features)]
            loss = sum(F.cross_entropy(each.float(), y) for each in logits) / depths
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for hook in hooks:
        hook.remove()


def wise_ft(net: nn.Module, batches: Batches, amp: Amp = nullcontext, alpha: float = 0.5) -> None:
    """Plain training, and the mean of the weights before and after it; buffers are those after it."""
    before = {name: p.detach().to("cpu", copy=True) for name, p in net.named_parameters()}
    plain(net, batches, amp)
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(torch.lerp(before[name].to(p.device), p, alpha))


# -- mixing ----------------------------------------------------------------------------------------------------------


def mixing(
    net: nn.Module,
    batches: Batches,
    amp: Amp = nullcontext,
    cut: bool = False,
    alpha: float = 0.2,
    prob: float = 1.0,
    smoothing: float = 0.0,
) -> None:
    """Mixup, or (`cut`) CutMix of square images."""
    optimizer = AdamW(trained(net))
    net.train()
    for x, y in batches:
        share, box, order = mix(x.shape[-1], len(x), cut, alpha, prob)
        order = order.to(x.device, non_blocking=True)
        if box is None:
            x = share * x + (1 - share) * x[order]
        else:
            x1, y1, x2, y2 = box
            x[..., y1:y2, x1:x2] = x[order][..., y1:y2, x1:x2]
        with amp():
            out = net(x)
            soft = share * F.one_hot(y, out.shape[1]) + (1 - share) * F.one_hot(y[order], out.shape[1])
            loss = F.cross_entropy(out, (1 - smoothing) * soft + smoothing / out.shape[1], reduction="none").mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def mix(size: int, count: int, cut: bool, alpha: float, prob: float) -> tuple[float, tuple[int, ...] | None, Tensor]:
    """The share that stays, the box (None for Mixup) and the partners; all of it stays where nothing is mixed."""
    if random.random() >= prob:
        return 1.0, None, torch.arange(count)
    share, box = random.betavariate(alpha, alpha), None
    if cut:
        half = int(0.5 * size * math.sqrt(1 - share))
        x, y = random.randrange(size), random.randrange(size)
        box = max(x - half, 0), max(y - half, 0), min(x + half, size), min(y + half, size)
        share = 1 - (box[2] - box[0]) * (box[3] - box[1]) / size**2
    return share, box, torch.randperm(count)


# -- gradients -------------------------------------------------------------------------------------------------------


def noisy(net: nn.Module, batches: Batches, amp: Amp = nullcontext, eta: float = 0.01, gamma: float = 0.55) -> None:
    """Gaussian noise of variance eta / (1 + t)^gamma on every gradient."""
    parameters = trained(net)
    optimizer = AdamW(parameters)
    net.train()
    for step, (x, y) in enumerate(batches):
        with amp():
            loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        gradients = [p.grad for p in parameters]
        noise = [torch.randn_like(g) for g in gradients]
        torch._foreach_add_(gradients, noise, alpha=math.sqrt(eta / (1 + step) ** gamma))
        optimizer.step()


def langevin(
    net: nn.Module,
    batches: Batches,
    amp: Amp = nullcontext,
    lr: float = 0.01,
    size: int = 1000,
    prior_std: float = 0.2,
    temperature: float = 1.0,
    every: int = 4,
) -> None:
    """SGD with a Gaussian prior and Langevin noise; every few steps the weights are copied to main memory."""
    parameters, samples = trained(net), []
    optimizer = torch.optim.SGD(parameters, lr=lr)
    net.train()
    for number, (x, y) in enumerate(batches, 1):
        with amp():
            loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            torch._foreach_add_([p.grad for p in parameters], parameters, alpha=temperature / (size * prior_std**2))
            optimizer.step()
            noise = [torch.randn_like(p) for p in parameters]
            torch._foreach_add_(parameters, noise, alpha=math.sqrt(2 * lr * temperature / size))
        if number % every == 0:
            sample = {name: value.to("cpu", copy=True) for name, value in net.state_dict().items()}
            samples = [*samples[-1:], sample]


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


def normalized(net: nn.Module, batches: Batches, amp: Amp = nullcontext, lr: float = 0.01) -> None:
    """SGD on the gradient divided by the mean of 1 - p of the label."""
    parameters = trained(net)
    optimizer = SGD(parameters, lr=lr)
    net.train()
    for x, y in batches:
        with amp():
            logits = net(x)
            loss = F.cross_entropy(logits, y)
        optimizer.zero_grad()
        loss.backward()
        z, y = logits.detach().float(), y[:, None]
        margin = z.gather(1, y) - z.scatter(1, y, -math.inf).logsumexp(1, keepdim=True)
        torch._foreach_mul_([p.grad for p in parameters], (1 / torch.sigmoid(-margin.double()).mean()).float())
        optimizer.step()


# -- past predictions ------------------------------------------------------------------------------------------------


def self_distillation(
    net: nn.Module,
    batches: Batches,
    amp: Amp = nullcontext,
    alpha: float = 0.8,
    epochs: int = 2,
    table: bool = True,
) -> None:
    """Labels mixed with what the network predicted one epoch ago, or (no `table`) with what its weights of that epoch's
    end predict now. Samples come in one order, epoch after epoch; past predictions lie in main memory."""
    optimizer, past = AdamW(trained(net)), []
    for epoch in range(epochs):
        teacher = copy.deepcopy(net).eval() if epoch and not table else None
        net.train()
        share, rows = alpha * (epoch + 1) / epochs, []
        for place, (x, y) in enumerate(batches):
            with amp():
                out = net(x)
            before = None
            if epoch and table:
                before = past[place].to(x.device, non_blocking=True)
            elif epoch:
                with torch.no_grad(), amp():
                    before = teacher(x).float().softmax(1)
            target = y if before is None else (1 - share) * F.one_hot(y, out.shape[1]) + share * before
            with amp():
                loss = F.cross_entropy(out, target, reduction="none").mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if table:
                rows.append(out.detach().float().softmax(1).cpu())
        past = rows


# -- long tails ------------------------------------------------------------------------------------------------------


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


class Shrink(nn.Module):
    """relu(a - b) - relu(-a - b) with one learnable b."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.zeros(()))

    def forward(self, a: Tensor) -> Tensor:
        return F.relu(a - self.b) - F.relu(-a - self.b)


def projection_head(net: nn.Module, batches: Batches, amp: Amp = nullcontext) -> None:
    """A head that starts as the identity before the classifier of a timm ResNet; it is thrown away at the end."""
    width = net.fc.in_features
    layers = [nn.Linear(width, width).to(net.fc.weight.device) for _ in range(2)]
    for layer in layers:
        nn.init.eye_(layer.weight)
        nn.init.zeros_(layer.bias)
    classifier, net.fc = net.fc, nn.Sequential(layers[0], Shrink().to(net.fc.weight.device), layers[1], net.fc)
    plain(net, batches, amp)
    net.fc = classifier


# -- convolutional networks ------------------------------------------------------------------------------------------


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


def residual_blocks(net: nn.Module) -> list[list[nn.Module]]:
    """Those of a timm ResNet, stage by stage."""
    return [list(stage) for stage in (net.layer1, net.layer2, net.layer3, net.layer4)]


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


def drop_block(
    net: nn.Module, batches: Batches, amp: Amp = nullcontext, first: float = 0.05, last: float = 0.2, size: int = 7
) -> None:
    """Squares left out between the first two convolutions of every block of a timm ResNet, more in later stages."""

    def dropping(p: float) -> Callable[..., tuple[Tensor]]:
        def hook(conv: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            (x,) = args
            side = min(size, *x.shape[2:])
            side -= side % 2 == 0
            seeds = (torch.rand_like(x[:, :1], dtype=torch.float32) < p / side**2).float()
            keep = 1 - F.max_pool2d(seeds, side, 1, side // 2)
            return (x * (keep * (keep.numel() / keep.sum().clamp_min(1))).to(x.dtype),)

        return hook

    handles = []
    for stage, blocks in enumerate(residual_blocks(net)):
        for block in blocks:
            hook = dropping(first + (last - first) * stage / 3)
            handles.append(block.conv2.register_forward_pre_hook(hook))
    plain(net, batches, amp)
    for handle in handles:
        handle.remove()


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


# -- regularization --------------------------------------------------------------------------------------------------

GUIDE = "resnet10t"


def guided(net: nn.Module, batches: Batches, amp: Amp = nullcontext) -> None:
    """The layers of a ResNet pulled towards those of an untrained one, by CKA of their outputs in each batch."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        guide = timm.create_model(GUIDE).eval().to(next(net.parameters()).device)
    of_net: list[Tensor] = []
    of_guide: list[Tensor] = []
    hooks = [
        part.register_forward_hook(lambda part, args, out, seen=seen: seen.append(out))
        for model, seen in ((net, of_net), (guide, of_guide))
        for part in model.modules()
        if type(part) in (nn.Conv2d, nn.AdaptiveAvgPool2d, nn.Linear)
    ]
    optimizer = AdamW(trained(net))
    net.train()
    for x, y in batches:
        of_net.clear()
        of_guide.clear()
        with amp():
            loss = F.cross_entropy(net(x), y)
            with torch.no_grad():
                guide(x)
        last, steps = len(of_net) - 2, len(of_guide) - 2  # the logits are left out
        pairs = {round(i * last / steps): i for i in range(steps + 1)}
        for j, i in sorted(pairs.items()):
            k, l = similarities(of_net[j]), similarities(of_guide[i])  # noqa: E741
            loss = loss + 1 - (k * l).sum() / ((k * k).sum() * (l * l).sum()).sqrt()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for hook in hooks:
        hook.remove()


def similarities(x: Tensor) -> Tensor:
    """Of samples ``[n, ...]``: products of all two, centred, ``[n, n]``."""
    x = x.flatten(1).float()
    x = x - x.mean(0)
    x = x / x.norm()
    return x @ x.T


# -- continual learning ----------------------------------------------------------------------------------------------


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
