"""Adapters as files in peft's format: ``adapter_model.safetensors`` beside ``adapter_config.json``.

What a recipe trains is written as one ordinary LoRA a stock layer, so that peft loads it into a stock network and gives
the same outputs:

    a group of N adapters of rank r     A = [A_1; ...; A_N], B = [B_1, ..., B_N]: one LoRA of rank N r, exactly
    q, k, v of a fused or packed layer  A stacked, B in blocks, one a role: one LoRA of the fused layer
    trained singular values             A = V_r^T, B = U_r diag(delta)
    what trains fully beside them       peft's ``modules_to_save``

peft finds layers by the ends of their names. Where that would also find others, the layers to adapt are given as a
regular expression, and parts that train fully as plain weights of the network, which peft loads as well. In eval mode
``nn.TransformerEncoderLayer`` takes a fused path that does not ask peft's layers: merge there.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_recipes.core import select
from lightning_recipes.core.distributed import rank_and_world
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.qkv import ROLES, FusedProjections, PackedProjections

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

    from lightning_recipes.core.adapters import Adapters

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."


@dataclass
class LoRA:
    """The update of one stock layer: scale B A.

    Attributes:
        a: ``[r, in]``; of a convolution ``[r, in, *kernel]``, of an embedding ``[r, entries]``.
        b: ``[out, r]``; of a convolution ``[out, r, 1, ...]``.
        scale: of the product.
        kind: 'linear', 'embedding' or 'packed' (``nn.MultiheadAttention``).
    """

    a: Tensor
    b: Tensor
    scale: float
    kind: str = "linear"


def save_adapter(adapters: Adapters, folder: str | Path, root: str | None = None) -> Path:
    """Write adapters that are in a module, and what trains beside them; only rank 0 writes.

    Args:
        adapters: in place.
        folder: is made where it does not exist.
        root: path of the network that names count from, '' for the LightningModule itself; None finds the network
            inside it, the one that ``PeftModel.from_pretrained(network, folder)`` takes.

    Returns:
        the folder.

    Raises:
        RecipeError: when something adapted or trained stands outside the root.
    """
    from safetensors.torch import save_file

    module, folder = adapters.module, Path(folder)
    root = select.network(module)[0] if root is None else root
    network = module.get_submodule(root)
    loras = {_below(root, path): lora for path, lora in updates(adapters).items()}
    beside = {_below(root, name): value for name, value in trained_beside(adapters).items()}
    config = _config(adapters, network, loras, beside)
    if rank_and_world()[0] == 0:
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {_PREFIX + name: value for name, value in (_tensors(loras) | beside).items()}
        unfinished = folder / f"{WEIGHTS}.part"
        save_file({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, unfinished)
        unfinished.replace(folder / WEIGHTS)
        config.save_pretrained(str(folder))
    return folder


def load_adapter(module: nn.Module, folder: str | Path, *, merge: bool = False, root: str | None = None) -> nn.Module:
    """Put a saved adapter into a stock module, in place.

    Args:
        module: a LightningModule, or a network.
        folder: as a recipe or peft itself wrote it.
        merge: fold the updates into the stock weights; False leaves peft's LoRA layers in the module.
        root: path of the network that the file's names count from; None finds it.

    Returns:
        the module.

    Raises:
        RecipeError: for a folder without an adapter, an adapter that is no LoRA, a module that carries adapters, parts
            that the module has not or has in other sizes, and ``nn.TransformerEncoderLayer`` without `merge`; nothing
            is changed then.
    """
    from peft import LoraConfig, LoraModel, PeftConfig, set_peft_model_state_dict
    from peft.tuners.lora import LoraLayer
    from safetensors.torch import load_file

    folder = Path(folder)
    missing = [name for name in (WEIGHTS, CONFIG) if not (folder / name).is_file()]
    if missing:
        raise RecipeError(f"{folder} holds no adapter: it has no {' and no '.join(missing)}")
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig):
        raise RecipeError(f"the adapter in {folder} is a {config.peft_type} of peft's; only LoRA can be loaded")
    network = module.get_submodule(select.network(module)[0] if root is None else root)
    if any(isinstance(part, LoraLayer) for part in network.modules()):
        raise RecipeError("the module already carries adapters; merge or unload them first")
    saved = {name.removeprefix(_PREFIX): value for name, value in load_file(folder / WEIGHTS).items()}
    beside = {name: saved.pop(name) for name in list(saved) if ".lora_" not in name}
    _check_parts(network, beside, saved, folder)
    if not merge:
        _check_fused(network, saved)
    config.modules_to_save = None  # they go into the network's own parts
    flags = [(p, p.requires_grad) for p in network.parameters()]
    own = {part: dict(part._parameters) for part in network.modules()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        tuner = LoraModel(network, config, "default")
    try:
        set_peft_model_state_dict(network, {_PREFIX + name: value for name, value in saved.items()})
    except RuntimeError as error:
        tuner.unload()
        _give_back(own)
        raise RecipeError(f"the adapter in {folder} is of other sizes than the module: {error}") from error
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    if merge:
        tuner.merge_and_unload()
        _give_back(own)
    with torch.no_grad():
        state = network.state_dict()
        for name, value in beside.items():
            state[name].copy_(value)
    return module


# -- from a recipe's adapters to one LoRA a stock layer ---------------------------------------------------------------


def updates(adapters: Adapters) -> dict[str, LoRA]:
    """The update of every adapted layer of the stock module, by its path there."""
    found: dict[str, LoRA] = {}
    roles: dict[str, dict[str, LoRA]] = {}
    for path, layer in adapters.layers.items():
        parent, _, role = path.rpartition(".")
        lora = _stacked(layer, adapters.names)
        if isinstance(adapters.module.get_submodule(parent), (FusedProjections, PackedProjections)):
            roles.setdefault(parent, {})[role] = lora
        else:
            found[_stock(path)] = lora
    for path, by_role in roles.items():
        packed = isinstance(adapters.module.get_submodule(path), PackedProjections)
        found[_stock(path)] = _in_blocks(by_role, "packed" if packed else "linear")
    return found


def _stacked(layer: LoraLayer, names: Sequence[str]) -> LoRA:
    """All adapters of a layer as one."""
    embedding = bool(layer.lora_embedding_A)
    if embedding:
        a, b = ([side[name] for name in names] for side in (layer.lora_embedding_A, layer.lora_embedding_B))
    else:
        a, b = ([side[name].weight for name in names] for side in (layer.lora_A, layer.lora_B))
    scales = {layer.scaling[name] for name in names}
    if len(scales) > 1:
        b, scales = [x * layer.scaling[name] for x, name in zip(b, names)], {1.0}
    return LoRA(torch.cat(a), torch.cat(b, 1), scales.pop(), "embedding" if embedding else "linear")


def _in_blocks(by_role: Mapping[str, LoRA], kind: str) -> LoRA:
    """The updates of the projections of a fused layer as one of the whole layer, each in its own rows."""
    loras = list(by_role.values())
    width = loras[0].b.shape[0]
    ranks = [lora.a.shape[0] for lora in loras]
    b = loras[0].b.new_zeros(len(ROLES) * width, sum(ranks))
    for (role, lora), block in zip(by_role.items(), b.split(ranks, 1)):
        block[ROLES.index(role) * width :][:width] = lora.b.detach()
    return LoRA(torch.cat([lora.a for lora in loras]), b, loras[0].scale, kind)


def _tensors(loras: Mapping[str, LoRA]) -> dict[str, Tensor]:
    """By the names that peft gives them."""
    tensors: dict[str, Tensor] = {}
    for path, lora in loras.items():
        if lora.kind == "embedding":
            tensors |= {f"{path}.lora_embedding_A": lora.a, f"{path}.lora_embedding_B": lora.b}
            continue
        tensors |= {f"{path}.lora_A.weight": lora.a, f"{path}.lora_B.weight": lora.b}
        if lora.kind == "packed":  # peft adapts the output projection with it: by nothing here
            rank, width = lora.a.shape
            out = f"{path}.base_layer.out_proj"
            tensors[f"{out}.lora_A.weight"] = lora.a.new_zeros(rank, width)
            tensors[f"{out}.lora_B.weight"] = lora.a.new_zeros(width, rank)
    return tensors


def trained_beside(adapters: Adapters) -> dict[str, Tensor]:
    """The parts that train fully, with their running statistics, by their names in the stock module."""
    state = adapters.module.state_dict()
    kept = [name for name in adapters.kept_whole or () if name in state]
    holders = {name.rpartition(".")[0] for name in kept}
    parameters = {name for name, _ in adapters.module.named_parameters(remove_duplicate=False)}
    statistics = [name for name in state if name not in parameters and name.rpartition(".")[0] in holders]
    return {_stock(name): state[name] for name in [*kept, *statistics]}


def _config(
    adapters: Adapters, network: nn.Module, loras: Mapping[str, LoRA], beside: Mapping[str, Tensor]
) -> LoraConfig:
    from peft import LoraConfig

    names = list(_stock_names(network))
    ambiguous = any(_ends_of(names, path) != [path] for path in loras)
    ranks = {path: lora.a.shape[0] for path, lora in loras.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    scale = Counter(lora.scale for lora in loras.values()).most_common(1)[0][0]
    others = [path for path, lora in loras.items() if ranks[path] != rank or lora.scale != scale]
    keys = {path: f"^{re.escape(path)}" if ambiguous else path for path in others}
    layer = next(iter(adapters.layers.values()))
    return LoraConfig(
        r=rank,
        lora_alpha=_whole(scale * rank),
        lora_dropout=float(getattr(layer.lora_dropout[adapters.names[0]], "p", 0.0)),
        target_modules=f"({'|'.join(map(re.escape, loras))})" if ambiguous else list(loras),
        rank_pattern={keys[path]: ranks[path] for path in others},
        alpha_pattern={keys[path]: _whole(loras[path].scale * ranks[path]) for path in others},
        modules_to_save=_modules_to_save(network, names, beside, loras) or None,
        fan_in_fan_out=all(type(_at(network, path)).__name__ == "Conv1D" for path in loras),
        inference_mode=True,
        base_model_name_or_path=getattr(network, "name_or_path", None) or None,
    )


def _modules_to_save(
    network: nn.Module, names: Sequence[str], beside: Mapping[str, Tensor], loras: Mapping[str, LoRA]
) -> list[str]:
    """The modules that train as a whole and that peft cannot mistake for others; none lies in another."""
    found: list[str] = []
    for name in names:
        parameters = [f"{name}.{own}" for own, _ in _at(network, name).named_parameters()]
        own = bool(parameters) and beside.keys() >= set(parameters)
        inside = any(name.startswith(f"{other}.") for other in found)
        # peft compares the ends of names letter by letter, and leaves out targets with this name on their path
        mistaken = sum(other.endswith(name) for other in names) > 1
        hides = any(re.match(rf"(^|.*\.){name}($|\..*)", path) for path in loras)
        if own and not inside and not mistaken and not hides:
            found.append(name)
    return found


def _stock_names(network: nn.Module, path: str = "") -> Iterator[str]:
    """Paths of all parts as they are without adapters."""
    from peft.tuners.lora import LoraLayer

    inner = getattr(network, "_orig_mod", None)  # a compiled one
    if isinstance(network, (FusedProjections, PackedProjections, LoraLayer)):
        inner = network.base_layer
    if inner is not None:
        yield from _stock_names(inner, path)
        return
    if path:
        yield path
    for name, child in network.named_children():
        yield from _stock_names(child, f"{path}.{name}" if path else name)


def _at(network: nn.Module, path: str) -> nn.Module:
    """The stock part at a path, whatever stands around it."""
    from peft.tuners.lora import LoraLayer

    part = network
    for name in [*path.split("."), None]:
        while isinstance(part, (FusedProjections, PackedProjections, LoraLayer)) or hasattr(part, "_orig_mod"):
            part = part._orig_mod if hasattr(part, "_orig_mod") else part.base_layer
        part = part if name is None else getattr(part, name)
    return part


def _ends_of(names: Iterable[str], path: str) -> list[str]:
    """The names that peft takes for that path."""
    return [name for name in names if name == path or name.endswith(f".{path}")]


def _stock(name: str) -> str:
    """A name without what compilation and adapters put on it."""
    return ".".join(part for part in name.split(".") if part not in ("_orig_mod", "base_layer"))


def _below(root: str, name: str) -> str:
    root = _stock(root)
    if not root:
        return name
    if not name.startswith(f"{root}."):
        raise RecipeError(f"{name} is adapted or trained and stands outside {root!r}; give the root that holds all")
    return name.removeprefix(f"{root}.")


def _whole(value: float) -> float:
    """As peft writes it: 8, not 8.0."""
    return int(value) if float(value).is_integer() else value


def _give_back(own: Mapping[nn.Module, Mapping[str, nn.Parameter | None]]) -> None:
    """Have the merged values in the parameters that were there; peft makes new ones in ``nn.MultiheadAttention``."""
    for part, parameters in own.items():
        for name, parameter in parameters.items():
            if parameter is not None and part._parameters[name] is not parameter:
                parameter.data.copy_(part._parameters[name])
        part._parameters.clear()
        part._parameters.update(parameters)


def _check_fused(network: nn.Module, loras: Iterable[str]) -> None:
    paths = {name.partition(".lora_")[0].partition(".base_layer")[0] for name in loras}
    for name, part in network.named_modules():
        if isinstance(part, nn.TransformerEncoderLayer) and any(path.startswith(f"{name}.") for path in paths):
            raise RecipeError(
                f"{name} is an nn.TransformerEncoderLayer, whose fused path in eval mode does not ask adapters; load"
                " it with merge=True"
            )


def _check_parts(network: nn.Module, beside: Mapping[str, Tensor], loras: Iterable[str], folder: Path) -> None:
    state = {name: value.shape for name, value in network.state_dict().items()}
    parts = {name for name, _ in network.named_modules()}
    paths = {name.partition(".lora_")[0].partition(".base_layer")[0] for name in loras}
    absent = sorted(paths - parts) + [name for name in beside if name not in state]
    if absent:
        raise RecipeError(
            f"the adapter in {folder} is for {absent[0]!r}, which the module has not; name its network (root)"
        )
    other = [name for name, value in beside.items() if value.shape != state[name]]
    if other:
        raise RecipeError(
            f"the adapter in {folder} holds {other[0]!r} as {list(beside[other[0]].shape)}; the module's is"
            f" {list(state[other[0]])}"
        )
