"""CosineHead: classification by the angle between a feature and each class's weight.

Gidaris and Komodakis, "Dynamic Few-Shot Visual Learning without Forgetting", CVPR 2018
(https://arxiv.org/abs/1804.09458); with the first weights of LIFT (Shi et al., ICML 2024,
https://arxiv.org/abs/2309.10019), as in stage 1 of Chen et al., "Rethinking the Bias of Foundation Model under
Long-tailed Distribution", ICML 2025 (https://arxiv.org/abs/2501.15955; code
https://github.com/JiahaoChen1/Pre-train-Imbalance, commit f5ec404).

With h the input of the head and w_c the weight of class c:

    z_c = scale * <w_c, h> / (||w_c|| ||h||)

so that classes with many samples cannot win by longer weights. First weights: the head's own, the means of each class's
features over the training data, or text features t_c, taken back through CLIP's visual projection P ``[D, P]``:

    w_c = P norm(t_c),  normalised

Costs nothing to speak of (class means: one forward pass over the training data as the fit begins). A cosine is not a
linear layer, so the head stays in the module when the fit is over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_recipes.core.errors import RecipeError, check_argument, speaking_for
from lightning_recipes.core.features import Taps, head_input
from lightning_recipes.core.prepare import Plan
from lightning_recipes.core.probe import encode
from lightning_recipes.core.recipe import Paper, Recipe
from lightning_recipes.core.surgery import Operation

INITS = ("keep", "class_mean", "text")


def cosine_logits(h: Tensor, weight: Tensor, scale: float) -> Tensor:
    """scale * cosine of features ``[..., D]`` with class weights ``[C, D]``: ``[..., C]``."""
    return scale * F.linear(F.normalize(h, dim=-1), F.normalize(weight, dim=-1))


def class_means(features: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """Normalised mean feature of each class, ``[C, D]``; the own weight, normalised, of a class without samples.

    Args:
        features: ``[n, D]``.
        labels: ``[n]`` class indices.
        weight: ``[C, D]``.
    """
    sums = features.new_zeros(weight.shape).index_add_(0, labels, features)
    there = torch.bincount(labels, minlength=len(weight))[:, None] > 0
    return F.normalize(torch.where(there, sums, weight.to(sums)), dim=-1)


def text_weights(text: Tensor, projection: Tensor | None = None) -> Tensor:
    """Class weights from text features, normalised, ``[C, D]``.

    Args:
        text: ``[C, P]``; without a projection in the head's own space, ``[C, D]``.
        projection: from the head's space to that of the text, ``[D, P]``.
    """
    weight = F.normalize(text.float(), dim=-1)
    return weight if projection is None else F.normalize(weight @ projection.float().T, dim=-1)


class CosineLinear(nn.Linear):
    """A linear layer without bias that gives scaled cosines."""

    cosine_scale: float

    def forward(self, input: Tensor) -> Tensor:
        return cosine_logits(input, self.weight, self.cosine_scale)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, cosine_scale={self.cosine_scale}"


@dataclass
class CosineHeadInPlace(Operation):
    """A cosine head that is in place: `layer`."""

    layer: CosineLinear | None = None


@dataclass(frozen=True)
class CosineHeadSpec:
    """The surgery: the head at a path gives cosines, and has no bias.

    Attributes:
        scale: factor on them.
        head: its path, or 'auto'.
    """

    what: ClassVar[str] = "cosine head"
    on_weights: ClassVar[bool] = False

    scale: float
    head: str

    def present(self, module: pl.LightningModule) -> bool:
        return any(isinstance(part, CosineLinear) for part in module.modules())

    def operate(self, module: pl.LightningModule) -> CosineHeadInPlace:
        path, layer = head_input(module, self.head)
        operation = CosineHeadInPlace(module, CosineHeadSpec(self.scale, path), layer=layer)
        if type(layer) is CosineLinear:  # of an earlier fit; it goes on training
            operation.undo.callback(setattr, layer, "cosine_scale", layer.cosine_scale)
        elif type(layer) is nn.Linear:
            bias = layer.bias
            operation.undo.callback(_take_out, layer, bias)
            layer.__class__, layer.bias = CosineLinear, None
        else:
            raise RecipeError(f"the head {path} is a {type(layer).__name__}; a plain nn.Linear can be given cosines")
        layer.cosine_scale = self.scale
        return operation


def _take_out(layer: nn.Linear, bias: nn.Parameter | None) -> None:
    layer.__class__, layer.bias = nn.Linear, bias
    del layer.cosine_scale


class CosineHead(Recipe):
    """Replace the linear head of a classifier by scaled cosines.

    The head stays in the module when the fit is over, under its old name and without a bias. For validate, test and
    predict from a checkpoint give the recipe too, so that it is built before weights load.

    Args:
        scale: factor on the cosines.
        init: first weights: 'keep' the head's own, 'class_mean' of the training features, or 'text'.
        text: for 'text': class features ``[C, D]`` as the head's input, a file (.safetensors, or .pt without code) that
            holds them under 'text', or text features ``[C, P]`` there beside CLIP's visual 'projection' ``[D, P]``.
        head: path of the linear layer; 'auto' finds it.
        criterion: for 'class_mean': which loss of the training step has the labels, where it cannot be found.

    Raises:
        RecipeError: for bad arguments and files; in setup when there is no linear head, or class features of another
            shape.
    """

    paper = Paper(
        "Dynamic Few-Shot Visual Learning without Forgetting",
        "S. Gidaris, N. Komodakis",
        2018,
        "https://arxiv.org/abs/1804.09458",
        "https://github.com/gidariss/FewShotWithoutForgetting",
    )
    does = "Classifies by scaled cosines, with first weights from the head, from class means or from text features."
    use_when = "Classes are unequally frequent, or class features (text, means) are a better start than random weights."
    costs = "Two normalisations a step; class means cost one forward pass over the training data."
    refuses: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("BoostedHead", "ProjectionHead", "RidgeRefit", "SLCA"), "both own the head"
    )
    merge_on_end: ClassVar[bool] = False
    free_on_resume = frozenset({"text"})  # the weights are those of the checkpoint

    operation: CosineHeadInPlace | None = None

    def __init__(
        self,
        scale: float = 25.0,
        init: Literal["keep", "class_mean", "text"] = "keep",
        text: str | Tensor | None = None,
        head: str = "auto",
        criterion: str | int | None = None,
    ) -> None:
        super().__init__()
        check_argument(scale > 0, self, "scale", scale, "positive")
        check_argument(init in INITS, self, "init", init, "'keep', 'class_mean' or 'text'")
        given = text if text is None or isinstance(text, str) else "a tensor"
        check_argument(
            (text is not None) == (init == "text"), self, "text", given, "given with init='text' and only then"
        )
        self.scale, self.init, self.text, self.head, self.criterion = scale, init, text, head, criterion
        self._first: Tensor | None = None
        self._taps: Taps | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        return {
            **super().arguments,
            "text": self.text if self.text is None or isinstance(self.text, str) else "a tensor",
        }

    def declare(self, plan: Plan) -> None:
        path, layer = head_input(plan.module, self.head)
        plan.surgery(CosineHeadSpec(self.scale, self.head))
        self._first = self._taps = None
        if not plan.fitting or plan.section is not None:
            return
        if self.init == "text":
            self._first = _read(self.text)
            if self._first.shape != layer.weight.shape:
                raise RecipeError(
                    f"text gives class weights {list(self._first.shape)} and the head {path} takes"
                    f" {list(layer.weight.shape)} (classes, features); features of a text tower need its 'projection'"
                )
        if self.init == "class_mean":
            # For the whole fit: a hook that comes after the first compiled call never fires.
            self._taps = Taps(plan.module, {"h": (path, "input")})
            plan.install(self._taps)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._first is None and self._taps is None:
            return
        layer = self.operation.layer
        if self._taps is not None:
            with speaking_for(self):
                seen = encode(
                    trainer, pl_module, lambda: {"h": self._taps["h"]}, select=self.criterion, full_precision=True
                )
            labels = seen.targets.argmax(1) if seen.targets.is_floating_point() else seen.targets
            self._first = class_means(seen.features["h"], labels, layer.weight.detach().float().cpu())
            self._taps.close()
        with torch.no_grad():
            layer.weight.copy_(self._first)
        self._first = self._taps = None


def _read(text: str | Tensor) -> Tensor:
    if isinstance(text, Tensor):
        return text_weights(text)
    path = Path(text).expanduser()
    if not path.is_file():
        raise RecipeError(f"text={text!r}: there is no such file")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        held = load_file(path)
    else:
        held = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(held, Tensor):
        return text_weights(held)
    if not isinstance(held, Mapping) or not isinstance(held.get("text"), Tensor):
        keys = sorted(held) if isinstance(held, Mapping) else type(held).__name__
        raise RecipeError(f"text={text!r} must hold a tensor under 'text' (and 'projection'); it holds {keys}")
    return text_weights(held["text"], held.get("projection"))
