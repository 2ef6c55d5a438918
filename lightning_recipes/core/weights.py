"""Weights from a file, without unpickling code."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


def read_weights(path: str, argument: str = "weights") -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file, of a ``.pt``/``.pth`` state dict, or of a Lightning ``.ckpt``.

    Raises:
        FileNotFoundError, ValueError: names the `argument` that gave the path.
    """
    full = os.path.abspath(os.path.expandvars(os.path.expanduser(path)))
    if not os.path.isfile(full):
        raise FileNotFoundError(f"{argument}={path!r}: no such file (looked for {full})")
    kind = os.path.splitext(full)[1]
    if kind == ".safetensors":
        return load_file(full)
    if kind not in (".pt", ".pth", ".ckpt"):
        raise ValueError(f"{argument}={path!r}: must be a .safetensors, .pt, .pth or .ckpt file")
    state = torch.load(full, map_location="cpu", weights_only=True)
    return state.get("state_dict", state)


def load_weights(net: nn.Module, path: str, head: bool = True, argument: str = "weights") -> None:
    """Loads all weights of ``net`` from a file; every name and shape must agree.

    The net may be a part of what was saved, as ``net`` is of an `ImageClassifier`: names may carry its prefix. With
    ``head=False`` the last Linear layer keeps its own initial weights, for new classes.

    Raises:
        FileNotFoundError, ValueError: names the `argument` that gave the path, and what does not fit.
    """
    own = net.state_dict()
    state = part_of_state(read_weights(path, argument), own)
    # Batch norm's counter of batches is younger than many published weights, and its value seldom matters.
    state = {key: own[key] for key in own if key.endswith(".num_batches_tracked")} | state
    if not head:
        linear = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
        if not linear:
            raise ValueError(f"load_head=False: {type(net).__name__} has no Linear layer that could be its head")
        kept = {key for key in own if key.startswith(f"{linear[-1]}.")}
        state = {key: value for key, value in state.items() if key not in kept} | {key: own[key] for key in kept}
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [
        f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}"
        for key in sorted(own.keys() & state.keys())
        if state[key].shape != own[key].shape
    ]
    for what, names in (("missing", missing), ("unknown", unknown), ("other shape", shapes)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ValueError(
                f"{argument}={path!r} does not fit {type(net).__name__}: {what}: {', '.join(names[:5])}{more}"
            )
    net.load_state_dict(state)


def part_of_state(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a state dict what stands under the one prefix under which all names of a net are found, without the prefix.

    All of it, where that is the net's own or no such prefix is found.
    """
    needed = [key for key in own if not key.endswith(".num_batches_tracked")]
    for key in state if needed and needed[0] not in state else ():
        prefix = key.removesuffix(needed[0])
        if key.endswith(f".{needed[0]}") and all(prefix + name in state for name in needed):
            return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    return dict(state)
