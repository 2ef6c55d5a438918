"""LEVI's ensemble: a pre-trained network, a small one, and one head a depth; what a fit with ``LEVI`` leaves behind.

With features h_l of the pre-trained network at depth l and z of the small one:

    y_l = a_l([norm(h_l); z]),    prediction: mean over l of y_l
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_recipes.core import features, random
from lightning_recipes.core.batch import INPUT_KEYS
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.features import Taps


def combined(outputs: Sequence[Tensor], average: Literal["logits", "probs"] = "logits") -> Tensor:
    """The ensemble's prediction from its heads' outputs ``[n, classes]``, in fp32 at least.

    'logits': their mean. 'probs': the log of the mean of their softmax, whose softmax is that mean.
    """
    stacked = torch.stack([y if y.dtype == torch.float64 else y.float() for y in outputs])
    if average == "logits":
        return stacked.mean(0)
    return stacked.log_softmax(-1).logsumexp(0) - math.log(len(outputs))


def normalized(h: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the features of each sample: ``[n, d]``, a layer norm without parameters."""
    return F.layer_norm(h, h.shape[-1:])


# -- the small view --------------------------------------------------------------------------------------------------


class VectorView(nn.Sequential):
    """Vectors ``[n, inputs]`` to ``[n, width]``: two layers."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())


class ImageView(nn.Sequential):
    """Images ``[n, inputs, height, width]`` to ``[n, width]``: three convolutions of stride 2, each normalised over the
    whole sample, so that no statistic is kept and none depends on the batch.
    """

    def __init__(self, inputs: int, width: int) -> None:
        layers: list[nn.Module] = []
        for out in (max(1, width // 4), max(1, width // 2), width):
            layers += [nn.Conv2d(inputs, out, 3, stride=2, padding=1), nn.GroupNorm(1, out), nn.ReLU()]
            inputs = out
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class TokenView(nn.Module):
    """Token ids ``[n, tokens]`` to ``[n, width]``: an embedding of its own, sine positions, two transformer blocks, and
    the mean over what is not padding.
    """

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(inputs, width)
        block = nn.TransformerEncoderLayer(
            width, math.gcd(width, 4), 2 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, 2, nn.LayerNorm(width), enable_nested_tensor=False)
        for layer in self.blocks.layers[1:]:  # TransformerEncoder copies one layer, first values included
            for part in layer.modules():
                if part is not layer and hasattr(part, "_reset_parameters"):
                    part._reset_parameters()
                elif hasattr(part, "reset_parameters"):
                    part.reset_parameters()

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embedding(ids)
        x = x + _positions(ids.shape[1], x)
        if attention_mask is None:
            return self.blocks(x).mean(1)
        padding = torch.zeros(attention_mask.shape, dtype=x.dtype, device=x.device)
        padding = padding.masked_fill(attention_mask == 0, -math.inf)
        x = self.blocks(x, src_key_padding_mask=padding)
        return features.pooled(x, len(x), "mean", attention_mask, "the small view")


def _positions(tokens: int, like: Tensor) -> Tensor:
    """Sines and cosines ``[tokens, width]`` of wavelengths from 2 pi to 10,000 x 2 pi."""
    half = -(-like.shape[-1] // 2)
    rates = torch.exp(torch.arange(half, device=like.device) * (-math.log(1e4) / max(half, 1)))
    angles = torch.arange(tokens, device=like.device)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)[:, : like.shape[-1]].to(like.dtype)


_LOSSES = ("ForSequenceClassification", "ForImageClassification")
VIEWS = {"vectors": VectorView, "images": ImageView, "tokens": TokenView}


# -- the ensemble ----------------------------------------------------------------------------------------------------


class LEVIEnsemble(nn.Module):
    """A pre-trained network, a small one, and one head a depth; called like the pre-trained network.

    ``forward`` takes the arguments of `base` and returns what it returns, with the ensemble's logits in place of its
    own: a tensor, or a Hugging Face output (its loss is computed anew where labels are given).

    What a fit with :class:`LEVI` leaves in the module. To keep it without Lightning::

        module.network.save("levi.pt")
        network = LEVIEnsemble.load("levi.pt", base)     # base: the pre-trained network, built in any way

    Args:
        base: the pre-trained network. Its own head is not used.
        small: inputs to ``[n, small_width]``; None for no small view. Gets the first input of `base`, and its
            ``attention_mask`` where it takes one.
        heads: one a block, ``[n, d_l + small_width]`` to ``[n, classes]``.
        structure: plain values, see :meth:`build`.

    Attributes:
        structure: what :meth:`build` builds the same from.
        config: that of `base`, where it has one.
    """

    def __init__(
        self, base: nn.Module, small: nn.Module | None, heads: nn.ModuleList, structure: dict[str, Any]
    ) -> None:
        super().__init__()
        self.base, self.small, self.heads, self.structure = base, small, heads, structure
        self._masks_small = small is not None and takes_mask(small)
        self._listen()
        self.train(base.training)

    @classmethod
    def build(
        cls, base: nn.Module, structure: Mapping[str, Any], small: nn.Module | None = None, seed: int = 0
    ) -> LEVIEnsemble:
        """Build small view and heads around a network, without touching the global random state.

        Args:
            base: the pre-trained network.
            structure: ``blocks``: paths in `base`; ``names``: of the depths, for logs; ``widths``: d_l; ``pools``: one
                a block; ``classes``; ``view``: 'vectors', 'images', 'tokens', 'given' or None; ``inputs``: width,
                channels or vocabulary of the small view; ``small_width``; ``adapter_hidden``; ``frozen``; ``average``;
                ``normalize``; ``unused``: parameters of `base` that no depth depends on; ``asked``: the recipe's
                arguments.
            small: the small view where ``view`` is 'given'; used as it is.
            seed: of the first values.
        """
        view, width, hidden = structure["view"], structure["small_width"], structure["adapter_hidden"]
        if view == "given" and small is None:
            raise RecipeError("the ensemble has a small network of the user's own: give it as small")
        place = next(iter(base.parameters()), torch.zeros(()))
        with random.forked(place.device, seed):
            if view != "given":
                small = VIEWS[view](structure["inputs"], width) if view else None
            heads = nn.ModuleList(_head(d + width, hidden, structure["classes"]) for d in structure["widths"])
        ensemble = cls(base, small, heads, dict(structure))
        for part in (heads, small):
            if part is not None:
                part.to(place.device, place.dtype if place.is_floating_point() else None)
        return ensemble

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # A Hugging Face model would compute the loss of its own head too.
        labels = kwargs.get("labels") if getattr(self.base, "loss_type", None) in _LOSSES else None
        if labels is not None:
            kwargs = {**kwargs, "labels": None}
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._passes_gradients(args, kwargs)):
            output = self.base(*args, **kwargs)
            h = self._features(args, kwargs)
        if self.small is not None:
            z = self._small_view(args, kwargs)
            h = [torch.cat([each, z], 1) for each in h]
        logits = combined([head(each) for head, each in zip(self.heads, h)], self.structure["average"])
        return logits if isinstance(output, Tensor) else self._with_logits(output, logits, labels)

    @property
    def config(self) -> Any:
        return self.base.config  # what is asked of a Hugging Face model most

    def train(self, mode: bool = True) -> LEVIEnsemble:
        """As for any module; a frozen base stays in eval mode."""
        super().train(mode)
        if self.structure["frozen"]:
            self.base.eval()
        return self

    def _passes_gradients(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """A frozen base needs no graph, unless somebody asks for the gradient of an input (an attack must see both
        views)."""
        if not self.structure["frozen"]:
            return True
        if not torch.compiler.is_compiling() and any(part.training for part in self.base.modules()):
            self.base.eval()  # somebody reached past train()
        return any(isinstance(x, Tensor) and x.requires_grad for x in (*args, *kwargs.values()))

    def _features(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """h_l, ``[n, d_l]``, of the call that just ran."""
        x, mask = main_input(args, kwargs), token_mask(self.base, args, kwargs)
        names, pools = self.structure["blocks"], self.structure["pools"]
        h = [features.pooled(self._taps[name], len(x), pool, mask, name) for name, pool in zip(names, pools)]
        self._taps.values.clear()
        return [normalized(each) for each in h] if self.structure["normalize"] else h

    def _small_view(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        x, mask = main_input(args, kwargs), token_mask(self.base, args, kwargs)
        return self.small(x, attention_mask=mask) if self._masks_small and mask is not None else self.small(x)

    def _with_logits(self, output: Any, logits: Tensor, labels: Tensor | None) -> Any:
        """A Hugging Face output with other logits, and the loss of these."""
        changed: dict[str, Any] = {"logits": logits}
        if labels is not None:
            changed["loss"] = self.base.loss_function(labels, logits, self.base.config)
        elif output.get("loss") is not None:
            raise RecipeError(
                f"cannot compute the loss of {type(self.base).__name__} from other logits; compute it in the training"
                " step from the output's logits (F.cross_entropy) and leave the labels out of the call"
            )
        return replace(output, **changed) if is_dataclass(output) else {**output, **changed}

    # -- keeping it --------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write structure and weights, the base's among them, to one file that loads with ``weights_only=True``."""
        torch.save({"structure": self.structure, "state_dict": self.state_dict()}, path)

    @classmethod
    def load(cls, path: str | Path, base: nn.Module, small: nn.Module | None = None) -> LEVIEnsemble:
        """Read what :meth:`save` wrote, into `base` and new parts around it.

        Args:
            path: the file.
            base: a network of the same architecture as the one that was fitted; gets the file's weights.
            small: the small network, where it was one of the user's own.
        """
        saved = torch.load(path, weights_only=True, map_location="cpu")
        ensemble = cls.build(base, saved["structure"], small)
        ensemble.load_state_dict(saved["state_dict"])
        return ensemble.eval()

    def _listen(self) -> None:
        self._taps = Taps(self.base, {name: (name, "output") for name in self.structure["blocks"]}).open()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_taps"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._listen()  # a copy listens to its own base

    def release(self) -> nn.Module:
        """Stop listening to the base and give it back."""
        self._taps.close()
        return self.base


def takes_mask(small: nn.Module) -> bool:
    """Whether a small view wants to know what is padding."""
    return "attention_mask" in inspect.signature(small.forward).parameters


def _head(width: int, hidden: int, classes: int) -> nn.Module:
    if not hidden:
        return nn.Linear(width, classes)
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, classes))


def main_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The tensor that both views look at: the first argument, or the one that goes by an input's name.

    Raises:
        RecipeError: lists the names of the arguments.
    """
    candidates = [*args[:1], *(kwargs.get(name) for name in ("input_ids", "input_values", *INPUT_KEYS))]
    found = next((value for value in candidates if isinstance(value, Tensor)), None)
    if found is None:
        given = [type(value).__name__ for value in args] + sorted(kwargs)
        raise RecipeError(
            f"found no input tensor among the network's arguments {given}; give it first, or as one of {INPUT_KEYS}"
        )
    return found


def token_mask(base: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """``[n, tokens]``, 0 where a token is padding; None where nothing says so."""
    mask = kwargs.get("attention_mask")
    pad = getattr(getattr(base, "config", None), "pad_token_id", None)
    ids = main_input(args, kwargs)
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask
    return ids != pad if pad is not None and ids.dim() == 2 and not ids.is_floating_point() else None
