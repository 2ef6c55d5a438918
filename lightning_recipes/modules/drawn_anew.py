"""Networks whose weights are drawn anew each time: by name, from a function, or a copy of one that is there."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from lightning_recipes.core.errors import RecipeError
from lightning_recipes.modules.image_classifier import build_net

Net = str | nn.Module | Callable[[], nn.Module]


def drawn_anew(net: nn.Module, argument: str) -> nn.Module:
    """A copy of a network with fresh weights and statistics, by the ``reset_parameters`` of its layers.

    Args:
        argument: the caller's, for the error.

    Raises:
        RecipeError: for a parameter that no layer's ``reset_parameters`` draws.
    """
    copied = copy.deepcopy(net)
    for path, part in copied.named_modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
        elif own := [name for name, _ in part.named_parameters(recurse=False)]:
            name = ".".join(filter(None, [path, own[0]]))
            raise RecipeError(
                f"{argument}: {type(part).__name__} cannot draw its parameter {name!r} anew (it has no"
                " reset_parameters); give a function that builds the network"
            )
    return copied


def build_anew(
    net: Net, num_classes: int, in_chans: int, model_args: Mapping[str, Any] | None, argument: str
) -> nn.Module:
    """A network of its own: by name (as of `ImageClassifier`), from a function, or a module drawn anew.

    Args:
        num_classes, in_chans, model_args: for a network by name.
        argument: the caller's, for the error.

    Raises:
        RecipeError: when a function gives something else than a module.
    """
    if isinstance(net, str):
        return build_net(net, num_classes, in_chans, model_args=dict(model_args or {}))
    if isinstance(net, nn.Module):
        return drawn_anew(net, argument)
    built = net()
    if not isinstance(built, nn.Module):
        raise RecipeError(f"{argument} must give a module; {net!r} gave {type(built).__name__}")
    return built
