"""Small drawings as SVG text, in colours that follow the reader's light or dark setting.

Nothing but what the report needs; :data:`STYLE` is the style sheet that all share, in the page or in a file of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

STYLE = """
:root { --ink: #1b1f24; --soft: #59636e; --line: #d5dbe1; --grid: #e9edf0; --paper: #ffffff; --card: #f6f8fa;
  --base: #7d8791; --one: #0b63c5; --better: #0f7a45; --worse: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8ebee; --soft: #a3adb7; --line: #3a424a; --grid: #262c32;
  --paper: #13161a; --card: #1b2025; --base: #8f99a3; --one: #6fb3ff; --better: #5ccf94; --worse: #ff8f85; } }
svg text { font: 12px system-ui, sans-serif; fill: var(--soft); }
svg .strong { fill: var(--ink); }
svg .grid { stroke: var(--grid); stroke-width: 1; }
svg .axis { stroke: var(--line); stroke-width: 1; }
svg .curve { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
svg .whisker { stroke-width: 1.5; }
svg .band { opacity: .18; stroke: none; }
svg .of-base { stroke: var(--base); } svg .of-base.fill { fill: var(--base); stroke: none; }
svg .of-one { stroke: var(--one); } svg .of-one.fill { fill: var(--one); stroke: none; }
svg .of-better { stroke: var(--better); } svg .of-better.fill { fill: var(--better); stroke: none; }
svg .of-worse { stroke: var(--worse); } svg .of-worse.fill { fill: var(--worse); stroke: none; }
svg .of-noise { stroke: var(--soft); } svg .of-noise.fill { fill: var(--soft); stroke: none; }
"""


@dataclass(frozen=True)
class Scale:
    """Values to places on an axis.

    Attributes:
        low, high: values at its ends, different ones.
        start, end: their places.
    """

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)


def scale(values: Sequence[float], start: float, end: float, room: float = 0.06) -> Scale:
    """One that holds all finite values, with some room beside them."""
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    extra = (high - low) * room or abs(high) * 0.05 or 1.0
    return Scale(low - extra, high + extra, start, end)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round values from low to high, 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / max(most, 1)
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """For an axis."""
    text = f"{value:.3g}"
    if "e" in text and 1e-4 < abs(value) < 1e7:
        text = f"{value:.0f}"
    return text.replace("-", "−")


def drawing(width: float, height: float, parts: Sequence[str], says: str, alone: bool = False) -> str:
    """An SVG that is as wide as its place.

    Args:
        says: what it shows, for those who cannot see it.
        alone: with its own style sheet, for a file.
    """
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img"'
    style = f"<style>{STYLE} svg {{ background: var(--paper); }}</style>" if alone else ""
    return f'{head} aria-label="{escape(says)}">{style}{"".join(parts)}</svg>'


def text(x: float, y: float, words: str, anchor: str = "start", kind: str = "") -> str:
    """Words at a place."""
    of = f' class="{kind}"' if kind else ""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{of}>{escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """A straight line."""
    return f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" class="{kind}"/>'


def dot(x: float, y: float, kind: str, says: str, radius: float = 4.5) -> str:
    """A point that says what it is when it is pointed at."""
    return f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" class="fill {kind}"><title>{escape(says)}</title></circle>'


# -- the three pictures ----------------------------------------------------------------------------------------------


def interval(mean: float, low: float, high: float, across: Scale, kind: str, says: str) -> str:
    """A difference with its interval on the axis that all of them share; 0 is marked."""
    height = 22.0
    middle = height / 2
    parts = [line(across(0), 2, across(0), height - 2, "axis")]
    if math.isfinite(low):
        parts.append(line(across(low), middle, across(high), middle, f"whisker {kind}"))
        parts += [line(across(end), middle - 4, across(end), middle + 4, f"whisker {kind}") for end in (low, high)]
    parts.append(dot(across(mean), middle, kind, says))
    return drawing(across.end + across.start, height, parts, says)


@dataclass(frozen=True)
class Point:
    """A recipe in the picture of quality against cost.

    Attributes:
        name: of it.
        x: its cost, 1 for the base.
        y, low, high: what it changed, 0 for the base, and the interval (nan for none).
        kind: 'of-base', 'of-better' ...
    """

    name: str
    x: float
    y: float
    low: float
    high: float
    kind: str


def cost_picture(points: Sequence[Point], xlabel: str, ylabel: str, says: str, alone: bool = False) -> str:
    """What each recipe changes over what it costs, the base at (1, 0)."""
    width, height, left, right, top, bottom = 360.0, 300.0, 46.0, 10.0, 28.0, 42.0
    across = scale([point.x for point in points] + [1.0], left, width - right, 0.12)
    heights = [value for point in points for value in (point.y, point.low, point.high)]
    up = scale([*heights, 0.0], height - bottom, top, 0.08)
    parts = [text(4, 14, ylabel, kind="strong")]
    for value in ticks(up.low, up.high):
        parts += [line(left, up(value), width - right, up(value), "grid")]
        parts += [text(left - 6, up(value) + 4, number(value), "end")]
    for value in ticks(across.low, across.high):
        parts.append(text(across(value), height - bottom + 17, f"×{number(value)}", "middle"))
    parts += [line(left, height - bottom, width - right, height - bottom, "axis")]
    parts += [line(left, up(0), width - right, up(0), "axis"), line(across(1), top, across(1), height - bottom, "axis")]
    parts.append(text((left + width - right) / 2, height - 6, xlabel, "middle", "strong"))
    taken = [(across(p.x) - 6, up(p.y) - 6, across(p.x) + 6, up(p.y) + 6) for p in points]
    taken += [(across(p.x) - 2, up(p.high), across(p.x) + 2, up(p.low)) for p in points if math.isfinite(p.low)]
    labels = []
    for point in points:
        x, y = across(point.x), up(point.y)
        if math.isfinite(point.low):
            parts.append(line(x, up(point.low), x, up(point.high), f"whisker {point.kind}"))
        parts.append(dot(x, y, point.kind, f"{point.name}: {number(point.y)} at ×{number(point.x)}"))
        place = _free_place(x, y, 6.6 * len(point.name), taken, (left, top, width - right, height - bottom))
        if place is not None:
            labels.append(text(place[0], place[1], point.name, kind="strong"))
            taken.append((place[0], place[1] - 10, place[0] + 6.6 * len(point.name), place[1] + 3))
    return drawing(width, height, parts + labels, says, alone)


Box = tuple[float, float, float, float]


def _free_place(x: float, y: float, wide: float, taken: Sequence[Box], inside: Box) -> tuple[float, float] | None:
    """Where a label of that width stands beside a point without covering another; None where there is no room."""
    for dx, dy in ((9, 4), (-9 - wide, 4), (9, -10), (9, 18), (-9 - wide, -10), (-9 - wide, 18)):
        box = (x + dx, y + dy - 10, x + dx + wide, y + dy + 3)
        within = inside[0] <= box[0] and box[2] <= inside[2] and inside[1] <= box[1] and box[3] <= inside[3]
        covers = any(
            box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]
            for other in taken
            if other != (x - 6, y - 6, x + 6, y + 6)
        )
        if within and not covers:
            return x + dx, y + dy
    return None


@dataclass(frozen=True)
class Curve:
    """One arm's course.

    Attributes:
        x, mean, low, high: by measurement; the mean over seeds, and the lowest and highest of them.
        kind: 'of-base' or 'of-one'.
    """

    x: Sequence[float]
    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    kind: str


def curves_picture(
    curves: Sequence[Curve], title: str, xlabel: str, limits: tuple[float, float], says: str, alone: bool = False
) -> str:
    """Learning curves with the band between the lowest and the highest seed.

    Args:
        limits: lowest and highest value of the vertical axis; what is outside is cut off.
    """
    width, height, left, right, top, bottom = 300.0, 180.0, 44.0, 10.0, 26.0, 34.0
    across = scale([x for curve in curves for x in curve.x], left, width - right, 0.0)
    up = Scale(*limits, height - bottom, top)
    parts = [text(2, 14, title, kind="strong")]
    for value in ticks(up.low, up.high, 4):
        parts += [line(left, up(value), width - right, up(value), "grid")]
        parts += [text(left - 5, up(value) + 4, number(value), "end")]
    for value in ticks(across.low, across.high, 4):
        parts.append(text(across(value), height - bottom + 15, number(value), "middle"))
    parts.append(line(left, height - bottom, width - right, height - bottom, "axis"))
    parts.append(text(width - right, height - 4, xlabel, "end"))
    parts.append(
        f'<svg x="{left}" y="{top - 3}" width="{width - left - right}" height="{height - top - bottom + 6}"'
        f' viewBox="{left} {top - 3} {width - left - right} {height - top - bottom + 6}">'
    )
    for curve in curves:
        there = [(across(x), up(a), up(b)) for x, a, b in zip(curve.x, curve.low, curve.high)]
        around = [f"{x:g},{b:g}" for x, _, b in there] + [f"{x:g},{a:g}" for x, a, _ in reversed(there)]
        parts.append(f'<polygon points="{" ".join(around)}" class="band fill {curve.kind}"/>')
    for curve in curves:
        places = " ".join(f"{across(x):g},{up(y):g}" for x, y in zip(curve.x, curve.mean))
        if len(curve.x) == 1:
            parts.append(dot(across(curve.x[0]), up(curve.mean[0]), curve.kind, title, 3))
        parts.append(f'<polyline points="{places}" class="curve {curve.kind}"/>')
    return drawing(width, height, [*parts, "</svg>"], says, alone)
