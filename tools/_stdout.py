"""Standard output holds results and nothing else: what plugins and libraries print goes to standard error."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

_results: TextIO | None = None


def result_stream() -> TextIO:
    """Where results go: standard output as it was before :func:`results_alone`."""
    return _results or sys.stdout


@contextmanager
def results_alone() -> Iterator[None]:
    """In the block only what is written to :func:`result_stream` reaches standard output.

    All else, also what compiled code writes to the descriptor, goes to standard error; closing the streams that foreign
    code sees closes neither.
    """
    global _results
    kept = sys.stdout
    real = _descriptor(kept)
    if real is None:  # replaced by whoever called us
        _results, sys.stdout = kept, sys.stderr
        try:
            yield
        finally:
            _results, sys.stdout = None, kept
        return
    kept.flush()
    copy = os.dup(real)
    _results = io.TextIOWrapper(os.fdopen(copy, "wb"), encoding=kept.encoding, errors=kept.errors, line_buffering=True)
    sys.stdout = io.TextIOWrapper(os.fdopen(os.dup(2), "wb"), encoding=kept.encoding, line_buffering=True)
    os.dup2(2, real)
    try:
        yield
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        with suppress(OSError, ValueError):
            _results.flush()
        os.dup2(copy, real)
        _results, sys.stdout = None, kept


def _descriptor(stream: TextIO) -> int | None:
    """The descriptor behind standard output, if it is there and is standard output's."""
    with suppress(OSError, ValueError, AttributeError):
        number = stream.fileno()
        return number if number == 1 else None
    return None
