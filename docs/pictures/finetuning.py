"""Pictures of ``callbacks/finetuning``."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.ticker import MaxNLocator
from torchvision.transforms import v2

from lightning_recipes.callbacks.finetuning.freezeout import freezing_times, rate
from lightning_recipes.callbacks.finetuning.progressive_unfreezing import awake, group_scales
from lightning_recipes.core.averaging import interpolate
from lightning_recipes.core.mixing import Mix, smooth
from lightning_recipes.core.mixing import draw as draw_mix
from lightning_recipes.modules.projection import reweighting
from pictures import BLUE, FAINT, INK, ORANGE, arrow, bare, box, digit, draws, image, scheme, tiles
from pictures.small_nets import digits, shifted, softmax_regression

LAYERS = ("head", "layer 4", "layer 3", "layer 2", "layer 1", "stem")


@draws("ProgressiveUnfreezing")
def progressive_unfreezing(figure):
    """Learning rate of every group of layers over the epochs: pale is frozen. The head trains first, and each deeper
    group wakes later, at a smaller rate."""
    epochs, times = 20, [0, 3, 6, 9, 12, 15]
    scales = group_scales(0.6, len(times))
    values = np.zeros((len(times), epochs))
    for epoch in range(epochs):
        for group in range(awake(times, epoch)):
            values[group, epoch] = scales[group]
    axes = bare(figure.subplots())
    tiles(axes, values, BLUE)
    axes.set_yticks(np.arange(len(times)) + 0.5, LAYERS)
    axes.tick_params(length=0)
    axes.set_xlabel("epoch →")


@draws("FreezeOut")
def freeze_out(figure):
    """Learning rate of every layer over the fit: those near the input are annealed first, and frozen (pale) when they
    reach 0."""
    times = freezing_times(len(LAYERS), 0.5, 3)[::-1]  # from the head down
    values = np.array([[rate(t / 24, end, scaled=False) for t in range(24)] for end in times])
    axes = bare(figure.subplots())
    tiles(axes, values, BLUE)
    axes.set_yticks(np.arange(len(LAYERS)) + 0.5, LAYERS)
    axes.tick_params(length=0)
    axes.set_xlabel("share of the fit →")


def _mixed(figure, transform, seed: int) -> None:
    """Two digits, their mixture, and its label."""
    pair = torch.tensor(np.stack([digit(3, 2), digit(0, 1)]), dtype=torch.float32)[:, None]
    mix: Mix = draw_mix(transform, pair, 2, torch.Generator().manual_seed(seed))
    labels = F.one_hot(torch.tensor([3, 0]), 10).float()
    result, label = mix.inputs(pair, pair.flip(0)), mix.targets(labels, labels.flip(0))
    grid = figure.subplots(2, 3, height_ratios=(2.2, 1))
    for column, (shown, target) in enumerate(zip((*pair, result[0]), (*labels, label[0]))):
        image(grid[0][column], shown[0].numpy(), ("a", "b", "trained on")[column])
        if column == 2 and mix.box is not None:
            x1, y1, x2, y2 = mix.box
            corners = ([x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1])
            grid[0][column].plot(*corners, color=ORANGE, linewidth=1.4, clip_on=False)
        axes = grid[1][column]
        axes.bar(range(10), target, color=[(ORANGE, FAINT)[c != 0] if c != 3 else BLUE for c in range(10)], width=0.75)
        axes.set(ylim=(0, 1), yticks=[], xticks=[0, 3, 9])
        axes.spines["left"].set_visible(False)


@draws("CutMix")
def cut_mix(figure):
    """A box of one digit is pasted into another, and the label (below) is shared out by area."""
    _mixed(figure, v2.CutMix(alpha=1.0, num_classes=10), 6)


@draws("Mixup")
def mixup(figure):
    """Two digits are averaged, and their labels (below) alike."""
    _mixed(figure, v2.MixUp(alpha=1.0, num_classes=10), 11)


@draws("WiSEFT")
def wise_ft(figure):
    """A small classifier of digits, pre-trained where they stand in two places and fine-tuned on one of them: accuracy
    there and elsewhere of every mean of the two ends' weights. It bulges above the straight line (dotted)."""
    x, y = digits()
    few = torch.cat([shifted(x[500:700]), x[500:700]])
    before = softmax_regression(few, y[500:700].repeat(2), 40)
    after = softmax_regression(x[:500], y[:500], 400, before)
    test, labels = x[1000:], y[1000:]
    curve = []
    for share in np.linspace(0, 1, 21):
        weight = interpolate(before, after, float(share))
        curve.append([float(((part @ weight.T).argmax(1) == labels).float().mean()) for part in (test, shifted(test))])
    home, elsewhere = np.array(curve).T
    axes = figure.subplots()
    axes.plot(home[[0, -1]], elsewhere[[0, -1]], color=FAINT, linestyle=":")
    axes.plot(home, elsewhere, color=BLUE, marker="o", markersize=2.5)
    for i, name, side in ((0, "pre-trained", "left"), (20, "fine-tuned", "right")):
        axes.plot(home[i], elsewhere[i], marker="o", color=ORANGE)
        axes.text(home[i] + 0.006 * (1 - i / 10), elsewhere[i], name, ha=side, va="center" if i else "bottom")
    axes.set(xlabel="accuracy at home", ylabel="elsewhere")
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.yaxis.set_major_locator(MaxNLocator(3))


