"""The table of misuses: what is done wrong, and what the one error must say.

A new recipe brings the rows of its card's error section and pitfalls. What every recipe must refuse (``of_every_row``)
comes from the table of recipes by itself; only another value of one argument is asked for, in ``OTHER``.
"""

from __future__ import annotations

import functools
import math
import re
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import BackboneFinetuning, Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.optim import LBFGS, SGD
from torch.utils.data import DataLoader

from lightning_recipes.callbacks import AAER, GLAD, PEGO, ExactResume, ProgressiveUnfreezing, RobustAccuracyMonitor
from lightning_recipes.core.errors import RecipeError
from lightning_recipes.core.recipe import Recipe, StepRecipe, plain
from lightning_recipes.core.schedule import At, EveryN, Plateau
from tests.attention import D, timm_vit
from tests.stock import Classifier, loader, mlp, quiet, samples

from . import table
from .table import ROWS, Row

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
    **trainer: Any,
) -> Callable[[], bytes]:
    """What stands in the checkpoint of a run: after two steps, or (merged) when the fit is over. Trains once."""

    @functools.cache
    def write() -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            keep = ModelCheckpoint(folder, "after", every_n_train_steps=2, save_top_k=-1)
            settings = {"limit_train_batches": 3, "enable_checkpointing": True, **trainer}
            fit = quiet(callbacks=[*callbacks(), keep], **settings)
            fit.fit(module(), data())
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


# -- recipes of others -----------------------------------------------------------------------------------------------


class Mixup(StepRecipe):
    """Stands for a recipe that mixes batches."""

    def transform_batch(self, step: Any, batch: Any) -> Any:
        return batch


class Observes(StepRecipe):
    needs_criterion = True

    def __init__(self, criterion: int) -> None:
        self.criterion = criterion


class SecondPass(Recipe):
    """Stands for another rule like SAM's."""

    def declare(self, plan: Any) -> None:
        plan.replay_window(lambda optimizer, window: None)


class ProgressiveShrinking(Recipe):
    pass


class NormalizedGD(Recipe):
    pass


# -- AAER's card -----------------------------------------------------------------------------------------------------


