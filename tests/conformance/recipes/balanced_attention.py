"""Balanced attention's card in the conformance tests: InsertAttention, DropBlock and ClassWeights."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_recipes.callbacks import ClassWeights, DropBlock, InsertAttention, LogitAdjustment
from lightning_recipes.callbacks.adapters.insert_attention import remove_attention
from lightning_recipes.modules import BalancedNet, SmallCNN
from tests.conformance import table
from tests.conformance.misuse import (
    Misuse,
    NoLayers,
    X,
    Y,
    argument,
    of_class_counts,
    sees_no_loss,
    with_net,
)
from tests.conformance.table import Row, SmallResNet, small_hybrid
from tests.stock import Classifier, loader

IMAGES = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def _take_out(module: LightningModule) -> None:
    remove_attention(module)


ROWS = [
    Row("attention_se", lambda: [InsertAttention(kind="se", se_reduction=4)], optimizer="adamw", keeps=_take_out),
    Row(
        "attention",
        lambda: [InsertAttention(identity_init=False, ca_reduction=4, se_reduction=4)],
        network=SmallResNet,
        batch_norm=True,
        couples=True,
        keeps=_take_out,
    ),
    Row("drop_block", lambda: [DropBlock((0.1, 0.3), 3)], lambda: [DropBlock(0.0)], couples=True),
    Row(
        "drop_block_ramp",
        lambda: [DropBlock(0.3, 5, gamma="dropblock", ramp_epochs=2)],
        network=small_hybrid,
        couples=True,
    ),
    Row("class_weights", lambda: [ClassWeights("inverse")], lambda: [ClassWeights([1] * 10)], couples=True),
    Row("class_weights_effective", lambda: [ClassWeights(beta=0.9)], lambda: [ClassWeights(beta=0)], couples=True),
    Row(
        "attention+drop_block+weights",
        lambda: [
            InsertAttention(kind="se", se_reduction=2),
            DropBlock((0.1, 0.3), 3),
            ClassWeights("balanced_eurosat"),
        ],
        network=small_hybrid,
        couples=True,
        keeps=_take_out,
    ),
]
MEMBERS = {
    "InsertAttention": lambda: InsertAttention(kind="se", se_reduction=2),
    "DropBlock": lambda: DropBlock(0.2, 3),
    "ClassWeights": lambda: ClassWeights("balanced_eurosat"),
}
NETWORK = {"InsertAttention": small_hybrid, "DropBlock": small_hybrid}
SURGERY = ["InsertAttention"]
AUTOMATIC = ["ClassWeights"]
REFUSED = {
    ("ClassWeights", "LogitAdjustment"): "both correct for the class prior",
    **{("InsertAttention", mean): "leaves the network with another structure" for mean in ("WiSEFT", "BANG")},
}
OTHER = {"InsertAttention": {"seed": 7}, "DropBlock": {"block_size": 1}, "ClassWeights": {"beta": 0.25}}


class OwnWeights(Classifier):
    """Has class weights of its own."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x), y, weight=torch.tensor([1.0, 2.0, 1.0]))


def cnn() -> nn.Module:
    return SmallCNN(3, 1, 8, "none")


def images() -> Any:
    return loader(IMAGES, Y)


def misuses() -> list[Misuse]:
    return [*of_insert_attention(), *of_drop_block(), *of_class_weights()]


def of_insert_attention() -> list[Misuse]:
    attends = functools.partial(Misuse, "InsertAttention", data=images)
    no_part = r"'stages\.9' is no part of Classifier; its parts are \['net',"
    auto = lambda: [InsertAttention(kind="se")]  # noqa: E731
    return [
        argument(InsertAttention, "after must be 'auto' or names of at least one part; got 'layer1'", after="layer1"),
        argument(InsertAttention, r"after must be 'auto' or names of at least one part; got \[\]", after=[]),
        argument(InsertAttention, "kind must be 'balanced', 'coord' or 'se'; got 'cbam'", kind="cbam"),
        argument(InsertAttention, "ca_reduction must be at least 1; got 0", ca_reduction=0),
        argument(InsertAttention, "se_reduction must be at least 1; got 0", se_reduction=0),
        attends("no convolution", "found no feature maps in Classifier: .* name some with after=", auto),
        attends(
            "a transformer",
            "found no feature maps in Classifier: no residual blocks .* and no blocks in order with a convolution",
            auto,
            with_net(table.small_vit),
        ),
        attends("no such part", no_part, lambda: [InsertAttention(after=["stages.9"])], with_net(cnn)),
        attends(
            "a part without a convolution before it",
            r"net\.0 has no convolution in it or before it; name other parts with after=",
            lambda: [InsertAttention(after=["net.0"])],
        ),
        attends(
            "a part that gives no maps",
            r"net\.head gives \[4, 3\] where maps \[n, 32, height, width\] were expected; name other parts with after=",
            lambda: [InsertAttention(after=["head"])],
            with_net(cnn),
            in_step=True,
        ),
        attends(
            "attention of the network's own",
            r"balanced attention of its own, the first at net\.stages\.0\.0\.attention",
            auto,
            with_net(lambda: BalancedNet(3, 1, (16,), (1,))),
        ),
        attends(
            "a part whose name is taken",
            r"net\.blocks\.0\.bn2 has a part named 'attention' already; name other parts with after=",
            auto,
            with_net(_named_attention),
        ),
    ]


