"""Features of any network: what goes into a named part or comes out of it, and one vector a sample made of it.

A tap is a forward hook. It must be in place before the network's first call (a hook added after the first compiled call
never fires) and stays for the whole fit; nothing is copied, the tapped tensor is the network's own, with its graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_recipes.core import select
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.silence import left_alone

Side = Literal["input", "output"]
Pool = Literal["cls", "mean", "avg", "last"]
POOLS: tuple[Pool, ...] = ("cls", "mean", "avg", "last")
_OUTPUT_NAMES = ("last_hidden_state", "hidden_states", "logits", "pooler_output")
_CLASS_TOKENS = ("cls_token", "class_token", "cls_embedding", "class_embedding")
_LAST_TOKEN_HEADS = ("score", "lm_head")


class Taps:
    """Keeps the input or the output of named parts of a module in every call.

    Use it as a part of a fit (``plan.install(taps)``), as a context manager, or with :meth:`open` and :meth:`close`.
    A copy of the tapped module carries hooks that do nothing.

    Args:
        module: any module.
        points: by the caller's own name, (dotted path in `module`, 'input' or 'output'). A part's input is its first
            positional argument.
        training: keep what the module's own training pass computed and nothing else: nothing of passes without
            gradients (a validation), and nothing of silent ones (a replay in the step, a probe).

    Attributes:
        values: what the parts of the last call saw or gave, by name; the tensor of an output that holds several is the
            first one (or ``last_hidden_state`` of a Hugging Face output). Empty before the first call.

    Raises:
        RecipeError: for a path that is no part of the module; lists those near it.
    """

    def __init__(self, module: nn.Module, points: Mapping[str, tuple[str, Side]], *, training: bool = False) -> None:
        self.points, self.training = dict(points), training
        self.values: dict[str, Any] = {}
        self._parts = {name: part_of(module, path) for name, (path, _) in self.points.items()}
        self._handles: list[Any] = []

    def open(self) -> Taps:
        """Put the hooks on."""
        if self.training and not self._handles:
            self._let_go = left_alone(self.values)
        for name, (_, side) in self.points.items():
            part, keep = self._parts[name], _Keep(self.values, name, self.training)
            if side == "input":
                handle = part.register_forward_pre_hook(keep.input, with_kwargs=True)
            else:
                handle = part.register_forward_hook(keep.output)
            self._handles.append(handle)
        return self

    def close(self) -> None:
        """Take the hooks off and let go of the values."""
        if self.training and self._handles:
            self._let_go()
        while self._handles:
            self._handles.pop().remove()
        self.values.clear()

    def take(self) -> dict[str, Any]:
        """What the parts of the last call saw or gave, by name in the order of the calls, and let go of it."""
        values = dict(self.values)
        self.values.clear()
        return values

    def install(self, undo: ExitStack) -> None:
        """Tap for the length of a fit."""
        undo.callback(self.close)
        self.open()

    def __enter__(self) -> Taps:
        return self.open()

    def __exit__(self, *error: object) -> None:
        self.close()

    def __getitem__(self, name: str) -> Tensor:
        """The tensor that was tapped.

        Raises:
            RecipeError: when the part was not called, or gave no tensor.
        """
        path = self.points[name][0]
        if name not in self.values:
            raise RecipeError(f"{path} was not called in the last forward pass, so it has no features to read")
        value = tensor_in(self.values[name])
        if value is None:
            raise RecipeError(
                f"{path} gave {_describe(self.values[name])}, which holds no tensor of features; name another part"
            )
        return value


class Edits:
    """Changes the input or the output of named parts of a module in every call, for the length of a fit.

    Use it as a part of a fit (``plan.install(edits)``). A copy of the module carries hooks that do nothing.

    Args:
        module: any module.
        points: by the caller's own name, (dotted path in `module`, 'input' or 'output'), as for :class:`Taps`.
        edit: from the name, the part and the tensor to the tensor that takes its place. A part whose first argument,
            or whose output, is no tensor is an error.

    Raises:
        RecipeError: for a path that is no part of the module; lists those near it.
    """

    def __init__(
        self,
        module: nn.Module,
        points: Mapping[str, tuple[str, Side]],
        edit: Callable[[str, nn.Module, Tensor], Tensor],
    ) -> None:
        self.points = dict(points)
        self._parts = {name: part_of(module, path) for name, (path, _) in self.points.items()}
        self._edit = edit

    def install(self, undo: ExitStack) -> None:
        """Edit for the length of a fit."""
        for name, (path, side) in self.points.items():
            part, hook = self._parts[name], _Edit(self._edit, name, path, side)
            if side == "input":
                undo.callback(part.register_forward_pre_hook(hook).remove)
            else:
                undo.callback(part.register_forward_hook(hook).remove)


class _Edit:
    def __init__(self, edit: Callable[..., Tensor], name: str, path: str, side: Side) -> None:
        self.edit, self.name, self.path, self.side = edit, name, path, side

    def __call__(self, part: nn.Module, args: tuple[Any, ...], output: Any = None) -> Any:
        value = output if self.side == "output" else args[0] if args else None
        if not isinstance(value, Tensor):
            raise RecipeError(f"the {self.side} of {self.path} is {_describe(value)} and no tensor; name another part")
        changed = self.edit(self.name, part, value)
        return changed if self.side == "output" else (changed, *args[1:])

    def __reduce__(self) -> Any:
        return _Nothing, ()


class _Keep:
    """Writes into a table; a copy of it, in a copied or pickled module, writes nowhere."""

    def __init__(self, values: dict[str, Any], name: str, graph_only: bool = False) -> None:
        self.values, self.name, self.graph_only = values, name, graph_only
        self.input, self.output = _Input(self), _Output(self)


class _Input:
    def __init__(self, keep: _Keep) -> None:
        self.keep = keep

    def __call__(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.keep.graph_only and not torch.is_grad_enabled():
            return
        self.keep.values[self.keep.name] = args[0] if args else next(iter(kwargs.values()), None)

    def __reduce__(self) -> Any:
        return _Nothing, ()


class _Output:
    def __init__(self, keep: _Keep) -> None:
        self.keep = keep

    def __call__(self, part: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.keep.graph_only and not torch.is_grad_enabled():
            return
        self.keep.values[self.keep.name] = output

    def __reduce__(self) -> Any:
        return _Nothing, ()


class _Nothing:
    """What a hook becomes in a copy."""

    def __call__(self, *args: Any) -> None:
        return None


def part_of(module: nn.Module, path: str) -> nn.Module:
    """The part at a dotted path.

    Raises:
        RecipeError: lists the module's parts.
    """
    try:
        return module.get_submodule(path)
    except AttributeError:
        near = [name for name, _ in module.named_modules() if name and name.count(".") <= path.count(".")]
        raise RecipeError(f"{path!r} is no part of {type(module).__name__}; its parts are {near}") from None


def tensor_in(value: Any) -> Tensor | None:
    """The features in what a part gave: itself, the first tensor of a tuple, or the field of a Hugging Face output."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        return next((value[n] for n in _OUTPUT_NAMES if isinstance(value.get(n), Tensor)), None)
    if isinstance(value, (tuple, list)) and value and isinstance(value[0], Tensor):
        return value[0]
    return None


