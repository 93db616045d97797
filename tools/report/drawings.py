"""Charts of lines and bars as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence

from bitlower.ir.charts import BarChart, LineChart
from bitlower.tools.report.blocks import number
from bitlower.tools.report.naming import OTHER, place_of
from bitlower.tools.report.svg import Axis, Plot, Series, axis_of, box, lines, picture, rule, short

_WIDEST = 0.84
"""Share of a name's room that its bars take."""
_FEW, _LETTERS, _LEAST = 8, 100, 8
"""Bars that have their names below them; letters for all names together, and for one at least."""


def drawing(key: str, chart: LineChart | BarChart) -> tuple[list[str], str]:
    """What its colours stand for, in their order, and the picture."""
    return _lines(key, chart) if isinstance(chart, LineChart) else _bars(key, chart)


def _lines(key: str, chart: LineChart) -> tuple[list[str], str]:
    shown = {
        name: [(x, y if _fits(y, chart.logarithmic) else None) for x, y in points]
        for name, points in chart.lines.items()
    }
    heights = [y for points in shown.values() for _, y in points if y is not None]
    if chart.chosen is not None and _fits(chart.chosen[1], chart.logarithmic):
        heights.append(chart.chosen[1])
    places = [x for points in shown.values() for x, _ in points] + ([chart.chosen[0]] if chart.chosen else [])
    up = axis_of(heights, chart.up, logarithmic=chart.logarithmic and bool(heights))
    plot = Plot(axis_of(places, chart.across), up)
    series = [
        Series(name, [(x, y, f"{name}: {chart.across} {short(x)}, {chart.up} {number(y)}") for x, y in points])
        for name, points in shown.items()
    ]
    body = plot.frame() + lines(plot, series)
    about = f"{chart.up} over {chart.across}: {', '.join(shown)}"
    if chart.chosen is not None:
        x, y = chart.chosen
        about += f"; chosen: {short(x)}, {short(y)}"
        body += rule(plot, x, f"chosen: {short(y)}")
    return list(shown), picture(key, chart.title, about, body)


def _bars(key: str, chart: BarChart) -> tuple[list[str], str]:
    numbers = [y for bars in chart.bars.values() for y in bars if y is not None and _fits(y, chart.logarithmic)]
    up = axis_of(numbers, chart.up, logarithmic=chart.logarithmic and bool(numbers), zero=not chart.logarithmic)
    plot = Plot(Axis(-0.5, len(chart.names) - 0.5, ""), up)
    body = plot.frame(_names(chart.names))
    width = _WIDEST / max(len(chart.bars), 1)
    for place, (what, bars) in enumerate(chart.bars.items()):
        marks = []
        for i, y in enumerate(bars):
            if _fits(y, chart.logarithmic):
                assert y is not None
                left = i - _WIDEST / 2 + place * width
                low, high = sorted((y, up.low if chart.logarithmic else 0.0))
                said = f"{chart.names[i]}, {what}: {number(y)}"
                marks.append(box(plot, left, left + width, low, high, said, "bar"))
        body += f'<g class="s{place}">{"".join(marks)}</g>'
    about = f"{chart.up} of {len(chart.names)} names: {', '.join(chart.bars)}"
    return list(chart.bars), picture(key, chart.title, about, body)


def _names(names: Sequence[str]) -> list[tuple[float, str]]:
    """What stands below bars: the layer where one begins, or the ends of names where they belong to no layers."""
    places = [place_of(name) for name in names]
    if len(names) > _FEW and len({place.layer for place in places}) > 1:
        first = {(place.stack, place.layer): i for i, place in reversed(list(enumerate(places)))}
        return sorted((i, f"layer {layer}" if layer is not None else OTHER) for (_, layer), i in first.items())
    room = max(_LETTERS // max(len(names), 1), _LEAST)
    return [(i, name if len(name) <= room else f"…{name[1 - room :]}") for i, name in enumerate(names)]


def _fits(value: float | None, logarithmic: bool) -> bool:
    return value is not None and math.isfinite(value) and (value > 0 or not logarithmic)
