"""SVFit: its card in the conformance tests."""

from __future__ import annotations

import functools

import torch
from torch import nn

from lightning_recipes.callbacks import SubGM, SVFit
from tests.conformance.misuse import (
    LAYERS,
    Misuse,
    argument,
    finds_no_layers,
    of_adapters,
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
    return [
        argument(SVFit, "rank must be None or at least 1; got 0", rank=0),
        argument(SVFit, r"energy must be None or in \(0, 1\]; got 0", energy=0),
        argument(SVFit, r"energy must be None or in \(0, 1\]; got 1\.5", energy=1.5),
        argument(SVFit, r"rank=4 and energy=0\.99 both choose the rank; give one of them", rank=4, energy=0.99),
        argument(SVFit, "energy_of must be 'squares' or 'sums'; got 'cubes'", energy_of="cubes"),
        argument(SVFit, "part must be 'top', 'bottom' or 'random'; got 'middle'", part="middle"),
        argument(SVFit, "part must be 'top' with an energy, .*; got 'bottom'", part="bottom", energy=0.9),
        svfit(
            "a target that is a convolution",
            r"target net\.0 is a Conv1d; SVFit adapts linear layers",
            lambda: [SVFit(target_modules=["0"])],
            with_net(lambda: nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))),
        ),
        svfit(
            "a target whose weight is tied",
            r"the weight of target net\.2 is tied to net\.4\.weight, which merging would change too",
            lambda: [SVFit(target_modules=["2"])],
            tied,
        ),
        svfit(
            "weights that are not finite",
            r"the weight of net\.2 has entries that are not finite, and so no singular values",
            at_layers,
            broken,
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
        *of_adapters(SVFit),
    ]


def cannot_attach(row: Row) -> list[Misuse]:
    return [finds_no_layers(row)]