# -- finding what to tap ---------------------------------------------------------------------------------------------


def head_input(module: nn.Module, head: str = "auto") -> tuple[str, nn.Linear]:
    """The linear layer whose input is the network's last features.

    Args:
        module: a LightningModule or a network.
        head: 'auto' for the one that :func:`lightning_recipes.core.select.head` finds (the last Linear of a head of
            several layers), or a dotted path.

    Returns:
        its dotted path in `module`, and the layer.

    Raises:
        RecipeError: when there is none; lists the linear layers.
    """
    path = select.head(module) if head == "auto" else head
    part = part_of(module, path)
    linears = [(f"{path}.{name}" if name else path, p) for name, p in part.named_modules() if isinstance(p, nn.Linear)]
    if not linears:
        everywhere = [name for name, p in module.named_modules() if isinstance(p, nn.Linear)]
        raise RecipeError(
            f"the head {path!r} is a {type(part).__name__} and no linear layer; name the linear layer whose input are"
            f" the features, one of {everywhere}"
        )
    return linears[-1]


def blocks(module: nn.Module) -> list[str]:
    """Paths of the network's blocks in order, whose outputs are its features from depth to depth; the head is not one.

    The largest family of parts of one class under one parent (transformer blocks, the stages of a ResNet, the layers of
    a Sequential). The path of a bare layer in a Sequential is that of the last normalisation, activation or pooling
    that follows it, so that its output is what the next layer sees.

    Raises:
        RecipeError: when there is no such family.
    """
    return [place for _, place in _blocks(module)]


def _blocks(module: nn.Module) -> list[tuple[str, str]]:
    """Path of every block, and of the part that gives its output."""
    parts = {name for name, _ in module.named_modules()}
    found = {name: names for name, names in select.layers(module)[:-1] if name in parts}
    families: dict[tuple[str, type], list[str]] = {}
    for name in found:
        families.setdefault((name.rpartition(".")[0], type(module.get_submodule(name))), []).append(name)
    if not families:
        raise RecipeError(
            f"found no blocks in order in {type(module).__name__}; its parts are {select.names_of(module)}: name them"
        )
    parent_path, kind = max(reversed(families), key=lambda family: len(families[family]))  # the last of equals
    head, path = select.head(module), parent_path and parent_path + "."
    # With those that were counted to the stem or to what follows.
    family = [path + name for name, part in module.get_submodule(parent_path).named_children() if type(part) is kind]
    family = [name for name in family if name != head and not head.startswith(name + ".")]
    return [(name, _last_of_block(module, name, found.get(name, []))) for name in family]