def of_aaer() -> list[Misuse]:
    pixels = r"epsilon must be in \[0, 1\]: pixel units of a \[0, 1\] image, e\.g\. 8/255 .*; got "
    in_step = functools.partial(Misuse, "AAER", in_step=True)
    attack = lambda: [AAER(0.1)]  # noqa: E731
    images = lambda factor: lambda: loader(X.reshape(-1, 2, 3) * factor, Y)  # noqa: E731
    flat = with_net(lambda: nn.Sequential(nn.Flatten(), *mlp()))
    return [
        argument(AAER, pixels + "8", epsilon=8),
        argument(AAER, pixels + "8", epsilon=8, mean=[0.5], std=[0.5]),
        argument(AAER, pixels + r"-0\.1", epsilon=-0.1),
        argument(AAER, pixels + "nan", epsilon=math.nan),
        argument(AAER, "variant must be 'rs', 'n' or 'zero'; got 'fgsm'", variant="fgsm"),
        argument(AAER, "alpha must be positive, a multiple of epsilon; got 0", alpha=0),
        argument(AAER, "lambda1 must be at least 0; got -1", lambda1=-1),
        argument(AAER, "lambda2 must be at least 0; got -1", lambda2=-1),
        argument(AAER, "lambda3 must be at least 0; got -1", lambda3=-1),
        argument(AAER, r"mean and std go together; got mean=None, std=\(0\.5,\)", std=[0.5]),
        argument(AAER, r"mean and std go together; got mean=\(0\.5,\), std=None", mean=[0.5]),
        argument(AAER, r"std must be positive in every channel; got \[0\.5, 0\.0\]", mean=[0.5] * 2, std=[0.5, 0.0]),
        argument(AAER, "need one value a channel; got 2 and 1", mean=[0.5] * 2, std=[0.5]),
        argument(AAER, r"input_range must be .* low < high; got \(1\.0, 0\.0\)", input_range=(1.0, 0.0)),
        argument(AAER, "attack_warmup_epochs must be at least 0; got -1", attack_warmup_epochs=-1),
        argument(AAER, "reg_warmup_epochs must be at least 0; got -1", reg_warmup_epochs=-1),
        argument(AAER, "attack_mode must be 'train' or 'eval'; got 'both'", attack_mode="both"),
        in_step(
            "normalised inputs without mean and std",
            r"inputs reach from -\S+ to \S+, outside the range .* normalised but mean and std were not given \(or give",
            attack,
            data=lambda: loader(3 * X - 1, Y),
        ),
        in_step(
            "inputs that are not normalised by the mean and std given",
            r"outside the range .* not normalised by mean and std",
            lambda: [AAER(0.1, mean=[0.5] * 2, std=[0.5] * 2)],
            flat,
            images(9),
        ),
        in_step(
            "another number of channels",
            r"mean and std have 1 channels; the batch has shape \(4, 2, 3\)",
            lambda: [AAER(0.1, mean=[0.5], std=[0.5])],
            flat,
            images(1),
        ),
        in_step(
            "integer inputs",
            "the batch's input is torch.int64, not floating point",
            attack,
            Embeds,
            lambda: loader((X > 0.5).long(), Y),
        ),
        in_step(
            "boolean inputs",
            "the batch's input is torch.bool, not floating point",
            attack,
            Embeds,
            lambda: loader(X > 0.5, Y),
        ),
        in_step(
            "a dict without an input",
            r"no input tensor in a batch with keys \['a', 'b'\]; looked for \('pixel_values', 'image'",
            attack,
            data=lambda: DataLoader([{"a": X[:4], "b": Y[:4]}], batch_size=None),
        ),
        in_step(
            "a batch that is no tensor",
            r"the batch must be \(input, target\), a dict or a tensor; got str",
            attack,
            data=lambda: DataLoader(["a photograph"], batch_size=None),
        ),
        in_step("a loss that is not seen", r"no loss was seen .* name any other with criterion=", attack, Hidden),
        in_step(
            "a criterion of an index that does not come",
            r"no loss was seen .*\(criterion=1 was never called\)",
            lambda: [AAER(0.1, criterion=1)],
        ),
        in_step(
            "a criterion that is not called",
            r"no loss was seen .*\(criterion='unused' was never called\)",
            lambda: [AAER(0.1, criterion="unused")],
            Hidden,
        ),
        Misuse(
            "AAER",
            "a criterion that is not there",
            "criterion='nothing' is no submodule or method of Hidden",
            lambda: [AAER(0.1, criterion="nothing")],
            Hidden,
        ),
        Misuse(
            "AAER",
            "another recipe names another loss",
            "recipes name different losses: AAER criterion=0, Observes criterion=1",
            lambda: [AAER(0.1, criterion=0), Observes(1)],
            TwoLosses,
        ),
        in_step(
            "two losses to choose from",
            r"2 losses \(0: cross_entropy of \(4, 3\) and \(4,\); 1: mse_loss of .*choose with criterion=INDEX",
            attack,
            TwoLosses,
        ),
        in_step(
            "a regression",
            r"needs a classification loss of logits \[n, classes\]; the observed one got \(4, 3\) for 4 inputs",
            attack,
            Regression,
        ),
        in_step("several labels a sample", r"needs a classification loss of logits \[n, classes\]", attack, MultiLabel),
        in_step(
            "a segmentation",
            r"needs a classification loss of logits \[n, classes\]; the observed one got \(4, 3, 1\)",
            attack,
            Segmentation,
        ),
        in_step("a module with everything frozen", r"what needs no gradient: is everything frozen\?", attack, frozen()),
        Misuse(
            "AAER",
            "a mixing recipe after it",
            r"Mixup must stand before AAER in Trainer\(callbacks=\[\.\.\.\]\): the attack must start from the mixed",
            lambda: [AAER(0.1), Mixup()],
        ),
    ]


# -- PEGO's card -----------------------------------------------------------------------------------------------------


