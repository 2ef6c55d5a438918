"""Finding parts of a stock module: the network, its head, its layers in order, and whatever the user names."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import lightning.pytorch as pl
from torch import nn
from torch.nn import Parameter
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import type_before_parametrizations

from lightning_recipes.core.errors import RecipeError

HEAD_NAMES = ("head", "heads", "fc", "classifier", "score", "lm_head", "qa_outputs", "output", "out")
SHORTCUTS = ("shortcut", "downsample", "skip")  # what is beside a block's own layers is called one of these
_WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding)


def network(module: nn.Module) -> tuple[str, nn.Module]:
    """The network inside a LightningModule: the first module on the way down that has more than one part to train.

    Returns:
        its dotted path ('' for the module itself) and the module.
    """
    path, part = "", module
    while not isinstance(part, (nn.Sequential, nn.ModuleList)):
        children = _children(part)
        if len(children) != 1 or any(True for _ in part.parameters(recurse=False)) or isinstance(part, _WEIGHTED):
            break
        name, child = children[0]
        if not _children(child):
            break
        path, part = f"{path}.{name}" if path else name, child
    return path, part


def head(module: nn.Module) -> str:
    """Dotted path of the head: what timm calls the classifier, else the last part with a head's name, else the last
    Linear or convolution.

    Raises:
        RecipeError: when there is none; lists the top-level names.
    """
    path, root = network(module)
    config = getattr(root, "pretrained_cfg", None) or getattr(root, "default_cfg", None)
    named = config.get("classifier") if hasattr(config, "get") else None
    if isinstance(named, str) and _has_parameters(root, named):
        return _join(path, named)
    for name, child in reversed(_children(root)):
        if name in HEAD_NAMES:
            last = _last_linear(child)
            # torchvision's `classifier` may hold hidden layers; Hugging Face's two-layer heads are all head.
            return _join(path, name, last if isinstance(child, nn.Sequential) else "")
    last = _last_linear(root)
    if not last:
        raise RecipeError(
            f"found no head in {type(module).__name__}; its parts are {names_of(module)}: name the one that is the head"
        )
    return _join(path, last)


def layers(module: nn.Module) -> list[tuple[str, list[str]]]:
    """The network cut into layers from input to output, the head last.

    timm's group matcher where the model has one; else the parts of the network in order, a trunk of repeated blocks
    opened up into its blocks, normalisation joined to what it follows.

    Returns:
        (name, parameter names in the LightningModule) by layer; every parameter stands in exactly one.
    """
    path, root = network(module)
    head_path = head(module)
    everything = [name for name, _ in module.named_parameters()]
    in_head = _parameters_of(module, head_path)
    if hasattr(root, "group_matcher"):
        groups = _timm_groups(path, root, set(in_head))
    else:
        groups = _trunk_groups(module, path, root, head_path, set(in_head))
    grouped = {name for _, names in groups for name in names} | set(in_head)
    left = [name for name in everything if name not in grouped]
    if left:
        groups.insert(0, ("stem", left)) if not groups else groups[0][1].extend(left)
    return [(name, names) for name, names in groups if names] + [("head", in_head)]


def convolutional_blocks(module: nn.Module) -> dict[str, tuple[list[str], str]]:
    """The residual blocks of a convolutional network, from input to output.

    A block is a part inside the network, no mere sequence, that holds two or more 2-d convolutions of its own; those
    of a shortcut do not count.

    Returns:
        by path of the block: the paths of its convolutions in order, and the path of the last of its convolutions and
        batch norms, which gives what is added to the shortcut. Empty where there are none.
    """
    root, _ = network(module)
    try:
        head_path = head(module)
    except RecipeError:
        head_path = ""
    found: dict[str, tuple[list[str], str]] = {}
    for path, part in module.named_modules():
        outside = path == root or not _under(path, root) if root else not path
        if outside or _under(head_path, path) or isinstance(part, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            continue
        own = [(n, c) for n, c in part.named_children() if not any(word in n for word in SHORTCUTS)]
        convolutions = [_join(path, name) for name, child in own if isinstance(child, nn.Conv2d)]
        if len(convolutions) > 1 and not any(_under(path, other) for other in found):
            last = [_join(path, name) for name, child in own if isinstance(child, (nn.Conv2d, _BatchNorm))][-1]
            found[path] = convolutions, last
    return found


def groups(
    module: nn.Module, wanted: Literal["auto"] | Sequence[str | Sequence[str]], never: Sequence[str] = ()
) -> tuple[list[tuple[str, list[str]]], list[str]]:
    """The network's parameters in groups from the head down.

    Args:
        wanted: 'auto' for :func:`layers`; or the groups, each a pattern of :func:`parameters_under` or some of them. A
            part without parameters gives an empty group.
        never: patterns of what is in no group.

    Returns:
        (name, parameter names) by group, and the names under `never`.

    Raises:
        RecipeError: for a pattern that matches nothing, a parameter in two groups, or one that is in none.
    """
    left_out = parameters_under(module, never, "never") if never else []
    if wanted == "auto":
        found = [(name, [n for n in names if n not in left_out]) for name, names in reversed(layers(module))]
        return [(name, names) for name, names in found if names], left_out
    found, owner = [], {}
    for entry in wanted:
        patterns = [entry] if isinstance(entry, str) else list(entry)
        names = parameters_under(module, [p for p in patterns if not _is_bare(module, p)], "groups")
        for name in names:
            if name in owner or name in left_out:
                raise RecipeError(f"groups: parameter {name!r} is in {owner.get(name, 'never')} and in {patterns}")
            owner[name] = patterns
        found.append((patterns[0], names))
    left = [name for name, _ in module.named_parameters() if name not in owner and name not in left_out]
    if left:
        raise RecipeError(
            f"groups: {len(left)} parameters are in no group, the first {left[0]!r}; add them or put them in never"
        )
    return found, left_out


def _is_bare(module: nn.Module, path: str) -> bool:
    """Whether a path, from the module or from the network in it, is a part without parameters."""
    root, _ = network(module)
    parts = dict(module.named_modules())
    named = [parts[p] for p in (path, _join(root, path)) if p in parts]
    return path != "head" and bool(named) and not any(True for part in named for _ in part.parameters())


def parts_under(module: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    """The largest parts all of whose parameters are among `names`."""
    chosen, found = set(names), []

    def look(part: nn.Module, path: str) -> None:
        own = [_join(path, name) for name, _ in part.named_parameters()]
        if own and chosen.issuperset(own):
            found.append(part)
        else:
            for name, child in part.named_children():
                look(child, _join(path, name))

    look(module, "")
    return found


def parts_of_types(module: nn.Module, types: Iterable[type[nn.Module]]) -> list[str]:
    """Paths of the parts whose class is one of these and no subclass, in the order in which they are registered.

    A layer that an adapter wraps (peft's ``base_layer``) counts by the layer's class, at the adapter's place and with
    nothing inside it; one whose class was changed (a parametrized one, one of ``core.sparse``, which says with
    ``stands_for`` what it was) by the class that it had before.
    """
    wanted, found = tuple(types), []

    def look(part: nn.Module, path: str) -> None:
        base = getattr(part, "base_layer", None)
        kind = type_before_parametrizations(base if isinstance(base, nn.Module) else part)
        if vars(kind).get("stands_for", kind) in wanted:
            found.append(path)
            if isinstance(base, nn.Module):
                return
        for name, child in part.named_children():
            look(child, _join(path, name))

    look(module, "")
    return [path for path in found if path]


def parts_named(module: nn.Module, patterns: Sequence[str], argument: str) -> list[str]:
    """Paths of the parts of these names, in which `*` stands for any one name between dots (``blocks.*.attn``).

    A name counts from the LightningModule, or else from the network inside it.

    Raises:
        RecipeError: for a pattern that matches nothing; lists names close to it.
    """
    everything = [name for name, _ in module.named_modules() if name]
    root, _ = network(module)
    found: dict[str, None] = {}
    for pattern in patterns:
        hits = [n for n in everything if _is_named(n, pattern)]
        hits = hits or [n for n in everything if _is_named(n, _join(root, pattern))]
        if not hits:
            near = difflib.get_close_matches(_join(root, pattern), everything, 5)
            listed = f"near it are {near}" if near else f"its parts are {[n for n in everything if n.count('.') < 2]}"
            raise RecipeError(f"{argument}: {pattern!r} is no part of {type(module).__name__}; {listed}")
        found.update(dict.fromkeys(hits))
    return list(found)


def _is_named(name: str, pattern: str) -> bool:
    names, patterns = name.split("."), pattern.split(".")
    return len(names) == len(patterns) and all(map(fnmatch.fnmatchcase, names, patterns))


def parameters_under(module: nn.Module, patterns: Sequence[str], argument: str) -> list[str]:
    """Names of the parameters under the given module paths, parameter names or `*` patterns; 'head' finds the head.

    A path counts from the LightningModule, or else from the network inside it.

    Raises:
        RecipeError: for a pattern that matches nothing; lists the module's parts.
    """
    everything = [name for name, _ in module.named_parameters()]
    root, _ = network(module)
    found: dict[str, None] = {}
    for pattern in patterns:
        hits = [n for n in everything if _matches(n, pattern)] or [
            n for n in everything if _matches(n, _join(root, pattern))
        ]
        if not hits and pattern == "head":
            hits = _parameters_of(module, head(module))
        if not hits:
            raise RecipeError(
                f"{argument}: {pattern!r} matches no parameter; the module's parts are {names_of(module)}"
            )
        found.update(dict.fromkeys(hits))
    return list(found)


def parameters_by(
    module: nn.Module, wanted: str | Sequence[str] | Callable[[str, Parameter], bool], argument: str
) -> list[str]:
    """Names of the parameters under one or several patterns of :func:`parameters_under`, or those of which a function
    of name and parameter says so.

    Raises:
        RecipeError: for a pattern that matches nothing, or a function that chooses none; lists the module's parts.
    """
    if not callable(wanted):
        return parameters_under(module, [wanted] if isinstance(wanted, str) else wanted, argument)
    found = [name for name, parameter in module.named_parameters() if wanted(name, parameter)]
    if not found:
        raise RecipeError(f"{argument}: the function chooses no parameter; the module's parts are {names_of(module)}")
    return found


def names_of(module: nn.Module, depth: int = 2) -> list[str]:
    """Dotted names of the parts with parameters, down to a depth, for error messages."""
    return [n for n, p in module.named_modules() if n and n.count(".") < depth and any(True for _ in p.parameters())]


def has_batch_norm(module: nn.Module) -> bool:
    """Whether any layer keeps batch statistics."""
    return any(isinstance(part, _BatchNorm) for part in module.modules())


def _parameters_of(module: nn.Module, path: str) -> list[str]:
    """Names of a part's parameters in the module; a tied one goes by the name under which it comes first."""
    own = {id(p) for p in module.get_submodule(path).parameters()}
    return [name for name, p in module.named_parameters() if id(p) in own]


def _join(*parts: str) -> str:
    return ".".join(p for p in parts if p)


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, child) for name, child in module.named_children() if any(True for _ in child.parameters())]


