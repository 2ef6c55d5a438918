"""SaRA: its card in the conformance tests."""

from __future__ import annotations

import functools
from typing import Any

import torch
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import nn
from torch.optim import LBFGS

from lightning_recipes.callbacks import GLAD, SaRA
from tests.conformance.misuse import (
    Backbone,
    Misuse,
    argument,
    frozen,
    quantised,
    saved,
    stepped_by,
    trains_nothing,
    with_net,
)
from tests.conformance.table import Row, small_vit
from tests.stock import Classifier, mlp


def _sara(**arguments: Any) -> SaRA:
    return SaRA(**{"threshold": None, "fraction": 0.3, "rank_weight": 0.01, "rank_min_size": 16, **arguments})


# Without biases: that of the keys has no gradient but rounding errors, which AdamW makes steps of.
ROWS = [
    Row("sara", lambda: [_sara(target=["*.weight"])], network=small_vit, optimizer="adamw"),
    Row("sara_conv", lambda: [_sara(progressive_at=0.4)], optimizer="filter", trainer={"gradient_clip_val": 0.5}),
    Row("sara_dense", lambda: [_sara(backprop="dense")], optimizer="adamw"),
]
MEMBERS = {"SaRA": _sara}
REFUSED = {
    **dict.fromkeys([("SaRA", "GLAD"), ("SaRA", "PEGO"), ("SaRA", "SVFit")], "both adapt"),
    ("SaRA", "LEVI"): "LEVI freezes the network",
}
AUTOMATIC = ["SaRA"]
SURGERY = ["SaRA"]
OTHER = {"SaRA": {"rank_weight": 0.5}}


def _without_a_rank(**arguments: Any) -> list[SaRA]:
    return [_sara(**{"rank_weight": 0.0, **arguments})]


def _half() -> Classifier:
    net = mlp()
    net[2].weight = nn.Parameter(net[2].weight.detach().half())
    return Classifier(net)


def _recurrent() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.LSTM(5, 5), nn.Linear(5, 3))


def _of_ones() -> nn.Module:
    net = mlp()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(1.0)
    return net


def misuses() -> list[Misuse]:
    sara = functools.partial(Misuse, "SaRA")
    quantiles = r"\|p\| has the quantiles 1%: [\d.e-]+, 10%: [\d.e-]+, 20%: [\d.e-]+, 50%: [\d.e-]+\. Give a threshold"
    return [
        argument(SaRA, "exactly one of threshold and fraction.* threshold=0.002 and fraction=0.1", fraction=0.1),
        argument(SaRA, "exactly one of .* got threshold=None and fraction=None", threshold=None),
        argument(SaRA, "threshold must be positive; got 0", threshold=0),
        argument(SaRA, r"fraction must be in \(0, 1\); got 1.0", threshold=None, fraction=1.0),
        argument(SaRA, r"progressive_at must be in \(0, 1\), or None for never; got 1", progressive_at=1),
        argument(SaRA, "rank_weight must be at least 0; got -1", rank_weight=-1),
        argument(SaRA, "rank_min_size must be at least 1; got 0", rank_min_size=0),
        argument(SaRA, r"target must be None or at least one name; got \[\]", target=[]),
        argument(SaRA, "train_fully must be a list of names; got 'head'", train_fully="head"),
        argument(SaRA, "backprop must be 'sparse' or 'dense'; got 'none'", backprop="none"),
        sara(
            "a threshold that selects nothing",
            rf"threshold=1e-09 selects 0 of 65 entries of the target; {quantiles}",
            lambda: _without_a_rank(threshold=1e-9, fraction=None),
        ),
        sara(
            "a threshold that selects most",
            rf"threshold=1.0 selects 65 of 65 entries of the target; {quantiles}",
            lambda: _without_a_rank(threshold=1.0, fraction=None),
        ),
        sara(
            "a fraction of weights that are all the same",
            r"fraction=0.3 selects 0 of 65 entries of the target; .* 50%: 1\. Give a threshold",
            _without_a_rank,
            with_net(_of_ones),
        ),
        sara(
            "no matrix that is large enough",
            "rank_weight=0.01 needs a matrix in the target with both sides at least rank_min_size=16, and the largest"
            " matrix is 5 x 6; set rank_weight=0 or a smaller rank_min_size",
            lambda: [_sara()],
        ),
        sara(
            "no matrix at all",
            "needs a matrix in the target .* and there is no matrix; set rank_weight=0",
            lambda: [_sara(target=["*.bias"])],
        ),
        sara(
            "a quantised weight",
            r"net.2.weight is stored in int8 \(quantised\?\), .* load it in float32, or name by target=",
            _without_a_rank,
            quantised,
        ),
        sara(
            "a weight in fp16", r"net.2.weight is stored in float16 \(quantised\?\), .* float32", _without_a_rank, _half
        ),
        sara(
            "a recurrent layer",
            "net.1.weight_ih_l0 belongs to a LSTM, which reads its weights from a list of its own; leave it out",
            _without_a_rank,
            with_net(_recurrent),
        ),
        sara(
            "a target that matches nothing",
            r"target: 'nothing' matches no parameter; the module's parts are \['net', 'net\.0', 'net\.2', 'net\.4",
            lambda: _without_a_rank(target=["nothing"]),
        ),
        sara(
            "no such part to train",
            r"train_fully: 'nothing' matches no parameter; the module's parts are",
            lambda: _without_a_rank(train_fully=["nothing"]),
        ),
        sara(
            "everything named to train whole",
            r"no parameter to choose entries from: .* train_fully=\['net'\]; unfreeze them or name them by target=",
            lambda: _without_a_rank(train_fully=["net"]),
        ),
        sara(
            "a frozen head",
            r"'net\.4\.weight' is to train beside the sparse parameters \(train_fully\) and the module froze it",
            _without_a_rank,
            frozen(4),
        ),
        sara(
            "a fit without an end",
            r"progressive_at=0.5 \(or None for never\) needs Trainer\(max_steps=\.\.\.\) or max_epochs",
            _without_a_rank,
            trainer={"max_epochs": -1},
        ),
        sara(
            "an optimizer that calls its closure repeatedly",
            "LBFGS calls its closure several times for one; use another optimizer",
            _without_a_rank,
            stepped_by(LBFGS),
        ),
        sara(
            "adapters beside it",
            "GLAD cannot share a Trainer: both adapt the layers' weights",
            lambda: [*_without_a_rank(), GLAD(target_modules=["0"])],
        ),
        sara(
            "Lightning's own finetuning beside it",
            "SaRA and BackboneFinetuning both decide what trains; use one of them",
            lambda: [*_without_a_rank(target=["net.2"]), BackboneFinetuning(unfreeze_backbone_at_epoch=1)],
            Backbone,
        ),
        sara(
            "a checkpoint with stock weights",
            "written after the fit ended and holds stock weights; .* Load its weights into the module and start a new",
            _without_a_rank,
            checkpoint=saved(Classifier, _without_a_rank, merged=True),
        ),
    ]


def cannot_attach(row: Row) -> list[Misuse]:
    says = (
        "no parameter to choose entries from: the module froze all|is to train beside the sparse .* the module froze it"
    )
    return [trains_nothing(row, says)]
