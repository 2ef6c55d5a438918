"""LangevinMixture and HypothesisWeightMonitor: their card in the conformance tests."""

from __future__ import annotations

import functools
import math

import torch.nn.functional as F
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch.optim import LBFGS, SGD, AdamW

from lightning_recipes.callbacks import HypothesisWeightMonitor, LangevinMixture
from lightning_recipes.core.likelihood import GaussianLogProb
from tests.conformance.misuse import SAM, Misuse, MultiLabel, Regression, X, Y, argument, sees_no_loss, stepped_by
from tests.conformance.table import Row
from tests.stock import loader

SHORT = {"temperature": 0.01, "burn_in_steps": 1, "sample_every": 1, "max_samples": 2}

ROWS = [
    Row(
        "langevin_mixture",
        lambda: [LangevinMixture(**SHORT, prior_std=0.3)],
        lambda: [LangevinMixture(0.0)],
        optimizer="plain",
        validation=True,
        trainer={"gradient_clip_val": 0.5},
    ),
    Row(
        "langevin_mixture_grad",
        lambda: [LangevinMixture(**SHORT, prior_std=None, inject="grad", storage="device")],
        lambda: [LangevinMixture(0.0)],
    ),
    Row(
        "langevin_mixture_prequential",
        lambda: [LangevinMixture(**{**SHORT, "max_samples": 3}, prior_std=None, prequential=True)],
    ),
    Row(
        "hypothesis_weight",
        lambda: [
            HypothesisWeightMonitor(n_probe=24, n_draws=4, every_n_steps=5, geometric_steps=False, budget=None),
        ],
        monitors=True,
    ),
    Row(
        "hypothesis_weight_star",
        lambda: [HypothesisWeightMonitor(method="star", n_probe=24, n_draws=2, budget=6.0)],
        monitors=True,
    ),
]
MEMBERS = {
    "LangevinMixture": lambda: LangevinMixture(**SHORT, prior_std=None),
    "HypothesisWeightMonitor": lambda: HypothesisWeightMonitor(
        n_probe=16, n_draws=2, every_n_steps=8, geometric_steps=False
    ),
}
REFUSED = {
    ("LangevinMixture", "GradientNoise"): "both add noise",
    ("LangevinMixture", "NormalizedGD"): "its factor assumes the plain gradient",
    ("LangevinMixture", "WiSEFT"): "both decide with which weights the network is evaluated",
    ("LangevinMixture", "BANG"): "both decide with which weights the network is evaluated",
    ("LangevinMixture", "BackdoorAdjustment"): "both replace the outputs at evaluation",
    ("LangevinMixture", "AdaptiveSmoothing"): "both replace the outputs at evaluation",
    ("LangevinMixture", "SLCA"): "the samples would follow no one law",
}
AUTOMATIC = ["LangevinMixture", "HypothesisWeightMonitor"]
OTHER = {"LangevinMixture": {"seed": 7}, "HypothesisWeightMonitor": {"eps": 0.02}}


