"""Pictures of ``callbacks/robustness``."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from lightning_recipes.callbacks.robustness.aaer import abnormal_statistics
from lightning_recipes.callbacks.robustness.backdoor_adjustment import fuse
from lightning_recipes.callbacks.robustness.class_weights import effective_number, inverse
from lightning_recipes.callbacks.robustness.cosine_head import cosine_logits
from lightning_recipes.callbacks.robustness.logit_adjustment import adjusted, log_prior
from lightning_recipes.core.attacks import fgsm, pgd
from lightning_recipes.datamodules.long_tailed import exponential_profile
from lightning_recipes.modules.mixer import mixture
from pictures import BLUE, FAINT, GREEN, INK, ORANGE, RED, VIOLET, arrow, bare, box, draws, image, scheme, tiles
from pictures.small_nets import digits, on_digits


@draws("AAER")
def aaer(figure):
    """Loss of sixteen samples at the start and at the end of a single-step attack. Those whose loss fell are abnormal
    (red), a sign of catastrophic overfitting, and what is penalised."""
    draws_ = torch.Generator().manual_seed(4)
    before = 0.5 + 0.9 * torch.rand(16, generator=draws_)
    after = before + torch.where(torch.arange(16) % 5 == 2, -0.45, 0.7) * (0.5 + torch.rand(16, generator=draws_))
    logits = torch.zeros(16, 2)
    found = abnormal_statistics(logits, logits, before, after)
    axes = figure.subplots()
    for l0, l1 in zip(before.tolist(), after.tolist()):
        tone = RED if l1 < l0 else BLUE
        axes.plot([0, 1], [l0, l1], color=tone, marker="o", markersize=3, linewidth=1.2)
    axes.set(xticks=[0, 1], xlim=(-0.25, 1.25), yticks=[], ylabel="loss")
    axes.set_xticklabels(["random start", "attacked"])
    axes.set_title(f"abnormal: {int(found['m'])} of {int(found['n'])}")


@draws("AdaptFormer")
def adapt_former(figure):
    """A block's MLP is frozen (grey); a narrow branch beside it trains."""
    axes = scheme(figure)
    axes.text(0.2, 1.0, "z", ha="center", va="center", fontsize=10)
    arrow(axes, (0.3, 1.0), (2.62, 1.0), FAINT)
    box(axes, 1.5, 1.55, 1.1, 0.4, "MLP", FAINT)
    arrow(axes, (0.55, 1.0), (0.95, 1.55), FAINT, connectionstyle="angle,angleA=90,angleB=0,rad=4")
    arrow(axes, (2.05, 1.55), (2.75, 1.12), FAINT, connectionstyle="angle,angleA=0,angleB=90,rad=4")
    for x, height, name in ((1.05, 0.46, "down"), (1.5, 0.22, ""), (1.95, 0.46, "up")):
        box(axes, x, 0.42, 0.36 if name else 0.28, height, name, BLUE, 0.3)
    axes.text(1.5, 0.68, "ReLU", ha="center", fontsize=6)
    arrow(axes, (0.55, 1.0), (0.87, 0.42), BLUE, connectionstyle="angle,angleA=-90,angleB=0,rad=4")
    arrow(axes, (1.23, 0.42), (1.36, 0.42), BLUE)
    arrow(axes, (1.64, 0.42), (1.77, 0.42), BLUE)
    arrow(axes, (2.13, 0.42), (2.75, 0.88), BLUE, connectionstyle="angle,angleA=0,angleB=-90,rad=4")
    axes.text(2.45, 0.5, "· s", fontsize=8, ha="center", color=BLUE)
    axes.text(2.75, 1.0, "+", ha="center", va="center", fontsize=12)
    arrow(axes, (2.86, 1.0), (3.15, 1.0), INK)


