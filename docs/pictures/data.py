"""Pictures of ``callbacks/data``, and of the module and data module beside them."""

from __future__ import annotations

import functools

import numpy as np
import torch

from lightning_recipes.callbacks.data.bayes_error import estimate
from lightning_recipes.callbacks.data.scores import el2n, prune_indices
from lightning_recipes.core.bayes_error import bayes_error, max_abs_scaled
from lightning_recipes.datamodules.priors import GPPrior
from lightning_recipes.datamodules.unlearnable import linf, project_
from lightning_recipes.modules.bar_distribution import BarDistribution
from lightning_recipes.modules.pfn import attention_mask
from pictures import BLUE, FAINT, ORANGE, bare, draws, image, tiles
from pictures.small_nets import digits, softmax_regression


@draws("BayesErrorMonitor")
def bayes_error_monitor(figure):
    """Features of two classes at three moments of training, and their estimated Bayes error."""
    draws_ = torch.Generator().manual_seed(0)
    noise = torch.randn(120, 2, generator=draws_)
    labels = torch.arange(120) % 2
    for axes, apart, title in zip(figure.subplots(1, 3), (0.15, 0.9, 2.2), ("early", "later", "late")):
        features = noise + apart * (2 * labels[:, None] - 1) * torch.tensor([1.0, 0.45])
        bare(axes, title).set(xlim=(-4.6, 4.6), ylim=(-4.2, 4.2), aspect="equal")
        for label, tone in ((0, ORANGE), (1, BLUE)):
            axes.scatter(*features[labels == label].T, s=5, color=tone, alpha=0.8, linewidths=0)
        axes.set_xlabel(f"error {float(estimate(features, labels)):.2f}")


@functools.cache
def _posterior() -> tuple[np.ndarray, ...]:
    """A prior's exact posterior given five points: context x and y, queries, means and standard deviations."""
    prior = GPPrior(lengthscale=0.22, noise=0.003)
    x = torch.tensor([0.08, 0.2, 0.42, 0.5, 0.86], dtype=torch.float64)
    y = torch.tensor([-0.4, 0.5, 0.7, 0.2, -0.6], dtype=torch.float64)
    queries = torch.linspace(0, 1, 90, dtype=torch.float64)
    mean, variance = prior.posterior(x[:, None, None], y[:, None], queries[:, None, None])
    return x.numpy(), y.numpy(), queries.numpy(), mean[:, 0].numpy(), variance[:, 0].sqrt().numpy()


@draws("BayesGapMonitor")
def bayes_gap_monitor(figure):
    """For one query: the exact posterior predictive of the prior (orange), the bars that a network predicts (blue), and
    how far they are apart."""
    _, _, queries, mean, std = _posterior()
    at = int(np.argmin(np.abs(queries - 0.66)))
    exact = torch.distributions.Normal(mean[at], std[at])
    borders = torch.linspace(-3, 3, 25, dtype=torch.float64)
    bars = BarDistribution(borders, full_support=False)
    middle = (borders[1:] + borders[:-1]) / 2
    logits = -(((middle - mean[at] - 0.22).abs() / (1.25 * std[at])) ** 1.8) / 2
    grid = torch.linspace(-2.99, 2.99, 1500, dtype=torch.float64)
    p = exact.log_prob(grid).exp()
    log_q = -bars(logits.expand(len(grid), -1), grid)
    gap = float((p * (exact.log_prob(grid) - log_q)).sum() * (grid[1] - grid[0]))
    axes = figure.subplots()
    axes.stairs((logits.softmax(0) / bars.widths).numpy(), borders.numpy(), fill=True, color=BLUE, alpha=0.45)
    axes.plot(grid, p, color=ORANGE)
    axes.set(xlabel="y of a query", yticks=[], title=f"gap {gap:.2f} nats", xlim=(-2.2, 2.6))
    axes.spines["left"].set_visible(False)