def of_mixture() -> list[Misuse]:
    langevin = functools.partial(Misuse, "LangevinMixture")
    bad = functools.partial(argument, LangevinMixture)
    stages = "evaluate must be a list of 'val', 'test' and 'predict'; got "
    short = lambda **other: lambda: [LangevinMixture(**{**SHORT, **other})]  # noqa: E731
    return [
        bad("temperature must be at least 0 and finite; got -1", temperature=-1),
        bad("temperature must be at least 0 and finite; got nan", temperature=math.nan),
        bad("prior_std must be None or positive and finite; got 0", prior_std=0),
        bad("train_size must be None or at least 1; got 0", train_size=0),
        bad(r"burn_in_steps must be a number of steps, or a share in \[0, 1\); got -1", burn_in_steps=-1),
        bad(r"burn_in_steps must be a number of steps, or a share in \[0, 1\); got 1\.5", burn_in_steps=1.5),
        bad("sample_every must be at least 1; got 0", sample_every=0),
        bad("max_samples must be at least 2: a mixture of one is none; got 1", max_samples=1),
        bad("max_samples must be at least 1; got 0", max_samples=0, evaluate=[]),
        bad("storage must be 'cpu', 'disk' or 'device'; got 'gpu'", storage="gpu"),
        bad("inject must be 'param' or 'grad'; got 'weights'", inject="weights"),
        bad(stages + "'val'", evaluate="val"),
        bad(stages + r"\('train',\)" + r"|" + stages + r"\['train'\]", evaluate=["train"]),
        bad("log_prob must be None, or a function of outputs and targets; got 'gaussian'", log_prob="gaussian"),
        bad("distill must be None or a folder, and None beside log_prob: it is for classes; got ''", distill=""),
        bad(
            "distill must be None or a folder, and None beside log_prob: it is for classes; got 'targets'",
            distill="targets",
            log_prob=GaussianLogProb(),
        ),
        langevin(
            "a code of labels that are no class indices",
            r"a code of labels needs logits \[n, classes\] and class indices \[n\]",
            short(prequential=True),
            data=lambda: loader(X, F.one_hot(Y, 3).float()),
        ),
        langevin("a part that is not there", "forward must be 'forward' or the name of a sub", short(forward="body")),
        langevin(
            "a burn-in beyond the end",
            "burn_in_steps=500 is 500 steps, and the fit has 4: with sample_every=1 no sample would be kept",
            short(burn_in_steps=500),
        ),
        langevin(
            "a share of a fit without an end",
            r"burn_in_steps=0\.5 needs Trainer\(max_steps=\.\.\.\) or max_epochs",
            short(burn_in_steps=0.5),
            trainer={"max_epochs": -1},
        ),
        langevin(
            "data without a length",
            "the training data do not say how many samples they have; give train_size",
            short(),
            data=lambda: [(X[:4], Y[:4])] * 4,
        ),
        langevin(
            "a second prior",
            r"prior_std=0\.2 and AdamW\(weight_decay=0\.01\) are two priors; use weight_decay=0, or prior_std=None",
            short(),
            stepped_by(AdamW),
        ),
        langevin(
            "weights of 16 bits",
            "is of 16 bits, in which noise as small as this is rounded away; use precision='32-true' or a mixed one",
            short(),
            trainer={"precision": "bf16-true"},
        ),
        langevin(
            "a regression", r"mixes probabilities of classes; mse_loss of \(4, 3\) gives none", short(), Regression
        ),
        langevin(
            "several labels a sample",
            "mixes probabilities of classes; binary_cross_entropy_with_logits",
            short(),
            MultiLabel,
        ),
        langevin(
            "an optimizer that calls its closure repeatedly",
            "LBFGS calls its closure several times for one; use another optimizer",
            short(),
            stepped_by(LBFGS),
        ),
        langevin(
            "a user's optimizer that calls its closure repeatedly",
            "SAM calls its closure several times for one; use another optimizer",
            short(),
            stepped_by(lambda parameters: SAM(parameters, lr=0.1)),
            in_step=True,
        ),
        langevin(
            "an average of weights of Lightning's",
            "LangevinMixture and StochasticWeightAveraging cannot share a Trainer",
            lambda: [LangevinMixture(**SHORT), StochasticWeightAveraging(0.1)],
            stepped_by(lambda parameters: SGD(parameters, lr=0.1)),
        ),
    ]


def of_monitor() -> list[Misuse]:
    bad = functools.partial(argument, HypothesisWeightMonitor)
    monitor = functools.partial(Misuse, "HypothesisWeightMonitor")
    make = lambda: [HypothesisWeightMonitor()]  # noqa: E731
    return [
        bad(r"eps must be in \(0, 1\), nats; got 0", eps=0),
        bad("method must be 'llc' or 'star'; got 'volume'", method="volume"),
        bad("n_probe must be at least 3; got 1", n_probe=1),
        bad("n_draws must be at least 2; got 1", n_draws=1),
        bad("prior_std must be positive and finite; got 0", prior_std=0),
        bad("step_size must be positive and finite; got inf", step_size=math.inf),
        bad("gamma must be at least 0 and finite; got -1", gamma=-1),
        bad("every_n_steps must be None or at least 1; got 0", every_n_steps=0),
        bad("geometric_steps must be true where every_n_steps is not given", geometric_steps=False),
        bad("budget must be None or a positive share, as 0.1; got 0", budget=0),
        monitor("a regression", "needs a classification loss", make, Regression),
        monitor(
            "two samples",
            "needs at least 3 training samples on each rank; there are 2",
            make,
            data=lambda: loader(X[:2], Y[:2]),
        ),
        monitor(
            "data that are no DataLoader",
            "needs the training data as one DataLoader",
            make,
            data=lambda: [(X[:4], Y[:4])] * 4,
        ),
    ]


def misuses() -> list[Misuse]:
    return of_mixture() + of_monitor()


def cannot_attach(row: Row) -> list[Misuse]:
    return [sees_no_loss(row, in_validation=True)] if row.monitors else []