def of_pego() -> list[Misuse]:
    at = functools.partial(PEGO, 1, 2)
    pego = functools.partial(Misuse, "PEGO")
    linear = r"linear layers are \['net\.0', 'net\.2', 'net\.4'\]"
    return [
        argument(PEGO, "rank must be at least 1; got 0", rank=0),
        argument(PEGO, "groups must be at least 1; got 0", groups=0),
        argument(PEGO, "weight must be at least 0; got -1", weight=-1),
        argument(PEGO, "scaling must be positive; got 0", scaling=0),
        argument(PEGO, "groups=1 .* diversify alone is an empty term; set preserve=True", groups=1, preserve=False),
        argument(PEGO, r"target must be 'qv' or names of at least one module; got \[\]", target=[]),
        argument(PEGO, "train_fully must be a list of names; got 'head'", train_fully="head"),
        pego("no attention", f"found no attention block with .*; its {linear}: name those to adapt", lambda: [at()]),
        pego(
            "attention that interleaves its projections",
            r"net\.query_key_value interleaves q, k and v by head; name the modules to adapt",
            lambda: [at()],
            with_net(InterleavedBlock),
        ),
        pego(
            "attention with fewer keys than queries",
            r"net\.qkv fuses projections of different sizes \(6 to 10\); name the modules to adapt",
            lambda: [at()],
            with_net(GroupedBlock),
        ),
        pego(
            "packed attention that cannot be opened",
            r"net\.attention has keys and values of other sizes \(kdim, vdim\)",
            lambda: [at()],
            with_net(lambda: PackedBlock(4)),
        ),
        pego(
            "a target that matches nothing",
            f"target 'nothing' matches no layer; the {linear}",
            lambda: [at(target=["nothing"])],
        ),
        pego(
            "a target that is no layer to adapt",
            r"target net\.1 is a LayerNorm; adapters go on linear, convolution or embedding layers",
            lambda: [at(target=["1"])],
            with_net(lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3))),
        ),
        pego(
            "a quantised target",
            r"target net\.2 is a Linear without a floating-point weight \(quantised\?\)",
            lambda: [at(target=["2"])],
            quantised,
        ),
        pego(
            "a target that is adapted already",
            "the module already carries adapters; merge or unload them first",
            lambda: [at(target=LAYERS)],
            adapted,
        ),
        pego(
            "a rank above the width",
            r"rank must be at most the width of net\.2, 5; got 6",
            lambda: [PEGO(6, target=["2"])],
        ),
        pego(
            "no such part to train",
            r"train_fully: 'nothing' matches no parameter; the module's parts are \['net', 'net\.0', 'net\.2', 'net\.4",
            lambda: [at(target=LAYERS, train_fully=["nothing"])],
        ),
        pego("no head", r"found no head in Classifier; its parts are \[\]: name the", lambda: [at()], no_parameters),
        pego(
            "a frozen head",
            r"'net\.4\.weight' is to train beside the adapters \(train_fully\) and the module froze it; unfreeze it or",
            lambda: [at(target=LAYERS)],
            frozen(4),
        ),
        pego(
            "Lightning's own finetuning beside it",
            "PEGO and BackboneFinetuning both decide what trains; use one of them",
            lambda: [at(target=LAYERS), BackboneFinetuning(unfreeze_backbone_at_epoch=1)],
            Backbone,
        ),
        pego(
            "a checkpoint with merged weights",
            "the checkpoint holds merged weights .* Load its weights into the module and start a new fit",
            lambda: [at(target=LAYERS)],
            checkpoint=saved(Classifier, lambda: [at(target=LAYERS)], merged=True),
        ),
    ]


# -- GLAD's card -----------------------------------------------------------------------------------------------------


