"""What people see: tables, progress bars and one-line notes on the terminal, JSON for machines."""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from bitlower.tools.stdout import result_stream

Cell = str | int | float | None
_TICK, _FULL = 0.2, 0.99
"""Seconds between two looks at the time, and how far a bar goes before what it stands for is done."""


@dataclass(frozen=True)
class Display:
    """Where output goes: results to standard output (as JSON if ``machine``), progress and notes to standard error."""

    machine: bool = False
    quiet: bool = False

    def track(self, items: Iterable[Any], label: object) -> Iterator[Any]:
        """Give ``items`` one by one and show a progress bar meanwhile, if standard error is a terminal.

        The label is read anew at each item.
        """
        console = Console(stderr=True)
        if self.machine or self.quiet or not console.is_terminal:
            yield from items
            return
        columns = (
            *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
            *(TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()),
        )
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(str(label), total=len(items) if isinstance(items, Sized) else None)
            for item in items:
                yield item
                progress.update(task, advance=1, description=str(label))

    @contextmanager
    def expecting(self, label: str, seconds: float | None = None) -> Iterator[None]:
        """Show what is going on while the block runs, if standard error is a terminal.

        Args:
            label: what it is.
            seconds: that it will take by prediction: a bar with the time left, which waits at its end if it takes
                longer; None: the time so far alone.
        """
        console = Console(stderr=True)
        if self.machine or self.quiet or not console.is_terminal:
            yield
            return
        left = (TextColumn("left"), TimeRemainingColumn()) if seconds else ()
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), *left)
        done, start = threading.Event(), time.monotonic()
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(label, total=seconds)

            def advance() -> None:
                while seconds and not done.wait(_TICK):
                    progress.update(task, completed=min(time.monotonic() - start, _FULL * seconds))

            ticking = threading.Thread(target=advance, name="progress", daemon=True)
            ticking.start()
            try:
                yield
            finally:
                done.set()
                ticking.join()

    def note(self, text: str) -> None:
        """Print one line about what is going on, to standard error."""
        if not (self.machine or self.quiet):
            print(text, file=sys.stderr, flush=True)

    def result(self, form: Mapping[str, Any], *tables: Table | str) -> None:
        """Print a command's result: ``form`` as JSON for machines, else ``tables`` and lines of text."""
        if self.machine:
            print(json.dumps(form, indent=2, ensure_ascii=False), file=result_stream())
        elif not self.quiet:
            show(*tables)

    def text(self, form: Mapping[str, Any], text: str) -> None:
        """Print a command's result as plain ``text``, or ``form`` as JSON for machines."""
        print(json.dumps(form, indent=2, ensure_ascii=False) if self.machine else text, file=result_stream())


WIDE = 200
"""Columns of tables where standard output is no terminal and ``$COLUMNS`` does not say."""


def show(*parts: Table | str) -> None:
    """Print tables and lines to standard output: tables as wide as the terminal, or ``$COLUMNS``, lines as they are."""
    console = Console(file=result_stream(), markup=False, highlight=False)
    terminal = console.is_terminal
    if not terminal:
        width = shutil.get_terminal_size((WIDE, 0)).columns
        console = Console(file=result_stream(), width=width, markup=False, highlight=False)
    for part in parts:
        if isinstance(part, str):
            console.print(part, soft_wrap=not terminal)
            continue
        title, part.title = part.title, None
        console.print(title, style="bold", soft_wrap=not terminal)
        console.print(part)


def make_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> Table:
    """A table whose numeric columns stand right; a column is numeric if its first value is."""
    filled = [list(row) for row in rows]
    table = Table(title=title)
    for place, column in enumerate(columns):
        numeric = bool(filled) and isinstance(filled[0][place], int | float)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in filled:
        table.add_row(*map(format_cell, row))
    return table


def format_cell(value: Cell) -> str:
    """A number with the digits that matter, nothing for None."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def format_bytes(count: float) -> str:
    """A size in decimal units (1 MB = 10⁶ bytes).

    >>> format_bytes(23_300_000)
    '23.3 MB'
    """
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
