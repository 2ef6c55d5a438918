"""Weights at rest: means of two sets of weights, and other weights in a module for a while or for good.

With weights theta_0 and theta_1 of the same names and shapes, and diagonal Fisher informations f_0, f_1:

    theta = (1 - a) theta_0 + a theta_1
    theta = ((1 - a) f_0 theta_0 + a f_1 theta_1) / ((1 - a) f_0 + a f_1)        (Fisher-weighted)

Values always go into a module by a copy into the tensors that are there, so that optimizers, DDP and compiled code go
on holding the right ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_recipes.core.distributed import active, all_mean_, rank_and_world
from lightning_recipes.core.random import uniform
from lightning_recipes.core.sparse import reload_leaves

Weights = Mapping[str, Tensor]


# -- means -----------------------------------------------------------------------------------------------------------


def interpolate(first: Tensor, second: Tensor, alpha: float) -> Tensor:
    """(1 - alpha) first + alpha second, computed in fp32 at least and given back in the dtype of `second`.

    Exactly one of the two at alpha 0 and 1. Integers have no mean: theirs is `second` for any alpha above 0.
    """
    if alpha == 0 or alpha == 1 or not second.is_floating_point():
        return first.to(second) if alpha == 0 else second
    wide = torch.promote_types(second.dtype, torch.float32)
    return torch.lerp(first.to(second.device, wide), second.to(wide), alpha).to(second.dtype)


def fisher_mean(
    first: Tensor, second: Tensor, alpha: float, f_first: Tensor, f_second: Tensor, floor: float = 1e-8
) -> Tensor:
    """The mean of two tensors weighted entry by entry by their diagonal Fisher informations, each at least `floor`."""
    wide = torch.promote_types(second.dtype, torch.float32)
    of_first = (1 - alpha) * f_first.to(second.device, wide).clamp_min(floor)
    of_second = alpha * f_second.to(second.device, wide).clamp_min(floor)
    total = of_first * first.to(second.device, wide) + of_second * second.to(wide)
    return (total / (of_first + of_second)).to(second.dtype)


def distance(first: Weights, second: Weights) -> Tensor:
    """||second - first|| over all floating-point tensors of `first`, on the device of `second`, in fp32."""
    squares = [
        (second[name].detach().float() - value.to(second[name].device).float()).square().sum()
        for name, value in first.items()
        if value.is_floating_point()
    ]
    return torch.stack(squares).sum().sqrt()


# -- the tensors of a module -----------------------------------------------------------------------------------------


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and the buffers of a module that its state dict holds, themselves; tied ones once."""
    saved = module.state_dict(keep_vars=True)
    return {name: value for name, value in [*module.named_parameters(), *module.named_buffers()] if name in saved}


def copied(tensors: Weights) -> dict[str, Tensor]:
    """Copies on the CPU, where they cost no device memory."""
    with torch.inference_mode(False), torch.no_grad():
        return {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}


def of_rank_zero_(tensors: Weights, device: torch.device) -> None:
    """Overwrite tensors by those of rank 0, one after the other through `device`, where the ranks can talk."""
    if not active():
        return
    for value in tensors.values():
        passed = value.to(device)
        dist.broadcast(passed, 0)
        value.copy_(passed)


class Swap:
    """Other values in a module's tensors, until its own are put back bit for bit.

    Costs one copy of what is swapped, on its device, while other values are in place.

    Args:
        module: keeps its tensors; only their values change.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._own: dict[str, Tensor] = {}

    @property
    def own(self) -> Weights:
        """The module's own values of what is swapped; empty when nothing is."""
        return self._own

    def put(self, names: Iterable[str], value: Callable[[str, Tensor], Tensor]) -> None:
        """Write values into the tensors of these names.

        Args:
            names: of parameters and buffers (:func:`tensors_of`).
            value: from the name and the module's own value to the one to write; other values that are in place are
                written over, and the module's own stay what they were.
        """
        live = tensors_of(self._module)
        with torch.inference_mode(False), torch.no_grad():
            for name in names:
                if name not in self._own:
                    self._own[name] = live[name].detach().clone()
                live[name].copy_(value(name, self._own[name]))
        reload_leaves(self._module)

    def back(self) -> None:
        """Give the module its own values back."""
        live = tensors_of(self._module) if self._own else {}
        with torch.inference_mode(False), torch.no_grad():
            for name, value in self._own.items():
                live[name].copy_(value)
        reload_leaves(self._module)
        self._own = {}

    def keep(self) -> None:
        """Leave what is in place there, as the module's own."""
        self._own = {}

    def mend(self, state_dict: dict[str, Tensor]) -> None:
        """Put the module's own values into a state dict that was taken while others were in place."""
        own = {id(tensor): self._own[name] for name, tensor in tensors_of(self._module).items() if name in self._own}
        for name, tensor in self._module.state_dict(keep_vars=True).items():
            if id(tensor) in own and name in state_dict:
                state_dict[name] = own[id(tensor)]


# -- Fisher information ----------------------------------------------------------------------------------------------


def fisher_information(
    parameters: Mapping[str, nn.Parameter], logits_of_batches: Iterable[Tensor], key: int
) -> dict[str, Tensor]:
    """The diagonal of the Fisher information of a classifier, per sample.

    E_x E_{y ~ p(y|x)} (d log p(y|x) / d theta)^2. The labels are drawn from the model, so the terms of a batch are
    independent with mean 0, and the square of their summed gradient is an unbiased estimate of the sum of their
    squares: one backward pass a batch, of all ranks together.

    Args:
        parameters: by name; one that a batch's logits do not depend on gets no entry.
        logits_of_batches: ``[n, classes]`` each, with their graph; all ranks give their own share, equally many.
        key: of the labels (:func:`lightning_recipes.core.random.key`), which belong to the samples' places: ranks that
            share out a batch in turn draw those of one process.

    Returns:
        fp32 tensors of the parameters' shapes, the same on every rank.
    """
    names = [name for name, p in parameters.items() if p.requires_grad]
    rank, world = rank_and_world()
    sums: dict[str, Tensor] = {}
    count = 0
    for logits in logits_of_batches:
        places = torch.arange(count, count + len(logits), device=logits.device) * world + rank
        below = logits.detach().float().softmax(1).cumsum(1) <= uniform(key, places, (1,))
        labels = below.sum(1).clamp_max(logits.shape[1] - 1)
        loss = F.cross_entropy(logits.float(), labels, reduction="sum")
        found = torch.autograd.grad(loss, [parameters[name] for name in names], allow_unused=True)
        gradients = {name: gradient.float() for name, gradient in zip(names, found) if gradient is not None}
        all_mean_(list(gradients.values()))
        for name, gradient in gradients.items():
            square = gradient.mul_(world).square_()
            sums[name] = sums[name].add_(square) if name in sums else square
        count += len(logits)
    return {name: value / (count * world) for name, value in sums.items()}
