"""One small picture a recipe: what it does, drawn with the recipe's own functions where it has some.

A picture is a function in one of the files here, one file a folder of recipes::

    @draws("FreezeOut")
    def freeze_out(figure):
        "Rate of every layer over the fit: the first layers get to 0 first, and are frozen from there on."
        axes = figure.subplots()
        ...

It draws into an empty figure; its docstring is the caption, and what a screen reader says. Colours are tones by name
(:data:`TONES`), each with a value for a light and for a dark page; the background stays transparent.
"""

from __future__ import annotations

import importlib
import inspect
import io
import pkgutil
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, PathPatch
from matplotlib.path import Path

SIZE = (3.3, 2.0)
"""Inches; a card of the gallery is as wide as 16 rem, where this is close to its natural size."""

# for a light page, for a dark page
TONES = {
    "ink": ("#39424e", "#d3dae3"),  # text, and what is plain
    "faint": ("#aab4c0", "#667080"),  # axes, what is left out, what was before
    "blue": ("#2f6db5", "#78b1f2"),  # the recipe
    "orange": ("#d8721f", "#f5a65b"),  # its counterpart
    "green": ("#2f9468", "#62cb9b"),
    "red": ("#c53f4a", "#f4808a"),
    "violet": ("#7a57b0", "#b79df0"),
}
INK, FAINT, BLUE, ORANGE, GREEN, RED, VIOLET = (light for light, _ in TONES.values())

STYLE = {
    "svg.fonttype": "none",  # text stays text, in the page's own font
    "svg.hashsalt": "lightning_recipes",  # the same ids in every build
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "axes.titlecolor": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.facecolor": "none",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "text.color": INK,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 7,
    "legend.labelcolor": INK,
    "legend.handlelength": 1.2,
    "figure.facecolor": "none",
    "hatch.color": FAINT,
    "hatch.linewidth": 0.6,
}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


@dataclass(frozen=True)
class Picture:
    """A recipe's picture.

    Attributes:
        draw: draws it into an empty figure.
        caption: what there is to see.
        size: inches.
    """

    draw: Callable[[Figure], None]
    caption: str
    size: tuple[float, float]

    def svg(self) -> tuple[str, str]:
        """The picture for a light and for a dark page."""
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=self.size, layout="constrained")
            self.draw(figure)
            out = io.StringIO()
            figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        light = out.getvalue()
        light = re.sub(r"font: ([^;\"]*?)'DejaVu Sans'[^;\"]*", rf"font: \g<1>{FONT}", light)
        dark = light
        for ours, theirs in TONES.values():
            dark = dark.replace(ours, theirs)
        return light, dark


PICTURES: dict[str, Picture] = {}
"""By the recipe's class name."""


def draws(*names: str, size: tuple[float, float] = SIZE) -> Callable[[Callable], Callable]:
    """Register a function as the picture of the recipes of these names.

    Raises:
        ValueError: it has no docstring, or one of them has a picture already.
    """

    def register(draw: Callable[[Figure], None]) -> Callable[[Figure], None]:
        caption = " ".join(inspect.cleandoc(draw.__doc__ or "").split())
        if not caption:
            raise ValueError(f"{draw.__qualname__} has no docstring to be the picture's caption")
        for name in names:
            if name in PICTURES:
                raise ValueError(f"{name} has two pictures, {PICTURES[name].draw.__qualname__} and {draw.__qualname__}")
            PICTURES[name] = Picture(draw, caption, size)
        return draw

    return register


# -- what several pictures share -------------------------------------------------------------------------------------


def bare(axes: Axes, title: str = "") -> Axes:
    """Axes for a scheme or an image: no frame, no ticks."""
    axes.set(xticks=[], yticks=[])
    axes.set_frame_on(False)
    if title:
        axes.set_title(title)
    return axes