def _named_attention() -> nn.Module:
    net = table.SmallResNet()
    net.blocks[0].bn2.attention = nn.Identity()
    return net


def of_drop_block() -> list[Misuse]:
    drops = functools.partial(Misuse, "DropBlock", data=images)
    auto = lambda: [DropBlock(0.2, 3)]  # noqa: E731
    inside = r"drop_prob must be in \[0, 1\), or a pair of such; got "
    return [
        argument(DropBlock, inside + "1", drop_prob=1),
        argument(DropBlock, inside + "-0.1", drop_prob=-0.1),
        argument(DropBlock, inside + "nan", drop_prob=math.nan),
        argument(DropBlock, inside + r"\(0\.1, 1\.0\)", drop_prob=(0.1, 1.0)),
        argument(DropBlock, inside + r"\(0\.1, 0\.2, 0\.3\)", drop_prob=(0.1, 0.2, 0.3)),
        argument(
            DropBlock, "block_size must be odd, or its squares would not stand on their middles; got 4", block_size=4
        ),
        argument(DropBlock, "block_size must be odd, .*; got -1", block_size=-1),
        argument(DropBlock, "where must be 'auto' or names of at least one part; got 'layer1'", where="layer1"),
        argument(DropBlock, r"where must be 'auto' or names of at least one part; got \(\)", where=()),
        argument(DropBlock, "gamma must be 'paper_code' or 'dropblock'; got 'paper'", gamma="paper"),
        argument(DropBlock, "ramp_epochs must be at least 0; got -1", ramp_epochs=-1),
        drops("no convolution", "found no feature maps in Classifier: .* name some with where=", auto),
        drops("a transformer", "found no feature maps in Classifier: ", auto, with_net(table.small_vit)),
        drops(
            "no such part",
            r"'stages\.9' is no part of Classifier",
            lambda: [DropBlock(where=["stages.9"])],
            with_net(cnn),
        ),
        drops(
            "a part that gives no maps",
            r"net\.head has \[4, 3\] where maps \[n, channels, height, width\] were expected; name other parts with",
            lambda: [DropBlock(where=["head"])],
            with_net(cnn),
            in_step=True,
        ),
        drops(
            "DropBlock of the network's own",
            r"the network has DropBlock of its own, the first at net\.stages\.0\.0\.drop; switch it off there",
            auto,
            with_net(lambda: BalancedNet(3, 1, (16,), (1,), block_size=3)),
        ),
    ]


def of_class_weights() -> list[Misuse]:
    weighs = functools.partial(Misuse, "ClassWeights")
    auto = lambda: [ClassWeights("inverse")]  # noqa: E731
    allowed = "weights must be 'effective_number', 'inverse', 'balanced_eurosat' or a positive number a class; got "
    return [
        argument(ClassWeights, allowed + "'balanced'", weights="balanced"),
        argument(ClassWeights, allowed + r"\[1\.0\]", weights=[1]),
        argument(ClassWeights, allowed + r"\[1\.0, 0\.0\]", weights=[1, 0]),
        argument(ClassWeights, allowed + r"\[1\.0, inf\]", weights=[1, math.inf]),
        argument(ClassWeights, r"beta must be in \[0, 1\); got 1", beta=1),
        weighs(
            "weights of another length than the logits",
            "there are 10 class weights and the logits have 3 classes",
            lambda: [ClassWeights("balanced_eurosat")],
            in_step=True,
        ),
        weighs(
            "a class without samples",
            "class 1 has no training sample, so weights='inverse' has none for it; give weights=",
            auto,
            data=lambda: loader(X, Y.clamp_min(1) * (Y > 1)),
            in_step=True,
        ),
        weighs(
            "more classes of labels than logits",
            "there are 4 classes of labels and the logits have 3 classes",
            auto,
            data=lambda: loader(X, torch.cat([Y[:15], torch.tensor([3])])),
            in_step=True,
        ),
        weighs(
            "class weights of the module's own",
            "the module's loss has class weights of its own; take them out there, or leave the recipe out",
            auto,
            OwnWeights,
            in_step=True,
        ),
        weighs(
            "the prior in the logits beside it",
            "ClassWeights and LogitAdjustment cannot share a Trainer: both correct for the class prior",
            lambda: [ClassWeights("inverse"), LogitAdjustment()],
        ),
        *of_class_counts(lambda: ClassWeights("inverse"), r"weights=\[weight of class 0,"),
    ]


def cannot_attach(row: Row) -> list[Misuse]:
    if row.name.startswith("class_weights"):
        return [sees_no_loss(row)]
    names = [type(recipe).__name__ for recipe in row.recipes()]
    name = "DropBlock" if "DropBlock" in names else names[0]  # it declares its places before any surgery
    bare = lambda: table.Classifier(NoLayers(), row.optimizer)  # noqa: E731
    says = r"found no feature maps in Classifier: no residual blocks .*; its parts are \['network'\]: name some with"
    return [
        Misuse(
            name, f"{row.name} on a module that it cannot attach to", says, row.recipes, bare, lambda: table.digits()
        )
    ]
