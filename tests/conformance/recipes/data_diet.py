"""DataDiet and PruneTrainSet: their card in the conformance tests."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_recipes.callbacks import SLCA, DataDiet, PruneTrainSet
from tests.conformance.misuse import (
    Hidden,
    Misuse,
    MultiLabel,
    Regression,
    Segmentation,
    TwoLosses,
    X,
    Y,
    argument,
    frozen,
    saved,
    sees_no_loss,
    with_net,
)
from tests.conformance.table import Row, first_digits
from tests.stock import Classifier, loader, mlp


def _twice_as_many(samples: int) -> TensorDataset:
    """As many as are asked for, once half of them are left out."""
    return first_digits(2 * samples)


def _prune() -> PruneTrainSet:
    return PruneTrainSet(keep=0.5, mode="random")


ROWS = [
    Row("data_diet_grand", lambda: [DataDiet("grand", 1)], monitors=True),
    Row("data_diet_forgetting", lambda: [DataDiet("forgetting", 1)], monitors=True),
    Row(
        "prune_train_set",
        lambda: [_prune()],
        lambda: [PruneTrainSet(keep=1.0, mode="random")],
        data=_twice_as_many,
    ),
]
MEMBERS = {"DataDiet": lambda: DataDiet("el2n", 1), "PruneTrainSet": _prune}
DATA = {"PruneTrainSet": _twice_as_many}
REFUSED = {("DataDiet", "PruneTrainSet"): "scores of a part of the training set are those of no whole one"}
OTHER = {"DataDiet": {"at_epoch": 3}, "PruneTrainSet": {"keep": 0.75}}


class Stream(IterableDataset):
    def __repr__(self) -> str:  # in the name of a test, which must be the same in every process
        return "Stream()"

    def __iter__(self) -> Any:
        return iter(zip(X, Y))


class Branches(nn.Module):
    """Asks for a number in its forward, and has a parameter that is in no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.scale = mlp(), nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.scale * x) if x.sum().item() > 0 else self.net(-x)


class TwoParts(Classifier):
    """Puts its network together in the step, and has no forward that does."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net[2:](self.net[:2](x)), y)

    def forward(self, x: Tensor, more: Tensor) -> Tensor:
        return x + more


class Scaled(Classifier):
    """Logits that are more than the head's output."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


