"""Guidance: its card in the conformance tests."""

from __future__ import annotations

import functools
import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_recipes.callbacks import Guidance
from tests.conformance import table
from tests.conformance.misuse import (
    Misuse,
    NoLayers,
    X,
    Y,
    argument,
    manual,
    no_parameters,
    saved,
    with_net,
)
from tests.conformance.table import Row, small_vit
from tests.stock import Classifier, loader, mlp

CONV = "tests.conformance.table:ConvNet"
NOISY = {"guide_input": "noise", "metric": "cka_debiased"}


def guidance(**arguments: object) -> Guidance:
    """On all ranks together, so that two ranks are one process; another seed than that of the target."""
    return Guidance(**{"guide": CONV, "pretrained": False, "gather": True, "seed": 1, "draw": False, **arguments})


ROWS = [
    Row("guidance", lambda: [guidance()], lambda: [guidance(alpha=0.0)], couples=True),
    Row("guidance_start", lambda: [guidance(guide_steps=5, alpha=0.5)], network=small_vit, couples=True),
    Row("guidance_noise", lambda: [guidance(**NOISY, second_forward=True)], couples=True),
]
# On the blocks: of a map that hardly varies, as behind a fresh projection head, CKA makes much of the last digits.
MEMBERS = {"Guidance": lambda: guidance(target_layers="blocks", alpha=0.1)}
AUTOMATIC = ["Guidance"]
OTHER = {"Guidance": {"alpha": 0.25}}


class SequenceFirst(Classifier):
    """Inputs ``[2, n, 3]``."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x.transpose(0, 1).flatten(1)), y)


class Skips(Classifier):
    """Never calls its second layer."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net[4](self.net[0](x))


