"""Pictures of the modules that papers bring."""

from __future__ import annotations

import numpy as np
import torch

from lightning_recipes.callbacks.adapters.subgm import decay_for, subgradient, subgradient_step
from lightning_recipes.core.linear_dynamics import mode_weights
from lightning_recipes.core.ridge_theory import ridge_readout
from lightning_recipes.core.spectrum import spectrum
from lightning_recipes.datamodules.matrix_sensing import low_rank
from lightning_recipes.modules.dual_input_output import warp
from lightning_recipes.modules.low_rank_recovery import measure
from lightning_recipes.modules.mixer import squeezed
from lightning_recipes.modules.two_layer_relu import even_part, odd_part
from pictures import BLUE, FAINT, INK, ORANGE, RED, VIOLET, arrow, bare, box, digit, draws, scheme, tiles


@draws("AdaptiveSmoothingModule")
def adaptive_smoothing_module(figure):
    """The weight α of the robust network that the mixing network gives each input: low for clean ones, high for
    attacked ones, squeezed into a range."""
    draws_ = torch.Generator().manual_seed(0)
    axes = figure.subplots()
    for gamma, tone, name in ((-1.6, BLUE, "clean"), (1.9, RED, "attacked")):
        alpha = squeezed((gamma + 0.9 * torch.randn(4000, generator=draws_)).sigmoid(), 0.84, 0.99)
        axes.hist(alpha, np.linspace(0.83, 1.0, 40), color=tone, alpha=0.5, density=True, label=name)
    axes.set(xlabel="α of an input", yticks=[], xticks=[0.84, 0.9, 0.99])
    axes.spines["left"].set_visible(False)
    axes.legend(loc="upper center")


@draws("BalancedCNN")
def balanced_cnn(figure):
    """The twelve layers: height is the size of the map, width the channels. Every block has attention (orange),
    mixed by a scalar of its own."""
    axes = scheme(figure, 3.3, 2.0)
    x = 0.12
    for height, width, blocks in ((1.25, 0.10, 1), (1.25, 0.11, 3), (0.85, 0.16, 3), (0.55, 0.24, 3), (0.33, 0.36, 2)):
        for _ in range(blocks):
            stem = blocks == 1
            box(axes, x + width / 2, 1.0, width, height, "", FAINT if stem else BLUE, 0.3)
            if not stem:
                axes.plot(x + width / 2, 1.0 + height / 2 + 0.1, marker="o", markersize=3, color=ORANGE)
            x += width + 0.055
        x += 0.03
    axes.text(0.12, 0.18, "stem", fontsize=7)
    axes.text(3.2, 0.18, "→ classes", fontsize=7, ha="right")


@draws("DualInputOutput")
def dual_input_output(figure):
    """One branch is trained on digits as they are, one on turned and moved ones; one head then reads both."""
    axes = scheme(figure)
    original = digit(5, 1)
    many = torch.tensor(original, dtype=torch.float32).expand(1, 1, 8, 8)
    turned = warp(many, torch.tensor([24.0]), torch.tensor([1.0]), torch.tensor([[0.08, -0.04]]), torch.ones(1))[0, 0]
    for y, values, name, tone in ((1.45, original, "branch A", BLUE), (0.55, turned.numpy(), "branch B", ORANGE)):
        inset = bare(axes.inset_axes((0.12, y - 0.36, 0.72, 0.72), transform=axes.transData))
        tiles(inset, values, tone, gap=0.0, floor=0.05)
        arrow(axes, (0.9, y), (1.2, y))
        box(axes, 1.6, y, 0.76, 0.36, name, tone)
        arrow(axes, (1.98, y), (2.42, 1.0 + 0.12 * np.sign(y - 1)))
    box(axes, 2.75, 1.0, 0.6, 0.5, "head", INK)


@draws("LinearStudent")
def linear_student(figure):
    """Weights of the student along eight directions, from their first values to the teacher's (dots) and beyond, to
    what the noise says: each at a speed of its own, the slowest most wrong."""
    draws_ = torch.Generator().manual_seed(3)
    values = torch.logspace(0.7, -2.2, 8, dtype=torch.float64)
    start, teacher, noise = (s * torch.randn(8, generator=draws_, dtype=torch.float64) for s in (0.2, 1.0, 0.25))
    times = torch.logspace(-2, 3.2, 120, dtype=torch.float64)
    curves = mode_weights(times, values, start, teacher, noise)
    axes = figure.subplots()
    tones = [BLUE, BLUE, BLUE, VIOLET, VIOLET, ORANGE, ORANGE, ORANGE]
    for i, tone in enumerate(tones):
        axes.plot(times, curves[:, i], color=tone, linewidth=1.2)
        axes.plot(3000, teacher[i], marker="o", color=tone, markersize=3.5)
    axes.set(xscale="log", xlabel="time →", xticks=[], yticks=[])
    axes.minorticks_off()