def of_data_diet() -> list[Misuse]:
    bad = functools.partial(Misuse, "DataDiet", callbacks=lambda: [DataDiet(at_epoch=0)])
    grand = lambda: [DataDiet("grand", 1)]  # noqa: E731
    loss = r"needs a classification loss of logits \[n, classes\]; the observed one is "
    shapes = r"needs logits \[n, classes\] and class indices .*; got "
    batch_norm = with_net(lambda: nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3, track_running_stats=False)))
    return [
        argument(DataDiet, "score must be one of 'el2n', 'grand', .*'forgetting'; got 'loss'", score="loss"),
        argument(DataDiet, "at_epoch must be at least 0; got -1", at_epoch=-1),
        argument(DataDiet, "at_epoch must be at least 1; got 0", score="forgetting", at_epoch=0),
        argument(DataDiet, "batch_size must be at least 1; got 0", batch_size=0),
        argument(DataDiet, "num_workers must be at least 0; got -1", num_workers=-1),
        argument(DataDiet, "grad_chunk must be at least 1; got 0", grad_chunk=0),
        argument(DataDiet, "run must be None or a name; got ''", run=""),
        argument(DataDiet, "forward must be 'auto', 'forward' or the name of a part; got ''", forward=""),
        argument(DataDiet, "dataset must be None or a map-style data set with a length; got", dataset=Stream()),
        bad(
            "an epoch that the fit does not reach",
            r"at_epoch=10 and Trainer\(max_epochs=\.\.\.\) is 1: scores would never be computed",
            callbacks=lambda: [DataDiet()],
        ),
        bad(
            "a stream",
            "needs the training data as one DataLoader over a data set read by index; got DataLoader of Stream",
            data=lambda: DataLoader(Stream(), 4),
        ),
        bad(
            "two loaders",
            "needs the training data as one DataLoader .*; got 2 loaders",
            data=lambda: {"a": loader(X, Y), "b": loader(X, Y)},
        ),
        bad(
            "a clean set of another length",
            "dataset has 5 samples and the training set 16; give the same in the same order",
            callbacks=lambda: [DataDiet(at_epoch=0, dataset=TensorDataset(X[:5], Y[:5]))],
        ),
        bad("a regression", loss + r"mse_loss of \(2, 3\) .*forward=", module=Regression),
        bad("several labels a sample", loss + "binary_cross_entropy_with_logits", module=MultiLabel),
        bad("a segmentation", loss + r"cross_entropy of \(2, 3, 1\)", module=Segmentation),
        bad("two losses", r"computes 2 losses .*choose with criterion=INDEX", module=TwoLosses),
        bad("a loss that is not seen", "no loss was seen .* name any other with criterion=", module=Hidden),
        bad("a module with everything frozen", r"what needs no gradient: is everything frozen\?", module=frozen()),
        bad(
            "a label without a class",
            r"the training step fails on the training data \(Target 3 is out of bounds.*\): is there a label",
            data=lambda: loader(X, Y + 3),
        ),
        bad(
            "a criterion that is not there",
            "criterion='nothing' is no submodule or method of Hidden",
            callbacks=lambda: [DataDiet(at_epoch=0, criterion="nothing")],
            module=Hidden,
        ),
        bad(
            "a part that is not there",
            "forward must be 'forward' or the name of a submodule of Classifier .*; got 'nothing'",
            callbacks=lambda: [DataDiet(at_epoch=0, forward="nothing")],
        ),
        bad(
            "a part that gives no logits",
            shapes + r"\(2, 5\) and \(2, 3\)",
            callbacks=lambda: [DataDiet(at_epoch=0, forward="net.0")],
            data=lambda: loader(X, nn.functional.one_hot(Y, 3).float()),
        ),
        bad(
            "batches without labels",
            r"forward='net' gave no labels beside them for list of \[tensor \(2, 6\)",
            callbacks=lambda: [DataDiet(at_epoch=0, forward="net")],
            data=lambda: loader(X),
        ),
        bad(
            "GraNd of a network that mixes examples",
            r"score='grand' needs examples that do not depend on each other; net\.1 normalises by its batch",
            callbacks=grand,
            module=batch_norm,
        ),
        bad(
            "GraNd of a network that cannot be vectorised",
            "cannot be computed example by example through .*; use score='grand_last'",
            callbacks=grand,
            module=with_net(Branches),
        ),
        bad(
            "GraNd where no part holds the network",
            r"needs one part that makes the logits of a batch .*: name it with forward=, or use score='grand_last'",
            callbacks=grand,
            module=TwoParts,
        ),
        bad(
            "last-layer GraNd of logits that are no layer's output",
            "needs logits that are the output of a last linear layer; .*: use score='el2n'",
            callbacks=lambda: [DataDiet("grand_last", 1)],
            module=Scaled,
        ),
        bad(
            "last-layer GraNd of a network without a linear layer",
            "found no head in Classifier",
            callbacks=lambda: [DataDiet("grand_last", 1)],
            module=with_net(lambda: nn.Sequential(nn.Flatten(), _Scale())),
        ),
        bad(
            "forgetting of a stream",
            r"DataDiet\(score='forgetting'\) needs a stable id per training sample; .*Stream is read from one end",
            callbacks=lambda: [DataDiet("forgetting", 1)],
            data=lambda: DataLoader(Stream(), 4),
        ),
        Misuse(
            "DataDiet",
            "forgetting of a regression",
            r"needs a classification loss of logits \[n, classes\]; the observed one is mse_loss",
            lambda: [DataDiet("forgetting", 1)],
            Regression,
            in_step=True,
        ),
    ]


