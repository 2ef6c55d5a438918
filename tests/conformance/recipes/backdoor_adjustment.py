"""The backdoor adjustment's card in the conformance tests: LogitAdjustment, AdaptFormer, CosineHead, the adjustment
itself and LongTailMonitor."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import BackboneFinetuning
from timm.models.vision_transformer import Block
from torch import nn
from torch.utils.data import TensorDataset

from lightning_recipes.callbacks import (
    AdaptFormer,
    BackdoorAdjustment,
    ClassWeights,
    CosineHead,
    LogitAdjustment,
    LongTailMonitor,
    RidgeRefit,
)
from lightning_recipes.callbacks.robustness.cosine_head import CosineLinear
from lightning_recipes.modules.adapted_block import AdaptedBlock
from tests.attention import timm_vit
from tests.conformance.misuse import (
    Backbone,
    Misuse,
    X,
    Y,
    argument,
    no_parameters,
    of_class_counts,
    sees_no_loss,
    with_net,
)
from tests.conformance.table import Row, small_vit
from tests.stock import Classifier, loader

MEMBER = "no/such/member.ckpt"  # a fit does not ask for members


def _take_out(module: LightningModule) -> None:
    """The branches and the cosine head that the fit left in the module."""
    for part in module.modules():
        if type(part) is AdaptedBlock:
            part.__class__ = Block
            del part.adapter
        elif type(part) is CosineLinear:
            part.__class__, part.bias = nn.Linear, nn.Parameter(part.weight.new_zeros(part.out_features))
            del part.cosine_scale


ROWS = [
    Row("logit_adjustment", lambda: [LogitAdjustment()], lambda: [LogitAdjustment(tau=0.0)]),
    Row("logit_adjustment_given", lambda: [LogitAdjustment([9, 8, 7, 6, 5, 4, 3, 2, 1, 0], 0.5, 1e-9)]),
    Row("adaptformer", lambda: [AdaptFormer(4)], network=small_vit, keeps=_take_out),
    # at the paper's 25 four epochs at this rate make one rounding error 50 times as large
    Row("cosine_head", lambda: [CosineHead(5.0, "class_mean")], keeps=_take_out),
    Row(
        "adaptformer+cosine+logits",
        lambda: [AdaptFormer(blocks=[1]), CosineHead(2.0), LogitAdjustment()],
        network=small_vit,
        keeps=_take_out,
    ),
    Row("backdoor_adjustment", lambda: [BackdoorAdjustment([MEMBER])], monitors=True),
    Row("long_tail", lambda: [LongTailMonitor(many=6, few=5)], monitors=True),
]
MEMBERS = {
    "LogitAdjustment": lambda: LogitAdjustment([9, 8, 7, 7, 6, 6, 5, 5, 4, 4]),
    "AdaptFormer": lambda: AdaptFormer(4),
    "CosineHead": lambda: CosineHead(5.0, "class_mean"),
    "BackdoorAdjustment": lambda: BackdoorAdjustment([MEMBER]),
    "LongTailMonitor": lambda: LongTailMonitor(),
}
SURGERY = ["AdaptFormer", "CosineHead"]
REFUSED = {
    ("CosineHead", "ProjectionHead"): "both own the head",
    ("CosineHead", "SLCA"): "both own the head",
    ("CosineHead", "LEVI"): "LEVI has heads of its own",
    **{(kept, mean): "leaves the network with another structure" for kept in SURGERY for mean in ("WiSEFT", "BANG")},
}
OTHER = {
    "LogitAdjustment": {"tau": 0.25},
    "AdaptFormer": {"seed": 7},
    "CosineHead": {"scale": 30.0},
    "BackdoorAdjustment": {"space": "prob"},
    "LongTailMonitor": {"many": 50},
}


class AsksItsNet(Classifier):
    """Validates by its network, past its own forward."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch[0])


