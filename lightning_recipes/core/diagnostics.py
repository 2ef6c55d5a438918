"""Logging from any hook, a history of what was measured, and its picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor


def log_values(trainer: pl.Trainer, values: Mapping[str, Any]) -> None:
    """Send values to every logger and to ``trainer.callback_metrics``, also from hooks where ``self.log`` is forbidden.

    Args:
        values: numbers or scalar tensors by their full name.
    """
    scalars = {name: float(value) for name, value in values.items()}
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in scalars.items()})
    for logger in trainer.loggers:
        logger.log_metrics(scalars, step=trainer.global_step)


class History:
    """What was measured when, for a picture at the end and for checkpoints."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.values: dict[str, list[float]] = {}

    def add(self, step: int, values: Mapping[str, float | Tensor]) -> None:
        """Note the values of one moment; the same names every time."""
        self.steps.append(step)
        for name, value in values.items():
            self.values.setdefault(name, []).append(float(value))

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"steps": list(self.steps), "values": {k: list(v) for k, v in self.values.items()}}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state` gave."""
        self.steps, self.values = list(state["steps"]), {k: list(v) for k, v in state["values"].items()}

    def draw(self, path: str | Path, title: str, ylabel: str) -> Path | None:
        """Draw all values over the steps; None where matplotlib (the `plots` extra) is not installed."""
        curves = {name: (self.steps[-len(values) :], values) for name, values in self.values.items()}
        return draw_curves(path, curves, title, "optimizer step", ylabel)


def draw_curves(
    path: str | Path,
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    title: str,
    xlabel: str,
    ylabel: str,
) -> Path | None:
    """Draw curves by name, each as (x, y); None where matplotlib (the `plots` extra) is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, (x, y) in curves.items():
        axes.plot(x, y, marker="o", markersize=3, label=name)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.legend()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def draw_images(
    path: str | Path, rows: Mapping[str, Sequence[tuple[Tensor, str]]], title: str, most: int = 12
) -> Path | None:
    """Draw images in rows; None where matplotlib (the `plots` extra) is not installed, or where there is no image.

    Args:
        rows: by the row's name, images ``[height, width]`` or ``[channels, height, width]`` of 1 or 3 channels, each
            with a few words to stand above it. Values outside [0, 1] are stretched to it, image by image.
        title: of the whole.
        most: images in a row.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    rows = {name: list(images)[:most] for name, images in rows.items() if images}
    if not rows:
        return None
    across = max(map(len, rows.values()))
    figure = Figure(figsize=(1.1 * across + 1, 1.35 * len(rows) + 0.6), layout="constrained")
    axes = figure.subplots(len(rows), across, squeeze=False)
    for line, (name, images) in zip(axes, rows.items()):
        for place in line:
            place.set(xticks=[], yticks=[], frame_on=False)
        line[0].set_ylabel(name)
        for place, (image, words) in zip(line, images):
            place.imshow(_as_picture(image), cmap="gray", vmin=0, vmax=1)
            place.set_title(words, fontsize=7)
    figure.suptitle(title)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def is_picture(value: Any) -> bool:
    """Whether :func:`draw_images` can draw it."""
    return isinstance(value, Tensor) and (value.dim() == 2 or (value.dim() == 3 and value.shape[0] in (1, 3)))


def _as_picture(image: Tensor) -> Any:
    """An image as matplotlib takes it, in [0, 1]."""
    image = image.detach().float().cpu()
    low, high = image.min(), image.max()
    if low < 0 or high > 1:
        image = (image - low) / (high - low).clamp_min(1e-12)
    if image.dim() == 3:
        image = image[0] if image.shape[0] == 1 else image.permute(1, 2, 0)
    return image.numpy()


def where_to_draw(trainer: pl.Trainer) -> Path | None:
    """The folder of the run's logs; None for a run that logs nowhere, which should leave no files."""
    return Path(trainer.log_dir) if trainer.loggers and trainer.log_dir else None
