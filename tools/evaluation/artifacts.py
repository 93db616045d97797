"""Artefacts as input: nothing of one is loaded before its files are known to be those that were written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from bitlower.ir import BitlowerError, CheckError


@contextmanager
def as_input() -> Iterator[None]:
    """Turn a failed check of an artefact that was given to be run into bad input, which it is.

    Raises:
        BitlowerError: in place of a CheckError.
    """
    try:
        yield
    except CheckError as error:
        raise BitlowerError(error.message, hint=error.hint) from None
