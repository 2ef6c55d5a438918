"""The methods of ``callbacks/finetuning`` by hand."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

from benchmarks.loops.baseline import Amp, Batches, descend, plain, trained

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
