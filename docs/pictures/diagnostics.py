"""Pictures of ``callbacks/diagnostics``."""

from __future__ import annotations

import torch

from lightning_recipes.core.linear_dynamics import (
    expected_test_error,
    expected_train_error,
    marchenko_pastur,
    optimal_stopping_time,
)
from lightning_recipes.core.ridge_theory import rf_risk
from pictures import BLUE, FAINT, INK, ORANGE, VIOLET, draws
from pictures.small_nets import grokking

MODES = torch.arange(1, 1001, dtype=torch.float64)
RIDGES = torch.logspace(-3, 1.5, 24, dtype=torch.float64)


def features(n: int, k: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Training and test error of k random features and n samples at :data:`RIDGES`."""
    risk = rf_risk(MODES**-1.5, MODES**-0.75, n, k, RIDGES, 0.5)
    return risk.train, risk.test


@draws("GeneralizationMonitor")
def generalization_monitor(figure):
    """What the training set alone forecasts: training error falls for ever (grey), test error turns at the marked time,
    where to stop."""
    axes = figure.subplots()
    times = torch.logspace(-2, 3, 140, dtype=torch.float64)
    law = marchenko_pastur(1.0)
    test = expected_test_error(times, law, 5.0)
    axes.plot(times, test, color=BLUE)
    axes.plot(times, expected_train_error(times, law, 1.0, 5.0), color=FAINT)
    stop = optimal_stopping_time(law, 5.0)
    best = float(expected_test_error(stop, law, 5.0))
    axes.plot([stop, stop], [0, best], color=ORANGE, linestyle=":")
    axes.plot(stop, best, marker="o", color=ORANGE)
    axes.text(stop * 1.3, 0.25, "stop here", color=ORANGE)
    axes.text(60, float(expected_test_error(60.0, law, 5.0)) + 0.35, "test", color=BLUE, ha="right")
    axes.text(0.02, 6.25, "error", color=INK)
    axes.text(100, 0.25, "training", color=INK)
    axes.set(xscale="log", xlabel="time →", xticks=[], yticks=[], ylim=(0, 7))
    axes.minorticks_off()


@draws("GrokkingMonitor")
def grokking_monitor(figure):
    """A two-layer network on XOR clusters: all training labels are fitted after one step, flipped ones too; test
    accuracy comes later, as the network ceases to be linear."""
    found = grokking(1e-6)
    steps = range(1, len(found["train"]) + 1)
    axes = figure.subplots()
    axes.plot(steps, found["train"], color=FAINT, label="training")
    axes.plot(steps, found["test"], color=BLUE, marker="o", markersize=2.5, label="test")
    axes.plot(steps, found["linear"], color=ORANGE, linestyle="--", label="linear share")
    axes.set(xlabel="optimizer step", ylim=(-0.03, 1.05), yticks=[0, 0.5, 1], xticks=[1, 5, 11])
    axes.legend(loc="center right")


@draws("SmallInit")
def small_init(figure):
    """Test accuracy of the same run from first weights of three sizes: from large ones the features are not learnt in
    time."""
    axes = figure.subplots()
    for omega, tone, name in ((1e-6, BLUE, "tiny"), (0.003, VIOLET, "larger"), (0.1, ORANGE, "large")):
        found = grokking(omega)["test"]
        axes.plot(range(1, len(found) + 1), found, color=tone, marker="o", markersize=2.5, label=name)
    axes.set(xlabel="optimizer step", title="test accuracy", ylim=(0.4, 1.03), yticks=[0.5, 1], xticks=[1, 5, 11])
    axes.legend(loc="center right", title="first weights", title_fontsize=7)


@draws("MoreIsBetterMonitor")
def more_is_better_monitor(figure):
    """Test error in theory against the width: at the best ridge more features never harm, and more data move the curve;
    at a tiny ridge (grey) it peaks where there are as many features as samples."""
    axes = figure.subplots()
    widths = [8, 16, 32, 48, 64, 80, 128, 256, 512, 1024]
    axes.plot(widths, [float(features(64, k)[1][0]) for k in widths], color=FAINT, label="64 samples, ridge ~ 0")
    for n, tone in ((64, ORANGE), (256, BLUE)):
        axes.plot(widths, [float(features(n, k)[1].min()) for k in widths], color=tone, label=f"{n}, best ridge")
    axes.set(xscale="log", xlabel="features", ylim=(0.6, 4), yticks=[1, 2, 3], xticks=[8, 64, 512])
    axes.set_xticklabels(["8", "64", "512"])
    axes.minorticks_off()
    axes.set_title("test error", loc="left")
    axes.legend(loc="upper right")


@draws("RidgeRefit")
def ridge_refit(figure):
    """Errors of the last layer as ridge regression has it, against the ridge: the one that is taken is where the test
    error is lowest, which the training set tells by itself."""
    axes = figure.subplots()
    train, test = features(64, 96)
    axes.plot(RIDGES, test, color=BLUE)
    axes.plot(RIDGES, train, color=FAINT)
    best = int(test.argmin())
    axes.plot(RIDGES[best], test[best], marker="o", color=ORANGE)
    axes.text(RIDGES[best], float(test[best]) + 0.35, "refit", color=ORANGE, ha="center")
    axes.text(RIDGES[0], float(test[0]) - 0.6, "test", color=BLUE)
    axes.text(RIDGES[4], 0.1, "training", color=INK)
    axes.set(xscale="log", xlabel="ridge →", xticks=[], yticks=[], ylim=(0, None))
    axes.minorticks_off()
