"""Text files of data, read line by line or piece by piece, so that no file takes more memory than a line may."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from bitlower.ir import BitlowerError
from bitlower.ir.files import open_regular, reason

LONGEST = 4 << 20
"""Bytes of a line."""


def read_lines(path: Path, *, whole: bool = False) -> Iterator[tuple[int, str]]:
    """Lines with their numbers (from 1) and their line breaks; a byte-order mark is dropped.

    Args:
        path: a regular file of UTF-8 text.
        whole: a line longer than ``LONGEST`` comes in several pieces; else it is an error.

    Raises:
        BitlowerError: no such file, bytes that are not UTF-8, a null character or too long a line.
    """
    try:
        return _decoded(path, open_regular(path), whole)
    except (OSError, ValueError) as error:
        raise BitlowerError(f"cannot read the data file {path}: {reason(error)}") from None


def _decoded(path: Path, stream: BinaryIO, whole: bool) -> Iterator[tuple[int, str]]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    number, more = 1, True
    with stream:
        while more:
            raw = stream.readline(LONGEST)
            more = bool(raw)
            ended = len(raw) < LONGEST or raw.endswith(b"\n")
            if not (ended or whole):
                raise BitlowerError(f"{path}, line {number}: more than {LONGEST} bytes", hint="one text a line")
            try:
                line = decoder.decode(raw, ended)
            except UnicodeDecodeError as error:
                raise BitlowerError(f"{path}, line {number}: byte {error.start} is not UTF-8") from None
            if "\0" in line:
                raise BitlowerError(f"{path}, line {number}: a null character", hint="save the file as UTF-8 text")
            if line:
                yield number, line
            number += ended