def _under(name: str, path: str) -> bool:
    return name == path or name.startswith(path + ".")


def _matches(name: str, pattern: str) -> bool:
    if any(c in pattern for c in "*?["):
        return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, pattern + ".*")
    return _under(name, pattern)


def _has_parameters(root: nn.Module, path: str) -> bool:
    try:
        return any(True for _ in root.get_submodule(path).parameters())
    except AttributeError:
        return False


def _last_linear(root: nn.Module) -> str:
    found = [name for name, part in root.named_modules() if isinstance(part, (nn.Linear, nn.modules.conv._ConvNd))]
    found = [name for name in found if not any(_under(name, other) for other in found if other != name)]
    return found[-1] if found else ""  # what stands inside a layer (a head before it) is a part of that layer


def _timm_groups(path: str, root: nn.Module, in_head: set[str]) -> list[tuple[str, list[str]]]:
    from timm.models import group_parameters

    by_depth = group_parameters(root, root.group_matcher(coarse=True))
    groups: list[tuple[str, list[str]]] = []
    for depth in sorted(by_depth):
        names = [_join(path, n) for n in by_depth[depth]]
        kept = [n for n in names if n not in in_head]
        if groups and len(kept) < len(names):  # what timm groups with the head, a last normalisation
            groups[-1][1].extend(kept)
        elif kept:
            groups.append((_shared_path(path, kept) or f"layer {depth}", kept))
    return groups