@draws("AdaptiveSmoothing")
def adaptive_smoothing(figure):
    """Probability of the right class as the robust network's weight α grows: of a clean input that the robust network
    gets wrong, being unsure, and of an attacked one, where the accurate network is surely wrong."""
    axes = figure.subplots()
    shares = np.linspace(0, 1, 60)
    for g, h, tone, name in (
        ([4.0, 0.0, 0.0], [0.5, 0.75, 0.0], BLUE, "clean input"),
        ([0.0, 5.0, 0.0], [3.5, 0.0, 0.0], RED, "attacked input"),
    ):
        g, h = torch.tensor([g], dtype=torch.float64), torch.tensor([h], dtype=torch.float64)
        p = torch.stack([mixture(g, h, float(a)).softmax(1)[0] for a in shares])
        right = (p[:, 0] > p[:, 1:].amax(1)).numpy()
        axes.plot(shares, p[:, 0], color=tone, linewidth=1, alpha=0.5)
        axes.plot(shares, np.where(right, p[:, 0], np.nan), color=tone, linewidth=2.6, label=name)
    axes.set(
        xlabel="α", title="probability of the right class (thick: it wins)", xticks=[0, 0.5, 1], yticks=[0, 0.5, 1]
    )
    axes.legend(loc="lower center")


@draws("BackdoorAdjustment")
def backdoor_adjustment(figure):
    """What three differently pre-trained members say of one input, and their mixture."""
    members = [
        torch.tensor([[2.0, 1.6, -0.5, 0.1, -1.0]]),
        torch.tensor([[-0.4, 1.7, 1.9, 0.0, -0.2]]),
        torch.tensor([[0.2, 1.5, -0.8, 0.3, 1.6]]),
    ]
    together = fuse(members, [1 / 3] * 3)
    panels = figure.subplots(1, 4, sharey=True)
    names = ("member 1", "member 2", "member 3", "mixture")
    for axes, logits, name in zip(panels, (*members, together), names):
        p = logits.softmax(1)[0].numpy()
        tone = BLUE if name == "mixture" else FAINT
        bars = axes.bar(range(5), p, color=tone, width=0.75)
        bars[int(p.argmax())].set_color(BLUE if name == "mixture" else ORANGE)
        axes.set(title=name, xticks=[], yticks=[])
        axes.spines["left"].set_visible(False)
    figure.supxlabel("classes", fontsize=8)


@draws("CosineHead")
def cosine_head(figure):
    """Which class wins in a plane of features: a linear head favours the class with the longest weight (blue, the one
    with most samples); by the angle they are level."""
    weights = torch.tensor([[1.9, 0.5], [-0.5, 0.75], [0.1, -0.8]])
    tones = (BLUE, ORANGE, VIOLET)
    rows, columns = np.meshgrid(np.linspace(2, -2, 22), np.linspace(-2.3, 2.3, 25), indexing="ij")
    grid = torch.tensor(np.stack([columns.ravel(), rows.ravel()], 1), dtype=torch.float32)
    panels = zip(figure.subplots(1, 2), ("linear head", "cosine head"))
    for axes, name in panels:
        logits = grid @ weights.T if name == "linear head" else cosine_logits(grid, weights, 1.0)
        drawn = weights if name == "linear head" else F.normalize(weights, dim=1)
        winner = logits.argmax(1).view(rows.shape).tolist()
        bare(axes, name)
        tiles(axes, np.full(rows.shape, 0.25), gap=0.0, tones=[[tones[c] for c in row] for row in winner], floor=0.0)
        for (x, y), tone in zip(drawn.tolist(), tones):
            arrow(axes, (12.5, 11), (12.5 + x * 25 / 4.6, 11 - y * 22 / 4), tone, linewidth=1.8)


@draws("LogitAdjustment")
def logit_adjustment(figure):
    """A frequent and a rare class along a line. The loss sees logits with the prior, whose boundary (dotted) gives the
    rare class little room; z without it puts the boundary in the middle."""
    x = torch.linspace(-3.4, 3.4, 200)
    z = torch.stack([-((x + 1) ** 2) / 2, -((x - 1) ** 2) / 2], 1)
    prior = log_prior(torch.tensor([900, 60]))
    seen = adjusted(z, prior, 1.0)
    axes = figure.subplots()
    for c, (tone, name) in enumerate(((BLUE, "frequent"), (ORANGE, "rare"))):
        axes.fill_between(x, seen[:, c].exp(), color=tone, alpha=0.35, linewidth=0, label=name)
        axes.plot(x, seen[:, c].exp(), color=tone, linewidth=1)
    for logits, style, tone, name in ((seen, ":", INK, "with prior"), (z, "-", GREEN, "z")):
        at = float(x[int((logits[:, 0] - logits[:, 1]).abs().argmin())])
        axes.plot([at, at], [0, 1.0], color=tone, linestyle=style)
        axes.text(at + 0.08, 1.0, name, color=tone, va="top", fontsize=7)
    axes.set(yticks=[], xticks=[], xlabel="feature", ylim=(0, 1.05))
    axes.legend(loc="upper left")
    axes.spines["left"].set_visible(False)


