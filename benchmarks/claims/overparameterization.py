"""Ridge regression on random features against the eigenframework, and its forecasts on digits against held-out ones.

The theory's test errors are to lie within two standard errors of 15 trials, and its training errors within 5 % of their
mean. The latter does not show in one case: with 256 samples and as many features the mean is 7 % off, with a standard
error of 4 %.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from statistics import mean, stdev
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

from benchmarks.claims.findings import Finding, Metrics, Results
from lightning_recipes.callbacks.diagnostics.overparameterization import DATA, WIDTH, limit_of
from lightning_recipes.core.random import generator
from lightning_recipes.core.ridge_theory import best_ridge, default_ridges, rf_risk, ridge_readout, sweep, task_of
from lightning_recipes.core.spectrum import Spectrum, spectrum
from lightning_recipes.datamodules import GaussianRFDataModule

RECIPE = "MoreIsBetterMonitor"
CLAIM = "Errors of ridge regression on random features follow the theory; at the best ridge more features never harm."
MODES, NOISE, RIDGE, TINY = 2000, 0.5, 0.1, 1e-3
CASES = ((256, 64), (256, 256), (256, 1024), (64, 256))
WIDTHS = (16, 32, 64, 128, 512)
RIDGES = torch.logspace(-3, 2, 31, dtype=torch.float64)
DIGITS = torch.logspace(-4, 1, 11, dtype=torch.float64)
SETTING = (
    f"Gaussian features of a kernel with {MODES:,} eigenvalues i^-1.5, target coefficients^2 i^-1.5, noise {NOISE:g},"
    " 1,000 test points; random ReLU features of scikit-learn's digits, one-hot targets, on held-out digits"
)
SEEDS = 15
ARMS: Mapping[str, Mapping[str, Any]] = {
    **{f"n {n}, k {k}": {"n": n, "k": k} for n, k in CASES},
    "widths": {"n": 64},
    "digits": {"digits": True},
}


def _errors(found: Spectrum, ridges: Tensor, x: Tensor, y: Tensor, means: tuple[Tensor, Tensor] | None) -> list[float]:
    """Mean squared error on other samples, summed over targets, of ridge regression at every ridge."""
    if means is not None:
        x, y = x - means[0], y - means[1]
    return [float((x @ ridge_readout(found, float(d)).T - y).square().sum(1).mean()) for d in ridges]


def gaussian(seed: int, n: int, k: int, ridges: Tensor) -> tuple[list[float], list[float]]:
    """Test and training error at every ridge."""
    data = GaussianRFDataModule(noise_var=NOISE, n_modes=MODES, n=n, k=k, seed=seed, n_test=500)
    data.setup()
    h, y = (each.double() for each in data.train_set.tensors)
    others = [torch.cat(each).double() for each in zip(data.val_set.tensors, data.test_set.tensors)]
    found = spectrum(h, y[:, None], centred=False)
    return _errors(found, ridges, others[0], others[1][:, None], None), sweep(found, ridges).train.tolist()


class _Digits:
    """Random ReLU features of the digits in an order of the seed's; the last 597 are held out."""

    def __init__(self, seed: int) -> None:
        digits, draws = load_digits(), generator(seed, "overparameterization", "digits")
        order = torch.randperm(len(digits.target), generator=draws)
        x = torch.tensor(digits.data, dtype=torch.float64)[order] / 16
        self.y = F.one_hot(torch.tensor(digits.target)[order], 10).double()
        weight = torch.randn(64, 2000, generator=draws, dtype=torch.float64) / 8
        self.h = (x @ weight + 0.1 * torch.randn(2000, generator=draws, dtype=torch.float64)).relu()

    def seen(self, n: int, k: int) -> Spectrum:
        return spectrum(self.h[:n, :k] / k**0.5, self.y[:n])

    def held_out(self, found: Spectrum, ridges: Tensor) -> list[float]:
        n, k = found.samples, found.features
        means = self.h[:n, :k].mean(0) / k**0.5, self.y[:n].mean(0)
        return _errors(found, ridges, self.h[-597:, :k] / k**0.5, self.y[-597:], means)

    def best(self, n: int, k: int) -> float:
        found = self.seen(n, k)
        return min(self.held_out(found, default_ridges(found)[::2]))


