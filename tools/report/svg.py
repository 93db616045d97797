"""Pictures as SVG: lines, bars and ranges over axes. Colours and fonts come from the page's style sheet.

Every picture has the role ``img`` with a title and a description, and every mark a title that is shown on hover.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 720, 300
"""Of a picture, in its units."""
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 14, 42
"""Margins around what is drawn in."""
COLORS = 8
"""Different colours of the style sheet; more series begin again, dashed."""
_STEPS = (1, 2, 2.5, 5, 10)
"""Ticks lie at multiples of one of these times a power of ten."""
_FLAT = 1e-300
"""Axes that are no longer have one tick: a step of theirs would be no float."""
LETTER = 6.2
"""Width of a letter of an axis, about."""


@dataclass(frozen=True)
class Axis:
    """Numbers along a side.

    Args:
        low: the least number.
        high: the greatest.
        label: what they are.
        logarithmic: whether equal distances are equal factors; both ends are above 0 then.
    """

    low: float
    high: float
    label: str
    logarithmic: bool = False

    def share(self, value: float) -> float:
        """Where ``value`` lies between the ends, from 0 to 1 and beyond."""
        if self.logarithmic:
            span = math.log(self.high) - math.log(self.low)
            return (math.log(value) - math.log(self.low)) / span if span else 0.5
        span = self.high - self.low
        return (value - self.low) / span if span else 0.5

    def ticks(self, count: int = 5) -> list[float]:
        """Round numbers between the ends; powers of ten on a logarithmic axis with as many of them."""
        if self.logarithmic:
            powers = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
            step = math.ceil(len(powers) / (count + 1)) or 1
            if len(powers) < 2:
                return [value for value in Axis(self.low, self.high, "").ticks(count) if value > 0]
            return [10.0**power for power in powers][::step]
        span = self.high - self.low
        if span <= _FLAT:
            return [self.low]
        rough = span / count
        scale = 10 ** math.floor(math.log10(rough))
        step = next(s * scale for s in _STEPS if s * scale >= rough * (1 - 1e-9))
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def axis_of(values: Iterable[float], label: str, *, logarithmic: bool = False, zero: bool = False) -> Axis:
    """An axis that holds ``values``, and 0 if ``zero``, with a little room at its upper end."""
    numbers = [value for value in values if math.isfinite(value)]
    low, high = (min(numbers), max(numbers)) if numbers else (0.0, 1.0)
    if logarithmic:
        return Axis(low / 1.2, high * 1.2, label, True)
    low, high = (min(low, 0.0), max(high, 0.0)) if zero else (low, high)
    room = 0.05 * ((high - low) or abs(high) or 1.0)
    return Axis(low if zero and low == 0 else low - room, high if zero and high == 0 else high + room, label)


@dataclass(frozen=True)
class Plot:
    """The area between two axes."""

    across: Axis
    up: Axis
    height: int = HEIGHT
    width: int = WIDTH

    def x(self, value: float) -> float:
        """The place of a number along the lower axis."""
        return LEFT + self.across.share(value) * (self.width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """The height of a number."""
        return self.height - BOTTOM - self.up.share(value) * (self.height - TOP - BOTTOM)

    def frame(self, names: Sequence[tuple[float, str]] | None = None) -> str:
        """Grid, ticks and labels; ``names`` stand in place of numbers below."""
        bottom, parts = self.height - BOTTOM, []
        for value in self.up.ticks():
            y = self.y(value)
            parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{self.width - RIGHT}"/>')
            parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short(value)}</text>')
        places = (
            names if names is not None else [(value, short(value)) for value in self.across.ticks(self.width // 100)]
        )
        parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{self.width - RIGHT}"/>')
        right = -math.inf
        for value, name in places:
            x = self.x(value)
            if x - len(name) * LETTER / 2 > right:  # names that would lie over the last one are left out
                parts.append(
                    f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{escape(name)}</text>'
                )
                right = x + len(name) * LETTER / 2 + LETTER
        middle = (TOP + bottom) / 2
        parts.append(_label((LEFT + self.width - RIGHT) / 2, self.height - 6, self.across.label))
        parts.append(
            f'<text class="label" transform="translate(13 {middle:.1f}) rotate(-90)" text-anchor="middle">'
            f"{escape(self.up.label)}</text>"
        )
        return "".join(parts)


def _label(x: float, y: float, text: str) -> str:
    return f'<text class="label" x="{x:.1f}" y="{y}" text-anchor="middle">{escape(text)}</text>'


def picture(key: str, title: str, about: str, body: str, height: int = HEIGHT, width: int = WIDTH) -> str:
    """An SVG element; ``key`` makes its ids, and no other picture of the page has it."""
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-labelledby="{key}-t {key}-d">'
        f'<title id="{key}-t">{escape(title)}</title><desc id="{key}-d">{escape(about)}</desc>{body}</svg>'
    )


@dataclass(frozen=True)
class Series:
    """A line.

    Args:
        name: in the legend.
        points: ``(x, y, what hover says)``; ``y`` None breaks the line.
        link: for each point, the id of a place in the page; empty: none.
    """

    name: str
    points: Sequence[tuple[float, float | None, str]]
    links: Sequence[str] = ()


def lines(plot: Plot, series: Sequence[Series]) -> str:
    """Lines with a dot at every point."""
    parts = []
    for index, one in enumerate(series):
        path, pen = [], "M"
        dots = []
        for place, (x, y, said) in enumerate(one.points):
            if y is None or not math.isfinite(y):
                pen = "M"
                continue
            spot = f"{plot.x(x):.1f} {plot.y(y):.1f}"
            path.append(f"{pen}{spot}")
            pen = "L"
            cx, _, cy = spot.partition(" ")
            dot = f'<circle cx="{cx}" cy="{cy}" r="3.5"><title>{escape(said)}</title></circle>'
            link = one.links[place] if place < len(one.links) else ""
            dots.append(f'<a href="#{link}" aria-label="{escape(said)}">{dot}</a>' if link else dot)
        css = f"s{index % COLORS}{' dashed' if index >= COLORS else ''}"
        parts.append(f'<g class="{css}"><path class="line" d="{"".join(path)}"/>{"".join(dots)}</g>')
    return "".join(parts)


def rule(plot: Plot, value: float, name: str, *, upright: bool = True, css: str = "rule") -> str:
    """A straight mark at ``value``, upright or across, with its name."""
    if upright:
        x = plot.x(value)
        anchor = "end" if x > plot.width / 2 else "start"
        shift = -4 if anchor == "end" else 4
        return (
            f'<path class="{css}" d="M{x:.1f} {TOP}V{plot.height - BOTTOM}"/>'
            f'<text class="note" x="{x + shift:.1f}" y="{TOP + 10}" text-anchor="{anchor}">{escape(name)}</text>'
        )
    y = plot.y(value)
    return (
        f'<path class="{css}" d="M{LEFT} {y:.1f}H{plot.width - RIGHT}"/>'
        f'<text class="note" x="{plot.width - RIGHT - 2}" y="{y - 4:.1f}" text-anchor="end">{escape(name)}</text>'
    )


def box(plot: Plot, left: float, right: float, low: float, high: float, said: str, css: str) -> str:
    """A rectangle between numbers of both axes."""
    x, y = plot.x(left), plot.y(high)
    width, height = max(plot.x(right) - x, 0.5), max(plot.y(low) - y, 0.8)
    title = f"<title>{escape(said)}</title>" if said else ""
    return f'<rect class="{css}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}">{title}</rect>'


def outline(plot: Plot, start: float, step: float, counts: Sequence[float], to_height: Callable[[float], float]) -> str:
    """A histogram as one filled path."""
    base = plot.height - BOTTOM
    path = [f"M{plot.x(start):.1f} {base}"]
    for place, count in enumerate(counts):
        path.append(f"V{plot.y(to_height(count)):.1f}H{plot.x(start + (place + 1) * step):.1f}")
    return f'<path class="bars" d="{"".join(path)}V{base}Z"/>'


def legend(names: Sequence[str]) -> str:
    """The names of series with their colours, as HTML that stands above a picture."""
    items = (
        f'<li{" class=dashed" if i >= COLORS else ""}><span class="swatch s{i % COLORS}"></span>{escape(name)}</li>'
        for i, name in enumerate(names)
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def short(value: float) -> str:
    """A number of an axis."""
    return f"{value:.4g}"