class OwnBlock(nn.Module):
    """A transformer whose blocks are not timm's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.TransformerEncoderLayer(6, 2), nn.Linear(6, 3)

    def forward(self, x: Any) -> Any:
        return self.head(self.first(x))


def misuses() -> list[Misuse]:
    return [*of_logit_adjustment(), *of_adaptformer(), *of_cosine_head(), *of_backdoor_adjustment(), *of_long_tail()]


def of_logit_adjustment() -> list[Misuse]:
    adjusts = functools.partial(Misuse, "LogitAdjustment")
    auto = lambda: [LogitAdjustment()]  # noqa: E731
    counts = r"class_counts must be 'auto' or a number of samples a class, at least 0; got "
    return [
        argument(LogitAdjustment, "tau must be at least 0; got -1", tau=-1),
        argument(LogitAdjustment, "tau must be at least 0; got nan", tau=math.nan),
        argument(LogitAdjustment, "smoothing must be at least 0; got -1", smoothing=-1),
        argument(LogitAdjustment, counts + r"'all'", class_counts="all"),
        argument(LogitAdjustment, counts + r"\[5\.0\]", class_counts=[5]),
        argument(LogitAdjustment, counts + r"\[5\.0, -1\.0\]", class_counts=[5, -1]),
        argument(
            LogitAdjustment,
            r"class 1 has no training sample; its log prior is -inf; pass smoothing",
            class_counts=[5, 0, 2],
        ),
        adjusts(
            "counts of another length than the logits",
            "there are 4 class counts and the logits have 3 classes",
            lambda: [LogitAdjustment([4, 4, 4, 4])],
            in_step=True,
        ),
        adjusts(
            "a class without samples",
            "class 1 has no training sample; its log prior is -inf; pass smoothing",
            auto,
            data=lambda: loader(X, Y.clamp_min(1) * (Y > 1)),
            in_step=True,
        ),
        adjusts(
            "weights against the prior beside it",
            "LogitAdjustment and ClassWeights cannot share a Trainer: both correct for the class prior",
            lambda: [LogitAdjustment(), ClassWeights()],
        ),
        *of_class_counts(LogitAdjustment, "class_counts="),
    ]


def of_adaptformer() -> list[Misuse]:
    former = functools.partial(Misuse, "AdaptFormer")
    images = lambda: loader(torch.rand(8, 3, 8, 8), torch.arange(8) % 3)  # noqa: E731
    vit, at = timm_vit, lambda **arguments: lambda: [AdaptFormer(2, **arguments)]

    def frozen() -> Classifier:
        module = vit()
        module.net.head.requires_grad_(False)
        return module

    return [
        argument(AdaptFormer, "bottleneck must be None or at least 1; got 0", bottleneck=0),
        argument(AdaptFormer, "num_classes must be None or at least 2; got 1", num_classes=1),
        argument(AdaptFormer, r"blocks must be None or at least one index of a block, each once; got \[\]", blocks=[]),
        argument(AdaptFormer, r"train_fully must be a list of names; got 'head'", train_fully="head"),
        former("no transformer", "needs a vision transformer of timm, .*the module's blocks are none", at()),
        former(
            "a transformer of somebody else",
            "needs a vision transformer of timm, with blocks that are timm.models.vision_transformer.Block",
            at(),
            with_net(OwnBlock),
        ),
        former(
            "a block that is not there", r"blocks must be indices from 0 to \d+; got 99", at(blocks=[99]), vit, images
        ),
        former(
            "no such part to train",
            "train_fully: 'nothing' matches no parameter; the module's parts are",
            at(train_fully=["nothing"]),
            vit,
            images,
        ),
        former(
            "a frozen head",
            r"'net\.head\.weight' is to train beside the AdaptFormer branches \(train_fully\) and the module froze it",
            at(),
            frozen,
            images,
        ),
        former(
            "Lightning's own finetuning beside it",
            "AdaptFormer and BackboneFinetuning both decide what trains; use one of them",
            lambda: [AdaptFormer(2), BackboneFinetuning(unfreeze_backbone_at_epoch=1)],
            Backbone,
        ),
    ]


def of_cosine_head() -> list[Misuse]:
    cosine = functools.partial(Misuse, "CosineHead")
    return [
        argument(CosineHead, "scale must be positive; got 0", scale=0),
        argument(CosineHead, "init must be 'keep', 'class_mean' or 'text'; got 'mean'", init="mean"),
        argument(CosineHead, "text must be given with init='text' and only then; got None", init="text"),
        argument(CosineHead, "text must be given with init='text' and only then; got 'a.pt'", text="a.pt"),
        cosine("no head", "found no head in Classifier", lambda: [CosineHead()], no_parameters),
        cosine(
            "a head that is no linear layer",
            "'net.1' is a ReLU and no linear layer; name the linear layer whose input are the features",
            lambda: [CosineHead(head="net.1")],
        ),
        cosine(
            "a file that is not there",
            "text='no.pt': there is no such file",
            lambda: [CosineHead(init="text", text="no.pt")],
        ),
        cosine(
            "text features without the projection",
            r"text gives class weights \[3, 8\] and the head net\.4 takes \[3, 5\] .* need its 'projection'",
            lambda: [CosineHead(init="text", text=torch.rand(3, 8))],
        ),
        cosine(
            "a means' data that are no data set",
            "needs the training data as one DataLoader over a data set read by index",
            lambda: [CosineHead(init="class_mean")],
            data=lambda: [*loader(X, Y)],
        ),
        cosine(
            "another owner of the head",
            "CosineHead and RidgeRefit cannot share a Trainer: both own the head",
            lambda: [CosineHead(), RidgeRefit()],
        ),
    ]


def of_backdoor_adjustment() -> list[Misuse]:
    return [
        argument(
            BackdoorAdjustment, "members must be a list of checkpoints and modules; got 'a.ckpt'", members="a.ckpt"
        ),
        argument(
            BackdoorAdjustment, r"members must be not empty with include_self=False; got \(\)", include_self=False
        ),
        argument(BackdoorAdjustment, "space must be 'logit', 'prob' or 'logprob'; got 'mean'", space="mean"),
        argument(BackdoorAdjustment, "device must be 'same' or 'cpu'; got 'cuda'", device="cuda"),
        argument(
            BackdoorAdjustment,
            r"prior must be one number a member, 2 of them; got \[1\.0\]",
            members=[MEMBER],
            prior=[1.0],
        ),
        argument(
            BackdoorAdjustment,
            r"prior must be of sum 1, it is 1\.1; got \[0\.5, 0\.6\]",
            members=[MEMBER],
            prior=[0.5, 0.6],
        ),
        argument(
            BackdoorAdjustment,
            r"prior must be at least 0 for every member; got \[1\.5, -0\.5\]",
            members=[MEMBER],
            prior=[1.5, -0.5],
        ),
        argument(
            BackdoorAdjustment,
            r"transforms must be one transform or None a member, 1 of them; got \[None, None\]",
            members=[MEMBER],
            transforms=[None, None],
        ),
    ]


def of_long_tail() -> list[Misuse]:
    sanity = {"num_sanity_val_steps": 1}
    monitor = functools.partial(Misuse, "LongTailMonitor", validation=lambda: loader(X, Y), trainer=sanity)
    counts = r"class_counts must be 'auto' or a number of samples a class, at least 0; got "

    class TakesImages(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self(batch[0])

    return [
        argument(LongTailMonitor, counts + "'all'", class_counts="all"),
        argument(LongTailMonitor, counts + r"\[3\]", class_counts=[3]),
        argument(LongTailMonitor, "few must be at least 0; got -1", few=-1),
        argument(LongTailMonitor, "many must be at least few - 1 = 19; got 3", many=3),
        monitor(
            "a part that is not there",
            r"forward must be 'forward' or the name of a submodule of Classifier \(it has \['net'\]\); got 'body'",
            lambda: [LongTailMonitor(forward="body")],
        ),
        monitor(
            "a validation past the module's forward",
            r"no logits \[4, classes\] came out of the module in the evaluation step; .* forward='NAME'",
            lambda: [LongTailMonitor()],
            AsksItsNet,
        ),
        monitor(
            "validation batches without labels",
            "the evaluation batches have no class indices: no second item, no 'labels' or 'targets'",
            lambda: [LongTailMonitor()],
            TakesImages,
            validation=lambda: torch.utils.data.DataLoader(TensorDataset(X), 4),
        ),
    ]


def cannot_attach(row: Row) -> list[Misuse]:
    return [sees_no_loss(row)] if row.name.startswith("logit_adjustment") else []
