"""Pictures of the data modules that papers bring."""

from __future__ import annotations

import numpy as np
import torch

from lightning_recipes.core.linear_dynamics import edges, marchenko_pastur
from lightning_recipes.core.random import generator
from lightning_recipes.datamodules.boolean_task import all_inputs, draw_task
from lightning_recipes.datamodules.gaussian_rf import GaussianRFDataModule
from lightning_recipes.datamodules.matrix_sensing import low_rank
from lightning_recipes.datamodules.scole import Schedule
from lightning_recipes.datamodules.xor_clusters import XORClusters, balanced_draw
from lightning_recipes.modules.low_rank_recovery import measure
from pictures import BLUE, FAINT, INK, ORANGE, RED, VIOLET, bare, draws, tiles


@draws("MatrixSensingDataModule")
def matrix_sensing(figure):
    """A matrix of rank 2, and what is measured of it: most values are right (blue), some are grossly wrong (red)."""
    draws_ = torch.Generator().manual_seed(0)
    truth = low_rank(14, 2, draws_)
    a = torch.randn(160, 14, 14, generator=draws_)
    wrong = torch.rand(160, generator=draws_) < 0.15
    y = measure(a, truth) + 6 * torch.randn(160, generator=draws_) * wrong
    matrix, values = figure.subplots(1, 2, width_ratios=(1, 1.3))
    bare(matrix, "X*").set_aspect("equal")
    scaled = (truth / truth.abs().max()).numpy()
    tiles(matrix, np.abs(scaled), tones=np.where(scaled > 0, BLUE, ORANGE))
    right = measure(a, truth)
    values.scatter(right[~wrong], y[~wrong], s=5, color=BLUE, linewidths=0)
    values.scatter(right[wrong], y[wrong], s=7, color=RED, linewidths=0)
    values.set(title="measured", xlabel="true", xticks=[], yticks=[])


@draws("SCoLeDataModule")
def scole(figure):
    """Forty tasks of two classes each, drawn at random: every class comes back, some more often than others."""
    tasks = Schedule(num_tasks=40, classes=10, classes_per_task=2, entropy_decrease=2.0).tasks()
    there = np.zeros((10, 40))
    for t, classes in enumerate(tasks):
        there[classes, t] = 1
    axes = bare(figure.subplots())
    order = there.sum(1).argsort()[::-1]
    tiles(axes, there[order], BLUE)
    axes.set(xlabel="task →", ylabel="class")


@draws("StudentTeacherDataModule")
def student_teacher(figure):
    """Eigenvalues of the samples' correlations, drawn and in theory, for half as many samples as parameters, as many,
    and twice as many. Those near 0 are what is learnt last, and from noise."""
    draws_ = torch.Generator().manual_seed(0)
    for axes, alpha, tone in zip(figure.subplots(1, 3), (0.5, 1.0, 2.0), (ORANGE, VIOLET, BLUE)):
        x = torch.randn(round(300 * alpha), 300, generator=draws_) / 300**0.5
        values = torch.linalg.eigvalsh(x.T @ x) if alpha >= 1 else torch.linalg.eigvalsh(x @ x.T)
        low, high = edges(alpha)
        axes.hist(values, np.linspace(max(low - 0.1, 0), high + 0.1, 26), density=True, color=tone, alpha=0.35)
        law = marchenko_pastur(alpha, 400)
        nodes, mass = law.values[:-1], law.mass[:-1]
        density = mass / (-torch.gradient(nodes)[0]) / mass.sum()
        axes.plot(nodes, density, color=tone)
        axes.set(title=f"P = {alpha:g} N", yticks=[], ylim=(0, 1.5), xlabel="λ")
        axes.spines["left"].set_visible(False)


@draws("XORClusterDataModule")
def xor_clusters(figure):
    """The two directions that matter: four clusters whose labels no line can tell apart, a tenth of them flipped
    (ringed)."""
    draws_ = torch.Generator().manual_seed(0)
    centres, flipped = balanced_draw(200, 0.1, draws_)
    x, y = XORClusters(centres, flipped, 4.0 * torch.eye(2), draws_).tensors
    axes = bare(figure.subplots())
    axes.set_aspect("equal")
    for label, tone in ((1, BLUE), (-1, ORANGE)):
        axes.scatter(*x[y == label].T, s=7, color=tone, linewidths=0, alpha=0.85)
    axes.scatter(*x[flipped].T, s=26, facecolors="none", edgecolors=INK, linewidths=0.8)
    axes.axhline(0, color=FAINT, linewidth=0.6, zorder=0)
    axes.axvline(0, color=FAINT, linewidth=0.6, zorder=0)


@draws("BooleanTaskDataModule")
def boolean_task(figure):
    """Training inputs of five bits as columns, and below them the labels by the majority of the first three: one in ten
    is flipped (red)."""
    places, labels = draw_task(5, "majority", 0.1, 28, generator(4, "picture"))
    bits = all_inputs(5)[places]
    rule = bits[:, :3].float().gt(0).float().sum(1) >= 2
    axes = bare(figure.subplots())
    axes.set_aspect("equal")
    blank = np.full((1, len(labels)), np.nan)
    given = labels.numpy()[None].astype(float)
    values = np.concatenate([(bits.float() > 0).float().T.numpy(), blank, given])
    tones = np.full(values.shape, FAINT)
    tones[:3], tones[-1] = INK, np.where(labels.bool() == rule, BLUE, RED)
    tiles(axes, values, tones=tones, floor=0.25)


@draws("GaussianRFDataModule")
def gaussian_rf(figure):
    """Eigenvalues of the kernel and squares of the target's coefficients in its modes: both are power laws."""
    data = GaussianRFDataModule(alpha=1.5, beta=1.2, n_modes=1000, n=1, k=1, n_test=1)
    modes = np.arange(1, 1001)
    axes = figure.subplots()
    axes.plot(modes, data.eigvals, color=BLUE)
    axes.plot(modes, data.coeffs.square(), color=ORANGE)
    axes.text(25, float(data.eigvals[24]) / 8, "kernel", color=BLUE, ha="right")
    axes.text(60, float(data.coeffs[59]) ** 2 * 2, "target", color=ORANGE)
    axes.set(xscale="log", yscale="log", xlabel="mode", xticks=[1, 1000], yticks=[])
    axes.minorticks_off()
