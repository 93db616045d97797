"""Charts that reports of passes declare, drawn; the parts of the page that are made of them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from bitlower.backends.artifact import parsed
from bitlower.ir.charts import BarChart, Chart, LineChart, MapChart, Topic
from bitlower.passes import known_passes
from bitlower.tools.report.blocks import Block, Chapter, DataTable, Field, Picture, Prose, number, plain_table
from bitlower.tools.report.contents import Material
from bitlower.tools.report.naming import OTHER, place_of
from bitlower.tools.report.svg import Axis, Plot, Series, axis_of, box, legend, lines, picture, rule, short

_WIDEST = 0.84
"""Share of a name's room that its bars take."""
_FEW, _LETTERS, _LEAST = 8, 100, 8
"""Bars that have their names below them; letters for all names together, and for one at least."""
_KINDS = Mapping[str, type[Any]]
_READ: _KINDS = {"lines": LineChart, "bars": BarChart, "map": MapChart}


def charts_of(material: Material, topic: Topic) -> Iterator[tuple[str, Chart]]:
    """The charts of a topic with the step whose report declares them.

    Raises:
        CheckError: a report's charts are none; the entry is named.
    """
    for step, report in material.reports.items():
        for form in report.get("charts", ()):
            kind = _READ.get(str(form.get("kind")))
            if kind is None:
                continue
            chart = parsed(kind, form, f"reports/{step}.json")
            if chart.topic == topic:
                yield step, chart


def chart_blocks(material: Material, topic: Topic) -> Iterator[Block]:
    """The charts of a topic as pictures with their tables; what the pass said stands in front of its first."""
    last = ""
    for place, (step, chart) in enumerate(charts_of(material, topic)):
        if step != last and (said := material.reports[step].get("summary")):
            yield Prose(f"{said}.", strong=step)
        last = step
        key = f"chart-{topic or 'other'}-{place}-{re.sub(r'[^a-z0-9]+', '-', step.lower())}"
        yield draw(key, chart)


def chart_chapter(material: Material, topic: Topic, anchor: str, title: str, about: str, what: str) -> Chapter:
    """A part that is made of charts alone; without any it says which passes draw some.

    Args:
        material: the artifact.
        topic: of the charts.
        anchor: the part's id.
        title: its heading.
        about: how it is read.
        what: what is missing without charts, in a few words.
    """
    blocks = tuple(chart_blocks(material, topic))
    return Chapter(anchor, title, about, blocks, "" if blocks else f"{what}: {who_draws(material, topic)}")


def who_draws(material: Material, topic: Topic) -> str:
    """Which passes would fill a part, in a sentence's end."""
    names = sorted(name for name, cls in known_passes().items() if topic in cls.draws)
    own = [step for step in material.reports if re.sub(r"-\d+$", "", step) in names]
    if own:
        return f"the recipe has {_listed(own)}, whose report holds nothing to draw, or was written by an older version."
    return f"there is no {_listed(names, 'or')} in this recipe, and these are the passes that give it."


def _listed(names: Sequence[str], word: str = "and") -> str:
    quoted = [f"`{name}`" for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} {word} {quoted[-1]}" if quoted else "such pass"


def draw(key: str, chart: Chart) -> Picture | DataTable:
    """A chart as a picture with its table; a map is its own table."""
    if isinstance(chart, LineChart):
        return _lines(key, chart)
    return _bars(key, chart) if isinstance(chart, BarChart) else _map(chart)


def _lines(key: str, chart: LineChart) -> Picture:
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
    rows = [(name, x, y) for name, points in chart.lines.items() for x, y in points]
    table = plain_table(chart.title, ("line", chart.across, chart.up), rows, folded=True)
    return Picture(legend(list(shown)) + picture(key, chart.title, about, body), chart.title, table)


def _bars(key: str, chart: BarChart) -> Picture:
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
    rows = [(name, *(bars[i] for bars in chart.bars.values())) for i, name in enumerate(chart.names)]
    table = plain_table(chart.title, ("name", *chart.bars), rows, folded=True)
    about = f"{chart.up} of {len(chart.names)} names: {', '.join(chart.bars)}"
    head = legend(list(chart.bars)) if len(chart.bars) > 1 else ""
    return Picture(head + picture(key, chart.title, about, body), chart.title, table)


def _names(names: Sequence[str]) -> list[tuple[float, str]]:
    """What stands below bars: the layer where one begins, or the ends of names where they belong to no layers."""
    places = [place_of(name) for name in names]
    if len(names) > _FEW and len({place.layer for place in places}) > 1:
        first = {(place.stack, place.layer): i for i, place in reversed(list(enumerate(places)))}
        return sorted((i, f"layer {layer}" if layer is not None else OTHER) for (_, layer), i in first.items())
    room = max(_LETTERS // max(len(names), 1), _LEAST)
    return [(i, name if len(name) <= room else f"…{name[1 - room :]}") for i, name in enumerate(names)]


def _map(chart: MapChart) -> DataTable:
    return heat_table(chart.title, chart.row_header or "row", chart.columns, zip(chart.rows, chart.cells, strict=True))


def heat_table(
    caption: str, header: str, columns: Sequence[str], rows: Iterable[tuple[str, Sequence[float | None]]]
) -> DataTable:
    """Numbers in cells, the largest the darkest; a number below 0 is not coloured."""
    body = [(name, list(cells)) for name, cells in rows]
    most = max((cell for _, cells in body for cell in cells if cell is not None), default=0.0)

    def field(cell: float | None) -> Field:
        heat = max(cell, 0.0) / most if most > 0 and cell is not None else None
        return Field(number(cell), numeric=True, heat=heat)

    filled = tuple((Field(name), *map(field, cells)) for name, cells in body)
    return DataTable(caption, (header, *columns), filled, is_map=True)


def _fits(value: float | None, logarithmic: bool) -> bool:
    return value is not None and math.isfinite(value) and (value > 0 or not logarithmic)