@draws("LongTailMonitor")
def long_tail_monitor(figure):
    """Classes by how many training samples they have: accuracy is told for many, medium and few apart."""
    counts = exponential_profile(400, 24, 80)
    tones = [BLUE if n > 100 else VIOLET if n >= 20 else ORANGE for n in counts]
    axes = figure.subplots()
    axes.bar(range(len(counts)), counts, color=tones, width=0.75)
    for n in (100, 20):
        axes.axhline(n, color=FAINT, linestyle=":", linewidth=0.9)
    for tone, name in ((BLUE, "many"), (VIOLET, "medium"), (ORANGE, "few")):
        middle = np.mean([i for i, each in enumerate(tones) if each == tone])
        axes.text(middle, counts[int(middle)] + 35, name, ha="left", color=tone)
    axes.set(xlabel="classes", ylabel="samples", yticks=[20, 100, 400], xticks=[])


@draws("RobustAccuracyMonitor")
def robust_accuracy_monitor(figure):
    """A digit that a linear classifier gets right, the attack, and what it says then; and its accuracy on 300 digits as
    the attack grows."""
    x, y = digits()
    weight = on_digits()
    x, y = x[1200:1500], y[1200:1500]

    def logits(inputs: torch.Tensor) -> torch.Tensor:
        return inputs @ weight.T

    radii, curves = (0.0, 0.03, 0.06, 0.1, 0.15, 0.2), {"FGSM": [], "PGD": []}
    for radius in radii:
        for name, attacked in (
            ("FGSM", fgsm(logits, x, y, radius)),
            ("PGD", pgd(logits, x, y, radius, 10, 1, generator=torch.Generator().manual_seed(0))),
        ):
            curves[name].append(float((logits(attacked).argmax(1) == y).float().mean()))
    attacked = fgsm(logits, x, y, 0.15)
    fooled = ((logits(x).argmax(1) == y) & (logits(attacked).argmax(1) != y)).nonzero()[2]
    clean, wrong, curve = figure.subplots(1, 3, width_ratios=(1, 1, 1.5))
    image(clean, x[fooled].view(8, 8).numpy(), f"“{int(logits(x[fooled]).argmax())}”")
    image(wrong, attacked[fooled].view(8, 8).numpy(), f"“{int(logits(attacked[fooled]).argmax())}”", RED)
    for name, tone in (("FGSM", ORANGE), ("PGD", RED)):
        curve.plot(radii, curves[name], color=tone, label=name, marker="o", markersize=2.5)
    curve.set(title="accuracy", xlabel="ε", ylim=(0, 1), yticks=[0, 1], xticks=[0, 0.2])
    curve.legend()


@draws("ClassWeights")
def class_weights(figure):
    """Ten classes on a long tail, and the weights that their samples get: by inverse frequency, and by the effective
    number of samples, which levels off."""
    counts = exponential_profile(500, 10, 100)
    many, weights = figure.subplots(1, 2)
    many.bar(range(10), counts, color=FAINT, width=0.7)
    many.set(title="samples of a class", xlabel="class", xticks=[0, 9])
    weights.plot(inverse(torch.tensor(counts)), color=ORANGE, marker="o", markersize=2.5, label="inverse")
    for beta, tone in ((0.99, BLUE), (0.9, VIOLET)):
        label = f"β {beta:g}"
        weights.plot(effective_number(torch.tensor(counts), beta), color=tone, marker="o", markersize=2.5, label=label)
    weights.set(title="weight of a class", xlabel="class", yscale="log", xticks=[0, 9], yticks=[0.1, 1, 10])
    weights.yaxis.set_major_formatter("{x:g}")
    weights.minorticks_off()
    weights.legend()