class SkipsInTraining(Skips):
    """Leaves its second layer out of every training pass."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.training else self.net(x)


class Example(Classifier):
    """Says what its inputs look like."""

    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = X[:1]


_DRAWS = itertools.count()


def changing() -> nn.Module:
    """Another network every time."""
    return mlp(seed=next(_DRAWS))


def twice_as_many(x: Tensor) -> Tensor:
    """Of batches that are larger than those of a dry run."""
    return torch.cat([x, x]) if len(x) > 4 else x


def on_mlp(**arguments: object) -> Guidance:
    return Guidance(**{"guide": "tests.stock:mlp", "pretrained": False, "seed": 1, **arguments})


def misuses() -> list[Misuse]:
    bad = functools.partial(argument, Guidance)
    wrong = functools.partial(Misuse, "Guidance")
    shared, mlps = mlp(), lambda: [on_mlp()]
    changes = lambda: [on_mlp(guide=f"{__name__}:changing")]  # noqa: E731
    layers = r"'auto', 'blocks' or a list of names; got "
    taken = "last one is taken for the logits: too few to guide by; name layers"
    return [
        bad("guide must be a module, 'package.module:Class' or a timm name; got 7", guide=7),
        bad("guide must be a module, 'package.module:Class' or a timm name; got ''", guide=""),
        bad(
            r"guide_args must be None when guide is a module; got \{'width': 3\}",
            guide=nn.ReLU(),
            guide_args={"width": 3},
        ),
        bad("alpha must be at least 0; got -1", guide=CONV, alpha=-1),
        bad("alpha must be at least 0; got nan", guide=CONV, alpha=math.nan),
        bad("guide_steps must be None or at least 1; got 0", guide=CONV, guide_steps=0),
        bad(f"target_layers must be {layers}'all'", guide=CONV, target_layers="all"),
        bad(rf"guide_layers must be {layers}\[\]", guide=CONV, guide_layers=[]),
        bad("metric must be 'cka' or 'cka_debiased'; got 'rsa'", guide=CONV, metric="rsa"),
        bad("guide_input must be 'data' or 'noise'; got 'random'", guide=CONV, guide_input="random"),
        bad("guide_transform must be None or a function of the batch's input; got 3", guide=CONV, guide_transform=3),
        wrong(
            "a guide that is nowhere",
            r"guide='tests.stock:perceptron' cannot be imported \(AttributeError",
            lambda: [on_mlp(guide="tests.stock:perceptron")],
        ),
        wrong(
            "a name that timm does not have",
            r"guide='resnet_18' must be a module, an import path .*; timm has ",
            lambda: [on_mlp(guide="resnet_18")],
        ),
        wrong(
            "a trained guide without weights",
            "makes a network with random weights and pretrained=True asks for trained ones: give guide_checkpoint",
            lambda: [on_mlp(pretrained=True)],
        ),
        wrong(
            "a checkpoint that is not there",
            "guide_checkpoint='none.pt': no such file",
            lambda: [on_mlp(guide_checkpoint="none.pt")],
        ),
        wrong(
            "a guide that shares parameters with the module",
            r"guide shares parameters with the module \('0.weight' is its 'net.0.weight'\).*copy.deepcopy",
            lambda: [Guidance(shared)],
            with_net(lambda: shared),
        ),
        wrong(
            "a guide for inputs of another shape",
            r"the guide ConvNet, whose Conv2d '0.0' has weights \[8, 1, 3, 3\], failed on the batch's input \[4, 6\]"
            r" .*guide_transform",
            lambda: [on_mlp(guide=CONV)],
        ),
        wrong(
            "a layer that is not there",
            r"target_layers: 'net.22' is no part of Classifier; near it are \['net.2'",
            lambda: [on_mlp(target_layers=["net.22"])],
        ),
        wrong(
            "a layer of the guide that is not there",
            r"guide_layers: '9' is no part of Sequential; its parts are \['0', '1'",
            lambda: [on_mlp(guide_layers=["9"])],
        ),
        wrong(
            "a layer that is not called",
            r"target_layers: 'net.2' of Skips gives no map: it is not called",
            lambda: [on_mlp(target_layers=["net.2"])],
            Skips,
        ),
        wrong(
            "one map beside the logits",
            f"Classifier has 2 maps for target_layers='auto' .*{taken}",
            mlps,
            with_net(lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))),
        ),
        wrong(
            "no layers", f"Classifier has 0 maps for target_layers='auto' .*{taken}", lambda: [on_mlp()], no_parameters
        ),
        wrong(
            "a guide with one map beside the logits",
            f"the guide Sequential has 2 maps for guide_layers='auto' .*{taken}",
            lambda: [Guidance(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)))],
        ),
        wrong(
            "batches of two",
            "compares the samples of a batch and needs 4 of them, better 32; the training data give batches of 2",
            mlps,
            data=lambda: loader(X, Y, size=2),
        ),
        wrong(
            "batches of two behind an example",
            "compares the samples of a batch and needs 4 of them; got 2",
            mlps,
            Example,
            lambda: loader(X, Y, size=2),
            in_step=True,
        ),
        wrong(
            "a batch whose axis is not the first",
            r"the batch's axis must come first; the input is \[2, 6, 3\] and the labels \[6\]",
            lambda: [Guidance(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4)))],
            SequenceFirst,
            lambda: DataLoader([(X[:6].reshape(6, 2, 3).transpose(0, 1), Y[:6])], batch_size=None),
        ),
        wrong(
            "a layer that is called in the dry run alone",
            "net.2 was not called in this pass, and it was in the dry run before training",
            mlps,
            SkipsInTraining,
            in_step=True,
        ),
        wrong(
            "a guide that changes the number of samples",
            "the guide gives 16 samples for the batch's 8; guide_transform must keep their number",
            lambda: [on_mlp(guide_transform=twice_as_many)],
            data=lambda: loader(X, Y, size=8),
            in_step=True,
        ),
        wrong(
            "manual optimization",
            "needs automatic optimization: .* extra_loss would come",
            mlps,
            manual(),
        ),
        wrong(
            "another guide than in the checkpoint",
            "guide built anew is not the network of the run that is resumed: .* hash",
            changes,
            checkpoint=saved(Classifier, changes),
        ),
    ]


def cannot_attach(row: Row) -> list[Misuse]:
    """A network without any layer that gives a map."""
    bare = lambda: table.Classifier(NoLayers(), row.optimizer)  # noqa: E731
    wrong = f"{row.name} on a module that it cannot attach to"
    says = "Classifier has 0 maps for target_layers='auto' .* name layers"
    return [Misuse("Guidance", wrong, says, row.recipes, bare, lambda: table.digits())]
