"""MoreIsBetterMonitor and RidgeRefit: their card in the conformance tests."""

from __future__ import annotations

import functools
import math

import torch
from torch import nn
from torch.nn import functional as F

from lightning_recipes.callbacks import MoreIsBetterMonitor, RidgeRefit
from lightning_recipes.datamodules import DigitsDataModule, SCoLeDataModule
from tests.conformance.misuse import (
    Misuse,
    Regression,
    TwoLosses,
    argument,
    finds_no_layers,
    manual,
    no_parameters,
    saved,
    sees_no_loss,
)
from tests.conformance.table import Row
from tests.stock import Classifier, loader, samples

ROWS = [
    Row(
        "more_is_better",
        lambda: [MoreIsBetterMonitor(probe_size=64, every_n_steps=3, ridges=[1e-3, 0.1, 10.0], budget=0.8)],
        monitors=True,
        network=lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 80), nn.ReLU(), nn.Linear(80, 10)),
    ),
    Row(
        "more_is_better_relu_nngp",
        lambda: [MoreIsBetterMonitor(probe_size=64, every_n_steps=3, kernel="relu_nngp", budget=0.8)],
        monitors=True,
        network=lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)),
    ),
    Row(
        "more_is_better_ntk",
        lambda: [MoreIsBetterMonitor(probe_size=64, every_n_steps=3, kernel="ntk")],
        monitors=True,
        network=lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(36, 10)
        ),
    ),
    # Large ridges: at small ones what rounding leaves of such similar features is blown up beyond 1e-6.
    Row("ridge_refit", lambda: [RidgeRefit(ridges=[3.0, 30.0])], lambda: [RidgeRefit(when="never")]),
]
MEMBERS = {
    "MoreIsBetterMonitor": lambda: MoreIsBetterMonitor(probe_size=64),
    # features of some stacks hardly vary, and what rounding leaves of them a small ridge makes large in the layer
    "RidgeRefit": lambda: RidgeRefit(ridges=[3e6]),
}
REFUSED = {
    **dict.fromkeys(
        (("RidgeRefit", "ProjectionHead"), ("RidgeRefit", "CosineHead"), ("RidgeRefit", "SLCA")), "both own the head"
    ),
    ("RidgeRefit", "LEVI"): "LEVI has heads of its own",
}
OTHER = {"MoreIsBetterMonitor": {"probe_size": 128}, "RidgeRefit": {"head": "network.3"}}
AUTOMATIC = ["MoreIsBetterMonitor", "RidgeRefit"]

MANY, LABELS = samples(80)


class SmoothedLoss(Classifier):
    """A loss of probabilities."""

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        x, y = batch
        return F.mse_loss(self(x).softmax(1).flatten(), F.one_hot(y, 3).float().flatten())


class LinearProbe(Classifier):
    """A readout on a network that runs without gradients."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 5)))
        self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            h = self.net(x)
        return self.head(h)


class TwiceOver(nn.Sequential):
    """Its last hidden layer is called twice."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 5), nn.Linear(5, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self[1](self[0](x))
        return self[3](self[2](self[2](h)))


class Stretch(nn.Module):
    """A feature at many places."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :1, None].expand(-1, 1_200_000, 1)


class Few(nn.Module):
    """The first of them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :8, 0]


