"""Standard output holds results and nothing else: what plugins and libraries print goes to standard error."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

STDOUT, STDERR = 1, 2
"""The descriptors of POSIX."""
_results: TextIO | None = None


def result_stream() -> TextIO:
    """Where results go: standard output as it was before :func:`results_alone`."""
    return _results or sys.stdout


@contextmanager
def results_alone() -> Iterator[None]:
    """In the block only what is written to :func:`result_stream` reaches standard output.

    All else, also what compiled code writes to the descriptor, goes to standard error; closing the streams that foreign
    code sees closes neither. Where standard output is another stream, put there by whoever called us, results go to it.
    """
    global _results
    original = sys.stdout
    real = _descriptor(original) == STDOUT
    copy, other = _duplicate(STDOUT), _duplicate(STDERR)
    _results = _stream(os.dup(copy), original) if real else original
    sys.stdout = _stream(os.dup(other), original) if real else sys.stderr
    try:
        original.flush()
        os.dup2(other, STDOUT)
        yield
    finally:
        results, lent, _results, sys.stdout = _results, sys.stdout, None, original
        for stream in (results, lent) if real else ():
            with suppress(OSError, ValueError):
                stream.close()
        with suppress(OSError):
            os.dup2(copy, STDOUT)
        for descriptor in (copy, other):
            with suppress(OSError):
                os.close(descriptor)


def _stream(descriptor: int, like: TextIO) -> TextIO:
    """A text stream of its own to a descriptor, encoded as ``like``."""
    return open(descriptor, "w", encoding=like.encoding, errors=like.errors, buffering=1)


def _duplicate(descriptor: int) -> int:
    """Another descriptor for the same stream; for nowhere if that is closed."""
    try:
        return os.dup(descriptor)
    except OSError:
        return os.open(os.devnull, os.O_WRONLY)


def _descriptor(stream: TextIO) -> int | None:
    with suppress(OSError, ValueError, AttributeError):
        return stream.fileno()
    return None
