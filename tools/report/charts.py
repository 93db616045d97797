"""Charts that reports of passes declare, drawn; the parts of the page that are made of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from bitlower.backends.artifact import parsed
from bitlower.ir.charts import BarChart, Chart, LineChart, MapChart, Topic
from bitlower.passes import known_passes
from bitlower.tools.report.blocks import Block, Chapter, DataTable, Field, Picture, Prose, number, plain_table
from bitlower.tools.report.contents import Material
from bitlower.tools.report.drawings import drawing
from bitlower.tools.report.svg import legend

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
    if isinstance(chart, MapChart):
        return _map(chart)
    names, svg = drawing(key, chart)
    head = legend(names) if len(names) > 1 or isinstance(chart, LineChart) else ""
    table = plain_table(chart.title, *_numbers(chart), folded=True)
    return Picture(head + svg, chart.title, table)


def _numbers(chart: LineChart | BarChart) -> tuple[tuple[str, ...], list[tuple[str | float | None, ...]]]:
    """Columns and rows of the table of a picture."""
    if isinstance(chart, LineChart):
        points = [(name, x, y) for name, points in chart.lines.items() for x, y in points]
        return ("line", chart.across, chart.up), list(points)
    rows = [(name, *(bars[i] for bars in chart.bars.values())) for i, name in enumerate(chart.names)]
    return ("name", *chart.bars), list(rows)


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