def of_glad() -> list[Misuse]:
    glad = functools.partial(Misuse, "GLAD")
    of_all = lambda: [GLAD(rank=None)]  # noqa: E731
    at_layers = lambda: [GLAD(rank=1, target_modules=LAYERS)]  # noqa: E731
    linear = r"linear layers are \['net\.0', 'net\.2', 'net\.4'\]"
    return [
        argument(GLAD, r"mix must be in \[0, 1\]; got 1\.5", mix=1.5),
        argument(GLAD, r"mix must be in \[0, 1\]; got -0\.1", mix=-0.1),
        argument(GLAD, "rho must be positive; got 0", rho=0),
        argument(GLAD, "rank must be None or at least 1; got 0", rank=0),
        argument(GLAD, "lora_alpha must be positive; got 0", lora_alpha=0),
        argument(GLAD, r"lora_dropout must be in \[0, 1\); got 1\.0", lora_dropout=1.0),
        argument(GLAD, "params must be 'trainable' or 'adapters'; got 'all'", params="all"),
        argument(GLAD, "params must be 'trainable' when rank is None; got 'adapters'", params="adapters", rank=None),
        argument(GLAD, r"target_modules must be None or names of at least one module; got \[\]", target_modules=[]),
        argument(GLAD, "train_fully must be a list of names; got 'head'", train_fully="head"),
        glad("no attention", f"found no attention block with .*; its {linear}: name those to adapt", lambda: [GLAD()]),
        glad(
            "a target that matches nothing",
            f"target 'nothing' matches no layer; the {linear}",
            lambda: [GLAD(target_modules=["nothing"])],
        ),
        glad(
            "dropout on packed attention",
            r"dropout must be 0 on a packed nn\.MultiheadAttention \(net\.attention\.q\)",
            lambda: [GLAD(rank=1, lora_dropout=0.1)],
            with_net(PackedBlock),
        ),
        glad(
            "a frozen head", r"'net\.4\.weight' is to train beside the adapters .*; unfreeze it", at_layers, frozen(4)
        ),
        glad(
            "nothing that trains",
            "no parameter of Classifier requires a gradient; unfreeze what is to train",
            of_all,
            frozen(),
        ),
        glad(
            "an optimizer that calls its closure repeatedly",
            "LBFGS calls its closure several times for one; use another optimizer",
            of_all,
            stepped_by(LBFGS),
        ),
        glad(
            "a user's optimizer that calls its closure repeatedly",
            "SAM calls its closure several times for one; use another optimizer",
            of_all,
            stepped_by(lambda parameters: SAM(parameters, lr=0.1)),
            in_step=True,
        ),
        glad(
            "an optimizer that steps in backward",
            r"a hook that runs as soon as its gradient is there .*; step after backward",
            of_all,
            stepped_by(steps_in_backward),
        ),
        glad(
            "a loss to replay that is not there",
            "replay='nothing' is no method of Classifier",
            lambda: [GLAD(rank=None, replay="nothing")],
        ),
        glad(
            "another recipe with a second pass",
            "GLAD and SecondPass both run a second pass over the window; use one of them",
            lambda: [GLAD(rank=None), SecondPass()],
        ),
        glad(
            "another recipe with further passes",
            "GLAD and ProgressiveShrinking cannot share a Trainer: both run further passes",
            lambda: [ProgressiveShrinking(), GLAD(rank=None)],
        ),
        glad(
            "a recipe that needs the plain gradient",
            "GLAD and NormalizedGD cannot share a Trainer: its factor assumes the plain gradient",
            lambda: [GLAD(rank=None), NormalizedGD()],
        ),
        glad(
            "PEGO beside it",
            "GLAD and PEGO cannot share a Trainer: both adapt the layers' weights",
            lambda: [GLAD(target_modules=["0"]), PEGO(target=["2"])],
        ),
        glad(
            "Lightning's own finetuning beside its adapters",
            "GLAD and BackboneFinetuning both decide what trains; use one of them",
            lambda: [*at_layers(), BackboneFinetuning(unfreeze_backbone_at_epoch=1)],
            Backbone,
        ),
        glad(
            "a checkpoint with merged weights",
            "the checkpoint holds merged weights .* Load its weights into the module and start a new fit",
            at_layers,
            checkpoint=saved(Classifier, at_layers, merged=True),
        ),
    ]


# -- the card of progressive unfreezing ------------------------------------------------------------------------------