@draws("InContextPrediction")
def in_context_prediction(figure):
    """Five rows with a target, and what the prior's posterior says of every other input: mean and 90 % interval. A
    trained network gives it in one pass."""
    x, y, queries, mean, std = _posterior()
    axes = figure.subplots()
    axes.fill_between(queries, mean - 1.64 * std, mean + 1.64 * std, color=BLUE, alpha=0.22, linewidth=0)
    axes.plot(queries, mean, color=BLUE)
    axes.scatter(x, y, color=ORANGE, s=22, zorder=3)
    axes.set(xlabel="x", ylabel="y", xticks=[], yticks=[])


@draws("PFNModule")
def pfn_module(figure):
    """Left: data sets are drawn from a prior. Right: who sees whom in the transformer, six context tokens and four
    queries; nobody sees another query."""
    functions, mask = figure.subplots(1, 2)
    x, y = GPPrior(lengthscale=0.25, noise=1e-3).sample(60, 5, 1, torch.Generator().manual_seed(4))
    for i, tone in enumerate((BLUE, ORANGE, FAINT, BLUE, FAINT)):
        order = x[:, i, 0].argsort()
        functions.plot(x[order, i, 0], y[order, i], color=tone, linewidth=1.1, alpha=0.9)
    bare(functions, "drawn from a prior")
    seen = ~attention_mask(10, 6).numpy()
    bare(mask, "attention").set_aspect("equal")
    tiles(mask, seen.astype(float), tones=[[ORANGE if j < 6 else BLUE for j in range(10)]] * 10)
    mask.set(xlabel="sees", ylabel="token")


@functools.cache
def _scores() -> torch.Tensor:
    """EL2N of every digit, by a linear classifier early in its training."""
    x, y = digits()
    return el2n(x @ softmax_regression(x, y, 60).T, y)


@draws("DataDiet")
def data_diet(figure):
    """Digits with the lowest scores after a little training, which could be left out, and those with the highest."""
    images, order = digits()[0].view(-1, 8, 8).numpy(), _scores().argsort()
    grid = figure.subplots(2, 5)
    for row, chosen, tone in zip(grid, (order[:5], order[-5:]), (BLUE, ORANGE)):
        for axes, index in zip(row, chosen.tolist()):
            image(axes, images[index], tone=tone)
    grid[0][2].set_title("easy: low scores")
    grid[1][2].set_title("hard, or wrong: high scores")


@draws("PruneTrainSet")
def prune_train_set(figure):
    """Scores of all training samples: half of them is trained on, less a few of the hardest."""
    scores = _scores()
    kept = torch.zeros(len(scores), dtype=torch.bool)
    kept[prune_indices(scores, 0.5, "offset", offset=0.45)] = True
    axes = figure.subplots()
    edges = np.linspace(0, float(scores.max()), 36)
    axes.hist([scores[kept], scores[~kept]], edges, stacked=True, color=[BLUE, FAINT], rwidth=0.85)
    axes.set(xlabel="score", ylabel="samples", yticks=[], xticks=[0, 0.5, 1], title="trained on: blue")


@draws("UnlearnableDataModule")
def unlearnable(figure):
    """A digit, the change that it gets within a small ball, and the digit as it is published; and what the change does
    to the estimated Bayes error of the set."""
    x, y = digits()
    clean, labels = x[:240], y[:240]
    moving = clean.clone().requires_grad_()
    optimizer = torch.optim.Adam([moving], 0.02, maximize=True)
    before = float(estimate(clean, labels, 0.5))
    for _ in range(40):
        optimizer.zero_grad()
        bayes_error(max_abs_scaled(moving), labels, 10, 0.5, reduction="none").sum().backward()
        optimizer.step()
        project_(moving.data, clean, 0.2)
    after, change = float(estimate(moving.detach(), labels, 0.5)), moving.detach() - clean
    one, two, three = figure.subplots(1, 3)
    shown = [each[13].view(8, 8).numpy() for each in (clean, change, moving.detach())]
    image(one, shown[0], "clean")
    bare(two, "change").set_aspect("equal")
    tiles(two, np.abs(shown[1]) / linf(moving.detach(), clean), gap=0, tones=np.where(shown[1] > 0, BLUE, ORANGE))
    image(three, shown[2], "protected")
    one.set_xlabel(f"Bayes error {before:.2f}")
    three.set_xlabel(f"{after:.2f}")
