"""Charts as plain data: what a report of a pass wants to have drawn, without a word on how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Topic = Literal["", "front", "outliers", "sensitivity", "training"]
"""The part of the report that a chart belongs to; empty: that of the ledger, below what passes say."""


@dataclass(frozen=True)
class LineChart:
    """Lines through points.

    Args:
        title: what it shows.
        across: what the numbers to the right are, with their unit.
        up: what the numbers upwards are, with their unit.
        lines: points ``(x, y)`` by the line's name; ``y`` None or not finite breaks a line.
        topic: where it belongs.
        logarithmic: whether equal heights are equal factors; points that are not above 0 are left out then.
        chosen: a point that was chosen among them, marked.
    """

    title: str
    across: str
    up: str
    lines: Mapping[str, tuple[tuple[float, float | None], ...]]
    topic: Topic = ""
    logarithmic: bool = False
    chosen: tuple[float, float] | None = None
    kind: Literal["lines"] = "lines"


@dataclass(frozen=True)
class BarChart:
    """Bars side by side.

    Args:
        title: what it shows.
        up: what the numbers are, with their unit.
        names: of the bars.
        bars: a number for each name, None for none, by what the bars stand for; several stand side by side.
        topic: where it belongs.
        logarithmic: whether equal heights are equal factors.
    """

    title: str
    up: str
    names: tuple[str, ...]
    bars: Mapping[str, tuple[float | None, ...]]
    topic: Topic = ""
    logarithmic: bool = False
    kind: Literal["bars"] = "bars"


@dataclass(frozen=True)
class MapChart:
    """Numbers in rows and columns, the larger the darker.

    Args:
        title: what it shows.
        rows: names of the rows.
        columns: names of the columns.
        cells: for each row a number for each column; None for none.
        topic: where it belongs.
        row_header: what the rows are.
    """

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[float | None, ...], ...] = field(default=())
    topic: Topic = ""
    row_header: str = ""
    kind: Literal["map"] = "map"


Chart = LineChart | BarChart | MapChart


def chart_form(chart: Chart) -> dict[str, Any]:
    """A chart as plain data for JSON; ``kind`` says which it is."""
    return asdict(chart)
