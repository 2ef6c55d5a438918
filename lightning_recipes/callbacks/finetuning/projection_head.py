"""A projection head between a network's features and its classifier, which is taken out after training.

Xue, Gan, Ni, Joshi, Mirzasoleiman, "Investigating the Benefits of Projection Head for Representation Learning", ICLR
2024 (https://arxiv.org/abs/2403.11391; code https://github.com/jiayini1119/projection-head-experiments, commit
a145e06).

    z = g(x),   u = h(z),   loss of classifier(u);   after training h is thrown away and z is used

Deeper layers weight features more unequally and drop some, so z serves a task that was not trained on better than u.
With linear layers that is exact: for a feature of strength phi whose two views correlate by rho, trained from a small
start by the spectral contrastive loss, u weights it by sqrt(rho) / phi and z by the square root of that. Heads:

    mlp       Linear(p, m), ReLU, Linear(m, q); mlp2 with two hidden layers
    identity  Linear(p, p), s_b, Linear(p, p) with s_b(a) = relu(a - b) - relu(-a - b), the identity at the start
    fixed     u_i = z_i kappa^(-i), without parameters: late features must be large to count

The released script builds the fixed head wherever an MLP head was asked for, at kappa = 1.05, and evaluates at 1.01;
here the kind is what it says and there is one kappa. Its weights are a buffer, not a frozen parameter.

Costs the head, and at the end one pass over the training set where it is taken out again. A batch norm behind the fixed
head undoes it in training.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn import Parameter

from lightning_recipes.core import random, select
from lightning_recipes.core.distributed import decided_on_rank_zero
from lightning_recipes.core.errors import RecipeError, check_argument, speaking_for
from lightning_recipes.core.features import Taps, head_input
from lightning_recipes.core.head_fit import LinearHead, fit_logistic, where_to_fit
from lightning_recipes.core.labels import labels_in
from lightning_recipes.core.prepare import Plan
from lightning_recipes.core.probe import bar, encode
from lightning_recipes.core.recipe import Recipe
from lightning_recipes.core.surgery import Operation
from lightning_recipes.modules.projection import CHILD, PAPER, FixedReweighting, IdentityHead, MLPHead, SymmetricReLU

Kind = Literal["mlp", "mlp2", "identity", "fixed"]
KINDS = ("mlp", "mlp2", "identity", "fixed")


def build_head(
    kind: Kind, p: int, hidden: int | None = None, out: int | None = None, kappa: float = 1.05, threshold: bool = True
) -> nn.Module:
    """A head for features of width p; see :class:`ProjectionHead` for the arguments.

    Raises:
        RecipeError: for sizes that the kind cannot have.
    """
    if kind in ("mlp", "mlp2"):
        return MLPHead(p, hidden, out, layers=1 if kind == "mlp" else 2)
    for name, value in (("hidden", hidden), ("out", out)):
        if value not in (None, p):
            raise RecipeError(
                f"{name}={value} with kind={kind!r}: this head keeps the classifier's input width, which is {p}; leave"
                f" {name} out, or use kind='mlp'"
            )
    try:
        return IdentityHead(p, threshold) if kind == "identity" else FixedReweighting(p, kappa)
    except ValueError as error:
        raise RecipeError(str(error)) from error


# -- the surgery -----------------------------------------------------------------------------------------------------


class Project:
    """The hook that sends a classifier's input through the head that is its child; a copy uses its own classifier's.

    Args:
        spec: of the head.
        p: width of z.
        stock: the classifier's own weight where it has another now.
    """

    def __init__(self, spec: ProjectionSurgery, p: int, stock: Parameter | None) -> None:
        self.spec, self.p, self.stock, self.called = spec, p, stock, False

    def __call__(self, classifier: nn.Linear, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        z = args[0] if args else kwargs["input"]
        if z.dim() != 2:
            raise RecipeError(
                f"ProjectionHead: the classifier {self.spec.classifier} got features {list(z.shape)} and needs [n, p];"
                " name another layer with classifier="
            )
        if not torch.compiler.is_compiling():
            self.called = True
        u = getattr(classifier, CHILD)(z)
        return (u.to(classifier.weight.dtype),), {}  # the fixed head computes in fp32 in a module of half precision


@dataclass(frozen=True)
class ProjectionSurgery:
    """A head before a linear classifier, whose own keys stay; arguments as those of :class:`ProjectionHead`."""

    what: ClassVar[str] = "projection head"
    on_weights: ClassVar[bool] = False

    kind: Kind
    classifier: str = "auto"
    hidden: int | None = None
    out: int | None = None
    kappa: float = 1.05
    threshold: bool = True
    seed: int = 0

    def present(self, module: pl.LightningModule) -> bool:
        return projected(module) is not None

    def operate(self, module: pl.LightningModule) -> Projection:
        kept = projected(module)
        path, classifier = head_input(module, self.classifier) if kept is None else kept
        if kept is None and self.classifier == "auto":
            _check_alone(module, path)
        p = classifier.in_features if kept is None else _hook_of(classifier).p
        if kept is None and hasattr(classifier, CHILD):
            raise RecipeError(f"the classifier {path} has a part named {CHILD!r} already")
        hidden = (self.hidden or p) if self.kind.startswith("mlp") else self.hidden
        out = (self.out or p) if self.kind.startswith("mlp") else self.out
        done = replace(self, classifier=path, hidden=hidden, out=out)
        operation = Projection(module, done, classifier=classifier)
        if kept is not None:
            operation.take_over()
        else:
            with random.forked(module.device, self.seed):
                operation.put_in(build_head(self.kind, p, hidden, out, self.kappa, self.threshold))
        return operation


@dataclass
class Projection(Operation):
    """A head in its place: a child of the classifier, called by a hook before it.

    Attributes:
        classifier: the module's own linear layer.
        refit: what the classifier becomes when the head is taken out; None leaves it as it was trained.
    """

    classifier: nn.Linear | None = None
    refit: LinearHead | None = None

    @property
    def head(self) -> nn.Module:
        """h, from z to u."""
        return getattr(self.classifier, CHILD)

    @property
    def called(self) -> bool:
        """Whether the head was reached in any pass that was not compiled."""
        return _hook_of(self.classifier).called

    def put_in(self, head: nn.Module) -> None:
        """Add the head, and give the classifier another weight where u has another width than z."""
        layer, spec = self.classifier, self.spec
        head = head.to(layer.weight.device)
        head = head if isinstance(head, FixedReweighting) else head.to(layer.weight.dtype)
        head.train(layer.training)
        p = layer.in_features
        stock = layer.weight if spec.out not in (None, p) else None
        if stock is not None:
            self._make_anew(spec.out)
        layer.add_module(CHILD, head)
        layer.register_forward_pre_hook(Project(spec, p, stock), with_kwargs=True, prepend=True)
        self._begin()

    def _make_anew(self, width: int) -> None:
        layer, stock, path = self.classifier, self.classifier.weight, self.spec.classifier
        if sum(p is stock for _, p in self.module.named_parameters(remove_duplicate=False)) > 1:
            raise RecipeError(
                f"the weight of the classifier {path} is tied to another part's, so it cannot get the width"
                f" out={width}; leave out at the classifier's input width {layer.in_features}"
            )
        rank_zero_info(f"ProjectionHead: {path} was made anew for {width} features instead of {layer.in_features}")
        fresh = nn.Linear(width, layer.out_features, bias=False, device=stock.device, dtype=stock.dtype)
        layer.weight, layer.in_features = fresh.weight, width

    def take_over(self) -> None:
        """Go on with the head that an earlier fit kept.

        Raises:
            RecipeError: when it is another one than is asked for.
        """
        there = _hook_of(self.classifier).spec
        if there != replace(self.spec, seed=there.seed):
            raise RecipeError(
                f"the module carries another projection head from an earlier fit ({there}); use its arguments, or a"
                " module without it"
            )
        self._begin()

    def _begin(self) -> None:
        path = self.spec.classifier
        self.made = {f"{path}.{CHILD}.{name}": p for name, p in self.head.named_parameters()}
        if _hook_of(self.classifier).stock is not None:
            self.made[f"{path}.weight"] = self.classifier.weight
        self.undo.callback(_take_out, self.classifier)

    def remove(self, *, merge: bool) -> None:
        """Take the head out; the classifier becomes what was fitted on z, where that was done."""
        super().remove(merge=merge)
        if merge and self.refit is not None:
            self.refit.write(self.classifier)


def projected(module: nn.Module) -> tuple[str, nn.Linear] | None:
    """Path and classifier of the projection head in a module, None without one."""
    return next((found for found in module.named_modules() if _hook_of(found[1]) is not None), None)


def discard_head(module: nn.Module) -> nn.Module:
    """Take the projection head that a fit kept out of a module, and return it.

    The classifier is left as it was trained, behind the head; one that was made anew for another width is the stock
    one again, which was not trained.

    Raises:
        RecipeError: when there is none.
    """
    found = projected(module)
    if found is None:
        raise RecipeError(f"{type(module).__name__} carries no projection head")
    head = getattr(found[1], CHILD)
    _take_out(found[1])
    return head


def _take_out(classifier: nn.Linear) -> None:
    hook = _hook_of(classifier)
    key = next(key for key, each in classifier._forward_pre_hooks.items() if each is hook)
    del classifier._forward_pre_hooks[key]
    classifier._forward_pre_hooks_with_kwargs.pop(key, None)
    delattr(classifier, CHILD)
    if hook.stock is not None:
        hook.stock.data = hook.stock.data.to(classifier.weight)  # nobody moved it with the module
        classifier.weight, classifier.in_features = hook.stock, hook.p


def _hook_of(part: nn.Module) -> Project | None:
    return next((hook for hook in part._forward_pre_hooks.values() if isinstance(hook, Project)), None)


def _check_alone(module: nn.Module, path: str) -> None:
    """Refuse to choose among several classifiers side by side.

    Raises:
        RecipeError: names them.
    """
    parent = module.get_submodule(path.rpartition(".")[0])
    beside: list[str] = []
    if isinstance(parent, (nn.ModuleList, nn.ModuleDict)):
        prefix = path.rpartition(".")[0]
        beside = [f"{prefix}.{name}" for name, part in parent.named_children() if isinstance(part, nn.Linear)]
    root_path, root = select.network(module)
    named = (getattr(root, "pretrained_cfg", None) or {}).get("classifier")
    if isinstance(named, (tuple, list)):  # timm's distilled networks have two
        beside = [f"{root_path}.{name}" if root_path else name for name in named]
    if len(beside) > 1:
        raise RecipeError(f"the module has several classifiers {beside}; name one of them with classifier=")


# -- the callbacks ---------------------------------------------------------------------------------------------------


class ProjectionHead(Recipe):
    """Put a projection head before the classifier of a stock module: its new forward is classifier(head(z)).

    The head is a child of the classifier and its keys come beside the stock ones. Checkpoints of the fit hold both and
    load, with this callback, in a resume and in validate, test and predict; after those the head is taken out again,
    and the classifier that was loaded is the one that was trained behind it.

    Args:
        kind: 'mlp', 'mlp2' (two hidden layers), 'identity' or 'fixed'.
        classifier: 'auto' for the network's last linear layer, or the dotted path of one.
        hidden: m of the MLP heads; None is the classifier's input width p.
        out: q of the MLP heads; None is p. With another one the classifier's weight is made anew.
        kappa: decay of the fixed head, above 1; 1 does nothing.
        threshold: of the identity head: learn b; without it the head stays linear.
        discard: 'fit_end' takes the head out when the fit is over, so that the module is stock again; 'never' keeps it
            in the module.
        refit: what the classifier is then: 'linear_probe' fits it anew on z of the training set (logistic regression),
            'none' leaves it as trained behind the head.
        seed: of the head's first values.

    Raises:
        RecipeError: for bad arguments; in setup when there is no linear classifier or there are several, or sizes that
            the kind cannot have; in the first step when the classifier does not get features [n, p], is never called,
            or is to be fitted anew on targets that are no class indices.
    """

    paper = PAPER
    does = "Trains through a head that is thrown away, so that the features before it keep more than the task needs."
    use_when = "The features shall serve another task, or data on which the trained task's shortcuts fail."
    costs = "The head; one pass over the training set where it is taken out at the end."
    refuses: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("BoostedHead", "CosineHead", "RidgeRefit", "SLCA"), "both own the head"
    )
    free_on_resume = frozenset({"discard", "refit"})

    operation: Projection | None = None

    def __init__(
        self,
        kind: Kind = "mlp",
        classifier: str = "auto",
        hidden: int | None = None,
        out: int | None = None,
        kappa: float = 1.05,
        threshold: bool = True,
        discard: Literal["never", "fit_end"] = "never",
        refit: Literal["linear_probe", "none"] = "linear_probe",
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_argument(kind in KINDS, self, "kind", kind, "'mlp', 'mlp2', 'identity' or 'fixed'")
        check_argument(bool(classifier), self, "classifier", classifier, "'auto' or the path of a linear layer")
        check_argument(hidden is None or hidden >= 1, self, "hidden", hidden, "None or at least 1")
        check_argument(out is None or out >= 1, self, "out", out, "None or at least 1")
        check_argument(kappa > 0, self, "kappa", kappa, "positive")
        check_argument(discard in ("never", "fit_end"), self, "discard", discard, "'never' or 'fit_end'")
        check_argument(refit in ("linear_probe", "none"), self, "refit", refit, "'linear_probe' or 'none'")
        self.kind, self.classifier, self.hidden, self.out = kind, classifier, hidden, out
        self.kappa, self.threshold, self.discard, self.refit, self.seed = kappa, threshold, discard, refit, seed
        self._begun = self._reached = True  # what the first step is checked for
        self._taps: Taps | None = None
        if self.neutral:
            rank_zero_warn("ProjectionHead: the fixed head with kappa=1 has no effect; the paper has 1.01 to 1.5")

    @property
    def neutral(self) -> bool:
        return self.kind == "fixed" and self.kappa == 1

    @property
    def merge_on_end(self) -> bool:
        """Whether the module is stock after the fit."""
        return self.discard == "fit_end"

    @property
    def _refits(self) -> bool:
        return self.discard == "fit_end" and self.refit == "linear_probe"

    def declare(self, plan: Plan) -> None:
        plan.surgery(
            ProjectionSurgery(self.kind, self.classifier, self.hidden, self.out, self.kappa, self.threshold, self.seed)
        )
        self._begun = self._reached = not plan.fitting
        if plan.fitting and self._refits:
            plan.install(_TapOfZ(self))
        if plan.fitting and self.discard == "fit_end" and self.refit == "none":
            rank_zero_warn(
                "ProjectionHead: discard='fit_end' with refit='none' leaves a classifier that was trained on u and will"
                " be given z; use refit='linear_probe' unless you fit one yourself"
            )

    # -- the first step ----------------------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._begun or self.neutral:
            return
        self._begun = True
        labels = labels_in(batch)
        if self._refits and isinstance(labels, Tensor) and (labels.is_floating_point() or labels.dim() != 1):
            raise RecipeError(
                f"ProjectionHead: refit='linear_probe' fits the classifier on class indices [n]; the targets are"
                f" {str(labels.dtype)[6:]} {list(labels.shape)}: use refit='none' and fit it yourself, or"
                " discard='never'"
            )

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if self._reached or self.neutral:
            return
        self._reached = True
        if not self.operation.called and not _is_compiled(pl_module):
            raise RecipeError(
                f"ProjectionHead: the classifier {self.operation.spec.classifier} was not called in the training step,"
                " so the head had no part in it; name the layer that gives the logits with classifier="
            )

    # -- the end -----------------------------------------------------------------------------------------------------

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        thresholds = [] if self.neutral else [p for p in self.operation.head.modules() if isinstance(p, SymmetricReLU)]
        for part in thresholds:
            self.log("projection/threshold", part.threshold.detach())

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        head = None if self.neutral else self.operation.head
        if isinstance(head, FixedReweighting) and trainer.precision == "16-mixed":
            lost = int((head.weights < torch.finfo(torch.float16).smallest_normal).sum())
            if lost:
                rank_zero_warn(
                    f"ProjectionHead: fp16 has no room for {lost} of the {head.p} fixed weights, so those features"
                    " reach the classifier as 0; use precision='bf16-mixed', or a smaller kappa"
                )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fit the classifier that the module will have without the head; the head itself goes when the fit closes."""
        if self.neutral or not self._refits:
            return
        classifier = self.operation.classifier

        def fit() -> LinearHead:
            z, y = found.features["z"], found.targets
            head = fit_logistic(
                z.to(where_to_fit(pl_module)),
                (y.argmax(1) if y.dim() == 2 else y).to(where_to_fit(pl_module)),
                classifier.out_features,
                floor=0.1,
                bias=classifier.bias is not None,
            )
            return head.to("cpu")

        with speaking_for(self):
            found = encode(
                trainer, pl_module, lambda: {"z": self._taps["z"]}, progress=bar(trainer, "fitting a classifier on z")
            )
            self.operation.refit = decided_on_rank_zero(fit, trainer)
        if not self.operation.refit.converged:
            rank_zero_warn("ProjectionHead: the classifier fitted on z has not converged after 1000 iterations")


class _TapOfZ:
    """Taps what goes into the head, for the length of the fit."""

    def __init__(self, recipe: ProjectionHead) -> None:
        self.recipe = recipe

    def install(self, undo: ExitStack) -> None:
        operation = self.recipe.operation
        if operation.classifier.out_features < 2:
            raise RecipeError(
                f"ProjectionHead: refit='linear_probe' needs a classifier of at least 2 classes;"
                f" {operation.spec.classifier} has one output: use refit='none', or discard='never'"
            )
        self.recipe._taps = Taps(operation.module, {"z": (f"{operation.spec.classifier}.{CHILD}", "input")})
        self.recipe._taps.install(undo)


def _is_compiled(module: pl.LightningModule) -> bool:
    return getattr(module, "_compiler_ctx", None) is not None or any(
        type(part).__name__ == "OptimizedModule" or part._compiled_call_impl is not None for part in module.modules()
    )