@draws("LowRankRecovery")
def low_rank_recovery(figure):
    """The product of factors with 16 columns on its way to a matrix of rank 2, of which a tenth of the measurements are
    grossly wrong."""
    draws_ = torch.Generator().manual_seed(0)
    d, m = 16, 220
    truth = low_rank(d, 2, draws_)
    a = torch.randn(m, d, d, generator=draws_)
    y = measure(a, truth) + 10 * torch.randn(m, generator=draws_) * (torch.rand(m, generator=draws_) < 0.1)
    u, eta = 1e-3 * torch.randn(d, d, generator=draws_) / d**0.5, 0.25
    rho, shown = decay_for(1e-3, eta), {}
    for step in range(181):
        if step in (31, 180):
            shown[f"step {step}"] = u @ u.T
        u = subgradient_step(u, subgradient(a, y, u @ u.T), eta * rho**step)
    for axes, (name, x) in zip(figure.subplots(1, 3), {**shown, "truth": truth}.items()):
        bare(axes, name).set_aspect("equal")
        scaled = (x / truth.abs().max()).numpy()
        tiles(axes, np.abs(scaled), gap=0.06, tones=np.where(scaled > 0, BLUE, ORANGE))


@draws("TwoLayerReLU")
def two_layer_relu(figure):
    """What a network on XOR clusters has learnt, cut into its odd part, which is linear and tells nothing, and its even
    part, which tells the clusters apart (blue: one class, orange: the other)."""
    draws_ = torch.Generator().manual_seed(5)
    corners = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    centre = torch.arange(200) % 4
    x, y = 2 * corners[centre] + 0.5 * torch.randn(200, 2, generator=draws_), torch.where(centre < 2, 1.0, -1.0)
    a = torch.tensor([1.0, -1.0]).repeat(32) / 8
    w = 0.05 * torch.randn(64, 2, generator=draws_)
    for _ in range(120):
        pull = torch.sigmoid(-y * ((x @ w.T).relu() @ a)) * y
        w = w + 0.5 / 200 * a[:, None] * ((((x @ w.T) > 0) * pull[:, None]).T @ x)
    rows, columns = np.meshgrid(np.linspace(3, -3, 22), np.linspace(-3.4, 3.4, 25), indexing="ij")
    grid = torch.tensor(np.stack([columns.ravel(), rows.ravel()], 1), dtype=torch.float32)
    most = float(even_part(w, a, grid).abs().max())
    for axes, part, name in zip(figure.subplots(1, 2), (odd_part, even_part), ("odd part", "even part")):
        values = (part(w, a, grid) / most).view(rows.shape).numpy()
        bare(axes, name).set_aspect("equal")
        tiles(axes, np.abs(values), gap=0.0, tones=np.where(values > 0, BLUE, ORANGE), floor=0.02)
        places = (x[:80] + torch.tensor([3.4, -3.0])) * torch.tensor([25 / 6.8, -22 / 6.0])
        for label, tone in ((1, BLUE), (-1, ORANGE)):
            axes.scatter(*places[y[:80] == label].T, s=4, color=tone, linewidths=0)


@draws("RandomFeatureRegressor")
def random_feature_regressor(figure):
    """Ridge regression on ReLU features that are drawn and never trained, solved at once: few features bend little."""
    axes = figure.subplots()
    draws_ = torch.Generator().manual_seed(2)
    x = torch.rand(24, 1, generator=draws_) * 2 - 1
    y = torch.sin(4 * x) + 0.15 * torch.randn(24, 1, generator=draws_)
    at = torch.linspace(-1, 1, 120)[:, None]
    for k, tone in ((4, ORANGE), (400, BLUE)):
        w, b = torch.randn(k, 1, generator=draws_), torch.randn(k, generator=draws_)
        h, line = (torch.relu(each @ w.T + b) / k**0.5 for each in (x, at))
        readout = ridge_readout(spectrum(h, y, centred=False), 1e-3).float()
        axes.plot(at, line @ readout.T, color=tone, label=f"{k} features")
    axes.scatter(x, y, s=8, color=INK, linewidths=0)
    axes.set(xticks=[], yticks=[], ylim=(-2.2, 1.6))
    axes.legend(loc="lower right")
