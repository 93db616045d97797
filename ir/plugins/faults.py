"""Foreign code that fails: whatever it raises becomes one line that names it; only the user's interruption passes."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bitlower.ir.diagnostics import BitlowerError, shorten

EXIT_CODES = (1, 2)
"""Those of failures that bitlower has itself: a fault, and bad input."""


@contextmanager
def blamed(what: str, source: str | None = None) -> Iterator[None]:
    """Run foreign code: what it raises, an exit or an exception of its own included, becomes an error about ``what``.

    Args:
        what: the beginning of the message, up to its colon.
        source: the file of the code, whose last line that led to the error is named.

    Raises:
        BitlowerError: the code failed; an error of this type that the code raised itself is passed on.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if isinstance(error, BitlowerError) and error.exit_code in EXIT_CODES:
            raise
        raise BitlowerError(f"{what}: {describe_error(error, source)}") from error


def describe_error(error: BaseException, source: str | None) -> str:
    """The error's type, text and the last line of file ``source`` (else the last line at all) that led to it."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{type(error).__name__}: {error.msg} at {Path(error.filename).name}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if source and f.filename == source] or frames[-1:]
    place = f" at {Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
    text = _first_line(error)
    return f"{type(error).__name__}{f': {text}' if text else ''}{place}"


def source_of(cls: type) -> str | None:
    """The file that defines ``cls``, if there is one."""
    with suppress(TypeError, OSError):
        return inspect.getsourcefile(cls)
    return None


def _first_line(error: BaseException) -> str:
    """The first line of the error's text, which is foreign too."""
    try:
        return shorten(next(iter(str(error).splitlines()), ""))
    except Exception:
        return "(its text cannot be read)"