def of_unfreezing() -> list[Misuse]:
    unfreeze = ProgressiveUnfreezing
    setting = functools.partial(ProgressiveUnfreezing, groups=["net.4", "net.2", "net.0"], at=(0, 1, 2), lr_scale=None)
    bad = functools.partial(Misuse, "ProgressiveUnfreezing", trainer={"max_epochs": 4})
    parts = r"the module's parts are \['net', 'net\.0', 'net\.2', 'net\.4'\]"
    times = r"at must be epochs or steps \(int\), fractions in \[0, 1\] \(float\) or inf; got "
    positive = "lr_scale must be 'paper', None, or positive: one a group or one ratio; got "
    missing = r"4 parameters that are to train are in no optimizer, the first 'net\.0\.weight'; give the optimizer all"
    return [
        argument(unfreeze, "groups must be 'auto' or a list of groups.*; got 'head'", groups="head"),
        argument(unfreeze, r"groups must be 'auto' or a list of groups.*; got \[\]", groups=[]),
        argument(unfreeze, r"groups must be 'auto' or a list of groups.*; got \[\[\]\]", groups=[[]]),
        argument(unfreeze, "bn must be 'follow', 'train' or 'eval'; got 'frozen'", bn="frozen"),
        argument(unfreeze, "mechanism must be 'auto', 'rewrap' or 'drop_grad'; got 'fast'", mechanism="fast"),
        argument(unfreeze, positive + r"\(1\.0, 0\.0\)", lr_scale=(1.0, 0.0)),
        argument(unfreeze, positive + r"\(\)", lr_scale=()),
        argument(unfreeze, positive + "'papr'", lr_scale="papr"),
        argument(unfreeze, r"weight_decay must be non-negative; got \(-1\.0,\)", weight_decay=(-1.0,)),
        argument(unfreeze, "never must be a list of names; got 'head'", never="head"),
        argument(unfreeze, r"at must be a list of times, At, EveryN or Plateau; got 0\.5", at=0.5),
        argument(unfreeze, r"at must be the time of at least one group; got \(\)", at=()),
        Misuse("At", "a fraction above 1", times + r"1\.5", lambda: [unfreeze(at=(0, 1.5))]),
        Misuse("At", "a time before the start", times + "-1", lambda: [unfreeze(at=(0, -1))]),
        argument(At, "unit must be 'epoch' or 'step'; got 'batch'", at=(0,), unit="batch"),
        argument(EveryN, "n must be at least 1; got 0", n=0),
        argument(EveryN, "unit must be 'epoch' or 'step'; got 'batch'", n=1, unit="batch"),
        argument(Plateau, "patience must be at least 1; got 0", patience=0),
        argument(Plateau, "mode must be 'min' or 'max'; got 'up'", mode="up"),
        bad("times that decrease", r"at must not decrease; got \[0, 2, 1\]", lambda: [setting(at=(0, 2, 1))]),
        bad("too few times", "at has 2 times for 3 groups; give one time a group", lambda: [setting(at=(0, 1))]),
        bad("too few times, all of them 0", "at has 2 times for 3 groups; give one time", lambda: [setting(at=(0, 0))]),
        bad(
            "more times than the network has layers",
            r"at has 4 times and the network 3 groups \['head', 'net\.2', 'net\.0'\]",
            lambda: [setting(groups="auto", at=(0, 1, 2, 3))],
        ),
        bad(
            "more rates than groups",
            "lr_scale has 4 factors for 3 groups; give at most one a group",
            lambda: [setting(lr_scale=(1.0,) * 4)],
        ),
        bad(
            "too few decays",
            "weight_decay has 1 values for 3 groups; give one a group",
            lambda: [setting(weight_decay=(0.1,))],
        ),
        bad(
            "a group that matches nothing",
            f"groups: 'nothing' matches no parameter; {parts}",
            lambda: [setting(groups=["net.4", "nothing"], at=(0, 1))],
        ),
        bad(
            "a group that matches nothing, awake from the start",
            f"groups: 'nothing' matches no parameter; {parts}",
            lambda: [setting(groups=["nothing"], at=(0,))],
        ),
        bad(
            "a part never to train that matches nothing",
            f"never: 'nothing' matches no parameter; {parts}",
            lambda: [setting(never=["nothing"])],
        ),
        bad(
            "a parameter in two groups",
            r"groups: parameter 'net\.4\.weight' is in \['net\.4'\] and in \['net'\]",
            lambda: [setting(groups=["net.4", "net"], at=(0, 1))],
        ),
        bad(
            "a parameter in a group that is never to train",
            r"groups: parameter 'net\.4\.weight' is in never and in \['net\.4'\]",
            lambda: [setting(never=["head"])],
        ),
        bad(
            "a parameter in no group",
            r"groups: 2 parameters are in no group, the first 'net\.2\.weight'; add them or put them in never",
            lambda: [setting(groups=["net.4", "net.0"], at=(0, 1))],
        ),
        bad(
            "the head alone, with the rest in no group",
            r"groups: 4 parameters are in no group, the first 'net\.0\.weight'; add them or put them in never",
            lambda: [unfreeze(groups=["head"], at=(0,))],
        ),
        bad(
            "nothing that ever trains",
            "every parameter would be frozen; nothing is left to train",
            lambda: [setting(at=(math.inf,) * 3, mechanism="rewrap")],
        ),
        bad("parameters in no optimizer", missing, lambda: [setting()], head_only),
        bad("parameters in no optimizer, drop_grad", missing, lambda: [setting(mechanism="drop_grad")], head_only),
        bad(
            "fractions of a fit without an end",
            r"at=\[0, 0\.5, 0\.6\] in fractions of the fit needs Trainer\(max_epochs=\.\.\.\); it is -1.*, or give",
            lambda: [setting(at=(0, 0.5, 0.6))],
            trainer={"max_epochs": -1, "max_steps": 3},
        ),
        bad(
            "a plateau without validation",
            r"at=Plateau\(\.\.\.\) wakes groups after validations, and this fit has none; give it validation data, or",
            lambda: [setting(at=Plateau("val/loss"))],
        ),
        bad(
            "an optimizer with one flat step",
            "LBFGS takes one flat step over all parameters; rates per parameter need another optimizer",
            lambda: [setting()],
            stepped_by(LBFGS),
        ),
        bad(
            "Lightning's own finetuning beside it",
            "ProgressiveUnfreezing and BackboneFinetuning both decide what trains; use one of them",
            lambda: [setting(), BackboneFinetuning(unfreeze_backbone_at_epoch=1)],
            Backbone,
        ),
    ]


