"""Weights from a file, without unpickling code."""

from __future__ import annotations

import os

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


def read_weights(path: str) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file, of a ``.pt``/``.pth`` state dict, or of a Lightning ``.ckpt``."""
    full = os.path.abspath(os.path.expandvars(os.path.expanduser(path)))
    if not os.path.isfile(full):
        raise FileNotFoundError(f"weights={path!r}: no such file (looked for {full})")
    kind = os.path.splitext(full)[1]
    if kind == ".safetensors":
        return load_file(full)
    if kind not in (".pt", ".pth", ".ckpt"):
        raise ValueError(f"weights={path!r}: must be a .safetensors, .pt, .pth or .ckpt file")
    state = torch.load(full, map_location="cpu", weights_only=True)
    return state.get("state_dict", state)


def load_weights(net: nn.Module, path: str, head: bool = True) -> None:
    """Loads all weights of ``net`` from a file; every name and shape must agree.

    Names may carry the prefix ``net.`` that an `ImageClassifier`'s checkpoint gives them. With ``head=False`` the last
    Linear layer keeps its own initial weights, for new classes.
    """
    state = read_weights(path)
    if state and all(key.startswith("net.") for key in state):
        state = {key.removeprefix("net."): value for key, value in state.items()}
    own = net.state_dict()
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
                f"weights={path!r} does not fit {type(net).__name__}: {what}: {', '.join(names[:5])}{more}"
            )
    net.load_state_dict(state)
