"""GeneralizationMonitor: its card in the conformance tests."""

from __future__ import annotations

import functools

import torch
from torch import nn

from lightning_recipes.callbacks import GeneralizationMonitor
from tests.conformance.misuse import (
    Misuse,
    Regression,
    TwoLosses,
    argument,
    finds_no_layers,
    no_parameters,
    sees_no_loss,
    stepped_by,
)
from tests.conformance.table import Row
from tests.stock import loader, samples

ROWS = [
    Row(
        "generalization",
        lambda: [GeneralizationMonitor(probe_size=64, every_n_steps=3, track_frozen=["0.1", "1.1"], budget=0.8)],
        monitors=True,
        network=lambda: nn.Sequential(
            nn.Sequential(nn.Flatten(), nn.Linear(64, 80), nn.ReLU()),
            nn.Sequential(nn.Identity(), nn.Linear(80, 16), nn.ReLU()),
            nn.Linear(16, 10),
        ),
    ),
]
MEMBERS = {"GeneralizationMonitor": lambda: GeneralizationMonitor(probe_size=64)}
OTHER = {"GeneralizationMonitor": {"loss_factor": 1.0}}
AUTOMATIC = ["GeneralizationMonitor"]

MANY, LABELS = samples(80)


def misuses() -> list[Misuse]:
    monitor = GeneralizationMonitor
    look = functools.partial(Misuse, "GeneralizationMonitor", data=lambda: loader(MANY, LABELS))
    tracked = "'first', None or a list of names"
    return [
        argument(monitor, "readout must be None or the dotted path of a linear layer; got 64", readout=64),
        argument(monitor, "probe_size must be at least 64; got 63", probe_size=63),
        argument(monitor, "loss_factor must be positive: 2 for the mean of squares; got 0", loss_factor=0),
        argument(monitor, "frozen_tol must be between 0 and 1, as 1e-6; got 1.0", frozen_tol=1.0),
        argument(monitor, r"patience_factor must be at least 1; got 0\.5", patience_factor=0.5),
        argument(monitor, f"track_frozen must be {tracked}; got 'last'", track_frozen="last"),
        argument(monitor, "every_n_steps must be None or at least 1; got 0", every_n_steps=0),
        argument(monitor, "geometric_steps must be true where every_n_steps is not given", geometric_steps=False),
        argument(monitor, "budget must be None or a positive share, as 0.1; got 0", budget=0),
        look("a readout that is not there", "'nothing' is no part of Classifier", lambda: [monitor("nothing")]),
        look(
            "a readout that is not linear",
            r"the head 'net\.1' is a ReLU and no linear layer; .* one of \['net\.0', 'net\.2', 'net\.4'\]",
            lambda: [monitor("net.1")],
        ),
        look(
            "tracked layers that are not there",
            "track_frozen: 'nothing' is no part of Classifier",
            lambda: [monitor(track_frozen=["nothing"])],
        ),
        look(
            "a tracked layer that is not linear",
            r"track_frozen: 'net\.1' is a ReLU; the span of inputs is that of linear layers",
            lambda: [monitor(track_frozen=["net.1"])],
        ),
        look("no head", r"found no head in Classifier; its parts are \[\]", lambda: [monitor()], no_parameters),
        look(
            "few samples",
            "8 samples say nothing of 3 outputs; it needs 12 at least",
            lambda: [monitor()],
            data=lambda: loader(MANY[:8], LABELS[:8]),
        ),
        look(
            "features that do not vary",
            "GeneralizationMonitor: the readout's inputs do not vary",
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
        look("stop with class labels", "stop=True with class labels: .* give force=True", lambda: [monitor(stop=True)]),
        look("two losses", r"computes 2 losses .*choose with criterion=INDEX", lambda: [monitor()], TwoLosses),
        look(
            "data that are not read by index",
            "needs the training data as one DataLoader over a data set read by index; got 40 loaders",
            lambda: [monitor()],
            data=lambda: [*loader(MANY, LABELS)],
        ),
        look(
            "an optimizer that calls its closure several times",
            "GeneralizationMonitor takes part in an update once, and LBFGS calls its closure several times",
            lambda: [monitor()],
            stepped_by(lambda parameters: torch.optim.LBFGS(parameters)),
        ),
    ]


def _with_a_hole() -> torch.Tensor:
    x = MANY.clone()
    x[9, 0] = torch.nan
    return x


def cannot_attach(row: Row) -> list[Misuse]:
    return [sees_no_loss(row, in_validation=True), finds_no_layers(row)]
