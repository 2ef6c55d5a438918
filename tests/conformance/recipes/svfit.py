"""SVFit: its card in the conformance tests."""

from __future__ import annotations

import functools

import torch
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import nn

from lightning_recipes.callbacks import SVFit
from lightning_recipes.core.recipe import Recipe
from tests.conformance.misuse import (
    LAYERS,
    Backbone,
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
from tests.stock import Classifier, mlp

ROWS = [
    Row("svfit", lambda: [SVFit(8)], network=small_vit, optimizer="adamw"),
    Row("svfit_energy", lambda: [SVFit(energy=0.9, target_modules=["qkv", "fc1"])], network=small_vit),
]
MEMBERS = {"SVFit": lambda: SVFit()}
REFUSED = {("SVFit", "PEGO"): "both adapt", ("SVFit", "GLAD"): "both adapt"}
SURGERY = ["SVFit"]
OTHER = {"SVFit": {"energy_of": "sums"}}


class SubGM(Recipe):
    """Stands for the recipe of that name."""


def broken() -> Classifier:
    net = mlp()
    with torch.no_grad():
        net[2].weight[1, 1] = torch.inf
    return Classifier(net)


def tied() -> Classifier:
    net = mlp()
    net.insert(4, nn.Linear(5, 5))
    net[4].weight = net[2].weight
    return Classifier(net)


def misuses() -> list[Misuse]:
    svfit = functools.partial(Misuse, "SVFit")
    at_layers = lambda: [SVFit(target_modules=LAYERS)]  # noqa: E731
    linear = r"linear layers are \['net\.0', 'net\.2', 'net\.4'\]"
    return [
        argument(SVFit, "rank must be None or at least 1; got 0", rank=0),
        argument(SVFit, r"energy must be None or in \(0, 1\]; got 0", energy=0),
        argument(SVFit, r"energy must be None or in \(0, 1\]; got 1\.5", energy=1.5),
        argument(SVFit, r"rank=4 and energy=0\.99 both choose the rank; give one of them", rank=4, energy=0.99),
        argument(SVFit, "energy_of must be 'squares' or 'sums'; got 'cubes'", energy_of="cubes"),
        argument(SVFit, "part must be 'top', 'bottom' or 'random'; got 'middle'", part="middle"),
        argument(SVFit, "part must be 'top' with an energy, .*; got 'bottom'", part="bottom", energy=0.9),
        argument(SVFit, r"target_modules must be None or names of at least one module; got \[\]", target_modules=[]),
        argument(SVFit, "train_fully must be a list of names; got 'head'", train_fully="head"),
        svfit("no attention", f"found no attention block with .*; its {linear}: name those", lambda: [SVFit()]),
        svfit(
            "packed attention that cannot be opened",
            r"net\.attention has keys and values of other sizes \(kdim, vdim\)",
            lambda: [SVFit()],
            with_net(lambda: PackedBlock(4)),
        ),
        svfit(
            "a target that matches nothing",
            r"target 'nothing' matches no layer; the nearest are \['net\.0', 'net\.2', 'net\.4'\]",
            lambda: [SVFit(target_modules=["nothing"])],
        ),
        svfit(
            "a target that is a convolution",
            r"target net\.0 is a Conv1d; SVFit adapts linear layers",
            lambda: [SVFit(target_modules=["0"])],
            with_net(lambda: nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))),
        ),
        svfit(
            "a target that is no layer to adapt",
            r"target net\.1 is a LayerNorm; adapters go on linear, convolution or embedding layers",
            lambda: [SVFit(target_modules=["1"])],
            with_net(lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3))),
        ),
        svfit(
            "a quantised target",
            r"target net\.2 is a Linear without a floating-point weight \(quantised\?\)",
            lambda: [SVFit(target_modules=["2"])],
            quantised,
        ),
        svfit(
            "a target that is adapted already",
            "the module already carries adapters; merge or unload them first",
            at_layers,
            adapted,
        ),
        svfit(
            "a target whose weight is tied",
            r"the weight of target net\.2 is tied to net\.4\.weight, which merging would change too",
            lambda: [SVFit(target_modules=["2"])],
            tied,
        ),
        svfit(
            "a rank above the width",
            r"rank must be at most the width of net\.0, 5 \(its weight is \[5, 6\]\); got 6",
            lambda: [SVFit(6, target_modules=LAYERS)],
        ),
        svfit(
            "weights that are not finite",
            r"the weight of net\.2 has entries that are not finite, and so no singular values",
            at_layers,
            broken,
        ),
        svfit(
            "no such part to train",
            r"train_fully: 'nothing' matches no parameter; the module's parts are \['net', 'net\.0', 'net\.2', 'net\.4",
            lambda: [SVFit(target_modules=LAYERS, train_fully=["nothing"])],
        ),
        svfit(
            "no head", r"found no head in Classifier; its parts are \[\]: name the", lambda: [SVFit()], no_parameters
        ),
        svfit(
            "a frozen head",
            r"'net\.4\.weight' is to train beside the adapters \(train_fully\) and the module froze it; unfreeze it or",
            at_layers,
            frozen(4),
        ),
        svfit(
            "true half precision",
            "SVFit .* which need fp32; precision='bf16-true' .* use the mixed one, 'bf16-mixed' or '16-mixed'",
            at_layers,
            trainer={"precision": "bf16-true"},
        ),
        svfit(
            "a recipe for one LoRA product",
            "SVFit and SubGM cannot share a Trainer: its rate is that of one LoRA product",
            lambda: [*at_layers(), SubGM()],
        ),
        svfit(
            "Lightning's own finetuning beside it",
            "SVFit and BackboneFinetuning both decide what trains; use one of them",
            lambda: [*at_layers(), BackboneFinetuning(unfreeze_backbone_at_epoch=1)],
            Backbone,
        ),
        svfit(
            "a checkpoint with merged weights",
            "written after the fit ended and holds stock weights; .* Load its weights into the module and start a new",
            at_layers,
            checkpoint=saved(Classifier, at_layers, merged=True),
        ),
    ]


def cannot_attach(row: Row) -> list[Misuse]:
    return [finds_no_layers(row)]
