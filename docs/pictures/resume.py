"""Pictures of ``callbacks/resume``."""

from __future__ import annotations

import numpy as np

from pictures import BLUE, GREEN, INK, ORANGE, RED, draws, scheme


@draws("ExactResume")
def exact_resume(figure):
    """Two runs, step by step. The second is killed (×), goes on from its last checkpoint (orange), and ends with the
    same bits as the first."""
    axes = scheme(figure)
    steps, shades = 16, 0.35 + 0.65 * np.random.default_rng(0).random(16)
    width = 2.72 / steps
    for y, name in ((1.5, "never killed"), (0.85, "killed")):
        axes.text(0.08, y + 0.2, name, fontsize=7)
        for i in range(steps):
            lost = name == "killed" and i >= 9
            if not lost:
                axes.bar(0.12 + width * (i + 0.5), 0.16, width * 0.8, bottom=y - 0.05, color=BLUE, alpha=shades[i])
    axes.text(0.12 + width * 9.6, 0.87, "×", color=RED, fontsize=13, fontweight="bold", ha="center", va="center")
    for i in range(6, steps):
        axes.bar(0.12 + width * (i + 0.5), 0.16, width * 0.8, bottom=0.35, color=BLUE, alpha=shades[i])
    checkpoint = 0.12 + width * 6
    axes.plot([checkpoint, checkpoint], [0.28, 1.05], color=ORANGE, linewidth=1.4)
    axes.text(checkpoint - 0.08, 0.4, "checkpoint", ha="right", fontsize=7, color=ORANGE)
    axes.text(2.93, 1.53, "=", fontsize=11, ha="left", va="center", color=GREEN)
    axes.plot([3.12, 3.2, 3.2, 3.12], [1.53, 1.53, 0.43, 0.43], color=GREEN, linewidth=1.2)
    axes.text(1.5, 0.08, "optimizer steps →", ha="center", fontsize=7, color=INK)
