"""The vocabulary of misuses: what is done wrong, what the one error must say, and modules that a recipe cannot take."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import BackboneFinetuning, Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.optim import SGD

from lightning_recipes.core.adapters import AdapterRecipe
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.phases import Phase, PhasePlan
from lightning_recipes.core.recipe import Recipe
from tests.attention import D
from tests.stock import Classifier, loader, mlp, quiet, samples

from . import table
from .table import Row

X, Y = samples()
LAYERS = ["0", "2"]  # of the mlp; its head is '4'


@dataclass(frozen=True)
class Misuse:
    """One thing done wrong.

    Attributes:
        recipe: the name that the message must give; '' where no recipe is to blame.
        wrong: what is done, in a few words.
        says: regular expression for what is wrong, the value given or what was found, and what to do.
        callbacks: makes the callbacks; a bad argument shows here.
        module: makes the user's module.
        data, validation: make its data.
        trainer: further Trainer arguments.
        checkpoint: makes the file to resume from; None for a new fit.
        loads: whether the error can only come once the checkpoint's weights are in the module.
        in_step: whether only a training step can show it.
        missing: a package that is not installed.
        error: its type: ours, or the one that Lightning raises for it.
    """

    recipe: str
    wrong: str
    says: str
    callbacks: Callable[[], list[Callback]]
    module: Callable[[], LightningModule] = Classifier
    data: Callable[[], Iterable[Any]] = lambda: loader(X, Y)
    validation: Callable[[], Iterable[Any]] | None = None
    trainer: dict[str, Any] = field(default_factory=dict)
    checkpoint: Callable[[], bytes] | None = None
    loads: bool = False
    in_step: bool = False
    missing: str | None = None
    error: type[Exception] = RecipeError

    def __str__(self) -> str:
        return f"{self.recipe or 'any'}: {self.wrong}"


def argument(recipe: Callable[..., Any], says: str, **arguments: Any) -> Misuse:
    """A bad value of a constructor argument."""
    given = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    return Misuse(recipe.__name__, given, says, lambda: [recipe(**arguments)])


def saved(
    module: Callable[[], LightningModule],
    callbacks: Callable[[], list[Callback]],
    data: Callable[[], Iterable[Any]] = lambda: loader(X, Y),
    merged: bool = False,
    validation: Callable[[], Iterable[Any]] = lambda: None,
    **trainer: Any,
) -> Callable[[], bytes]:
    """What stands in the checkpoint of a run: after two steps, or (merged) when the fit is over. Trains once."""

    @functools.cache
    def write() -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            keep = ModelCheckpoint(folder, "after", every_n_train_steps=2, save_top_k=-1)
            settings = {"limit_train_batches": 3, "enable_checkpointing": True, **trainer}
            fit = quiet(callbacks=[*callbacks(), keep], **settings)
            fit.fit(module(), data(), validation())
            if merged:
                fit.save_checkpoint(Path(folder, "after.ckpt"))
            return Path(folder, "after.ckpt").read_bytes()

    return write


# -- modules that a recipe cannot take -------------------------------------------------------------------------------


class Backbone(Classifier):
    """Says where its backbone is, as Lightning's BackboneFinetuning asks. It is frozen from the start: that callback
    freezes it in its own setup, before any recipe has a say."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone.requires_grad_(False)

    @property
    def backbone(self) -> nn.Module:
        return self.net[0]


class Hidden(Classifier):
    """A loss of its own, in no function that could be seen."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return self.own(self(x), y)

    def own(self, logits: Tensor, targets: Tensor) -> Tensor:
        return -logits.log_softmax(1).gather(1, targets[:, None]).mean()

    def unused(self, logits: Tensor, targets: Tensor) -> Tensor:
        return self.own(logits, targets)


class TwoLosses(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self(x)
        return F.cross_entropy(logits, y) + F.mse_loss(logits, F.one_hot(y, 3).float())


class Regression(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0]), F.one_hot(batch[1], 3).float())


class MultiLabel(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.binary_cross_entropy_with_logits(self(batch[0]), F.one_hot(batch[1], 3).float())


class Segmentation(Classifier):
    """Logits ``[n, classes, places]``."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x)[:, :, None], y[:, None])


class Embeds(Classifier):
    """Takes inputs of any dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


class SAM(SGD):
    """An optimizer that asks for two gradients an update."""

    def step(self, closure: Callable[[], Any]) -> Any:
        closure()
        with torch.enable_grad():
            loss = closure()
        super().step()
        return loss


class InterleavedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query_key_value, self.head = nn.Linear(6, 18), nn.Linear(18, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.query_key_value(x))


class GroupedBlock(nn.Module):
    """Fewer keys and values than queries."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(6, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.qkv(x))


