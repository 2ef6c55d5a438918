"""The tangent kernel of a network's last layers: how alike two samples are in what would change their outputs.

With f_c(x) the C outputs of the readout and w the parameters of the last layers, as they stand,

    K(x, x') = 1/C sum_c df_c(x)/dw . df_c(x')/dw

It is the mean over outputs: the trace of the matrix of kernels that several outputs have, over C, which in a wide
network is the kernel of each of them and 0 between two (A. Jacot, F. Gabriel, C. Hongler, "Neural Tangent Kernel",
NeurIPS 2018, https://arxiv.org/abs/1806.07572). Parameters that are frozen count as well: the kernel is of the layers.

The readout itself, f = W h + b, has h . h' + 1 in it (h . h' without a bias), the features' own kernel. Of a layer
before it with input a and output o, plain autograd gives g_c = df_c/do through whatever is between, for all samples at
once, and ``torch.func`` what the layer makes of that, sample by sample and in chunks: nothing of the user's network but
that layer is called under ``vmap``. A linear layer with one row a sample needs no Jacobian: it has

    (a . a' + 1) 1/C sum_c g_c . g_c'

Samples must not depend on each other: eval mode.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.utils.parametrize import is_parametrized

from lightning_recipes.core.errors import RecipeError

HELD = 2**25
"""Numbers of a Jacobian that are held at once: 256 MB."""
KEPT = 2**28
"""Numbers that are kept of all samples at most: 1 GB."""
INSTEAD = "use kernel='features'"


@dataclass
class _Call:
    """One call of a layer: what it got, and what it gave, from which the rest of the pass was computed."""

    name: str
    part: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Tensor | None  # None for another thing than one tensor of numbers

    @property
    def sizes(self) -> tuple[torch.Size, torch.Size] | None:
        """Of input and output; None where they are not one tensor each."""
        given = self.args[0] if len(self.args) == 1 and not self.kwargs else None
        return (given.shape, self.output.shape) if isinstance(given, Tensor) and self.output is not None else None

    @property
    def work(self) -> int:
        """Multiplications of one sample, nearly: each weight once a place of the output."""
        if self.output is None or not self.output.dim():
            return 0
        places = self.output[0].numel()
        return sum(p.numel() * max(1, places // len(p)) for p in _own(self.part).values() if p.dim() > 1)


@dataclass(frozen=True)
class _Layer:
    """A layer of which the kernel is.

    Attributes:
        name: path.
        input, output: sizes of one sample's.
        integers: whether the input is of integers.
        row: whether it is linear on one row a sample.
        parameters: how many.
        work: multiplications of one sample's call.
    """

    name: str
    input: torch.Size
    output: torch.Size
    integers: bool
    row: bool
    parameters: int
    work: int


class LastLayers:
    """The readout and the last layers before it: back to the first with a weight matrix, and norms on the way.

    Args:
        module: any module.
        head: dotted path of the readout in it.

    Attributes:
        names: of the layers before the readout, in the order of their calls; once they have been found.
        outputs: how many the readout has.
        size: numbers that are kept of one sample.
    """

    def __init__(self, module: nn.Module, head: str) -> None:
        self.module, self.head = module, head
        self.outputs = self.size = 0
        self._work = 1  # multiplications of a forward pass
        self._layers: list[_Layer] = []
        self._calls: list[_Call] = []
        self._given: Tensor | None = None

    @property
    def names(self) -> list[str]:
        return [layer.name for layer in self._layers]

    # -- which they are --------------------------------------------------------------------------------------------

    def find(self, run: Callable[[], object]) -> None:
        """Find the layers in a pass of the network, and hold what is made of them against plain autograd.

        Args:
            run: has the network run on a few samples, in eval mode.

        Raises:
            RecipeError: where no layer with parameters is called before the readout; where its outputs have no
                gradient with respect to one; and for layers that are called twice, or not from one tensor with a
                sample a row to another.
        """
        with self._watched(dict(_leaves(self.module, self.head))):
            run()
            outputs, calls = self._given, self._calls
            if not calls:
                raise RecipeError(
                    f"kernel='ntk' needs a layer with parameters before the readout {self.head}, and none is called"
                    f" there; {INSTEAD}, which is the kernel of the readout alone"
                )
            reached = self._reached(outputs, calls)
            last = len(reached)
            while last and (last == len(reached) or not _is_matrix(reached[last].part)):
                last -= 1
            chosen = reached[last:]
            self._layers = [self._checked(call, [each.name for each in calls], len(outputs)) for call in chosen]
            self.outputs = outputs.shape[1]
            self._work = max(1, sum(call.work for call in calls) + self.outputs * self._features())
            self.size = sum(each.input.numel() + self.outputs * each.output.numel() for each in self._layers)
            for call, layer in zip(chosen, self._layers):
                self._hold_against_autograd(call, layer, outputs)

    def _reached(self, outputs: Tensor, calls: list[_Call]) -> list[_Call]:
        """The calls that the outputs have a gradient with respect to."""
        made = [call for call in calls if call.output is not None]
        there = bool(made) and outputs.requires_grad
        found = self._gradients(outputs.sum(), [call.output for call in made]) if there else ()
        reached = [call for call, gradient in zip(made, found) if gradient is not None]
        if not reached:
            before = ", ".join(dict.fromkeys(call.name for call in calls))
            raise RecipeError(
                f"kernel='ntk' differentiates the outputs of {self.head} with respect to a layer before it, and they"
                f" have no gradient there ({before}): the network runs under torch.no_grad, or detaches what it gives;"
                f" {INSTEAD}"
            )
        return reached

    def _gradients(self, value: Tensor, of: list[Tensor]) -> tuple[Tensor | None, ...]:
        try:
            return torch.autograd.grad(value, of, retain_graph=True, allow_unused=True)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # torch's only one for an operation without a derivative
            raise RecipeError(
                f"kernel='ntk' cannot differentiate the outputs of {self.head} with respect to the layers before it"
                f" ({_first(error)}); {INSTEAD}"
            ) from error

    def _checked(self, call: _Call, called: list[str], count: int) -> _Layer:
        kind, times = type(call.part).__name__, called.count(call.name)
        if times > 1:
            raise RecipeError(
                f"kernel='ntk' takes layers that are called once in a pass; {call.name} ({kind}) is called {times}"
                f" times: {INSTEAD}"
            )
        sizes = call.sizes
        if sizes is None or sizes[0][:1] != (count,) or sizes[1][:1] != (count,):
            raise RecipeError(
                f"kernel='ntk' takes layers from one tensor with a sample a row to another; {call.name} ({kind}) is"
                f" none: {INSTEAD}"
            )
        row = _by_rows(call.part, call.args[0])
        size = sum(p.numel() for p in _own(call.part).values())
        numbers = call.args[0].is_floating_point()
        return _Layer(call.name, sizes[0][1:], sizes[1][1:], not numbers, row, size, call.work)

    def _features(self) -> int:
        return getattr(self.module.get_submodule(self.head), "in_features", 0)

    def passes(self, samples: int) -> int:
        """What it costs to read so many samples and make their kernel, in forward passes of one sample.

        A forward pass, one more for each output's way back through the last layers, and by their multiplications the
        Jacobians and the products of all pairs, which are most of it.
        """
        work = 0
        for layer in self._layers:
            if layer.row:
                work += samples**2 * (layer.input.numel() + self.outputs * layer.output.numel())
                continue
            again = 1 + samples / _half(layer.parameters) / 2 if _chunk(layer.parameters) < samples else 1
            work += self.outputs * samples * (samples * layer.parameters + round(again * layer.work))
        return samples * (1 + self.outputs) + round(work / self._work)

    def _hold_against_autograd(self, call: _Call, layer: _Layer, outputs: Tensor) -> None:
        """The Jacobian's row of one sample's outputs together; of a layer that trains, for others have no gradient."""
        trained = {name: p for name, p in _own(call.part).items() if p.requires_grad}
        try:
            (g,) = self._gradients(outputs[0].sum(), [call.output])
            found = _by_name(_copied(call.part), call.args[0][:1], g[:1])
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # torch's for what neither vmap nor fp64 nor a copy can do
            raise RecipeError(
                f"kernel='ntk' cannot call {layer.name} ({type(call.part).__name__}) sample by sample"
                f" ({_first(error)}); {INSTEAD}"
            ) from error
        plain = self._gradients(outputs[0].sum(), list(trained.values())) if trained else ()
        for name, expected in zip(trained, plain):
            expected = torch.zeros_like(trained[name]) if expected is None else expected
            rough = 5e-2 if expected.dtype in (torch.bfloat16, torch.float16) else 1e-3
            scale = float(expected.abs().max())
            if not torch.allclose(found[name][0].to(expected), expected, rtol=rough, atol=rough * scale + 1e-12):
                raise RecipeError(
                    f"kernel='ntk' takes layers whose parameters act in one call alone; {layer.name}.{name} has another"
                    f" gradient than that: {INSTEAD}"
                )

    # -- reading ---------------------------------------------------------------------------------------------------

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, passes of the network are seen, eagerly: a compiled call would pass by hooks that were not there."""
        parts = dict(self.module.named_modules())
        gone = [name for name in (*self.names, self.head) if name not in parts]
        if gone:
            raise RecipeError(f"{gone[0]} is no longer part of the network")
        with self._watched({name: parts[name] for name in self.names}):
            yield

    @contextmanager
    def _watched(self, parts: Mapping[str, nn.Module]) -> Iterator[None]:
        def keep(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, name: str) -> Any:
            args = tuple(each.detach().clone() if isinstance(each, Tensor) else each for each in args)
            if not isinstance(output, Tensor) or not output.is_floating_point():
                self._calls.append(_Call(name, part, args, kwargs, None))
                return output
            output = output if output.requires_grad else output.detach().requires_grad_()
            self._calls.append(_Call(name, part, args, kwargs, output))
            return output.clone()  # as of what came in: what follows may work in place

        def end(part: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._given = output

        with ExitStack() as undo:
            undo.enter_context(torch.compiler.set_stance("force_eager"))
            undo.callback(self._forget)
            for name, part in parts.items():
                undo.callback(part.register_forward_hook(partial(keep, name=name), with_kwargs=True).remove)
            undo.callback(self.module.get_submodule(self.head).register_forward_hook(end).remove)
            yield

    def _forget(self) -> None:
        self._calls, self._given = [], None

    def take(self) -> dict[str, Tensor]:
        """Of the last pass what the layers got, and the gradients of all outputs there: ``[n, ...]``, each flat.

        Raises:
            RecipeError: when the pass was another than the one in which the layers were found.
        """
        outputs, calls = self._given, {call.name: call for call in self._calls}
        self._forget()
        n = 0 if outputs is None else len(outputs)
        expected = {layer.name: ((n, *layer.input), (n, *layer.output)) for layer in self._layers}
        if not n or {name: call.sizes for name, call in calls.items()} != expected:
            raise RecipeError(f"the layers before {self.head} are called otherwise than before training")
        at = [calls[layer.name].output for layer in self._layers]
        rows = [self._gradients(each.sum(), at) for each in outputs.unbind(1)]
        found = {}
        for number, layer in enumerate(self._layers):
            gradients = [torch.zeros_like(at[number]) if row[number] is None else row[number] for row in rows]
            found[f"inputs of {layer.name}"] = calls[layer.name].args[0].flatten(1)
            found[f"gradients at {layer.name}"] = torch.stack(gradients, 1).flatten(1)
        return found

    def kernel(self, features: Tensor, kept: Mapping[str, Tensor], device: torch.device | str = "cpu") -> Tensor:
        """The kernel matrix of some samples, ``[n, n]`` in fp64.

        Args:
            features: that go into the readout, ``[n, p]``.
            kept: what :meth:`take` gave of them.
            device: one that has fp64.
        """
        features = features.to(device, torch.float64)
        head = self.module.get_submodule(self.head)
        total = features @ features.T + float(getattr(head, "bias", None) is not None)
        for layer in self._layers:
            a = kept[f"inputs of {layer.name}"].reshape(-1, *layer.input).to(device)
            g = kept[f"gradients at {layer.name}"].reshape(len(a), -1, *layer.output).to(device)
            total += layer_kernel(self.module.get_submodule(layer.name), a.long() if layer.integers else a, g)
        return total


def layer_kernel(layer: nn.Module, inputs: Tensor, gradients: Tensor, held: int = HELD) -> Tensor:
    """What one layer's own parameters have in the tangent kernel, ``[n, n]`` in fp64.

    Args:
        layer: called once, from one tensor to another.
        inputs: a, ``[n, ...]``.
        gradients: g_c of the C outputs, ``[n, C, ...]``.
        held: numbers of the Jacobian to hold at once; where it has more, it is made chunk by chunk, and again for each
            other chunk.
    """
    n, c = gradients.shape[:2]
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    gradients = gradients.double()
    if _by_rows(layer, inputs):
        flat = gradients.flatten(1)
        return (inputs @ inputs.T + float(layer.bias is not None)) * (flat @ flat.T) / c
    layer = _copied(layer, inputs.device)
    size = sum(p.numel() for p in _own(layer).values())
    chunk = _chunk(size, held)
    total = inputs.new_zeros(n, n, dtype=torch.float64)
    for g in gradients.unbind(1):
        if chunk >= n:
            rows = _jacobian(layer, inputs, g)
            total.addmm_(rows, rows.T)
            continue
        half = _half(size, held)
        pieces = [slice(at, at + half) for at in range(0, n, half)]
        for i, first in enumerate(pieces):
            rows = _jacobian(layer, inputs[first], g[first])
            total[first, first] += rows @ rows.T
            for second in pieces[i + 1 :]:
                block = rows @ _jacobian(layer, inputs[second], g[second]).T
                total[first, second] += block
                total[second, first] += block.T
    return total / c


def _by_rows(layer: nn.Module, inputs: Tensor) -> bool:
    return type(layer) is nn.Linear and inputs.dim() == 2


def _chunk(parameters: int, held: int = HELD) -> int:
    """Samples whose Jacobian is held at once."""
    return max(1, held // max(parameters, 1))


def _half(parameters: int, held: int = HELD) -> int:
    """The same where two chunks are held."""
    return max(1, _chunk(parameters, held) // 2)


def _jacobian(layer: nn.Module, inputs: Tensor, g: Tensor) -> Tensor:
    """Derivatives of every sample's output with respect to the layer's parameters, ``[n, parameters]``."""
    return torch.cat([each.flatten(1) for each in _by_name(layer, inputs, g).values()], 1)


def _by_name(layer: nn.Module, inputs: Tensor, g: Tensor) -> dict[str, Tensor]:
    """The same by parameter, ``[n, ...]``.

    Args:
        layer: a copy in fp64.
        inputs: ``[n, ...]``.
        g: with respect to its output, ``[n, ...]``.
    """
    own = {name: p.detach() for name, p in _own(layer).items()}

    def of_one(a: Tensor, g: Tensor) -> dict[str, Tensor]:
        _, back = vjp(lambda parameters: functional_call(layer, parameters, (a[None],)), own)
        return back(g[None])[0]

    inputs = inputs.double() if inputs.is_floating_point() else inputs
    with torch.no_grad():
        return vmap(of_one)(inputs, g.double())


def _copied(layer: nn.Module, device: torch.device | None = None) -> nn.Module:
    """In fp64, in eval mode and without hooks: those of others are not to see it."""
    own = copy.deepcopy(layer).double().eval()
    for part in own.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    return own if device is None else own.to(device)


def _leaves(module: nn.Module, head: str) -> Iterator[tuple[str, nn.Module]]:
    """Layers with parameters outside of the readout: parts that have no further parts with parameters."""
    for name, part in module.named_modules():
        if name == head or name.startswith(f"{head}.") or head.startswith(f"{name}.") or not name:
            continue
        inside = ".parametrizations" in f".{name}"  # of a layer that has them
        below = any(True for child, p in part.named_children() if child != "parametrizations" for _ in p.parameters())
        if not inside and not below and _own(part):
            yield name, part


def _own(part: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of a layer, those of its parametrizations among them."""
    if is_parametrized(part):
        return dict(part.named_parameters())
    return dict(part.named_parameters(recurse=False))


def _is_matrix(part: nn.Module) -> bool:
    return any(p.dim() > 1 for p in _own(part).values())


def _first(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
