"""Pictures of ``callbacks/regularization``."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from lightning_recipes.callbacks.regularization.gradient_noise import deviation
from lightning_recipes.callbacks.regularization.guidance import layer_pairs
from lightning_recipes.callbacks.regularization.hypothesis_weight import reach
from lightning_recipes.callbacks.regularization.langevin_mixture import noise_deviation
from lightning_recipes.callbacks.regularization.normalized_gd import normalized_logistic_gd
from lightning_recipes.callbacks.regularization.ps_kd import growth, refined
from lightning_recipes.modules.drop_block import kept, rates, seed_rate
from pictures import BLUE, FAINT, INK, ORANGE, bare, box, draws, scheme, tiles, whole


@draws("GradientNoise")
def gradient_noise(figure):
    """The noise on one entry of the gradient over 600 steps, and its standard deviation."""
    axes = figure.subplots()
    steps = np.arange(600)
    sigma = np.array([deviation(int(step), 0.3, 0.55) for step in steps])
    noise = torch.randn(600, generator=torch.Generator().manual_seed(0)).numpy() * sigma
    axes.scatter(steps, noise, s=3, color=BLUE, linewidths=0, alpha=0.75)
    for sign in (1, -1):
        axes.plot(steps, sign * sigma, color=ORANGE)
    axes.text(330, 0.36, "± σ", color=ORANGE)
    axes.set(xlabel="optimizer step", ylim=(-0.85, 0.85), yticks=[0], xticks=[0, 300, 600])


@draws("Guidance")
def guidance(figure):
    """Which layer of the guide (orange, frozen) each layer of the network (blue) is pulled towards."""
    guides, targets = 5, 9
    axes = scheme(figure, 3.3, 2.0)
    at_guide = np.linspace(0.5, 2.95, guides)
    at_target = np.linspace(0.35, 3.05, targets)
    pairs = layer_pairs(guides, targets)
    for target, guide in pairs.items():
        axes.plot([at_guide[guide], at_target[target]], [1.42, 0.62], color=INK, linewidth=1.0, linestyle=":")
    for i, x in enumerate(at_guide):
        box(axes, x, 1.55, 0.34, 0.26, "", ORANGE, 0.3 if i in pairs.values() else 0.1)
    for i, x in enumerate(at_target):
        box(axes, x, 0.5, 0.22, 0.26, "", BLUE, 0.45 if i in pairs else 0.1)
    axes.text(1.72, 1.8, "guide, of any architecture", ha="center", fontsize=7)
    axes.text(1.72, 0.14, "network that trains: + α Σ (1 − CKA)", ha="center", fontsize=7)


@draws("NormalizedGD")
def normalized_gd(figure):
    """Over the loss of a logistic regression with unbalanced classes: forty steps of plain gradient descent, which get
    shorter and shorter, and the normalised ones until every sample is right (star)."""
    draws_ = torch.Generator().manual_seed(1)
    few, many = 4, 60
    a = torch.cat(
        [
            torch.tensor([0.55, 0.9]) + 0.12 * torch.randn(few, 2, generator=draws_),
            torch.tensor([-0.35, 1.0]) + 0.22 * torch.randn(many, 2, generator=draws_),
        ]
    )
    y = torch.cat([torch.ones(few), -torch.ones(many)])
    paths = {}
    for normalized in (True, False):
        found = [normalized_logistic_gd(a, y, 1.0, k, normalized)[0] for k in range(40)]
        paths[normalized] = torch.stack(found).numpy()
    end = paths[True][-1]
    axes = whole(figure)
    low = np.minimum(paths[True].min(0), paths[False].min(0)) - np.array([1.2, 0.7])
    high = np.maximum(paths[True].max(0), paths[False].max(0)) + np.array([2.0, 1.0])
    x1, x2 = np.meshgrid(np.linspace(low[0], high[0], 60), np.linspace(low[1], high[1], 50))
    theta = torch.tensor(np.stack([x1.ravel(), x2.ravel()], 1), dtype=torch.float32)
    loss = F.softplus(-(theta @ (a * y[:, None]).T)).mean(1).view(x1.shape).numpy()
    axes.contour(x1, x2, loss, levels=np.geomspace(loss.min() * 1.15, loss.max(), 11), colors=FAINT, linewidths=0.7)
    for normalized, tone, name in ((False, ORANGE, "plain"), (True, BLUE, "normalised")):
        axes.plot(*paths[normalized].T, color=tone, marker="o", markersize=2.6, linewidth=1.2, label=name)
    axes.plot(0, 0, marker="o", color=INK, markersize=4)
    axes.plot(*end, marker="*", color=BLUE, markersize=9)
    axes.legend(loc="upper right")


@draws("PSKD")
def ps_kd(figure):
    """The target of one digit (label 3) over the epochs: more and more of the network's own prediction of an epoch
    before, in which it is not sure."""
    y = F.one_hot(torch.tensor(3), 10).float()
    past = torch.tensor([0.01, 0.02, 0.08, 0.42, 0.0, 0.18, 0.0, 0.01, 0.24, 0.04])
    epochs = 6
    rows = torch.stack([refined(y, past if e else y, growth(e, epochs, 0.8)) for e in range(epochs)])
    axes = bare(figure.subplots())
    tiles(axes, (rows**0.6).numpy(), BLUE)
    axes.set_xticks(np.arange(10) + 0.5, range(10))
    axes.set_yticks(np.arange(epochs) + 0.5, [f"epoch {e}" for e in range(epochs)])
    axes.tick_params(length=0)
    axes.set_xlabel("class")


@draws("HypothesisWeightMonitor")
def hypothesis_weight_monitor(figure):
    """How far from a solution predictions stay the same to within ε: wide in a flat minimum, narrow in a sharp one. The
    more of the prior lies within, the simpler the solution."""
    axes = figure.subplots()
    t, eps = np.linspace(-3.4, 3.4, 300), 0.35
    for middle, sharp, tone, name in ((-1.5, 0.4, BLUE, "simple"), (2.2, 9.0, ORANGE, "complex")):
        divergence = lambda r, sharp=sharp: sharp * r * r  # noqa: E731
        near = np.abs(t - middle) < 1.75 / (1 + 0.5 * (sharp > 1))
        axes.plot(t[near], divergence(t[near] - middle), color=tone)
        radius = reach(divergence, eps, 0.1)
        axes.plot([middle - radius, middle + radius], [eps, eps], color=tone, linewidth=4, solid_capstyle="butt")
        axes.text(middle, -0.22, name, color=tone, ha="center")
    axes.axhline(eps, color=FAINT, linestyle=":")
    axes.text(0.6, eps + 0.05, "ε", color=INK)
    axes.set(ylim=(-0.3, 1.3), xticks=[], yticks=[], xlabel="weights", ylabel="KL")


@draws("LangevinMixture")
def langevin_mixture(figure):
    """Steps with noise do not stop at the minimum: they wander over everything that fits the data about as well, and
    what they come by (blue) predicts together. Without noise there is one network (orange)."""
    axes = figure.subplots()
    draws_ = torch.Generator().manual_seed(3)
    curvature, lr, start = torch.tensor([0.25, 1.6]), 0.25, torch.tensor([-2.6, 1.4])
    weights, plain = [start], [start]
    for _ in range(700):
        noise = noise_deviation(lr, 1.0, 6) * torch.randn(2, generator=draws_)
        weights.append(weights[-1] - lr * curvature * weights[-1] + noise)
        plain.append(plain[-1] - lr * curvature * plain[-1])
    x, y = np.meshgrid(np.linspace(-3.4, 3.4, 80), np.linspace(-1.6, 1.7, 60))
    axes.contour(x, y, 0.125 * x**2 + 0.8 * y**2, levels=[0.1, 0.35, 0.8, 1.5], colors=FAINT, linewidths=0.7)
    axes.plot(*torch.stack(weights[:60]).T.numpy(), color=BLUE, linewidth=0.5, alpha=0.6)
    axes.scatter(*torch.stack(weights[60::16]).T.numpy(), s=9, color=BLUE, linewidths=0)
    axes.plot(*torch.stack(plain[:60]).T.numpy(), color=ORANGE, linewidth=1.2)
    axes.plot(0, 0, marker="o", color=ORANGE)
    bare(axes)


@draws("DropBlock")
def drop_block(figure):
    """Feature maps of three depths: squares are left out (orange), more of them the deeper the map."""
    draws_ = torch.Generator().manual_seed(3)
    for axes, p in zip(figure.subplots(1, 3), rates((0.05, 0.25), 3)):
        seeds = (torch.rand(1, 1, 12, 12, generator=draws_) < seed_rate(p, 3, 12, 12)).float()
        keep = kept(seeds, 3)[0, 0].numpy()
        map_ = 0.25 + 0.5 * torch.rand(12, 12, generator=draws_).numpy()
        bare(axes, f"p = {p:.0%}").set_aspect("equal")
        tiles(axes, np.where(keep > 0, map_, 0.95), tones=np.where(keep > 0, BLUE, ORANGE))
    figure.axes[1].set_xlabel("depth →")