def run(seed: int, n: int = 0, k: int = 0, digits: bool = False) -> Metrics:
    """Draw and solve once.

    Returns:
        for one n and k ``test`` and ``train``; for a sweep of widths ``best K`` and ``tiny K``, test errors at the best
        ridge and at `TINY`; for digits ``off``, by how much cross-validation is off at most with 200 features,
        ``chosen`` and ``possible``, held-out errors with 2000 at the ridge that it chooses and at the best, and
        ``helped N`` and ``other N``, with twice of what the monitor says would help more and twice of the other.
    """
    if digits:
        return _of_digits(_Digits(seed))
    if k:
        (test,), (train,) = gaussian(seed, n, k, RIDGES.new_tensor([RIDGE]))
        return {"test": test, "train": train}
    found: Metrics = {}
    for width in WIDTHS:
        tests, _ = gaussian(seed, n, width, RIDGES)
        found |= {f"best {width}": min(tests), f"tiny {width}": tests[0]}
    return found


def _of_digits(data: _Digits) -> Metrics:
    few, many = data.seen(800, 200), data.seen(800, 2000)
    targets = few.targets.shape[1]
    foretold, held = (targets * sweep(few, DIGITS).test).tolist(), data.held_out(few, DIGITS)
    swept, possible = sweep(many, DIGITS), data.held_out(many, DIGITS)
    values = {
        "off": max(abs(a / b - 1) for a, b in zip(foretold, held)),
        "chosen": possible[best_ridge(many, swept, 2000)],
        "possible": min(possible),
    }
    for n, k in ((600, 60), (150, 600)):
        task = task_of(data.seen(n, k), k)
        limit = limit_of(*(task.best(*times).error for times in ((n, k), (n, 2 * k), (2 * n, k))))
        wider, more = data.best(n, 2 * k), data.best(2 * n, k)
        said = {WIDTH: (wider, more), DATA: (more, wider)}.get(limit, (max(wider, more), min(wider, more)))
        values |= {f"helped {n}": said[0], f"other {n}": said[1]}
    return values


def check(results: Results) -> list[Finding]:
    """Errors by their mean over draws; what the monitor says of digits in the mean too."""

    def of(arm: str, metric: str) -> list[float]:
        return [each[metric] for each in results[arm]]

    i = torch.arange(1, MODES + 1, dtype=torch.float64)
    findings = []
    for n, k in CASES:
        arm, risk = f"n {n}, k {k}", rf_risk(i**-1.5, i**-0.75, n, k, RIDGE, NOISE)
        for name, theory in (("test", float(risk.test)), ("train", float(risk.train))):
            seen = of(arm, name)
            words, allowed = (
                ("2 standard errors", 2 * stdev(seen) / len(seen) ** 0.5) if name == "test" else ("5 %", 0.05 * theory)
            )
            findings.append(
                Finding(
                    f"{arm}: the mean {name} error is within {words} of the theory's",
                    f"{name} error; without: theory",
                    seen,
                    [theory] * len(seen),
                    allowed - abs(mean(seen) - theory),
                )
            )
    best, tiny = ([mean(of("widths", f"{name} {k}")) for k in WIDTHS] for name in ("best", "tiny"))
    findings += [
        Finding(
            "64 samples, best ridge: the mean test error falls with every doubling of the width from 16 to 512",
            "test error; with: 512 features, without: 16",
            of("widths", "best 512"),
            of("widths", "best 16"),
            min(wide - wider for wide, wider in pairwise(best)),
        ),
        Finding(
            f"64 samples, ridge {TINY:g}: it peaks where features are as many as samples, above twice what 16 have",
            "test error; with: 64 features, without: 16",
            of("widths", "tiny 64"),
            of("widths", "tiny 16"),
            tiny[WIDTHS.index(64)] - 2 * tiny[0],
        ),
        Finding(
            "Digits, 800 samples, 200 features: cross-validation is within 8 % of held-out error at every ridge",
            "largest relative difference; without: the bound",
            of("digits", "off"),
            [0.08] * len(of("digits", "off")),
            0.08 - mean(of("digits", "off")),
        ),
        Finding(
            "Digits, 800 samples, 2000 features: the ridge that it chooses is within 10 % of the best, in every draw",
            "held-out squared error; without: at the best ridge",
            of("digits", "chosen"),
            of("digits", "possible"),
            min(1.1 - a / b for a, b in zip(of("digits", "chosen"), of("digits", "possible"))),
        ),
    ]
    for n, k in ((600, 60), (150, 600)):
        with_, without = of("digits", f"helped {n}"), of("digits", f"other {n}")
        findings.append(
            Finding(
                f"Digits, {n} samples, {k} features: twice of what is said to help more helps more, in every draw",
                "held-out squared error; with: twice of what was said, without: twice of the other",
                with_,
                without,
                min(b - a for a, b in zip(with_, without)),
            )
        )
    return findings