def feature_maps(module: nn.Module, where: Literal["middle", "end"], argument: str) -> list[tuple[str, Side, int]]:
    """Where a convolutional network's feature maps [n, channels, height, width] are, from input to output.

    In residual blocks: in the middle of each, at the input of its second convolution, or at the end, where what is
    added to the shortcut comes out of its last convolution or batch norm. In a network without them: at the output of
    every block that holds a convolution.

    Args:
        argument: the caller's, by which places can be named, for the error.

    Returns:
        (path, 'input' or 'output', depth from 0) by place. Blocks under one parent have one depth, those of another
        parent the next; if all have one parent each is one deeper than the one before.

    Raises:
        RecipeError: when there are none; says what was looked for.
    """
    residual = select.convolutional_blocks(module)
    if residual:
        stages = list(dict.fromkeys(path.rpartition(".")[0] for path in residual))
        depths = {
            path: stages.index(path.rpartition(".")[0]) if len(stages) > 1 else i for i, path in enumerate(residual)
        }
        if where == "middle":
            return [(convolutions[1], "input", depths[path]) for path, (convolutions, _) in residual.items()]
        return [(last, "output", depths[path]) for path, (_, last) in residual.items()]
    try:
        found = _blocks(module)
    except RecipeError:
        found = []
    plain = [
        place for path, place in found if any(isinstance(p, nn.Conv2d) for p in module.get_submodule(path).modules())
    ]
    if not plain:
        raise RecipeError(
            f"found no feature maps in {type(module).__name__}: no residual blocks (parts with two 2-d convolutions of"
            f" their own) and no blocks in order with a convolution; its parts are {select.names_of(module)}: name"
            f" some with {argument}="
        )
    return [(path, "output", depth) for depth, path in enumerate(plain)]


def named_part(module: nn.Module, path: str) -> str:
    """The path of a part that is named from the LightningModule, or else from the network inside it.

    Raises:
        RecipeError: for a path that is no part; lists those near it.
    """
    parts = {name for name, _ in module.named_modules()}
    inside = f"{select.network(module)[0]}.{path}"
    if path not in parts and inside in parts:
        return inside
    part_of(module, path)
    return path


def _last_of_block(module: nn.Module, path: str, names: Sequence[str]) -> str:
    """The last sibling in a Sequential that belongs to a block: without parameters of another and not reshaping."""
    parent_path, _, name = path.rpartition(".")
    parent = module.get_submodule(parent_path)
    if not isinstance(parent, nn.Sequential):
        return path
    own = {id(p) for n, p in module.named_parameters() if n in names or n.startswith(path + ".")}
    children = list(parent.named_children())
    last = place = [child for child, _ in children].index(name)
    for i in range(place + 1, len(children)):
        part = children[i][1]
        if isinstance(part, (nn.Flatten, nn.Unflatten)) or any(id(p) not in own for p in part.parameters()):
            break
        last = i
    return f"{parent_path}.{children[last][0]}" if parent_path else children[last][0]


# -- maps in order ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Map:
    """One tensor that a part of a network gives, of which one axis is the batch's.

    Attributes:
        path: of the part.
        element: its place in a tuple that the part gives; None where it gives the tensor alone.
        axis: the batch's.
    """

    path: str
    element: int | None
    axis: int

    @property
    def name(self) -> str:
        """The path, with the place in a tuple."""
        return self.path if self.element is None else f"{self.path}[{self.element}]"

    def of(self, values: Mapping[str, Any]) -> Tensor:
        """The map in what taps by path saw, ``[n, ...]``: the batch first.

        Raises:
            RecipeError: when the part was not called, or gave something else than it did.
        """
        if self.path not in values:
            raise RecipeError(f"{self.path} was not called in this pass, and it was in the dry run before training")
        found = dict(_tensors_in(None, values[self.path])).get(self.element)
        if found is None or found.dim() <= self.axis:
            raise RecipeError(f"{self.path} gave {_describe(values[self.path])}, and in the dry run something else")
        return found.movedim(self.axis, 0)


