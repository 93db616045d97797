"""Columns of data files, read line by line.

One text a line (``.txt`` and anything unknown), ``.tsv`` without quoting (as GLUE writes it), ``.csv`` with quoting,
and ``.jsonl`` with one object a line. A column is a name in the header line (or a key), or a number counted from 0 in
a file without a header line.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bitlower.ir import BitlowerError, nearest, shorten
from bitlower.ir.files import check_name
from bitlower.ir.json_files import object_of, parse_json
from bitlower.tools.data.lines import read_lines

TABLES = (".tsv", ".csv", ".jsonl")


@dataclass(frozen=True)
class Row:
    """The values of the chosen columns, and the line they stand on (from 1)."""

    line: int
    values: tuple[str, ...]


def split_column(data: str | os.PathLike[str]) -> tuple[Path, str | None]:
    """``FILE:COLUMN`` as a file and a column; a file of that whole name comes first.

    Raises:
        BitlowerError: no file can have that name.
    """
    name = os.fspath(data)
    stem, colon, column = name.rpartition(":")
    if colon and not check_name(name).exists() and Path(stem).suffix.lower() in TABLES:
        return Path(stem), column
    return Path(name), None


def read_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """The chosen columns of each line; no columns: the line itself.

    Raises:
        BitlowerError: no such file or column, a line with fewer columns, bytes that are not UTF-8.
    """
    lines = read_lines(path)
    kind = path.suffix.lower()
    if not columns:
        return (Row(number, (line.rstrip("\r\n"),)) for number, line in lines)
    if kind == ".jsonl":
        return _json_rows(path, lines, columns)
    if kind not in TABLES:
        raise BitlowerError(f"{path} has no columns", hint="name a .tsv, .csv or .jsonl file")
    return _table_rows(path, _csv_cells(path, lines) if kind == ".csv" else _tsv_cells(lines), columns)


def read_whole(path: Path, limit: int | None = None) -> str:
    """The text of a file as it is, whatever its kind; no more lines are read once ``limit`` characters are there.

    Raises:
        BitlowerError: no such file, or bytes that are not UTF-8.
    """
    return "".join(_until(limit, (line for _, line in read_lines(path, whole=True))))


def joined(path: Path, columns: Sequence[str], joiner: str, limit: int | None = None) -> str:
    """The values of the first of ``columns`` (no columns: the lines without their breaks), joined by ``joiner``.

    Blank values stay, and nothing is stripped; no more rows are read once ``limit`` characters are there. Raises as
    :func:`read_rows`.
    """
    return joiner.join(_until(limit, (row.values[0] for row in read_rows(path, columns))))


def _until(limit: int | None, parts: Iterable[str]) -> Iterator[str]:
    """``parts`` up to the one that reaches ``limit`` characters."""
    count = 0
    for part in parts:
        yield part
        count += len(part)
        if limit is not None and count >= limit:
            return


def header(path: Path) -> list[str]:
    """The names in the first line (the keys of the first object)."""
    lines = read_lines(path)
    match path.suffix.lower():
        case ".jsonl":
            return next((list(form) for _, form in _objects(path, lines)), [])
        case ".csv":
            return next((cells for _, cells in _csv_cells(path, lines)), [])
        case _:
            return next((cells for _, cells in _tsv_cells(lines)), [])


def read_objects(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """The objects of a ``.jsonl`` file with their lines (from 1); empty lines are left out.

    Raises:
        BitlowerError: no such file, or a line that is no JSON object.
    """
    return _objects(path, read_lines(path))


def number(path: Path, row: Row, value: str) -> float:
    """``value`` of ``row`` as a finite number.

    Raises:
        BitlowerError: it is none; the message names the file and the line.
    """
    try:
        result = float(value)
    except ValueError:
        result = math.nan
    if not math.isfinite(result):
        raise BitlowerError(
            f"{path}, line {row.line}: {shorten(repr(value))} is not a finite number", hint="check the column"
        )
    return result


def _tsv_cells(lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, list[str]]]:
    """Cells without any quoting: ``csv.QUOTE_NONE``, and a stray carriage return or a long cell does no harm."""
    for count, line in lines:
        if stripped := line.rstrip("\r\n"):
            yield count, stripped.split("\t")


def _csv_cells(path: Path, lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader((line for _, line in lines), strict=True)
    try:
        for cells in reader:
            if cells:
                yield reader.line_num, cells
    except csv.Error as error:
        raise BitlowerError(f"{path}, line {reader.line_num}: {error}") from None


def _table_rows(path: Path, cells: Iterator[tuple[int, list[str]]], columns: Sequence[str]) -> Iterator[Row]:
    places = [int(column) for column in columns if _is_place(column)]
    if len(places) != len(columns):  # names: the first line is the header
        places = _find_columns(path, next(cells, (1, []))[1], columns)
    for line, values in cells:
        if len(values) <= max(places):
            raise BitlowerError(f"{path}, line {line}: {len(values)} columns, column {max(places)} is asked for")
        yield Row(line, tuple(values[place] for place in places))


def _is_place(column: str) -> bool:
    return column.isdecimal() and len(column) < 10


def _find_columns(path: Path, header: Sequence[str], columns: Sequence[str]) -> list[int]:
    names = [name.strip() for name in header]
    places = []
    for column in columns:
        if column not in names and not (_is_place(column) and int(column) < len(names)):
            raise BitlowerError(f"{path} has no column {shorten(repr(column))}", hint=nearest(column, names))
        places.append(names.index(column) if column in names else int(column))
    return places


def _objects(path: Path, lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, dict[str, object]]]:
    for count, line in lines:
        if not line.strip():
            continue
        try:
            form = object_of(parse_json(line))
        except ValueError as error:
            raise BitlowerError(f"{path}, line {count}: not JSON: {error}") from None
        yield count, form


def _json_rows(path: Path, lines: Iterable[tuple[int, str]], columns: Sequence[str]) -> Iterator[Row]:
    for count, form in _objects(path, lines):
        for column in columns:
            if column not in form:
                raise BitlowerError(
                    f"{path}, line {count}: no column {shorten(repr(column))}", hint=nearest(column, form)
                )
            if not isinstance(form[column], str | int | float):
                raise BitlowerError(f"{path}, line {count}: column {column!r} is no text and no number")
        yield Row(count, tuple(str(form[column]) for column in columns))