# -- the monitor of AAER's card, and exact resume --------------------------------------------------------------------


def of_monitor() -> list[Misuse]:
    monitor = RobustAccuracyMonitor
    fgsm = lambda: [monitor("fgsm", 0.1)]  # noqa: E731
    # What only a batch can show comes in Lightning's check before the training.
    batch = functools.partial(
        Misuse, "RobustAccuracyMonitor", validation=lambda: loader(X, Y), trainer={"num_sanity_val_steps": 1}
    )
    return [
        argument(monitor, "attack must be 'fgsm', 'pgd' or 'autoattack'; got 'cw'", attack="cw"),
        argument(monitor, r"epsilon must be in \(0, 1\] pixel units; got 0\.0", epsilon=0.0),
        argument(monitor, r"epsilon must be in \(0, 1\] pixel units; got 8", epsilon=8, mean=[0.5], std=[0.5]),
        argument(monitor, "steps must be at least 1; got 0", steps=0),
        argument(monitor, "restarts must be at least 1; got 0", restarts=0),
        argument(monitor, "step_size must be None or at least 0; got -1", step_size=-1),
        argument(monitor, "every_n_epochs must be at least 1; got 0", every_n_epochs=0),
        argument(monitor, "limit_batches must be at least 1; got 0", limit_batches=0),
        argument(monitor, r"mean and std go together; got mean=\(0\.5,\), std=None", mean=[0.5]),
        batch(
            "normalised inputs without mean and std",
            "outside the range .* normalised but mean and std were not given",
            fgsm,
            validation=lambda: loader(3 * X - 1, Y),
        ),
        batch(
            "integer inputs",
            "the batch's input is torch.int64, not floating point",
            fgsm,
            Embeds,
            validation=lambda: loader((X > 0.5).long(), Y),
        ),
        batch(
            "another number of channels",
            r"mean and std have 1 channels; the batch has shape \(4, 6\)",
            lambda: [monitor("fgsm", 0.1, mean=[0.5], std=[0.5])],
        ),
        batch("a regression", r"needs a classification loss of logits \[n, classes\]", fgsm, Regression),
        Misuse(
            "RobustAccuracyMonitor",
            "AutoAttack without its package",
            r"attack='autoattack' needs pyautoattack: pip install 'lightning_recipes\[attacks\]'",
            lambda: [monitor("autoattack")],
            missing="pyautoattack",
        ),
    ]


