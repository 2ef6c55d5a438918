"""Pictures of ``callbacks/adapters``."""

from __future__ import annotations

import numpy as np
import torch

from lightning_recipes.callbacks.adapters.glad import ascent, mixed
from lightning_recipes.callbacks.adapters.pego import orthogonality, overlaps
from lightning_recipes.callbacks.adapters.sara import quantiles, small
from lightning_recipes.callbacks.adapters.subgm import decay_for, subgradient, subgradient_step
from lightning_recipes.callbacks.adapters.svfit import decompose, merged, rank_for
from lightning_recipes.datamodules.matrix_sensing import low_rank
from lightning_recipes.modules.balanced_attention import fused
from lightning_recipes.modules.low_rank_recovery import measure
from pictures import BLUE, FAINT, INK, ORANGE, RED, VIOLET, arrow, bare, digit, draws, image, tiles, whole
from pictures.small_nets import valley


@draws("GLAD")
def glad(figure):
    """One step over a loss in two weights. g is the gradient here, g′ that at the worst point nearby (dotted); the step
    goes along their mixture."""
    axes = whole(figure)
    x, y = np.meshgrid(np.linspace(-2.3, 2.0, 90), np.linspace(-1.25, 1.35, 70))
    axes.contour(x, y, valley(x, y)[0], levels=np.geomspace(0.03, 9, 13), colors=FAINT, linewidths=0.7)
    here = np.array([-1.05, 0.6])
    g = torch.tensor(valley(*here)[1])
    there = here + ascent([g], 0.45)[0].numpy()
    sharp = torch.tensor(valley(*there)[1])
    axes.plot(*zip(here, there), color=INK, linestyle=":", linewidth=1.3)
    axes.plot(*there, marker="o", color=INK, markersize=3.5)
    for gradient, tone, name, side in (
        (g, ORANGE, "− g", (0.18, 0.0)),
        (sharp, VIOLET, "− g′", (0.22, 0.0)),
        (mixed([g], [sharp], 0.5)[0], BLUE, "step", (0.28, 0.0)),
    ):
        end = here - 0.6 * gradient.numpy()
        arrow(axes, here, end, tone, linewidth=2.2 if tone == BLUE else 1.4)
        axes.text(*(end + np.array(side)), name, color=tone, ha="center", va="center", fontweight="bold")
    axes.plot(*here, marker="o", color=INK, markersize=5)
    axes.text(here[0] + 0.1, here[1] + 0.08, "θ")
    axes.text(there[0] + 0.1, there[1] + 0.02, "θ + e")


@draws("InsertAttention")
def insert_attention(figure):
    """A feature map, the gate that a block makes of its rows and columns and of its channel, and their product."""
    map_ = torch.tensor(digit(8), dtype=torch.float32)
    rows, columns = map_.mean(1), map_.mean(0)
    a_h = torch.sigmoid(6 * (rows - rows.mean()) / rows.std()).view(1, 1, -1, 1)
    a_w = torch.sigmoid(3 * (columns - columns.mean()) / columns.std()).view(1, 1, 1, -1)
    gate = fused(a_h, a_w, torch.full((1, 1, 1, 1), 0.35), torch.tensor(0.5))[0, 0]
    one, two, three = figure.subplots(1, 3)
    image(one, map_, "map x", gap=0.08)
    image(two, gate, "gate G", BLUE, gap=0.08)
    image(three, map_ * gate, "x · G", INK, gap=0.08)


@draws("PEGO")
def pego(figure):
    """How much the pre-trained weight W and four LoRA updates overlap, before and after a little training on the
    orthogonal regulariser alone."""
    draws_ = torch.Generator().manual_seed(0)
    u, s, v = torch.linalg.svd(torch.randn(24, 24, generator=draws_))
    w = u @ torch.diag(s * (torch.arange(24) < 12)) @ v  # of rank 12: there is room beside it
    a = [torch.randn(3, 24, generator=draws_).requires_grad_() for _ in range(4)]
    b = [torch.randn(24, 3, generator=draws_).requires_grad_() for _ in range(4)]

    def table() -> np.ndarray:
        found = np.full((5, 5), np.nan)
        for i in range(4):
            found[i + 1, 0] = overlaps(w, a[i : i + 1], b[i : i + 1])[0]
            for j in range(i):
                found[i + 1, j + 1] = overlaps(w, [a[i], a[j]], [b[i], b[j]])[1]
        return found

    before = table()
    optimizer = torch.optim.Adam([*a, *b], 0.02)
    for _ in range(150):
        preserve, diversify = orthogonality(w, a, b)
        optimizer.zero_grad()
        (preserve + diversify).backward()
        optimizer.step()
        with torch.no_grad():
            for factor in (*a, *b):
                factor.mul_(24 * 3 / factor.square().sum().clamp_min(1e-12).sqrt() / 24**0.5)
    for axes, values, title in zip(figure.subplots(1, 2), (before, table()), ("plain LoRAs", "with PEGO")):
        bare(axes, title).set_aspect("equal")
        tiles(axes, values[1:, :4] / np.nanmax(before), VIOLET)
        names = ["W", "D₁", "D₂", "D₃", "D₄"]
        for i in range(4):
            axes.text(-0.15, i + 0.5, names[i + 1], ha="right", va="center", fontsize=7)
            axes.text(i + 0.5, 4.15, names[i], ha="center", va="top", fontsize=7)


