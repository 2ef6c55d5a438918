"""LEVI: its card in the conformance tests."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_recipes.callbacks import AAER, LEVI, PEGO
from tests.attention import D, Encoder
from tests.conformance.misuse import (
    Misuse,
    NoLayers,
    Regression,
    X,
    Y,
    argument,
    sees_no_loss,
    with_net,
)
from tests.conformance.table import Classifier as OfImages
from tests.conformance.table import ConvNet, Row, digits, small_vit
from tests.stock import Classifier, loader, mlp, quiet


def _unwrap(module: Any) -> None:
    module.network = module.network.release()


ROWS = [
    Row("levi", lambda: [LEVI(2, small_width=8)], optimizer="adamw", keeps=_unwrap),
    Row(
        "levi_trainable",
        lambda: [LEVI([0], small_width=8, adapter_hidden=4, backbone="trainable", lr_scale=5.0)],
        network=small_vit,
        keeps=_unwrap,
    ),
    Row("levi+aaer", lambda: [LEVI(2, small_width=8), AAER(0.1)], couples=True, keeps=_unwrap),
]
MEMBERS = {"LEVI": lambda: LEVI(2, small_width=8, backbone="trainable")}
REFUSED = {
    **dict.fromkeys([("LEVI", "ProjectionHead"), ("LEVI", "SLCA")], "LEVI has heads of its own"),
    ("LEVI", "SaRA"): "LEVI's own parts begin at random",
}
AUTOMATIC = ["LEVI"]
SURGERY = ["LEVI"]
OTHER = {"LEVI": {"seed": 7}}


class OwnLayers(Classifier):
    """A network that is no part of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.other = mlp()


class LogProbabilities(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.nll_loss(self(batch[0]), batch[1])


class Tempered(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]) / 2, batch[1])