class _Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def _damaged(content: bytes) -> str:
    path = Path(tempfile.mkdtemp()) / "scores.pt"
    path.write_bytes(content)
    return str(path)


def of_pruning() -> list[Misuse]:
    bad = functools.partial(Misuse, "PruneTrainSet", callbacks=lambda: [_prune()])
    keep = r"keep must be a share in \(0, 1\], or how many, at least 1; got "
    offset = r"offset must be a place of at least 0 or a share in \[0, 1\), for mode='offset' alone; got "
    some = [0.5] * 16
    return [
        argument(PruneTrainSet, keep + r"0\.0", scores=some, keep=0.0),
        argument(PruneTrainSet, keep + r"1\.5", scores=some, keep=1.5),
        argument(PruneTrainSet, keep + "0", scores=some, keep=0),
        argument(PruneTrainSet, "mode must be one of 'keep_max', .*; got 'best'", scores=some, mode="best"),
        argument(PruneTrainSet, offset + "None", scores=some, mode="offset"),
        argument(PruneTrainSet, offset + "3", scores=some, offset=3),
        argument(PruneTrainSet, offset + r"1\.0", scores=some, mode="offset", offset=1.0),
        argument(PruneTrainSet, "scores must be given, but for mode='random'; got None", keep=0.5),
        bad(
            "a file that is not there",
            "there is no file nowhere/scores.pt",
            callbacks=lambda: [PruneTrainSet("nowhere/scores.pt")],
        ),
        bad(
            "a file that is damaged",
            r"scores\.pt cannot be read .* it is damaged or not one of ours",
            callbacks=lambda: [PruneTrainSet(_damaged(b"no scores"))],
        ),
        bad(
            "a folder without scores",
            r"the folder .* holds 0 files \(none\); name the one to read",
            callbacks=lambda: [PruneTrainSet(tempfile.mkdtemp())],
        ),
        bad(
            "more than there are",
            r"keep=17 of 16 scores: must be a share in \(0, 1\] or from 1 to 16",
            callbacks=lambda: [PruneTrainSet(some, 17)],
        ),
        bad(
            "a window that reaches beyond",
            "offset=10 and keep=7: 10 \\+ 7 are more than 16 scores",
            callbacks=lambda: [PruneTrainSet(some, 7, "offset", 10)],
        ),
        bad(
            "scores of another data set",
            "there are 9 scores and 16 training samples: the scores belong to another data set or split",
            callbacks=lambda: [PruneTrainSet([0.1] * 9)],
        ),
        bad(
            "a stream", "no part of a DataLoader of Stream can be taken; give one", data=lambda: DataLoader(Stream(), 4)
        ),
        bad(
            "two loaders",
            "no part of several loaders can be taken; give one plain DataLoader",
            data=lambda: {"a": loader(X, Y), "b": loader(X, Y)},
        ),
        Misuse(
            "PruneTrainSet",
            "a resume with other scores",
            "the scores choose other samples than in the run of the checkpoint: .* Resume with those",
            lambda: [PruneTrainSet([float(i % 3) for i in range(16)], 12)],
            checkpoint=saved(Classifier, lambda: [PruneTrainSet([float(i) for i in range(16)], 12)]),
            loads=True,
        ),
        Misuse(
            "PruneTrainSet",
            "after the recipe that cuts the data into tasks",
            r"PruneTrainSet must stand before SLCA in Trainer\(callbacks=\[\.\.\.\]\): the whole training set is",
            lambda: [SLCA([[0, 1, 2]], None), _prune()],
        ),
    ]


def misuses() -> list[Misuse]:
    return of_data_diet() + of_pruning()


def cannot_attach(row: Row) -> list[Misuse]:
    if row.name == "prune_train_set":
        return []  # it knows of no module
    # scores are asked for before the first step; forgetting waits for it
    return [replace(sees_no_loss(row), in_step=row.name == "data_diet_forgetting")]