def of_exact_resume() -> list[Misuse]:
    exact = lambda: [ExactResume()]  # noqa: E731
    before = saved(Classifier, exact)
    return [
        Misuse(
            "ExactResume",
            "other training data",
            "the training data differ from the checkpoint's: batches is 2, there it was 4; resume with the same data",
            exact,
            data=lambda: loader(X[:8], Y[:8]),
            checkpoint=before,
            loads=True,
        ),
        Misuse(
            "",
            "an empty checkpoint",
            "the checkpoint .*on_exception.ckpt cannot be read .*; it may be cut off: resume from an earlier",
            exact,
            checkpoint=lambda: b"",
        ),
    ]


# -- what every row of the table of recipes must refuse --------------------------------------------------------------

# Another value of one argument of each recipe that has any, for a resume.
OTHER: dict[str, dict[str, Any]] = {
    "AAER": {"lambda3": 0.25},
    "PEGO": {"weight": 0.5},
    "GLAD": {"rho": 0.2},
    "ProgressiveUnfreezing": {"bn": "train"},
    "RobustAccuracyMonitor": {"epsilon": 0.2},
}
# What trains under automatic optimization only.
AUTOMATIC = ("AAER", "PEGO", "GLAD", "ProgressiveUnfreezing")


class FetchesItself(table.Classifier):
    def training_step(self, dataloader_iter: Any) -> Any:
        batch, batch_idx, _ = next(dataloader_iter)
        return super().training_step(batch, batch_idx)


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


def cannot_attach(row: Row) -> list[Misuse]:
    """The row on a module that its first recipe cannot take; the message says what it found there, or what it needs."""
    recipe = row.recipes()[0]
    name, wrong = type(recipe).__name__, f"{row.name} on a module that it cannot attach to"
    digits, seen = lambda: table.digits(), r"no loss was seen .* name any other with criterion="
    if isinstance(recipe, AAER):
        hidden = lambda: HiddenLoss(row.network())  # noqa: E731
        return [Misuse(name, wrong, seen, row.recipes, hidden, digits, in_step=True)]
    if isinstance(recipe, RobustAccuracyMonitor):
        hidden = lambda: HiddenLoss(row.network())  # noqa: E731
        sanity = {"num_sanity_val_steps": 1}
        return [Misuse(name, wrong, seen, row.recipes, hidden, digits, validation=digits, trainer=sanity)]
    if isinstance(recipe, GLAD) and recipe.rank is None:

        def still() -> LightningModule:
            return table.Classifier(row.network().requires_grad_(False), row.optimizer)

        return [Misuse(name, wrong, "no parameter of Classifier requires a gradient", row.recipes, still, digits)]
    if isinstance(recipe, (PEGO, GLAD, ProgressiveUnfreezing)):
        bare = lambda: table.Classifier(NoLayers(), row.optimizer)  # noqa: E731
        there = r"\['network'\]"
        says = f"(found no head in Classifier; its parts|matches no parameter; the module's parts) are {there}"
        return [Misuse(name, wrong, says, row.recipes, bare, digits)]
    return []


def other_arguments(row: Row, module: Callable[[], LightningModule], before: Callable[[], bytes]) -> list[Misuse]:
    """A resume of the row with one argument of one recipe changed."""
    found = []
    for place, recipe in enumerate(row.recipes()):
        if not recipe.arguments:
            continue
        name = type(recipe).__name__
        ((argument, value),) = OTHER[name].items()

        def changed(place: int = place, argument: str = argument, value: Any = value) -> list[Callback]:
            recipes = row.recipes()
            old = recipes[place]
            recipes[place] = type(old)(**{**old.arguments, argument: value})
            return recipes

        was = re.escape(repr(plain(recipe.arguments[argument])))
        says = rf"other arguments \({argument}={was} in the checkpoint but {value!r} here\)\. Resume with the arguments"
        wrong = f"{row.name} resumed with another {argument}"
        found.append(
            Misuse(name, wrong, says, changed, module, lambda: table.digits(), trainer=row.trainer, checkpoint=before)
        )
    return found