@draws("SaRA")
def sara(figure):
    """Entries of a pre-trained weight: those near 0 train (blue), all others stay as they are, bit for bit."""
    weight = torch.randn(11, 19, generator=torch.Generator().manual_seed(1))
    free = small(weight, quantiles([weight], [0.2])[0]).numpy()
    axes = bare(figure.subplots())
    axes.set_aspect("equal")
    size = weight.abs().numpy() / 2.6
    tiles(axes, np.where(free, 1.0, 0.6 * size), tones=np.where(free, BLUE, FAINT))
    axes.set_xlabel("a fifth of the entries trains")


@draws("SVFit")
def svfit(figure):
    """Left: singular values of a weight, of which the largest train (from grey to blue). Right: what moves of the
    weight is a few of its own directions."""
    weight = torch.randn(14, 20, generator=torch.Generator().manual_seed(2)) @ torch.diag(0.86 ** torch.arange(20.0))
    u, s, vt = decompose(weight)
    rank = rank_for(s, 0.8)
    delta = 0.35 * s[:rank] * torch.sin(2.4 * torch.arange(rank) + 0.6)
    values, change = figure.subplots(1, 2, width_ratios=(1.2, 1))
    values.bar(range(len(s)), s, color=FAINT, width=0.75, alpha=0.55)
    values.bar(range(rank), s[:rank] + delta, color=BLUE, width=0.35)
    values.set(title=f"σ: {rank} of {len(s)} train", xticks=[], yticks=[])
    moved = merged(weight, u[:, :rank], delta, vt[:rank]) - weight
    bare(change, "change of W").set_aspect("equal")
    scaled = (moved / moved.abs().max()).numpy()
    tiles(change, np.abs(scaled), tones=np.where(scaled > 0, BLUE, ORANGE))


@draws("SubGM")
def subgm(figure):
    """Distance from a matrix of rank 2 over the steps, with 16 columns and a tenth of the measurements grossly wrong:
    from a tiny start, from a large one, and by squared errors."""
    draws_ = torch.Generator().manual_seed(0)
    d, m = 16, 220
    truth = low_rank(d, 2, draws_)
    a = torch.randn(m, d, d, generator=draws_)
    y = measure(a, truth) + 10 * torch.randn(m, generator=draws_) * (torch.rand(m, generator=draws_) < 0.1)
    start = torch.randn(d, d, generator=draws_) / d**0.5
    axes = figure.subplots()
    for scale, tone in ((1e-3, BLUE), (1.0, ORANGE)):
        u, eta, curve = scale * start, 0.12, []
        rho = decay_for(scale, eta)
        for step in range(401):
            x = u @ u.T
            curve.append(float((x - truth).norm()))
            u = subgradient_step(u, subgradient(a, y, x), eta * rho**step)
        axes.plot(range(0, 401, 10), curve[::10], color=tone)
    u, curve = 1e-3 * start, []
    for _ in range(401):
        x = u @ u.T
        curve.append(float((x - truth).norm()))
        q = (a.flatten(1).T @ (measure(a, x) - y)).view(d, d) / m
        u = u - 0.03 * (q + q.T) @ u
    axes.plot(range(0, 401, 10), curve[::10], color=RED)
    axes.set(
        yscale="log", xlabel="steps", title="‖UUᵀ − X*‖", yticks=[0.01, 0.1, 1], ylim=(0.005, 9), xticks=[0, 200, 400]
    )
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.text(400, curve[-1] * 1.35, "squared errors", color=RED, ha="right")
    axes.text(400, 0.26, "from a large start", color=ORANGE, ha="right")
    axes.text(0, 0.009, "SubGM, from a tiny start", color=BLUE)