def _trunk_groups(
    module: nn.Module, path: str, root: nn.Module, head_path: str, in_head: set[str]
) -> list[tuple[str, list[str]]]:
    sizes = {name: p.dim() for name, p in module.named_parameters()}
    taken = set(in_head)
    groups: list[tuple[str, list[str]]] = []
    for part_path, _ in _open_trunk(path, root, head_path):
        names = [n for n in _parameters_of(module, part_path) if n not in taken]
        if not names:
            continue
        taken.update(names)
        if groups and all(sizes[name] < 2 for name in names):  # a normalisation
            groups[-1][1].extend(names)
        else:
            groups.append((part_path, names))
    return groups


def _open_trunk(path: str, root: nn.Module, head_path: str) -> list[tuple[str, nn.Module]]:
    """The parts of the network in order; the one part that holds all repeated blocks is opened, again and again."""
    parts = [(_join(path, name), child) for name, child in _children(root)]
    while True:
        trunks = [i for i, (p, part) in enumerate(parts) if p != head_path and _repeats(part)]
        if len(trunks) > 1:  # torchvision's `classifier` may be a Sequential too
            trunks = [i for i in trunks if not _under(head_path, parts[i][0])]
        if len(trunks) != 1:
            return parts
        trunk_path, trunk = parts[trunks[0]]
        parts[trunks[0] : trunks[0] + 1] = [(_join(trunk_path, name), child) for name, child in _children(trunk)]


def _repeats(part: nn.Module) -> bool:
    return any(isinstance(m, (nn.Sequential, nn.ModuleList)) and len(_children(m)) > 1 for m in part.modules())


def _shared_path(path: str, names: Sequence[str]) -> str:
    """The deepest module path that three in four of the names share with the first; '' if that is `path` itself."""
    shared = names[0].rpartition(".")[0]
    while shared != path and 4 * sum(_under(name, shared) for name in names) < 3 * len(names):
        shared = shared.rpartition(".")[0]
    return shared if shared != path else ""


def lightning_path(module: pl.LightningModule, part: nn.Module) -> str:
    """Dotted path of a part inside the module."""
    return next(name for name, other in module.named_modules() if other is part)
