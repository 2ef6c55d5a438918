"""Pictures of ``callbacks/continual``."""

from __future__ import annotations

import numpy as np
import torch

from lightning_recipes.callbacks.continual.forgetting import forgetting
from lightning_recipes.callbacks.continual.group_mask import masked, present
from lightning_recipes.callbacks.continual.slca import align, draw_epoch, shrink_factors
from lightning_recipes.core.gaussians import fit
from pictures import BLUE, GREEN, ORANGE, RED, bare, draws, tiles


@draws("ForgettingMonitor")
def forgetting_monitor(figure):
    """Accuracy on every task (columns) after every task (rows), and what was lost since each task was known best."""
    loss = np.array([0.5, 0.25, 0.36, 0.18, 0.3, 0.2])
    matrix = [[0.96 * np.exp(-loss[j] * (k - j) ** 0.8) for j in range(k + 1)] for k in range(6)]
    axes = bare(figure.subplots(), f"forgetting {forgetting(matrix):.2f}")
    values = np.full((6, 6), np.nan)
    for k, row in enumerate(matrix):
        values[k, : k + 1] = row
    axes.set_aspect("equal")
    tiles(axes, 0.75 * values, BLUE)
    for k, j in zip(*np.nonzero(~np.isnan(values))):
        axes.text(j + 0.5, k + 0.52, f"{values[k, j]:.1f}".lstrip("0"), ha="center", va="center", fontsize=6)
    axes.set(xlabel="accuracy on task", ylabel="after task")


@draws("GroupMask")
def group_mask(figure):
    """What the loss makes of a batch with labels of three classes: without the mask every other class is pushed down
    too (orange), with it they are not there."""
    draws_ = torch.Generator().manual_seed(1)
    logits = 1.2 * torch.randn(8, 10, generator=draws_)
    targets = torch.tensor([2, 7, 2, 4, 7, 4, 2, 7])
    logits[torch.arange(8), targets] += 1.0
    keep = present(targets, 10)
    for axes, z, title in zip(
        figure.subplots(1, 2), (logits, masked(logits, keep)), ("softmax of all", "of the classes at hand")
    ):
        p = z.softmax(1).numpy()
        there = p if title == "softmax of all" else np.where(keep.numpy(), p, np.nan)
        bare(axes, title).set_aspect("equal")
        tiles(axes, there**0.7, tones=[[BLUE if at else ORANGE for at in keep.tolist()]] * 8)
        axes.set_xlabel("classes")
    figure.axes[0].set_ylabel("batch")


@draws("SLCA")
def slca(figure):
    """Two tasks of two classes. The head that comes out of the second task takes too much for its classes; it is
    aligned on features that are drawn from one Gaussian a class."""
    draws_ = torch.Generator().manual_seed(0)
    middles = torch.tensor([[-1.2, 0.9], [-1.0, -1.0], [1.1, 1.0], [1.2, -0.9]])
    samples = [m + 0.33 * torch.randn(60, 2, generator=draws_) for m in middles]
    gaussians = [fit(each) for each in samples]
    weight = middles / middles.norm(dim=1, keepdim=True) * torch.tensor([[0.9], [0.9], [2.6], [2.6]])
    bias = torch.tensor([-1.3, -1.3, 1.2, 1.2])
    factors = shrink_factors([[0, 1], [2, 3]], 1, 0.1)

    def drawn(epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        return draw_epoch(gaussians, factors, 64, ("picture", epoch))

    aligned = align(weight, bias, (2, 2), drawn, epochs=6, lr=0.5, batch=64)[:2]
    tones = (ORANGE, RED, BLUE, GREEN)
    y, x = np.meshgrid(np.linspace(2, -2, 22), np.linspace(-2.3, 2.3, 26), indexing="ij")
    grid = torch.tensor(np.stack([x.ravel(), y.ravel()], 1), dtype=torch.float32)
    features = [drawn(9)[0].view(4, 64, 2)[c, :40] for c in range(4)]
    for axes, (w, b), title in zip(figure.subplots(1, 2), ((weight, bias), aligned), ("after task 2", "aligned")):
        said = (grid @ w.T + b).argmax(1).view(x.shape)
        bare(axes, title)
        tiles(axes, np.full(x.shape, 0.22), gap=0, tones=[[tones[c] for c in row] for row in said.tolist()], floor=0)
        for points, tone in zip(features, tones):
            axes.scatter((points[:, 0] + 2.3) / 4.6 * 26, (2 - points[:, 1]) / 4 * 22, s=4, color=tone, linewidths=0)
