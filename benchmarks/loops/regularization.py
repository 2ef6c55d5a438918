"""The methods of ``callbacks/regularization`` by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from benchmarks.loops.baseline import Amp, Batches, plain, residual_blocks, trained


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
