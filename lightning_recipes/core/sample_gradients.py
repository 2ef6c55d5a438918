"""The norm of every sample's own gradient, in one pass over a batch.

A layer that is called once gives it without the gradient itself. Of a linear layer with input a and output gradient g,
one row a position, dW = sum_t g_t a_t^T, so that

    || dW ||^2 = sum_{t,s} (a_t . a_s) (g_t . g_s),        || db ||^2 = || sum_t g_t ||^2

(Goodfellow 2015, https://arxiv.org/abs/1510.01799; Li et al. 2022, https://arxiv.org/abs/2110.05679). A convolution of
few positions is one on its patches, of many it is cheaper by the gradient of its weight itself; normalisations and
embeddings have as few terms. All other parameters (of layers that are called
twice, shared, parametrised or unknown) are differentiated sample by sample with ``torch.func``, many at once; their
gradients are held, those of the layers are not. What was found so is held against plain autograd on the first samples.

Samples must not depend on each other: batch norm in eval mode.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.grad import conv2d_weight
from torch.utils._pytree import tree_flatten, tree_unflatten

Loss = Callable[[Any, Tensor], Tensor]
"""From what a network gives for some samples, and their targets, to one loss a sample ``[n]``."""


class SampleGradients:
    """Norms of every sample's gradient with respect to all parameters of a network that require one.

    What the layers allow is found out in the first call. No ``.grad`` is touched.

    Args:
        network: in the mode in which it shall be differentiated.
        loss: one a sample.
        chunk: samples at once; None all. For each of them the gradients of parameters outside of known layers are held.
        layers: False differentiates all parameters with ``torch.func``.
    """

    def __init__(self, network: nn.Module, loss: Loss, chunk: int | None = 32, layers: bool = True) -> None:
        self.network, self.loss, self.chunk = network, loss, chunk
        self._trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self._layers: dict[str, nn.Module] = _known(network) if layers else {}
        self._looked = not layers

    def norms(self, args: tuple[Any, ...], targets: Tensor, kwargs: Mapping[str, Any] | None = None) -> Tensor:
        """One norm a sample, fp32 ``[n]``.

        Args:
            args, kwargs: of the network's call; tensors whose first axis is n long hold one entry a sample, all else
                is shared.
            targets: ``[n, ...]``.
        """
        leaves, tree = tree_flatten((args, dict(kwargs or {})))
        leaves = [each.detach() if isinstance(each, Tensor) else each for each in leaves]
        own = [i for i, v in enumerate(leaves) if isinstance(v, Tensor) and v.dim() and len(v) == len(targets)]

        def part(samples: slice) -> tuple[list[Any], Tensor]:
            return [each[samples] if i in own else each for i, each in enumerate(leaves)], targets[samples]

        def call(filled: list[Any], parameters: Mapping[str, Tensor] | None = None) -> Any:
            given, named = tree_unflatten(filled, tree)
            if parameters is None:
                return self.network(*given, **named)
            return functional_call(self.network, dict(parameters), given, named)

        if not self._looked:
            self._look(call, *part(slice(0, 2)))
        size = len(targets) if self.chunk is None else self.chunk
        found = [self._squares(call, own, *part(slice(at, at + size))) for at in range(0, len(targets), size)]
        return torch.cat(found).sqrt()

    def _look(self, call: Callable[..., Any], filled: list[Any], targets: Tensor) -> None:
        """Keep the layers that are called once, on one entry a sample, and give what plain autograd gives."""
        self._looked = True
        with torch.enable_grad(), _Calls(self._layers) as calls:
            loss = self.loss(call(filled), targets)
        self._layers = {
            name: self._layers[name]
            for name, seen in calls.seen.items()
            if len(seen) == 1 and seen[0][0] is not None and len(seen[0][0]) == len(seen[0][1]) == len(targets)
        }
        trained = {name: [p for p in part.parameters() if p.requires_grad] for name, part in self._layers.items()}
        every = [p for parameters in trained.values() for p in parameters]
        if not every:
            return
        rows = [iter(torch.autograd.grad(each, every, retain_graph=True, allow_unused=True)) for each in loss]
        plain = {name: [[next(row) for _ in parameters] for row in rows] for name, parameters in trained.items()}
        for name, found in self._of_layers(call, filled, targets).items():
            expected = torch.stack([_square(gradients) for gradients in plain[name]]).to(found)
            if not torch.allclose(found, expected, rtol=1e-3, atol=1e-12 + 1e-6 * float(expected.max())):
                del self._layers[name]

    def _squares(self, call: Callable[..., Any], own: list[int], filled: list[Any], targets: Tensor) -> Tensor:
        done = {
            f"{name}.{of}" if name else of for name, part in self._layers.items() for of, _ in part.named_parameters()
        }
        rest = {name: p.detach() for name, p in self._trained.items() if name not in done}
        total = torch.zeros(len(targets), device=targets.device)
        for squares in self._of_layers(call, filled, targets).values():
            total += squares
        if rest:
            total += self._of_rest(call, rest, own, filled, targets)
        return total

    def _of_layers(self, call: Callable[..., Any], filled: list[Any], targets: Tensor) -> dict[str, Tensor]:
        if not self._layers:
            return {}
        with torch.enable_grad(), _Calls(self._layers) as calls:
            loss = self.loss(call(filled), targets).sum()
            gradients = torch.autograd.grad(loss, [calls.seen[name][0][1] for name in self._layers], allow_unused=True)
        with torch.no_grad():
            return {
                name: _rule(part)(part, calls.seen[name][0][0], g.float())
                for (name, part), g in zip(self._layers.items(), gradients)
                if g is not None
            }

    def _of_rest(
        self, call: Callable[..., Any], rest: dict[str, Tensor], own: list[int], filled: list[Any], targets: Tensor
    ) -> Tensor:
        def loss(parameters: dict[str, Tensor], one: list[Tensor], target: Tensor) -> Tensor:
            single = list(filled)
            for place, value in zip(own, one):
                single[place] = value[None]
            return self.loss(call(single, parameters), target[None])[0]

        def squares(one: list[Tensor], target: Tensor) -> Tensor:
            gradients = grad(loss)(rest, one, target)
            return torch.stack([g.float().square().sum() for g in gradients.values()]).sum()

        # of all else nothing is to be recorded; of attention only its plain form is batched, others go sample by sample
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            return vmap(squares, randomness="different")([filled[i] for i in own], targets)


class _Calls:
    """Inputs and outputs of layers while a network runs; what follows a layer gets a copy, for it may work in place."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._parts, self._undo = dict(layers), ExitStack()
        self.seen: dict[str, list[tuple[Tensor | None, Tensor]]] = {name: [] for name in layers}

    def __enter__(self) -> _Calls:
        for name, part in self._parts.items():

            def keep(part: nn.Module, args: tuple[Any, ...], output: Any, name: str = name) -> Any:
                given = args[0].detach() if args and isinstance(args[0], Tensor) else None
                self.seen[name].append((given, output))
                return output.clone()

            self._undo.callback(part.register_forward_hook(keep).remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.close()


# -- squared norms by layer, from the layer, its input and the gradient of its output --------------------------------


def _linear(layer: nn.Linear, a: Tensor, g: Tensor) -> Tensor:
    a, g = (each.reshape(len(each), -1, each.shape[-1]) for each in (a, g))
    return _of_rows(layer, a, g)


def _convolution(layer: nn.Conv2d, a: Tensor, g: Tensor) -> Tensor:
    positions, p, d = g[0, 0].numel(), layer.out_channels, layer.weight[0].numel()
    if layer.groups == 1 and positions * (d + p) < d * p:
        patches = F.unfold(a, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        return _of_rows(layer, patches.mT, g.flatten(2).mT)

    def of_one(a: Tensor, g: Tensor) -> Tensor:
        way = (layer.stride, layer.padding, layer.dilation, layer.groups)
        return conv2d_weight(a[None], layer.weight.shape, g[None], *way).square().sum()

    total = vmap(of_one)(a.float(), g) if layer.weight.requires_grad else g.new_zeros(len(g))
    if layer.bias is not None and layer.bias.requires_grad:
        total = total + g.flatten(2).sum(2).square().sum(1)
    return total


def _of_rows(layer: nn.Module, a: Tensor, g: Tensor) -> Tensor:
    """Of a weight that maps rows a ``[n, positions, d]`` to rows of gradient g ``[n, positions, p]``, and its bias."""
    total, a = g.new_zeros(len(g)), a.float()
    if layer.weight.requires_grad:
        positions, d, p = a.shape[1], a.shape[2], g.shape[2]
        if positions == 1:
            total += a.square().sum((1, 2)) * g.square().sum((1, 2))
        elif positions * (d + p) < d * p:
            total += ((a @ a.mT) * (g @ g.mT)).sum((1, 2)).clamp_min(0)
        else:
            total += (g.mT @ a).square().sum((1, 2))
    if layer.bias is not None and layer.bias.requires_grad:
        total += g.sum(1).square().sum(1)
    return total


def _scale(layer: nn.Module, normalised: Tensor, g: Tensor, over: tuple[int, ...]) -> Tensor:
    """Of a factor and a summand that are the same along some axes."""
    total = g.new_zeros(len(g))
    for parameter, term in ((layer.weight, g * normalised.float()), (layer.bias, g)):
        if parameter is not None and parameter.requires_grad:
            total += (term.sum(over) if over else term).flatten(1).square().sum(1)
    return total


def _batch_norm(layer: nn.modules.batchnorm._BatchNorm, a: Tensor, g: Tensor) -> Tensor:
    normalised = F.batch_norm(a, layer.running_mean, layer.running_var, eps=layer.eps)
    return _scale(layer, normalised, g, tuple(range(2, g.dim())))


def _layer_norm(layer: nn.LayerNorm, a: Tensor, g: Tensor) -> Tensor:
    normalised = F.layer_norm(a, layer.normalized_shape, eps=layer.eps)
    return _scale(layer, normalised, g, tuple(range(1, g.dim() - len(layer.normalized_shape))))


def _group_norm(layer: nn.GroupNorm, a: Tensor, g: Tensor) -> Tensor:
    normalised = F.group_norm(a, layer.num_groups, eps=layer.eps)
    return _scale(layer, normalised, g, tuple(range(2, g.dim())))


def _embedding(layer: nn.Embedding, ids: Tensor, g: Tensor) -> Tensor:
    ids, g = ids.reshape(len(ids), -1), g.reshape(len(g), -1, g.shape[-1])
    if layer.padding_idx is not None:
        g = g * (ids != layer.padding_idx)[..., None]
    return ((g @ g.mT) * (ids[:, :, None] == ids[:, None, :])).sum((1, 2)).clamp_min(0)


KNOWN: dict[type[nn.Module], Callable[[Any, Tensor, Tensor], Tensor]] = {
    nn.Linear: _linear,
    nn.Conv2d: _convolution,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.BatchNorm3d: _batch_norm,
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
    nn.Embedding: _embedding,
}


def _rule(part: nn.Module) -> Callable[[Any, Tensor, Tensor], Tensor] | None:
    return next((KNOWN[kind] for kind in type(part).__mro__ if kind in KNOWN), None)


def _square(gradients: list[Tensor | None]) -> Tensor:
    return sum((g.float().square().sum().cpu() for g in gradients if g is not None), torch.zeros(()))


def _known(network: nn.Module) -> dict[str, nn.Module]:
    """Layers of those kinds that train, share no parameter, and have nothing unusual."""
    uses = Counter(id(p) for _, p in network.named_parameters(remove_duplicate=False))
    found = {}
    for name, part in network.named_modules():
        own = list(part.parameters())
        usual = _rule(part) is not None and all(uses[id(p)] == 1 for p in own) and any(p.requires_grad for p in own)
        if isinstance(part, nn.Conv2d):
            usual &= part.padding_mode == "zeros" and not isinstance(part.padding, str)
        elif isinstance(part, nn.Embedding):
            usual &= not part.scale_grad_by_freq and part.max_norm is None and not part.sparse
        elif isinstance(part, nn.modules.batchnorm._BatchNorm):
            usual &= not part.training and part.running_mean is not None
        if usual:
            found[name] = part
    return found