class PackedBlock(nn.Module):
    """PyTorch's own attention, whose projections have no modules of their own."""

    def __init__(self, kdim: int | None = None) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(D, 2, kdim=kdim, vdim=kdim, batch_first=True), nn.Linear(D, 3)


def with_net(net: Callable[[], nn.Module], kind: type[Classifier] = Classifier) -> Callable[[], Classifier]:
    return lambda: kind(net())


def stepped_by(optimizer: Callable[[Any], Any]) -> Callable[[], Classifier]:
    return lambda: Classifier(optimizer=optimizer)


def manual(module: Callable[[], LightningModule] = Classifier) -> Callable[[], LightningModule]:
    def make() -> LightningModule:
        made = module()
        made.automatic_optimization = False
        return made

    return make


def frozen(*parts: int) -> Callable[[], Classifier]:
    """The mlp with some of its layers frozen, all of them if none is named."""

    def make() -> Classifier:
        module = Classifier()
        for part in parts or range(5):
            module.net[part].requires_grad_(False)
        return module

    return make


def quantised() -> Classifier:
    net = mlp()
    net[2].weight = nn.Parameter(net[2].weight.detach().to(torch.int8), requires_grad=False)
    return Classifier(net, lambda parameters: SGD([p for p in parameters if p.requires_grad], lr=0.1))


def adapted() -> Classifier:
    from peft import LoraConfig, inject_adapter_in_model

    module = Classifier()
    inject_adapter_in_model(LoraConfig(r=1, target_modules=LAYERS), module)
    module.net[4].requires_grad_(True)
    return module


def no_parameters(kind: type[Classifier] = Classifier) -> Classifier:
    own = nn.Parameter(torch.zeros(1))
    return kind(nn.Flatten(), lambda _: SGD([own], lr=0.1))


def head_only() -> Classifier:
    module = Classifier(optimizer=lambda _: SGD(module.net[4].parameters(), lr=0.1))
    return module


def steps_in_backward(parameters: Iterable[nn.Parameter]) -> SGD:
    parameters = list(parameters)
    own = {parameter: SGD([parameter], lr=0.1) for parameter in parameters}
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(lambda p: own[p].step())
    return SGD(parameters, lr=0.0)


class HiddenLoss(table.Classifier):
    """A loss that cannot be seen."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return -self(x).log_softmax(1).gather(1, y[:, None]).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.training_step(batch, batch_idx))


class NoLayers(nn.Module):
    """A network without any layer to adapt or to unfreeze."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(10))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :10] * self.scale


# -- a row of the table on a module that it cannot take --------------------------------------------------------------


def sees_no_loss(row: Row, in_validation: bool = False) -> Misuse:
    """The row's first recipe observes the loss, and the module computes it where nobody can see."""
    hidden, digits = lambda: HiddenLoss(row.network()), lambda: table.digits()
    says = r"no loss was seen .* name any other with criterion="
    sanity = {"validation": digits, "trainer": {"num_sanity_val_steps": 1}} if in_validation else {"in_step": True}
    return Misuse(_first(row), _cannot_attach(row), says, row.recipes, hidden, digits, **sanity)


def finds_no_layers(row: Row) -> Misuse:
    """The row's first recipe looks for layers, and the network has none."""
    bare = lambda: table.Classifier(NoLayers(), row.optimizer)  # noqa: E731
    there = r"\['network'\]"
    says = f"(found no head in Classifier; its parts|matches no parameter; the module's parts) are {there}"
    long_enough = {"max_epochs": table.EPOCHS}
    return Misuse(
        _first(row), _cannot_attach(row), says, row.recipes, bare, lambda: table.digits(), trainer=long_enough
    )


def trains_nothing(row: Row, says: str = "no parameter of Classifier requires a gradient") -> Misuse:
    """The network is frozen."""
    still = lambda: table.Classifier(row.network().requires_grad_(False), row.optimizer)  # noqa: E731
    return Misuse(_first(row), _cannot_attach(row), says, row.recipes, still, lambda: table.digits())


def _first(row: Row) -> str:
    return type(row.recipes()[0]).__name__


def _cannot_attach(row: Row) -> str:
    return f"{row.name} on a module that it cannot attach to"


class InPhases(Recipe):
    """Stands for a recipe that shows other data in every phase."""

    def declare(self, plan: Any) -> None:
        plan.phases(PhasePlan([Phase("first", 1), Phase("second", 1)], lambda phase: None))


