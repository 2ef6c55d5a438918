"""LEVI: a layer-wise ensemble of a pre-trained network and a small one trained from scratch.

Roh et al., "LEVI: Generalizable Fine-tuning via Layer-wise Ensemble of Different Views", ICML 2024
(https://arxiv.org/abs/2402.04644; no official code was found, and the paper's own method section could not be read: the
depths, linear heads, normalisation and plain average below are this package's reading of its published summaries).

With pooled features h_l of the pre-trained network at chosen depths l in I and the output z of a small network on the
same input, each depth has its own head and its own loss:

    y_l = a_l([norm(h_l); z]),    L = mean over l of loss(y_l, y),    prediction: y = mean over l of y_l
    norm: to mean 0 and variance 1 over the features of a sample

The module's own loss is that of the prediction. The recipe adds the difference

    gap = mean over l of loss(y_l, y) - loss(mean over l of y_l, y)    (>= 0 for cross-entropy and squared error)

so that what trains is exactly L. Pays off where the pre-trained features are missing something or mislead; where they
are good and complete, plain full fine-tuning is better.

Costs a frozen forward pass and the training of the small network: less than full fine-tuning. At test time both
networks run: it cannot be merged away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_recipes.core import features, select
from lightning_recipes.core.dry_run import arguments_of, eager_and_silent
from lightning_recipes.core.errors import RecipeError, check_argument
from lightning_recipes.core.features import Taps
from lightning_recipes.core.labels import labels_in
from lightning_recipes.core.parameters import Claim
from lightning_recipes.core.prepare import Plan
from lightning_recipes.core.recipe import Paper, StepRecipe
from lightning_recipes.core.silence import modes_kept
from lightning_recipes.core.step import Step
from lightning_recipes.core.surgery import Operation
from lightning_recipes.modules.levi_ensemble import LEVIEnsemble, combined, main_input, takes_mask, token_mask

# -- the maths -------------------------------------------------------------------------------------------------------


def ensemble_gap(losses: Sequence[Tensor], loss: Tensor) -> Tensor:
    """The mean of the heads' losses over the loss of their combination; added to the latter it gives the former."""
    return torch.stack(list(losses)).mean(0) - loss