def of_every_row() -> list[Misuse]:
    found = []
    for row in ROWS:
        recipes = row.recipes()
        names = [type(recipe).__name__ for recipe in recipes]

        def module(row: Row = row) -> LightningModule:
            torch.manual_seed(0)
            return table.Classifier(row.network(), row.optimizer)

        def iterates(row: Row = row) -> LightningModule:
            return FetchesItself(row.network(), row.optimizer)

        def twice(row: Row = row) -> list[Callback]:
            return [*row.recipes(), row.recipes()[0]]

        before = saved(module, row.recipes, lambda: table.digits(), max_epochs=2, **row.trainer)
        without = saved(module, list, lambda: table.digits(), max_epochs=2)
        bad = functools.partial(Misuse, data=lambda: table.digits(), trainer=row.trainer)
        found += cannot_attach(row)
        found += other_arguments(row, module, before)
        found.append(
            bad(
                names[0],
                f"{row.name} on training_step(dataloader_iter)",
                r"training_step\(dataloader_iter\) fetches its own batches; recipes need training_step\(batch, ",
                row.recipes,
                iterates,
            )
        )
        found.append(
            bad(
                names[0],
                f"{row.name} twice",
                f"more than one stateful callback of type `{names[0]}`",
                twice,
                module,
                error=RuntimeError,  # Lightning's own
            )
        )
        refusing = "|".join(name for name in names if name in AUTOMATIC)
        if refusing:
            says = f"^({refusing}) .*automatic optimization: .*under manual optimization"
            by_hand = Misuse("", f"{row.name} under manual optimization", says, row.recipes, manual(module))
            found.append(replace(by_hand, data=lambda: table.digits()))
        found.append(
            bad(
                "",
                f"{row.name} from a checkpoint that is cut off",
                "the checkpoint .*on_exception.ckpt cannot be read .*; it may be cut off: resume from an earlier",
                row.recipes,
                module,
                checkpoint=lambda before=before: before()[: len(before()) // 2],
            )
        )
        adapts = next((r for r in recipes if isinstance(r, (PEGO, GLAD)) and getattr(r, "rank", None)), None)
        if adapts is not None:
            name = type(adapts).__name__
            found.append(
                bad(
                    name,
                    f"{row.name} from a checkpoint without it",
                    f"the checkpoint was written without {name} and holds no adapters .* Load its weights into",
                    row.recipes,
                    module,
                    checkpoint=without,
                )
            )
    return found


def of_others_checkpoints() -> list[Misuse]:
    """Every recipe resumed from the checkpoint of a run with somebody else's adapters."""
    pego, glad = lambda: [PEGO(1, 2)], lambda: [GLAD(rank=1)]
    written = {"PEGO": saved(timm_vit, pego, images), "GLAD": saved(timm_vit, glad, images)}
    resumed: dict[str, Callable[[], list[Callback]]] = {
        "PEGO": pego,
        "GLAD": glad,
        "AAER": lambda: [AAER(0.1)],
        "ProgressiveUnfreezing": lambda: [ProgressiveUnfreezing(at=(0, 1))],
        "RobustAccuracyMonitor": lambda: [RobustAccuracyMonitor("fgsm", 0.1)],
        "ExactResume": lambda: [ExactResume()],
    }
    return [
        Misuse(
            name,
            f"a checkpoint with the adapters of {owner}",
            f"the checkpoint holds the adapters of {owner}, which is not among the Trainer's callbacks. Add it",
            callbacks,
            timm_vit,
            images,
            checkpoint=before,
        )
        for owner, before in written.items()
        for name, callbacks in resumed.items()
        if name != owner
    ]


def images() -> DataLoader:
    """What the small vision transformers take."""
    return loader(torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 3)


MISUSES = [
    *of_aaer(),
    *of_pego(),
    *of_glad(),
    *of_unfreezing(),
    *of_monitor(),
    *of_exact_resume(),
    *of_every_row(),
    *of_others_checkpoints(),
]
