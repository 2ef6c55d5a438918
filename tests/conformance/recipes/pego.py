"""PEGO: its card in the conformance tests."""

from __future__ import annotations

import functools

from lightning.pytorch.callbacks import BackboneFinetuning
from torch import nn

from lightning_recipes.callbacks import PEGO
from tests.conformance.misuse import (
    LAYERS,
    Backbone,
    GroupedBlock,
    InterleavedBlock,
    Misuse,
    PackedBlock,
    adapted,
    argument,
    finds_no_layers,
    frozen,
    no_parameters,
    quantised,
    saved,
    with_net,
)
from tests.conformance.table import Row, small_vit
from tests.stock import Classifier

ROWS = [Row("pego", lambda: [PEGO(2, 2, 1e-3)], network=small_vit, optimizer="adamw")]
MEMBERS = {"PEGO": lambda: PEGO(2, 2, 1e-3)}
REFUSED = {("PEGO", "GLAD"): "both adapt"}
AUTOMATIC = ["PEGO"]
SURGERY = ["PEGO"]
OTHER = {"PEGO": {"weight": 0.5}}


def misuses() -> list[Misuse]:
    at = functools.partial(PEGO, 1, 2)
    pego = functools.partial(Misuse, "PEGO")
    linear = r"linear layers are \['net\.0', 'net\.2', 'net\.4'\]"
    return [
        argument(PEGO, "rank must be at least 1; got 0", rank=0),
        argument(PEGO, "groups must be at least 1; got 0", groups=0),
        argument(PEGO, "weight must be at least 0; got -1", weight=-1),
        argument(PEGO, "scaling must be positive; got 0", scaling=0),
        argument(PEGO, "groups=1 .* diversify alone is an empty term; set preserve=True", groups=1, preserve=False),
        argument(PEGO, r"target_modules must be None or names of at least one module; got \[\]", target_modules=[]),
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
            r"target 'nothing' matches no layer; the nearest are \['net\.0', 'net\.2', 'net\.4'\]",
            lambda: [at(target_modules=["nothing"])],
        ),
        pego(
            "a target that is no layer to adapt",
            r"target net\.1 is a LayerNorm; adapters go on linear, convolution or embedding layers",
            lambda: [at(target_modules=["1"])],
            with_net(lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3))),
        ),
        pego(
            "a quantised target",
            r"target net\.2 is a Linear without a floating-point weight \(quantised\?\)",
            lambda: [at(target_modules=["2"])],
            quantised,
        ),
        pego(
            "a target that is adapted already",
            "the module already carries adapters; merge or unload them first",
            lambda: [at(target_modules=LAYERS)],
            adapted,
        ),
        pego(
            "a rank above the width",
            r"rank must be at most the width of net\.2, 5 \(its weight is \[5, 5\]\); got 6",
            lambda: [PEGO(6, target_modules=["2"])],
        ),
        pego(
            "no such part to train",
            r"train_fully: 'nothing' matches no parameter; the module's parts are \['net', 'net\.0', 'net\.2', 'net\.4",
            lambda: [at(target_modules=LAYERS, train_fully=["nothing"])],
        ),
        pego("no head", r"found no head in Classifier; its parts are \[\]: name the", lambda: [at()], no_parameters),
        pego(
            "a frozen head",
            r"'net\.4\.weight' is to train beside the adapters \(train_fully\) and the module froze it; unfreeze it or",
            lambda: [at(target_modules=LAYERS)],
            frozen(4),
        ),
        pego(
            "Lightning's own finetuning beside it",
            "PEGO and BackboneFinetuning both decide what trains; use one of them",
            lambda: [at(target_modules=LAYERS), BackboneFinetuning(unfreeze_backbone_at_epoch=1)],
            Backbone,
        ),
        pego(
            "a checkpoint with merged weights",
            "written after the fit ended and holds stock weights; .* Load its weights into the module and start a new",
            lambda: [at(target_modules=LAYERS)],
            checkpoint=saved(Classifier, lambda: [at(target_modules=LAYERS)], merged=True),
        ),
    ]


def cannot_attach(row: Row) -> list[Misuse]:
    return [finds_no_layers(row)]
