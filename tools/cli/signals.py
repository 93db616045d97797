"""Signals that end a run: each becomes an exception, so that what is half-written is removed, and is remembered."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_WORDS = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "hung up"}


class EndedError(KeyboardInterrupt):
    """A signal asked for the end; what lets Python's own interruption through lets this through."""


class Signals:
    """A context in which SIGINT, SIGTERM and SIGHUP raise :class:`EndedError` in the main thread.

    A library that is interrupted as it is imported, or as it calls back into Python, may make another exception of it:
    so whoever ends on an exception asks ``word`` first. A signal that is ignored or handled already stays so. After the
    first one the others are ignored, so that the clearing up is not cut short; but SIGINT raises again.
    """

    def __init__(self) -> None:
        self._seen: signal.Signals | None = None
        self._kept: dict[signal.Signals, Any] = {}

    @property
    def word(self) -> str:
        """What happened; empty if no signal came."""
        return _WORDS[self._seen.name] if self._seen else ""

    @property
    def exit_code(self) -> int:
        """128 and the number of the signal that came first, as shells have it."""
        return 128 + (self._seen or 0)

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in _WORDS if hasattr(signal, name)):
                handler = signal.getsignal(number)
                if handler in (signal.SIG_DFL, signal.default_int_handler):
                    self._kept[number] = handler
                    signal.signal(number, self._end)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        for number, handler in self._kept.items():
            signal.signal(number, handler)

    def _end(self, number: int, frame: FrameType | None) -> None:
        first = self._seen is None
        self._seen = self._seen or signal.Signals(number)
        if first or number == signal.SIGINT:
            raise EndedError