def tiles(axes: Axes, values: Any, tone: str = BLUE, gap: float = 0.12, tones: Any = None, floor: float = 0.07) -> None:
    """A matrix as square tiles, 0 pale and 1 (or more) full; NaN leaves one out.

    Args:
        values: ``[rows, columns]``, the first row on top.
        tone: of all tiles.
        gap: between tiles, as a share of one.
        tones: one tone a tile, ``[rows, columns]``, instead of `tone`.
        floor: how opaque a tile of 0 is.
    """
    values = np.asarray(values, dtype=float)
    alike: dict[tuple[str, float], list[list[float]]] = {}  # tiles of one colour are one path, so that files stay small
    for row, column in np.ndindex(*values.shape):
        if np.isnan(values[row, column]):
            continue
        left, right, top, bottom = column + gap / 2, column + 1 - gap / 2, row + gap / 2, row + 1 - gap / 2
        alpha = round(20 * (floor + (1 - floor) * min(max(values[row, column], 0.0), 1.0))) / 20
        same = alike.setdefault((tone if tones is None else str(tones[row][column]), alpha), [])
        if not gap and same and same[-1][1:3] == [left, top]:
            same[-1][1] = right  # goes on from the one on its left
        else:
            same.append([left, right, top, bottom])
    for (colour, alpha), rectangles in alike.items():
        corners = [
            corner for left, right, top, bottom in rectangles
            for corner in ((left, top), (right, top), (right, bottom), (left, bottom), (left, top))
        ]  # fmt: skip
        codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY] * len(rectangles)
        axes.add_patch(PathPatch(Path(corners, codes), facecolor=to_rgba(colour, alpha), edgecolor="none", linewidth=0))
    axes.set(xlim=(0, values.shape[1]), ylim=(values.shape[0], 0))


def image(axes: Axes, values: Any, title: str = "", tone: str = INK, **options: Any) -> None:
    """A small grey image, its bright pixels opaque."""
    bare(axes, title)
    axes.set_aspect("equal")
    tiles(axes, values, tone, **{"gap": 0.0, "floor": 0.04, **options})


def box(
    axes: Axes,
    x: float,
    y: float,
    width: float,
    height: float,
    text: str = "",
    tone: str = INK,
    fill: float = 0.15,
    **options: Any,
) -> None:
    """A rounded box around (x, y), its middle, with a text in it."""
    corner = (x - width / 2, y - height / 2)
    style = {"boxstyle": "round,pad=0,rounding_size=0.06", "linewidth": 1.0, "mutation_aspect": 1.0, **options}
    axes.add_patch(FancyBboxPatch(corner, width, height, facecolor=to_rgba(tone, fill), edgecolor=tone, **style))
    if text:
        axes.text(x, y, text, ha="center", va="center", fontsize=7, color=INK)


def arrow(axes: Axes, start: Sequence[float], end: Sequence[float], tone: str = INK, **options: Any) -> None:
    """An arrow from start to end, in the units of the data."""
    style = {"arrowstyle": "-|>", "mutation_scale": 8, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0, **options}
    axes.add_patch(FancyArrowPatch(tuple(start), tuple(end), color=tone, **style))


def scheme(figure: Figure, width: float = 3.3, height: float = 2.0) -> Axes:
    """One bare axes with x in [0, width] and y in [0, height], the same unit in both."""
    axes = whole(figure)
    axes.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    return axes


def whole(figure: Figure) -> Axes:
    """Bare axes over the whole figure."""
    figure.set_layout_engine("none")
    return bare(figure.add_axes((0.01, 0.01, 0.98, 0.98)))


def digit(label: int = 3, which: int = 0) -> np.ndarray:
    """An 8 x 8 image of scikit-learn's handwritten digits in [0, 1]: the so many-th one of a label."""
    images, labels = _digits()
    return images[np.flatnonzero(labels == label)[which]]


_cache: list[Any] = []


def _digits() -> tuple[np.ndarray, np.ndarray]:
    if not _cache:
        from sklearn.datasets import load_digits

        found = load_digits()
        _cache.extend((found.images / 16.0, found.target))
    return _cache[0], _cache[1]


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
