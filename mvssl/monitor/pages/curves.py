"""Curves as inline SVG, which a page shows without a script and in its own colours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Curve = tuple[Sequence[float], Sequence[float]]
"""x and y."""

_WIDTH, _HEIGHT = 520, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 12, 34
_MOST = 400  # points of a curve: more would not be seen


def svg(curves: Mapping[str, Curve], *, x: str, y: str, log: bool = False) -> str:
    """Draw curves in one frame, with a legend below; "" where there is no point.

    Colours are the classes c0, c1, ... of the page's style; text takes the page's colour.

    Args:
        curves: by name, in the order of the legend.
        x: what stands below.
        y: what the picture shows, for readers that do not see it.
        log: whether y is logarithmic; values of 0 and less are left out then.
    """
    shown = {name: _points(curve, log=log) for name, curve in curves.items()}
    shown = {name: points for name, points in shown.items() if points}
    if not shown:
        return ""
    xs = [a for points in shown.values() for a, _ in points]
    ys = [b for points in shown.values() for _, b in points]
    x_ticks = ticks(min(xs), max(xs))
    y_ticks = log_ticks(min(ys), max(ys)) if log else ticks(min(ys), max(ys))
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1e-9)
    y_low, y_high = y_ticks[0], max(y_ticks[-1], y_ticks[0] + 1e-9)

    def place(a: float, b: float) -> tuple[float, float]:
        across = (a - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)
        up = (b - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)
        return _LEFT + across, _HEIGHT - _BOTTOM - up

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(y)}">']
    for tick in y_ticks:
        _, at = place(x_low, tick)
        label = number(10**tick if log else tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{label}</text>')
    for tick in x_ticks:
        if x_low <= tick <= x_high:
            at, _ = place(tick, y_low)
            parts.append(f'<text x="{at:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{number(tick)}</text>')
    parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 4}" text-anchor="end">{escape(x)}</text>')
    for place_of, points in enumerate(shown.values()):
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in (place(*point) for point in points))
        parts.append(f'<polyline class="curve c{place_of % 6}" points="{path}"/>')
        if len(points) == 1:
            a, b = place(*points[0])
            parts.append(f'<circle class="dot c{place_of % 6}" cx="{a:.1f}" cy="{b:.1f}" r="3"/>')
    parts.append("</svg>")
    if len(shown) > 1:
        keys = "".join(f'<span class="key c{n % 6}">{escape(name)}</span>' for n, name in enumerate(shown))
        parts.append(f'<div class="legend">{keys}</div>')
    return "".join(parts)


def ticks(low: float, high: float, *, about: int = 4) -> list[float]:
    """Round numbers from below `low` to above `high`, some `about` steps apart."""
    if not high > low:
        half = abs(low) / 10 or 1.0
        low, high = low - half, high + half
    rough = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * min((1, 2, 5, 10), key=lambda times: abs(times * unit - rough))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Decimal logarithms of 1, 2 and 5 times powers of ten, or of the powers alone where those would be many.

    The first is at most `low`, the last at least `high`, which are logarithms too.
    """
    digits = (1, 2, 5) if high - low < 2 else (1,)
    powers = range(math.floor(low), math.ceil(high) + 2)
    marks = [power + math.log10(digit) for power in powers for digit in digits]
    first = max(n for n, mark in enumerate(marks) if mark <= low + 1e-9)
    last = min(n for n, mark in enumerate(marks) if mark >= high - 1e-9)
    return marks[first : max(last, first + 1) + 1]


def number(value: float) -> str:
    """A number in few characters."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000:
        return f"{value / 1000:,.0f}k"
    if abs(value) < 0.001:
        return f"{value:.0e}"
    return f"{value:.4g}"


def _points(curve: Curve, *, log: bool) -> list[tuple[float, float]]:
    """At most `_MOST` points, each the mean of its neighbours where there are more."""
    pairs = [(float(a), float(b)) for a, b in zip(*curve, strict=True) if math.isfinite(b) and (b > 0 or not log)]
    share = -(-len(pairs) // _MOST) or 1
    points = []
    for at in range(0, len(pairs), share):
        some = pairs[at : at + share]
        a, b = (sum(values) / len(some) for values in zip(*some, strict=True))
        points.append((a, math.log10(b) if log else b))
    return points
