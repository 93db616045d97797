"""What the parts of a report are made of: plain data that the templates write as HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from bitlower.tools.render import Cell, format_cell

LEAST_HEAT, MOST_HEAT = 0.0, 1.0
"""Ends of what colours a cell."""
DARK = 0.55
"""From this heat on the text of a cell is written in the colour of the page."""


@dataclass(frozen=True)
class Field:
    """One cell of a table.

    Args:
        text: what stands there.
        link: the id of a place in the page that it leads to.
        note: what is shown on hover, and read with the text.
        heat: from 0 to 1, how strongly the cell is coloured; None: not at all.
        numeric: whether it stands right.
        sort: what its column is sorted by, if not the text.
    """

    text: str
    link: str = ""
    note: str = ""
    heat: float | None = None
    numeric: bool = False
    sort: float | None = None

    @property
    def percent(self) -> int:
        """The heat in percent."""
        return round(100 * min(max(self.heat or 0.0, LEAST_HEAT), MOST_HEAT))

    @property
    def is_dark(self) -> bool:
        """Whether the cell is coloured so strongly that its text changes colour."""
        return (self.heat or 0.0) > DARK


@dataclass(frozen=True)
class Prose:
    """A paragraph of text; ``strong`` stands in front of it, and ``lead`` makes it larger."""

    kind: ClassVar[str] = "prose"
    text: str
    strong: str = ""
    lead: bool = False


@dataclass(frozen=True)
class DataTable:
    """A table: the first cell of each row names it.

    Args:
        caption: what it shows.
        columns: the headers.
        rows: as many cells each.
        folded: whether it lies behind its caption until it is asked for.
        is_map: whether it is a picture itself: its cells are coloured and of equal width.
    """

    kind: ClassVar[str] = "table"
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Field, ...], ...]
    folded: bool = False
    is_map: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether all cells but the first of each row are numbers and nothing more."""
        return not self.is_map and all(
            field.numeric and not field.note and field.sort is None and field.heat is None
            for row in self.rows
            for field in row[1:]
        )


@dataclass(frozen=True)
class Picture:
    """An SVG with the table of the same numbers."""

    kind: ClassVar[str] = "picture"
    svg: str
    caption: str
    table: DataTable


@dataclass(frozen=True)
class Fact:
    """A figure with its name, what it means, and whether it is as it should be (``good``, ``bad`` or empty)."""

    name: str
    value: str
    meaning: str = ""
    state: str = ""


@dataclass(frozen=True)
class FactList:
    """Figures side by side."""

    kind: ClassVar[str] = "facts"
    facts: tuple[Fact, ...]


@dataclass(frozen=True)
class Listing:
    """Text in lines that are kept as they are, such as a recipe."""

    kind: ClassVar[str] = "listing"
    caption: str
    text: str


@dataclass(frozen=True)
class Heading:
    """A heading within a part, with an id that links lead to; ``back`` leads to where one came from."""

    kind: ClassVar[str] = "heading"
    text: str
    anchor: str
    back: str = ""


@dataclass(frozen=True)
class SideBySide:
    """Two pictures side by side where there is room."""

    kind: ClassVar[str] = "pair"
    pictures: tuple[Picture, ...]


Block = SideBySide | Prose | DataTable | Picture | FactList | Listing | Heading


@dataclass(frozen=True)
class Chapter:
    """One part of the report.

    Args:
        anchor: its id.
        title: its heading.
        about: what it shows and how it is read, one or two sentences.
        blocks: its contents.
        missing: in their place, why there are none and what would make them.
    """

    anchor: str
    title: str
    about: str
    blocks: tuple[Block, ...] = field(default=())
    missing: str = ""


def plain_table(
    caption: str, columns: Sequence[str], rows: Iterable[Sequence[Cell | Field]], *, folded: bool = False
) -> DataTable:
    """A table of numbers and words."""
    return DataTable(caption, tuple(columns), tuple(tuple(map(as_field, row)) for row in rows), folded)


def as_field(value: Cell | Field) -> Field:
    """A cell with the digits that matter."""
    if isinstance(value, Field):
        return value
    if isinstance(value, int | float):
        return Field(number(value), numeric=True)
    return Field(format_cell(value))


def number(value: float | None) -> str:
    """A number with the digits that matter; a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}"