def of_class_counts(make: Callable[[], Recipe], instead: str) -> list[Misuse]:
    """What every recipe refuses that counts the classes of the training set; `instead` is what one can give it."""
    recipe = lambda: [make()]  # noqa: E731
    bad = functools.partial(Misuse, type(make()).__name__, callbacks=recipe)
    loss = r"needs a classification loss of logits \[n, classes\]; the observed one is "
    return [
        bad(
            "data that are no data set",
            rf"the training data \(list\) are no one data set that is read by index; give {instead}",
            data=lambda: [*loader(X, Y)],
        ),
        bad(
            "soft labels in the data set",
            r"the labels of the training set must be class indices, .* got float32 of shape \(16, 3\); give",
            data=lambda: loader(X, F.one_hot(Y, 3).float()),
        ),
        bad("a regression", loss + r"mse_loss of \(4, 3\)", module=Regression, in_step=True),
        bad(
            "several labels a sample",
            loss + r"binary_cross_entropy_with_logits of \(4, 3\)",
            module=MultiLabel,
            in_step=True,
        ),
        bad("two losses", r"computes 2 losses .*choose with criterion=INDEX", module=TwoLosses, in_step=True),
        bad("a loss of the module's own", "no loss was seen .*criterion=", module=Hidden, in_step=True),
        bad(
            "data that come in phases",
            f"the training data may change from phase to phase, and the classes that are counted .*; give {instead}",
            callbacks=lambda: [make(), InPhases()],
            trainer={"max_epochs": 2},
        ),
        bad(
            "a resume with another training set",
            r"samples a class are \[6, 6, 4\] here and were \[6, 5, 5\]\. Resume with the data of the checkpoint",
            data=lambda: loader(X, torch.cat([Y[:14], torch.tensor([0, 1])])),
            checkpoint=saved(Classifier, recipe),
            loads=True,
        ),
    ]


def of_adapters(recipe: type[AdapterRecipe], **usual: Any) -> list[Misuse]:
    """What every recipe refuses that puts adapters on layers; it needs the arguments `usual`, and takes a rank."""
    make = lambda **given: recipe(**{**usual, **given})  # noqa: E731
    bad = functools.partial(Misuse, recipe.__name__)
    at_layers = lambda: [make(target_modules=LAYERS)]  # noqa: E731
    linear = r"linear layers are \['net\.0', 'net\.2', 'net\.4'\]"
    return [
        argument(recipe, r"target_modules must be None or names of at least one module; got \[\]", target_modules=[]),
        argument(recipe, "train_fully must be a list of names; got 'head'", train_fully="head"),
        bad("no attention", f"found no attention block with .*; its {linear}: name those to adapt", lambda: [make()]),
        bad(
            "packed attention that cannot be opened",
            r"net\.attention has keys and values of other sizes \(kdim, vdim\)",
            lambda: [make()],
            with_net(lambda: PackedBlock(4)),
        ),
        bad(
            "a target that matches nothing",
            r"target 'nothing' matches no layer; the nearest are \['net\.0', 'net\.2', 'net\.4'\]",
            lambda: [make(target_modules=["nothing"])],
        ),
        bad(
            "a target that is no layer to adapt",
            r"target net\.1 is a LayerNorm; adapters go on linear, convolution or embedding layers",
            lambda: [make(target_modules=["1"])],
            with_net(lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3))),
        ),
        bad(
            "a quantised target",
            r"target net\.2 is a Linear without a floating-point weight \(quantised\?\)",
            lambda: [make(target_modules=["2"])],
            quantised,
        ),
        bad(
            "a target that is adapted already",
            "the module already carries adapters; merge or unload them first",
            at_layers,
            adapted,
        ),
        bad(
            "a rank above the width",
            r"rank must be at most the width of net\.0, 5 \(its weight is \[5, 6\]\); got 6",
            lambda: [make(rank=6, target_modules=LAYERS)],
        ),
        bad(
            "no such part to train",
            r"train_fully: 'nothing' matches no parameter; the module's parts are \['net', 'net\.0', 'net\.2', 'net\.4",
            lambda: [make(target_modules=LAYERS, train_fully=["nothing"])],
        ),
        bad("no head", r"found no head in Classifier; its parts are \[\]: name the", lambda: [make()], no_parameters),
        bad(
            "a frozen head",
            r"'net\.4\.weight' is to train beside the adapters \(train_fully\) and the module froze it; unfreeze it or",
            at_layers,
            frozen(4),
        ),
        bad(
            "Lightning's own finetuning beside it",
            f"{recipe.__name__} and BackboneFinetuning both decide what trains; use one of them",
            lambda: [*at_layers(), BackboneFinetuning(unfreeze_backbone_at_epoch=1)],
            Backbone,
        ),
        bad(
            "a checkpoint with merged weights",
            "written after the fit ended and holds stock weights; .* Load its weights into the module and start a new",
            at_layers,
            checkpoint=saved(Classifier, at_layers, merged=True),
        ),
    ]
