"""What passes leave in the context: facts about the program, and records of what they did."""

from __future__ import annotations

import abc
from collections.abc import Iterable

from bitlower.ir.charts import Chart

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]
"""Column names, and rows of as many cells."""
MOST_LINES = 8
"""The most lines that :func:`few` shows."""


class Report(abc.ABC):
    """Base of results: frozen dataclasses of plain data, which a pass hands to ``context.put``.

    ``bitlower run`` prints :meth:`summary` and :meth:`details`. It writes the fields to ``reports/<pass>.json``, with
    what :meth:`charts` returns under ``charts``, and those charts as a picture to ``reports/<pass>.svg``. A report is
    void as soon as a pass changes the program, unless it is a :class:`Record`.
    """

    @abc.abstractmethod
    def summary(self) -> str:
        """What came out, in one line."""

    def details(self) -> Iterable[str]:
        """Lines below the summary: what a user should know of, and not all that is in the fields."""
        return ()

    def charts(self) -> Iterable[Chart]:
        """What of it is worth a picture; ``bitlower report`` draws it."""
        return ()

    def text(self) -> str:
        """The summary and the details."""
        return "\n".join([self.summary(), *(f"  {line}" for line in self.details())])


class Record(Report):
    """Base of reports that say what a pass did: they hold to the end, however the program changes."""


def few(lines: Iterable[str]) -> list[str]:
    """At most :data:`MOST_LINES` of ``lines``, and how many more there are."""
    lines = list(lines)
    more = len(lines) - MOST_LINES
    return [*lines[:MOST_LINES], f"and {more} more"] if more > 0 else lines


def counted(count: int, noun: str) -> str:
    """``1 weight``, ``2 weights``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