class Fails(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        raise KeyError("ids")


class Odd(nn.Module):
    """A block whose output holds no features."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.ModuleList([Names(), Names()]), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.inner:
            x = part(x)["x"]
        return self.head(x)


class Names(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"x": self.linear(x)}


class Features(nn.Sequential):
    """Its last part makes the logits of places: ``[n, classes, places]``."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Unflatten(1, (3, 2)))


def of_earlier_fit() -> Classifier:
    module = Classifier()
    quiet(callbacks=[LEVI(1, small_width=2)], limit_train_batches=1).fit(module, loader(X, Y))
    return module


def misuses() -> list[Misuse]:
    levi = functools.partial(Misuse, "LEVI")
    width = functools.partial(LEVI, small_width=4)
    several = "layers must be a number of blocks, or a list of different ones; got "
    vectors = {"data": lambda: loader(torch.rand(8, 5, D), Y[:8])}
    sequence = with_net(Encoder)
    return [
        argument(LEVI, several + "0", layers=0),
        argument(LEVI, several + r"\[\]", layers=[]),
        argument(LEVI, several + r"\[1, 1\]", layers=[1, 1]),
        argument(LEVI, "small must be 'auto' or a module; got 'mlp'", small="mlp"),
        argument(LEVI, "small_width must be at least 0; got -1", small_width=-1),
        argument(LEVI, "adapter_hidden must be at least 0; got -1", adapter_hidden=-1),
        argument(LEVI, "backbone must be 'frozen' or 'trainable'; got 'lora'", backbone="lora"),
        argument(LEVI, r"pool must be 'auto' or one of \('cls', 'mean', 'avg', 'last'\); got 'max'", pool="max"),
        argument(LEVI, "average must be 'logits' or 'probs'; got 'votes'", average="votes"),
        argument(LEVI, "lr_scale must be positive; got 0", lr_scale=0),
        levi(
            "a depth that is not there",
            r"layers: there is no block 2; the network has 2 blocks \['1', '3'\]: give indices of these",
            lambda: [width([0, 2])],
        ),
        levi(
            "a name that is not there",
            r"'blocks\.0' is no part of Sequential; its parts are \['0', '1', '2', '3', '4'\]",
            lambda: [width(["blocks.0"])],
        ),
        levi(
            "no sequence of blocks",
            r"found no .* in NoLayers; .*; give layers as dotted names",
            lambda: [width()],
            lambda: OfImages(NoLayers()),
            lambda: digits(),
        ),
        levi(
            "a block that gives no tensor",
            r"inner\.0 gave a dict, which holds no tensor of features; name another part",
            lambda: [width()],
            with_net(Odd),
        ),
        levi(
            "a block of another shape than the pooling takes",
            r"0 gave float32 \[4, 8, 8, 8\] for 4 samples, which pool='cls' does not make \[n, d\] of; 'avg' takes",
            lambda: [width(pool="cls")],
            lambda: OfImages(ConvNet()),
            lambda: digits(),
        ),
        levi(
            "a small network that does not give vectors",
            r"small must give \[n, d\]; it gave \[4, 6, 1\] for the input float32 \[4, 6\]",
            lambda: [LEVI(small=nn.Unflatten(1, (6, 1)))],
        ),
        levi(
            "a small network for other inputs",
            r"small cannot take the network's input float32 \[4, 6\] \(RuntimeError: ",
            lambda: [LEVI(small=nn.Linear(7, 2))],
        ),
        levi(
            "inputs that no small network of ours takes",
            r"small='auto' takes vectors .* the network gets float32 \[4, 5, 8\]: give small",
            lambda: [width()],
            sequence,
            **vectors,
        ),
        levi(
            "a network of several parts in the module itself",
            r"no single part of OwnLayers maps inputs to logits; its parts are \['net', 'other'\]: .* backbone_path",
            lambda: [width()],
            OwnLayers,
        ),
        levi(
            "a part that is not there",
            r"'backbone' is no part of Classifier; its parts are \['net'\]",
            lambda: [width(backbone_path="backbone")],
        ),
        levi(
            "a part that is never called",
            "the module's step never calls its Sequential; name the submodule that maps inputs to logits",
            lambda: [width(backbone_path="other")],
            OwnLayers,
        ),
        levi(
            "a network that gives no logits",
            r"Features gave \[4, 3, 2\] for 4 samples and not logits \[n, classes\]; name the submodule",
            lambda: [width()],
            with_net(Features),
        ),
        levi(
            "a step that fails on a few samples",
            r"the training step failed on 4 samples before training \(KeyError: 'ids'\); .* example_input_array",
            lambda: [width()],
            Fails,
        ),
        levi(
            "data that can be gone through once",
            "an iterator that goes through once; set the module's example_input_array",
            lambda: [width()],
            data=lambda: iter(loader(X, Y)),
        ),
        levi(
            "a part whose output is no logits of the loss",
            r"the loss is not computed from what net\.0 returned, \[4, 5\]: it sees other values \[4, 3\]",
            lambda: [width(["0"], backbone_path="net.0")],
            with_net(lambda: nn.Sequential(nn.Sequential(*mlp()[:4]), nn.Linear(5, 3))),
            in_step=True,
        ),
        levi(
            "logits that are changed before the loss",
            "the loss is not computed from what net returned, .* it sees other values",
            lambda: [width()],
            Tempered,
            in_step=True,
        ),
        levi(
            "a loss of log-probabilities",
            "heads give logits, and the module's loss, nll_loss, takes probabilities or their logarithms; use",
            lambda: [width()],
            LogProbabilities,
            in_step=True,
        ),
        levi(
            "probabilities of a regression",
            "average='probs' needs a loss of classes, and the module's is mse_loss",
            lambda: [width(average="probs")],
            Regression,
            in_step=True,
        ),
        levi(
            "adapters in a frozen network",
            r"runs a frozen network without gradients, and 'net\.base\.0\.lora_A.*', which .* set backbone='trainable'",
            lambda: [PEGO(1, 2, target_modules=["0"]), width()],
        ),
        levi(
            "an ensemble of an earlier fit with other arguments",
            r"of an earlier fit with other arguments \(layers=1 there and 4 here, small_width=2 there and 4 here",
            lambda: [width()],
            of_earlier_fit,
        ),
    ]


def cannot_attach(row: Row) -> list[Misuse]:
    return [] if "+" in row.name else [sees_no_loss(row)]
