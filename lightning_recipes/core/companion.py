"""Networks that stand beside the user's module and do not train: a teacher, a guide.

A :class:`Companion` is no part of the module: not of its state dict, its optimizers or DDP. It stays in eval mode, runs
without gradients, and is the same on every rank. Where it can be built again (from a name and a seed, or from a file)
a checkpoint holds a hash of it and nothing more, and a resume that builds another is refused.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_recipes.core import random
from lightning_recipes.core.distributed import active, broadcast_
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.silence import modes_kept
from lightning_recipes.core.weights import load_weights

_HUBS = ("hf-hub", "hf_hub", "local-dir")  # before the colon in a timm name


class Companion:
    """A frozen network beside the user's module.

    Args:
        source: a module, which is used as it is and not copied; what makes one, as 'package.module:Class'; or a name
            in ``timm.list_models()``.
        pretrained: of a timm name, whether its published weights are loaded. What an import path makes has random
            weights, so that it needs a checkpoint or pretrained=False; of a module it says nothing.
        checkpoint: a .safetensors, .pt, .pth or .ckpt file with its weights.
        arguments: that the class or timm's model gets.
        seed: of random weights.
        called: the name of the argument that `source` was given as, for errors; that of `checkpoint` is
            ``<called>_checkpoint``.

    Attributes:
        network: once it is built.
    """

    def __init__(
        self,
        source: nn.Module | str,
        pretrained: bool = True,
        checkpoint: str | None = None,
        arguments: Mapping[str, Any] | None = None,
        seed: int = 0,
        called: str = "guide",
    ) -> None:
        self.source, self.pretrained, self.checkpoint = source, pretrained, checkpoint
        self.arguments, self.seed, self.called = dict(arguments or {}), seed, called
        self.network: nn.Module | None = None
        self._hash = ""

    @property
    def can_be_rebuilt(self) -> bool:
        """Whether the arguments alone make the same network again, in another process too."""
        return isinstance(self.source, str) or self.checkpoint is not None

    def build(self, trainer: pl.Trainer | None = None, stored: Mapping[str, Any] | None = None) -> nn.Module:
        """Make the network, on the CPU, the same on every rank and without touching the global random state.

        Args:
            trainer: without one it is this process's alone; see :meth:`agree`.
            stored: what :meth:`state` gave in the run that is resumed.

        Raises:
            RecipeError: when it cannot be made, or is not the one of the run that is resumed.
        """
        network = self._made(trainer) if isinstance(self.source, str) else self.source
        if self.checkpoint is not None:
            try:
                load_weights(network, self.checkpoint, argument=f"{self.called}_checkpoint")
            except (OSError, ValueError, RuntimeError) as error:
                raise RecipeError(_line(error)) from error
        if trainer is not None:
            broadcast_([*network.parameters(), *network.buffers()], trainer)
        weights = (stored or {}).get("weights")
        if weights is not None and not self.can_be_rebuilt:
            try:
                network.load_state_dict(weights)
            except RuntimeError as error:
                raise RecipeError(
                    f"{self.called}: the checkpoint holds the weights of another network ({_line(error)})"
                ) from error
        self._hash = fingerprint(network)
        if stored is not None and stored["hash"] != self._hash:
            where = f"{self.called}_checkpoint={self.checkpoint!r}" if self.checkpoint else f"{self.called} built anew"
            raise RecipeError(
                f"{where} is not the network of the run that is resumed: its weights have the hash {self._hash[:12]},"
                f" in the checkpoint it is {stored['hash'][:12]}. Give the same file, seed and library versions, or"
                " start a new fit"
            )
        self.network = network
        return network

    def agree(self, trainer: pl.Trainer) -> None:
        """Take rank 0's weights on every rank, for a network that was built before there were ranks."""
        if active():
            broadcast_([*self.network.parameters(), *self.network.buffers()], trainer)
            self._hash = fingerprint(self.network)

    @property
    def hash(self) -> str:
        """SHA-256 of its weights."""
        return self._hash

    def _made(self, trainer: pl.Trainer | None) -> nn.Module:
        name, what = self.source, f"{self.called}={self.source!r}"
        path, _, attribute = name.rpartition(":")
        try:
            with random.forked(torch.device("cpu") if trainer is None else trainer.strategy.root_device, self.seed):
                if of_import(name):
                    make = _found(what, path, attribute)
                    if self.pretrained and self.checkpoint is None:
                        raise RecipeError(
                            f"{what} makes a network with random weights and pretrained=True asks for trained ones:"
                            f" give {self.called}_checkpoint, or pretrained=False for an untrained network"
                        )
                    network = make(**self.arguments)
                else:
                    network = self._of_timm(what)
        except RecipeError:
            raise
        except Exception as error:
            raise RecipeError(
                f"{what} could not be built with {self.arguments} ({type(error).__name__}: {_line(error)})"
            ) from error
        if not isinstance(network, nn.Module):
            raise RecipeError(f"{what} makes a {type(network).__name__}, not a torch.nn.Module")
        return network

    def _of_timm(self, what: str) -> nn.Module:
        import timm

        if ":" not in self.source and not timm.is_model(self.source):
            near = timm.list_models(f"*{self.source.split('_')[0]}*")[:5]
            raise RecipeError(
                f"{what} must be a module, an import path 'package.module:Class', or a name in timm.list_models()"
                + (f"; timm has {', '.join(near)}, ..." if near else "")
            )
        return timm.create_model(self.source, pretrained=self.pretrained and self.checkpoint is None, **self.arguments)

    def check_apart(self, module: nn.Module) -> None:
        """Refuse a network that shares parameters with the module: it would train, and its modes would be switched.

        Raises:
            RecipeError: names one in both.
        """
        theirs = {id(p): name for name, p in module.named_parameters()}
        for name, parameter in self.network.named_parameters():
            if id(parameter) in theirs:
                raise RecipeError(
                    f"{self.called} shares parameters with the module ({name!r} is its {theirs[id(parameter)]!r}), and"
                    f" has to stay as it is while the module trains; give a copy: copy.deepcopy"
                )

    @contextmanager
    def held(self) -> Iterator[None]:
        """Frozen and in eval mode inside; afterwards as it was, where it was, and let go of."""
        network = self.network
        device = next((p.device for p in network.parameters()), None)
        trained = [p for p in network.parameters() if p.requires_grad]
        try:
            for parameter in trained:
                parameter.requires_grad_(False)
            with modes_kept(network, training=False):
                yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)
            if not isinstance(self.source, str) and device is not None:
                network.to(device)
            self.network = None

    def to(self, device: torch.device) -> None:
        """Move it where the module is."""
        self.network.to(device)

    @torch.no_grad()
    def __call__(self, x: Tensor, **kwargs: Any) -> Any:
        """Its output, without gradients. A floating-point input comes in the type of its weights."""
        return self.attend(x.detach(), **kwargs)

    def attend(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Its output with a graph to the input, where there is one: an attack goes through it."""
        weight = next((p for p in self.network.parameters() if p.is_floating_point()), None)
        if weight is not None and x.is_floating_point():
            x = x.to(weight.dtype)
        return self.network(x, *args, **kwargs)

    def describe(self) -> str:
        """Its class, and the first layer with weights, for errors."""
        for name, part in self.network.named_modules():
            weight = part._parameters.get("weight")
            if weight is not None:
                first = f"{type(part).__name__} {name!r} has weights {list(weight.shape)}"
                return f"{type(self.network).__name__}, whose {first}"
        return type(self.network).__name__

    def state(self) -> dict[str, Any]:
        """For a checkpoint: its hash, and its weights where it cannot be built again."""
        state: dict[str, Any] = {"hash": self._hash}
        if not self.can_be_rebuilt:
            state["weights"] = {
                name: value.detach().cpu() for name, value in self.source.state_dict().items() if _is_tensor(value)
            }
        return state


def of_import(source: Any) -> bool:
    """Whether a source is an import path 'package.module:Class', and no timm name."""
    path = source.rpartition(":")[0] if isinstance(source, str) else ""
    return bool(path) and path not in _HUBS and all(part.isidentifier() for part in path.split("."))


def fingerprint(network: nn.Module) -> str:
    """SHA-256 of all parameters and buffers with their names, types and shapes."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        if _is_tensor(value):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _found(what: str, path: str, attribute: str) -> Any:
    try:
        return getattr(importlib.import_module(path), attribute)
    except (ImportError, AttributeError) as error:
        raise RecipeError(f"{what} cannot be imported ({type(error).__name__}: {error})") from error