def misuses() -> list[Misuse]:
    monitor, refit = MoreIsBetterMonitor, RidgeRefit
    look = functools.partial(Misuse, "MoreIsBetterMonitor", data=lambda: loader(MANY, LABELS))
    write = functools.partial(Misuse, "RidgeRefit", data=lambda: loader(MANY, LABELS))
    ridges = "ridges must be None or positive multiples of the mean diagonal of the kernel matrix; got"
    return [
        argument(monitor, "head must be None or the dotted path of a linear layer; got 64", head=64),
        argument(monitor, "probe_size must be at least 64; got 63", probe_size=63),
        argument(monitor, rf"{ridges} \[0\]", ridges=[0]),
        argument(monitor, rf"{ridges} \[\]", ridges=[]),
        argument(monitor, "kernel must be one of 'features', 'relu_nngp', 'ntk'; got 'rbf'", kernel="rbf"),
        argument(monitor, "what_if_k must be multiples that are positive, as", what_if_k=[0.0]),
        argument(monitor, "what_if_n must be multiples that are positive and finite, as", what_if_n=[math.inf]),
        argument(monitor, "every_n_steps must be None or at least 1; got 0", every_n_steps=0),
        argument(monitor, "geometric_steps must be true where every_n_steps is not given", geometric_steps=False),
        argument(monitor, "budget must be None or a positive share, as 0.1; got 0", budget=0),
        argument(refit, "head must be None or the dotted path of a linear layer; got 64", head=64),
        argument(refit, rf"{ridges} \[-1.0\]", ridges=[-1.0]),
        argument(refit, "when must be 'fit_end' or 'never'; got 'now'", when="now"),
        *(
            each
            for misuse, make in ((look, monitor), (write, refit))
            for each in (
                misuse("a head that is not there", "'nothing' is no part of Classifier", lambda m=make: [m("nothing")]),
                misuse(
                    "a head that is not linear",
                    r"the head 'net\.1' is a ReLU and no linear layer; .* one of \['net\.0', 'net\.2', 'net\.4'\]",
                    lambda m=make: [m("net.1")],
                ),
                misuse(
                    "no head", r"found no head in Classifier; its parts are \[\]", lambda m=make: [m()], no_parameters
                ),
                misuse(
                    "few samples",
                    "8 samples say nothing of 3 outputs; it needs 12 at least",
                    lambda m=make: [m()],
                    data=lambda: loader(MANY[:8], LABELS[:8]),
                ),
                misuse(
                    "two losses", r"computes 2 losses .*choose with criterion=INDEX", lambda m=make: [m()], TwoLosses
                ),
                misuse(
                    "data that are not read by index",
                    "needs the training data as one DataLoader over a data set read by index; got 40 loaders",
                    lambda m=make: [m()],
                    data=lambda: [*loader(MANY, LABELS)],
                ),
                misuse(
                    "several targets a feature vector",
                    r"needs one feature vector a sample; net\.4 got \(\d+, 5\) for \d+ samples",
                    lambda m=make: [m()],
                    SmoothedLoss,
                ),
            )
        ),
        look(
            "features that do not vary",
            "MoreIsBetterMonitor: the features do not vary, so there is nothing to learn from them",
            lambda: [monitor("net.0")],
            Regression,
            data=lambda: loader(torch.ones(80, 6), LABELS),
        ),
        look(
            "features that are not finite",
            "the readout's inputs are not finite; the first such batch is 2 of the probe",
            lambda: [monitor("net.0")],
            Regression,
            data=lambda: loader(_with_a_hole(), LABELS),
        ),
        look(
            "the tangent kernel of the readout alone",
            "kernel='ntk' needs a layer with parameters before the readout net, and none is called there; use"
            " kernel='features', which is the kernel of the readout alone",
            lambda: [monitor(kernel="ntk")],
            lambda: Classifier(nn.Linear(6, 3)),
        ),
        look(
            "the tangent kernel of a network that has no gradient",
            r"kernel='ntk' differentiates the outputs of head with respect to a layer before it, and they have no"
            r" gradient there \(net\.0, net\.2\): the network runs under torch.no_grad, or detaches",
            lambda: [monitor(kernel="ntk")],
            LinearProbe,
        ),
        look(
            "the tangent kernel of a layer that is called twice",
            r"kernel='ntk' takes layers that are called once in a pass; net\.2 \(Linear\) is called 2 times: use"
            r" kernel='features'",
            lambda: [monitor(kernel="ntk")],
            lambda: Classifier(TwiceOver()),
        ),
        look(
            "a kernel matrix of too many samples",
            "kernel='relu_nngp' makes a matrix of as many rows as there are samples, and 8192 are the most; got 8193:"
            " take fewer with probe_size=",
            lambda: [monitor(probe_size=10**6, kernel="relu_nngp")],
            data=lambda: loader(*samples(8193)),
        ),
        look(
            "more numbers of the tangent kernel than are kept",
            r"kernel='ntk' keeps 4800000 numbers a sample of net\.1, and 80 samples are too many for that; take 55 at"
            " most with probe_size=",
            lambda: [monitor(kernel="ntk")],
            lambda: Classifier(nn.Sequential(Stretch(), nn.Linear(1, 1), Few(), nn.Linear(8, 3))),
        ),
        write(
            "a layer with other outputs than targets",
            r"net\.0 has 5 outputs and there are 3 targets",
            lambda: [refit("net.0")],
        ),
        write(
            "a checkpoint of the refitted layer",
            "the checkpoint was written after the fit ended and holds the refitted layer",
            lambda: [refit()],
            checkpoint=saved(Classifier, lambda: [refit()], lambda: loader(MANY, LABELS), merged=True),
        ),
        Misuse(
            "RidgeRefit",
            "data that arrive in stages",
            "SCoLeDataModule shows its data in stages, and the layer would be fitted to the last one alone",
            lambda: [refit()],
            lambda: Classifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 10))),
            lambda: SCoLeDataModule(DigitsDataModule(), num_tasks=2),
        ),
        write(
            "manual optimization",
            "RidgeRefit .*needs automatic optimization: under manual optimization that step trains",
            lambda: [refit()],
            manual(),
        ),
    ]


def _with_a_hole() -> torch.Tensor:
    x = MANY.clone()
    x[9, 0] = torch.nan
    return x


def cannot_attach(row: Row) -> list[Misuse]:
    return [sees_no_loss(row, in_validation=True), finds_no_layers(row)]