@draws("BANG")
def bang(figure):
    """Left: labels are softened while it fine-tunes, so that neither end is over-confident. Right: it ends at the mean
    of the weights before and after."""
    labels, path = figure.subplots(1, 2)
    y = F.one_hot(torch.tensor([3]), 10).float()
    soft = smooth(0.8 * y + 0.2 * F.one_hot(torch.tensor([7]), 10), 0.2)[0]
    labels.bar(range(10), y[0], color=FAINT, width=0.8, alpha=0.5)
    labels.bar(range(10), soft, color=BLUE, width=0.45)
    labels.set(title="label", xticks=[3, 7], yticks=[0, 1], ylim=(0, 1.05))
    bare(path, "weights").set(xlim=(-0.5, 3.5), ylim=(-0.3, 2.6))
    first, last = torch.tensor([0.1, 0.3]), torch.tensor([2.9, 2.0])
    bend = np.linspace(0, 1, 40)
    walk = np.outer(1 - bend, first) + np.outer(bend, last)
    walk[:, 1] -= 0.55 * np.sin(np.pi * bend)
    walk[:, 0] += 0.08 * np.sin(9 * np.pi * bend)
    path.plot(*walk.T, color=FAINT, linewidth=1.2)
    path.plot(*zip(first, last), color=INK, linestyle=":", linewidth=1)
    middle = interpolate(first, last, 0.5)
    for point, name, tone, side in (
        (first, "pre-trained", INK, (0.1, 0.3)),
        (last, "fine-tuned", INK, (-0.1, 0.3)),
        (middle, "mean", BLUE, (-0.45, 0.25)),
    ):
        path.plot(*point, marker="o", color=tone, markersize=6 if tone == BLUE else 4)
        path.text(point[0] + side[0], point[1] + side[1], name, color=tone, ha="center", fontsize=7)


@draws("LEVI")
def levi(figure):
    """A frozen pre-trained network (grey) and a small new one see the same input; a head at every chosen depth sees
    both, and the heads' mean is the prediction."""
    axes = scheme(figure)
    for i, x in enumerate((0.75, 1.35, 1.95)):
        box(axes, x, 0.55, 0.46, 0.4, f"h{'₁₂₃'[i]}", FAINT)
        arrow(axes, (x - 0.37, 0.55), (x - 0.23, 0.55), FAINT)
        box(axes, x, 1.15, 0.4, 0.3, "head", BLUE)
        arrow(axes, (x, 0.75), (x, 1.0), FAINT)
        arrow(axes, (1.5 + 0.25 * (i - 1), 1.6), (x, 1.3), ORANGE, linewidth=0.9)
    box(axes, 1.35, 1.15, 1.8, 0.46, "", BLUE, 0.07, linestyle=":")
    arrow(axes, (2.25, 1.15), (2.62, 1.15), BLUE)
    axes.text(0.2, 0.55, "x", ha="center", va="center", fontsize=10)
    box(axes, 1.5, 1.75, 1.0, 0.3, "small network", ORANGE)
    arrow(axes, (0.2, 0.7), (1.0, 1.75), ORANGE, connectionstyle="arc3,rad=-0.35", linewidth=1.0)
    axes.text(1.35, 0.2, "pre-trained, frozen", ha="center", fontsize=7)
    box(axes, 2.9, 1.15, 0.5, 0.4, "mean", BLUE, 0.3)


@draws("ProjectionHead")
def projection_head(figure):
    """Training goes through the head h, which is thrown away: z keeps features that u has shrunk (bars: weights that
    the fixed head gives them)."""
    axes = scheme(figure)
    for x, name, tone in ((0.55, "network", INK), (1.65, "h", ORANGE), (2.7, "classifier", INK)):
        box(axes, x, 1.45, 0.78 if len(name) > 1 else 0.5, 0.4, name, tone)
    arrow(axes, (0.94, 1.45), (1.4, 1.45))
    arrow(axes, (1.9, 1.45), (2.3, 1.45))
    axes.plot([1.32, 1.98], [1.18, 1.72], color=ORANGE, linewidth=1.4)
    axes.text(1.17, 1.53, "z", ha="center", fontsize=9, color=BLUE)
    axes.text(2.1, 1.53, "u", ha="center", fontsize=9, color=ORANGE)
    shrunk = reweighting(9, 1.3).numpy()
    for i in range(9):
        axes.bar(0.75 + 0.1 * i, 0.62, 0.075, bottom=0.2, color=BLUE)
        axes.bar(2.0 + 0.1 * i, 0.62 * shrunk[i], 0.075, bottom=0.2, color=ORANGE)
    axes.text(1.15, 0.06, "features in z", ha="center", fontsize=7)
    axes.text(2.4, 0.06, "in u", ha="center", fontsize=7)
    axes.set(xlim=(0, 3.3), ylim=(0, 2))


@draws("PrePostMonitor")
def pre_post_monitor(figure):
    """Linear probes read labels of your choice off the features before the projection head (z) and behind it (u)."""
    axes = scheme(figure)
    for x, name, tone in ((0.55, "network", INK), (1.65, "head", INK), (2.75, "classifier", INK)):
        box(axes, x, 1.5, 0.76, 0.4, name, tone)
    arrow(axes, (0.93, 1.5), (1.27, 1.5))
    arrow(axes, (2.03, 1.5), (2.37, 1.5))
    for x, name, tone in ((1.1, "z", BLUE), (2.2, "u", ORANGE)):
        axes.text(x, 1.57, name, ha="center", color=tone, fontsize=9)
        arrow(axes, (x, 1.45), (x, 0.98), tone)
        box(axes, x, 0.8, 0.62, 0.36, "probe", tone)
        arrow(axes, (x, 0.62), (x, 0.4), tone)
        axes.text(x, 0.2, f"accuracy of {name}", ha="center", fontsize=7, color=tone)