def maps_in_order(
    module: nn.Module, paths: Iterable[str], run: Callable[[int], Any], count: int, *, training: bool = False
) -> list[Map]:
    """The maps that parts of a network give, in the order in which they are first called.

    The network runs twice, on `count` samples and on one less: the batch's axis is the one that follows. What has none,
    or two (similarities of samples), or has it merged into another (tokens of all samples in one axis) is no map. A
    recurrent layer's final state is none either, and an integer tensor.

    Args:
        paths: of the parts.
        run: runs the network on so many samples.
        count: samples, 2 or more.
        training: as for :class:`Taps`.
    """
    shapes = []
    for n in (count, count - 1):
        with Taps(module, {path: (path, "output") for path in paths}, training=training) as taps:
            run(n)
            shapes.append(
                {
                    (path, element): tuple(tensor.shape)
                    for path, value in taps.values.items()
                    for element, tensor in _tensors_in(part_of(module, path), value)
                }
            )
    found = []
    for (path, element), more in shapes[0].items():
        fewer = shapes[1].get((path, element), ())
        axes = [axis for axis, sizes in enumerate(zip(more, fewer)) if sizes[0] != sizes[1]]
        if len(more) == len(fewer) and len(axes) == 1 and more[axes[0]] == count and fewer[axes[0]] == count - 1:
            found.append(Map(path, element, axes[0]))
    return found


def _tensors_in(part: nn.Module | None, value: Any) -> list[tuple[int | None, Tensor]]:
    if isinstance(value, (tuple, list)):
        without_state = value[:-1] if isinstance(part, nn.RNNBase) else value
        return [
            (i, each) for i, each in enumerate(without_state) if isinstance(each, Tensor) and each.is_floating_point()
        ]
    tensor = tensor_in(value)
    return [] if tensor is None or not tensor.is_floating_point() else [(None, tensor)]


# -- one vector a sample ---------------------------------------------------------------------------------------------


def how_to_pool(module: nn.Module) -> Pool:
    """How a network of tokens makes one vector a sample, as far as its parts show it: by a class token or the first
    token of an encoder of text, by the last token (a head on a decoder), or else by the mean.
    """
    names = {name.rpartition(".")[2] for name, _ in module.named_parameters()}
    if names & set(_CLASS_TOKENS):
        return "cls"
    modules = {name.rpartition(".")[2] for name, _ in module.named_modules()}
    if modules & set(_LAST_TOKEN_HEADS):
        return "last"
    config = getattr(module, "config", None)
    if config is not None and getattr(config, "vocab_size", None) is not None:
        return "cls"  # an encoder of text reads its first token
    return "mean"


def pooled(value: Tensor, rows: int, pool: Pool, mask: Tensor | None = None, where: str = "the block") -> Tensor:
    """One vector a sample of a part's output.

    Args:
        value: ``[n, d]`` as it is; ``[n, tokens, d]``; ``[n, d, height, width]``, pooled over the places, or with
            pool='mean' ``[n, height, width, d]``.
        rows: n.
        pool: 'cls' (the first token), 'mean' (over tokens that are not padding), 'avg' (over places, channels second),
            'last' (the last token that is not padding).
        mask: ``[n, tokens]``, 0 where a token is padding.
        where: the part, for the error.

    Returns:
        ``[n, d]``.

    Raises:
        RecipeError: for a shape that pool cannot take.
    """
    fits = value.dim() >= 2 and len(value) == rows and value.is_floating_point()
    if fits and value.dim() == 2:
        return value
    if fits and pool == "avg" and value.dim() >= 3:
        return value.flatten(2).mean(2)
    if fits and pool == "mean" and (value.dim() == 4 or (value.dim() == 3 and mask is None)):
        return value.flatten(1, -2).mean(1)
    if fits and value.dim() == 3 and (mask is None or mask.shape == value.shape[:2]):
        if pool == "cls":
            return value[:, 0]
        if pool == "mean":
            share = mask.to(value.dtype)[..., None]
            return (value * share).sum(1) / share.sum(1).clamp_min(1)
        if mask is None:
            return value[:, -1]
        last = (mask.ne(0) * _places(mask)).argmax(1)
        return value.gather(1, last[:, None, None].expand(-1, 1, value.shape[2])).squeeze(1)
    raise RecipeError(
        f"{where} gave {str(value.dtype).removeprefix('torch.')} {list(value.shape)} for {rows} samples, which"
        f" pool={pool!r} does not make [n, d] of; 'avg' takes [n, d, places ...], 'mean' [n, tokens, d] or"
        " [n, height, width, d], 'cls' and 'last' [n, tokens, d]; or name other blocks"
    )


def _places(mask: Tensor) -> Tensor:
    return mask.new_ones(mask.shape[1]).cumsum(0)


def _describe(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {[type(v).__name__ for v in value]}"
    return f"a {type(value).__name__}"
