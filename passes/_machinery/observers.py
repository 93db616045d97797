"""Observers stand around every pass: verification, time and memory, progress, printing.

The ledger and the reproducer have modules of their own.
"""

from __future__ import annotations

import abc
import difflib
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass, field
from typing import Any, TextIO

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from bitlower.ir import CheckError, Program
from bitlower.ir.verifier import verify
from bitlower.passes._machinery.base import Context, Pass
from bitlower.passes._machinery.pipeline import format_pipeline


class Observer:
    """What stands around a pass; the manager calls observers in the order in which they are given.

    Derive from it and override what is needed.
    """

    def before(self, pass_: Pass, program: Program, context: Context) -> None:
        """``pass_`` is about to get a clone of ``program``."""

    def after(self, pass_: Pass, program: Program, context: Context, changed: bool) -> None:
        """``pass_`` gave ``program``; it is the one from before if nothing changed."""

    def failed(self, pass_: Pass, program: Program, context: Context, error: BaseException) -> None:
        """``pass_``, or a check of it, raised ``error`` on ``program``, which is as it was before."""


class Recorder(Observer, abc.ABC):
    """An observer whose record of a pass is kept in the cache, so that a resumed run returns the same record."""

    @abc.abstractmethod
    def key(self, context: Context) -> str:
        """What the record depends on besides the program and the pass."""

    @abc.abstractmethod
    def row(self) -> Any:
        """The record that the last ``after`` made, as plain data; None if it made none."""

    @abc.abstractmethod
    def restore(self, row: Any) -> None:
        """Take ``row``, recorded in an earlier run, in place of ``after``."""


class Verify(Observer):
    """Verify the program after every pass; the manager does so by default."""

    def after(self, pass_: Pass, program: Program, context: Context, changed: bool) -> None:
        """Raise CheckError, which names the pass, for a program that is not well formed."""
        if not changed:
            return
        try:
            verify(program)
        except CheckError as error:
            raise CheckError(f"the pass {pass_.name!r} broke the program: {error.message}", hint=error.hint) from error


@dataclass(frozen=True)
class PassTime:
    """What a pass, with the checks around it, took: wall-clock seconds, and the peak of resident bytes."""

    name: str
    seconds: float
    peak_bytes: int


class Timing(Observer):
    """Wall-clock time and peak memory of every pass, in ``rows``; put it first, to leave out other observers.

    Args:
        interval: seconds between two looks at the resident memory.
    """

    def __init__(self, interval: float = 0.01) -> None:
        self.rows: list[PassTime] = []
        self.interval = interval
        self._sampler: _Sampler | None = None
        self._start = 0.0

    def before(self, pass_: Pass, program: Program, context: Context) -> None:
        """Start the clock."""
        self._sampler = _Sampler(self.interval)
        self._sampler.start()
        self._start = time.perf_counter()

    def after(self, pass_: Pass, program: Program, context: Context, changed: bool) -> None:
        """Stop the clock."""
        self._stop(pass_)

    def failed(self, pass_: Pass, program: Program, context: Context, error: BaseException) -> None:
        """Stop the clock if it still runs."""
        self._stop(pass_)

    def _stop(self, pass_: Pass) -> None:
        if self._sampler is not None:
            seconds = time.perf_counter() - self._start
            self.rows.append(PassTime(pass_.name, seconds, self._sampler.stop()))
            self._sampler = None


class _Sampler(threading.Thread):
    """Looks at the process's resident memory again and again, until it is stopped."""

    def __init__(self, interval: float) -> None:
        super().__init__(daemon=True)
        self._process = psutil.Process()
        self._interval = interval
        self._done = threading.Event()
        self.peak = self._process.memory_info().rss

    def run(self) -> None:
        while not self._done.wait(self._interval):
            self.peak = max(self.peak, self._process.memory_info().rss)

    def stop(self) -> int:
        """The peak in bytes."""
        self._done.set()
        self.join()
        return max(self.peak, int(self._process.memory_info().rss))


class Progress(Observer):
    """A bar for what a pass iterates over through ``context.track``, and a line a pass when it is done.

    Args:
        console: where to; standard error by default.
        total: the number of passes, if it is to be shown.
    """

    def __init__(self, console: Console | None = None, total: int | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.total = total
        self.done = 0
        self._bar: RichProgress | None = None
        self._track: Callable[[Iterable[Any], object], Iterator[Any]] | None = None

    def before(self, pass_: Pass, program: Program, context: Context) -> None:
        """Show the bar and lend it to the pass."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = RichProgress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        self._bar.start()
        self._bar.add_task(f"{self._position()}{pass_.name}", total=None)
        self._track, context.track = context.track, self._follow

    def after(self, pass_: Pass, program: Program, context: Context, changed: bool) -> None:
        """Take the bar away and say what the pass did."""
        self._stop(context)
        text = f"{self._position()}{format_pipeline([pass_])}: {'changed' if changed else 'unchanged'}"
        self.console.print(text, markup=False, highlight=False)
        self.done += 1

    def failed(self, pass_: Pass, program: Program, context: Context, error: BaseException) -> None:
        """Take the bar away."""
        self._stop(context)

    def _position(self) -> str:
        return f"[{self.done + 1}/{self.total}] " if self.total else ""

    def _follow(self, items: Iterable[Any], label: object) -> Iterator[Any]:
        assert self._bar is not None
        task = self._bar.add_task(f"  {label}", total=len(items) if isinstance(items, Sized) else None)
        for item in items:
            yield item
            self._bar.update(task, advance=1, description=f"  {label}")
        self._bar.remove_task(task)

    def _stop(self, context: Context) -> None:
        if self._bar is not None and self._track is not None:
            self._bar.stop()
            context.track = self._track
            self._bar = self._track = None


@dataclass
class PrintAfterChange(Observer):
    """Print the program after every pass that changed it.

    Args:
        stream: where to; standard error if None.
        diff: print only the lines that differ, with three around them.
    """

    stream: TextIO | None = None
    diff: bool = False
    _text: str = field(default="", init=False, repr=False)

    def before(self, pass_: Pass, program: Program, context: Context) -> None:
        """Remember the program's text."""
        if self.diff:
            self._text = str(program)

    def after(self, pass_: Pass, program: Program, context: Context, changed: bool) -> None:
        """Print the program, or what changed in it."""
        if not changed:
            return
        text = str(program)
        if self.diff:
            lines = difflib.unified_diff(self._text.splitlines(), text.splitlines(), "before", "after", lineterm="")
            text = "\n".join(lines) + "\n"
        print(f"; after {format_pipeline([pass_])}\n{text}", end="", file=self.stream or sys.stderr)