def evenly_spaced(count: int, depth: int) -> list[int]:
    """`count` of `depth` indices at equal distances, the last one included; all of them where there are fewer."""
    count = min(count, depth)
    return [(i + 1) * depth // count - 1 for i in range(count)]


# -- putting it in ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EnsembleSurgery:
    """Wrap the part that maps inputs to logits; ``structure`` is found out in a dry run."""

    what: ClassVar[str] = "ensemble"
    on_weights: ClassVar[bool] = False

    asked: dict[str, Any]
    seed: int
    lr_scale: float
    path: str | None = None
    structure: dict[str, Any] | None = None
    small: nn.Module | None = field(default=None, metadata={"stored": False})

    def present(self, module: pl.LightningModule) -> bool:
        return any(isinstance(part, LEVIEnsemble) for part in module.modules())

    def operate(self, module: pl.LightningModule) -> Operation:
        if self.present(module):
            return self._go_on(module)
        path = self.path or where_logits_are_made(module, self.asked["backbone_path"])
        base = features.part_of(module, path)
        small = deepcopy(self.small)
        spec = replace(self, path=path)
        if spec.structure is None:
            spec = replace(spec, structure=learn(module, base, small, self.asked))
        modes = [(part, part.training) for part in base.modules()]
        parent_path, _, name = path.rpartition(".")
        parent = module.get_submodule(parent_path)
        ensemble = LEVIEnsemble.build(base, spec.structure, small, self.seed)
        undo = ExitStack()
        undo.callback(_put_back, parent, name, ensemble, modes)
        setattr(parent, name, ensemble)
        rank_zero_info(f"LEVI: {path} is an ensemble over {', '.join(spec.structure['blocks'])}")
        return self._operation(module, spec, undo)

    def _go_on(self, module: pl.LightningModule) -> Operation:
        """Train an ensemble that an earlier fit kept."""
        path, ensemble = next((n, p) for n, p in module.named_modules() if isinstance(p, LEVIEnsemble))
        there = ensemble.structure["asked"]
        differ = [name for name, value in self.asked.items() if there.get(name) != value]
        if differ:
            listed = ", ".join(f"{name}={there.get(name)!r} there and {self.asked[name]!r} here" for name in differ)
            raise RecipeError(
                f"the module keeps the ensemble of an earlier fit with other arguments ({listed}); give the same ones"
                f" to train on, or begin anew from the pre-trained network: module.{path} = module.{path}.release()"
            )
        return self._operation(module, replace(self, path=path, structure=ensemble.structure), ExitStack())

    def _operation(self, module: pl.LightningModule, spec: EnsembleSurgery, undo: ExitStack) -> Operation:
        ours = (f"{spec.path}.small.", f"{spec.path}.heads.")
        made = {name: p for name, p in module.named_parameters() if name.startswith(ours)}
        scales = dict.fromkeys(made, self.lr_scale) if self.lr_scale != 1 else {}
        return Operation(module, spec, made, lr_scale=scales, undo=undo)


def _put_back(parent: nn.Module, name: str, ensemble: LEVIEnsemble, modes: Sequence[tuple[nn.Module, bool]]) -> None:
    setattr(parent, name, ensemble.release())
    for part, mode in modes:
        part.training = mode


def where_logits_are_made(module: pl.LightningModule, path: str | None) -> str:
    """Path of the part to wrap: the one that is named, or the network inside the module.

    Raises:
        RecipeError: when the module's layers are its own, so that no single part maps inputs to logits.
    """
    if path is not None:
        features.part_of(module, path)
        return path
    path, _ = select.network(module)
    compiled = [name for name, part in module.named_modules() if type(part).__name__ == "OptimizedModule"]
    path = next((name for name in compiled if f"{path}.".startswith(f"{name}.")), path)
    children = [name for name, child in module.named_children() if any(True for _ in child.parameters())]
    if not path and len(children) == 1 and not any(True for _ in module.parameters(recurse=False)):
        path = children[0]
    if not path:
        raise RecipeError(
            f"no single part of {type(module).__name__} maps inputs to logits; its parts are"
            f" {select.names_of(module, 1)}: put its layers into one submodule, or name that with backbone_path"
        )
    return path


def learn(
    module: pl.LightningModule, base: nn.Module, small: nn.Module | None, asked: Mapping[str, Any]
) -> dict[str, Any]:
    """The ensemble's structure, from a dry run on a few samples.

    Raises:
        RecipeError: for depths that are not there, outputs that cannot be pooled, a base without logits ``[n, C]``, and
            a small view that does not give ``[n, d]``.
    """
    names, paths = chosen_blocks(base, asked["layers"])
    args, kwargs = arguments_of(module, base)
    frozen = asked["backbone"] == "frozen"
    with eager_and_silent(module), torch.set_grad_enabled(not frozen):
        with Taps(base, {path: (path, "output") for path in paths}) as taps:
            output = base(*args, **kwargs)
            x, mask = main_input(args, kwargs), token_mask(base, args, kwargs)
            values = [taps[path] for path in paths]
        logits = features.tensor_in(output.get("logits") if isinstance(output, Mapping) else output)
        fits = isinstance(output, (Tensor, Mapping)) and logits is not None and logits.dim() == 2
        if not fits or len(logits) != len(x):
            shape = list(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
            raise RecipeError(
                f"{type(base).__name__} gave {shape} for {len(x)} samples and not logits [n, classes]; name the"
                " submodule that maps inputs to logits with backbone_path"
            )
        pools = [_pool(base, value, asked["pool"]) for value in values]
        h = [features.pooled(value, len(x), pool, mask, path) for value, pool, path in zip(values, pools, paths)]
        unused = [] if frozen else _unused(base, h)
        width, view, inputs = _view_of(base, small, x, mask, asked["small_width"])
    return {
        "blocks": paths,
        "names": names,
        "widths": [each.shape[1] for each in h],
        "pools": pools,
        "classes": logits.shape[1],
        "view": view,
        "inputs": inputs,
        "small_width": width,
        "adapter_hidden": asked["adapter_hidden"],
        "frozen": frozen,
        "average": asked["average"],
        "normalize": asked["normalize"],
        "unused": unused,
        "asked": dict(asked),
    }


def chosen_blocks(base: nn.Module, layers: int | Sequence[int | str]) -> tuple[list[str], list[str]]:
    """Names of the chosen depths for logs, and their paths in the network."""
    if not isinstance(layers, int) and all(isinstance(layer, str) for layer in layers):
        for path in layers:
            features.part_of(base, path)
        return [path.replace(".", "_") for path in layers], list(layers)
    try:
        found = features.blocks(base)
    except RecipeError as error:
        raise RecipeError(f"{error}; give layers as dotted names of the parts that are the depths") from error
    if isinstance(layers, int):
        chosen = evenly_spaced(layers, len(found))
    else:
        beyond = [layer for layer in layers if not isinstance(layer, int) or not -len(found) <= layer < len(found)]
        if beyond:
            raise RecipeError(
                f"layers: there is no block {beyond[0]!r}; the network has {len(found)} blocks {found}: give indices of"
                " these, or dotted names only"
            )
        chosen = [layer % len(found) for layer in layers]
    return [str(i) for i in chosen], [found[i] for i in chosen]


def _pool(base: nn.Module, value: Tensor, pool: str) -> str:
    if pool != "auto":
        return pool
    if value.dim() == 3:
        return features.how_to_pool(base)
    channels_last = str(getattr(base, "output_fmt", "")).endswith("NHWC")  # timm says so where it is
    return "mean" if channels_last else "avg"


def _unused(base: nn.Module, h: Sequence[Tensor]) -> list[str]:
    """Names of the parameters that no depth depends on: the head, and what comes after the last depth."""
    train = {name: p for name, p in base.named_parameters() if p.requires_grad}
    if not train or not any(each.requires_grad for each in h):
        return list(train)
    gradients = torch.autograd.grad(sum(each.sum() for each in h), list(train.values()), allow_unused=True)
    return [name for name, gradient in zip(train, gradients) if gradient is None]


def _view_of(
    base: nn.Module, small: nn.Module | None, x: Tensor, mask: Tensor | None, width: int
) -> tuple[int, str | None, int | None]:
    """(d_s, kind of the small view, what it is built for)."""
    shape = f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
    if small is not None:
        try:
            with modes_kept(small, training=False):
                z = small(x, attention_mask=mask) if mask is not None and takes_mask(small) else small(x)
        except Exception as error:
            raise RecipeError(
                f"small cannot take the network's input {shape} ({type(error).__name__}: {error})"
            ) from error
        if not isinstance(z, Tensor) or z.dim() != 2 or len(z) != len(x):
            gave = list(z.shape) if isinstance(z, Tensor) else f"a {type(z).__name__}"
            raise RecipeError(f"small must give [n, d]; it gave {gave} for the input {shape}")
        return z.shape[1], "given", None
    if width == 0:
        return 0, None, None
    if not x.is_floating_point() and x.dim() == 2:
        embeddings = [p for p in base.modules() if isinstance(p, nn.Embedding)]
        if not embeddings:
            raise RecipeError("small='auto' found no nn.Embedding to take the vocabulary's size from; give small")
        return width, "tokens", embeddings[0].num_embeddings
    if x.is_floating_point() and x.dim() in (2, 4):
        return width, "vectors" if x.dim() == 2 else "images", x.shape[1]
    raise RecipeError(
        f"small='auto' takes vectors [n, d], images [n, channels, height, width] and token ids [n, tokens]; the network"
        f" gets {shape}: give small, a module that makes [n, d] of it"
    )


# -- the recipe ------------------------------------------------------------------------------------------------------


class LEVI(StepRecipe):
    """Join a pre-trained network, depth by depth, with a small one that is trained from scratch on the task.

    The network becomes a :class:`LEVIEnsemble` and stays one when the fit is over.

    Args:
        layers: depths I: how many evenly spaced blocks, the last included (all where there are fewer); or their
            indices; or their dotted names in the network.
        small: 'auto' (a 2-layer MLP for vectors, 3 convolutions for images, 2 transformer blocks for token ids), or a
            module that makes ``[n, d]`` of the network's input; it is copied.
        small_width: d_s of 'auto'; 0 for no small view.
        adapter_hidden: hidden width of the heads a_l; 0 for linear ones.
        backbone: 'frozen' runs the network in eval mode and without gradients; 'trainable' trains it too, or leaves
            that to an adapter recipe.
        backbone_path: dotted name of the submodule that maps inputs to logits; None finds it.
        pool: how a block's output becomes one vector a sample: 'cls', 'mean', 'last' for tokens, 'avg' for images;
            'auto' goes by the network.
        average: 'logits', or 'probs' for the mean of the heads' class probabilities.
        lr_scale: factor on the rate of small view and heads; 10 is a good start beside a trainable backbone.
        normalize: bring h_l to mean 0 and variance 1 over its features; False for depths that are normalised already.
        criterion: which loss of the training step to observe, where it cannot be found.
        seed: of the first values of small view and heads.

    Raises:
        RecipeError: for bad arguments; before training, for a module without one part that maps inputs to logits,
            depths or outputs that cannot be used, and a small view that does not fit; in the first step for a loss that
            cannot be seen or is not computed from the ensemble's logits.
    """

    paper = Paper(
        "LEVI: Generalizable Fine-tuning via Layer-wise Ensemble of Different Views",
        "Y. Roh, Q. Liu, H. Gui, Z. Yuan, Y. Tang, S. E. Whang, L. Liu, S. Bi, L. Hong, E. H. Chi, Z. Zhao",
        2024,
        "https://arxiv.org/abs/2402.04644",
    )
    does = "Joins a frozen pre-trained network, layer by layer, with a small one trained from scratch."
    use_when = "Pre-trained features are missing something or mislead on your task, and you need it on shifted data."
    costs = "One frozen forward pass and the small network; at test time both run. Cannot be merged away."
    refuses: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            ("ProjectionHead", "SLCA", "BoostedHead", "CosineHead", "RidgeRefit"),
            "LEVI has heads of its own and does not use the network's",
        ),
        "SaRA": "it trains the smallest entries of pre-trained weights, and LEVI's own parts begin at random",
    }
    merge_on_end = False  # it cannot be merged: the ensemble is what was trained

    def __init__(
        self,
        layers: int | list[int] | list[str] = 4,
        small: nn.Module | Literal["auto"] = "auto",
        small_width: int = 128,
        adapter_hidden: int = 0,
        backbone: Literal["frozen", "trainable"] = "frozen",
        backbone_path: str | None = None,
        pool: Literal["auto", "cls", "mean", "avg", "last"] = "auto",
        average: Literal["logits", "probs"] = "logits",
        lr_scale: float = 1.0,
        normalize: bool = True,
        criterion: str | int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        several = isinstance(layers, (list, tuple)) and len(set(layers)) == len(layers) > 0
        ok = layers >= 1 if isinstance(layers, int) else several
        check_argument(ok, self, "layers", layers, "a number of blocks, or a list of different ones")
        ok = small == "auto" or isinstance(small, nn.Module)
        check_argument(ok, self, "small", small, "'auto' or a module")
        check_argument(small_width >= 0, self, "small_width", small_width, "at least 0")
        check_argument(adapter_hidden >= 0, self, "adapter_hidden", adapter_hidden, "at least 0")
        check_argument(backbone in ("frozen", "trainable"), self, "backbone", backbone, "'frozen' or 'trainable'")
        check_argument(pool in ("auto", *features.POOLS), self, "pool", pool, f"'auto' or one of {features.POOLS}")
        check_argument(average in ("logits", "probs"), self, "average", average, "'logits' or 'probs'")
        check_argument(lr_scale > 0, self, "lr_scale", lr_scale, "positive")
        self.layers, self.small, self.small_width, self.adapter_hidden = layers, small, small_width, adapter_hidden
        self.backbone, self.backbone_path, self.pool, self.average = backbone, backbone_path, pool, average
        self.lr_scale, self.normalize, self.criterion, self.seed = lr_scale, normalize, criterion, seed
        self._taps: Taps | None = None
        self._before: set[int] = set()
        self._checked = False

    def declare(self, plan: Plan) -> None:
        if plan.fitting and not plan.module.automatic_optimization:
            raise RecipeError(
                "LEVI needs automatic optimization: it adds to the loss, and under manual optimization the module calls"
                " backward itself, inside its step"
            )
        asked = {
            "layers": self.layers if isinstance(self.layers, int) else list(self.layers),
            "small": "auto" if self.small == "auto" else "given",
            "small_width": self.small_width,
            "adapter_hidden": self.adapter_hidden,
            "backbone": self.backbone,
            "backbone_path": self.backbone_path,
            "pool": self.pool,
            "average": self.average,
            "normalize": self.normalize,
        }
        own = None if self.small == "auto" else self.small
        plan.surgery(EnsembleSurgery(asked, self.seed, self.lr_scale, small=own))
        if not plan.fitting:
            return
        self._before, self._checked = {id(p) for p in plan.module.parameters()}, False
        plan.parameters(self._claim)
        plan.step(self)
        plan.install(self)

    def _claim(self) -> Claim:
        """Freeze what does not train: the whole base, or what no depth depends on."""
        spec = self.operation.spec
        base = f"{spec.path}.base."
        names = {n: p for n, p in self.operation.module.named_parameters() if n.startswith(base)}
        if not spec.structure["frozen"]:
            return Claim(frozen=frozenset(names).intersection(base + name for name in spec.structure["unused"]))
        foreign = [name for name, p in names.items() if id(p) not in self._before]
        if foreign:
            raise RecipeError(
                f"LEVI runs a frozen network without gradients, and {foreign[0]!r}, which another recipe put into it,"
                " would never train; set backbone='trainable'"
            )
        return Claim(frozen=frozenset(names))

    def install(self, undo: ExitStack) -> None:
        """Listen to the heads for the length of the fit."""
        spec = self.operation.spec
        points = {name: (f"{spec.path}.heads.{i}", "output") for i, name in enumerate(spec.structure["names"])}
        self._taps = Taps(self.operation.module, points)
        self._taps.install(undo)

    # -- the step ----------------------------------------------------------------------------------------------------

    def transform_logits(self, step: Step, logits: Tensor) -> Tensor:
        """Keep the heads' outputs of this pass (a replay later in the step runs the network again); changes nothing."""
        if self not in step.notes:
            heads = {name: self._taps[name] for name in self._taps.points}
            if not self._checked and step.outputs.isfinite().all():  # NaN of a bad batch equals nothing
                self._check_loss(step, list(heads.values()))
                self._checked = True
            seen = step.outputs  # the prediction, in the shape and type in which the loss gets it
            step.notes[self] = {name: y.reshape(seen.shape).to(seen.dtype) for name, y in heads.items()}
        return logits

    def _check_loss(self, step: Step, heads: list[Tensor]) -> None:
        """Once a fit: the loss is one of the ensemble's own logits."""
        name, seen = step.call.name, step.outputs
        if name in ("nll_loss", "binary_cross_entropy"):
            raise RecipeError(
                f"LEVI's heads give logits, and the module's loss, {name}, takes probabilities or their logarithms; use"
                " cross_entropy or binary_cross_entropy_with_logits"
            )
        if self.average == "probs" and not step.call.classifies:
            raise RecipeError(f"average='probs' needs a loss of classes, and the module's is {name}")
        with torch.no_grad():
            ours = combined(heads, self.average)
            same = ours.numel() == seen.numel()
            same = same and torch.allclose(ours.flatten(), seen.flatten().to(ours.dtype), rtol=1e-2, atol=1e-3)
        if not same:
            raise RecipeError(
                f"the loss is not computed from what {self.operation.spec.path} returned, {list(ours.shape)}: it sees"
                f" other values {list(seen.shape)}; name the submodule that maps inputs to the loss's logits with"
                " backbone_path"
            )

    def extra_loss(self, step: Step) -> Mapping[str, Tensor]:
        """mean_l loss(y_l, y) - loss(y, y), by which the module's own loss becomes the mean of the heads' losses."""
        heads = step.notes[self]
        losses = {name: step.loss_of(y) for name, y in heads.items()}
        step.log(self, {f"loss_layer_{name}": loss.mean() for name, loss in losses.items()})
        if len(losses) == 1:
            return {}
        gap = ensemble_gap(list(losses.values()), step.loss)
        return {"ensemble_gap": gap if step.own_loss is step.loss else (step.share_of_loss() * gap).sum()}

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Accuracy of every head, where the batch has class labels."""
        if self._taps is None or not self._taps.values:
            return
        heads = {name: self._taps[name] for name in self._taps.points}
        labels = labels_in(batch)
        if not isinstance(labels, Tensor) or labels.is_floating_point():
            return
        for name, y in heads.items():
            if y.dim() == 2 and labels.shape == y.shape[:1]:
                hits = (y.argmax(1) == labels).float().mean()
                pl_module.log(f"levi/acc_layer_{name}", hits, batch_size=len(labels), sync_dist=True)
