"""Texts for calibration and for holding out: drawn from data files in one pass, or windows of one long text."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from bitlower.ir import BitlowerError
from bitlower.tools.data.tables import TABLES, Row, header, joined, number, read_rows, read_whole, split_column

__all__ = [
    "Column",
    "Row",
    "Text",
    "TextSplit",
    "check_finite",
    "check_one_column",
    "check_windows",
    "draw",
    "number",
    "read_examples",
    "read_rows",
    "read_text",
    "read_texts",
    "split_column",
    "split_drawn",
    "split_texts",
    "split_windows",
    "text_column",
    "too_short",
]

T = TypeVar("T")
Text = str | tuple[str, str]
"""A text, or two that belong together: a pair of sentences, or a source and its target."""
Column = str | list[str] | None

SAMPLES = 128
"""Texts to calibrate on where nobody says how many,"""
FEWEST = 8
"""and the fewest that will do then."""
HELD_OUT = 16
"""Texts left over for the ledger and for checks."""
PARAGRAPH = "\n\n"
"""What joins the rows of a table to one text."""
_TEXT_COLUMNS = ("text", "sentence")


def read_texts(
    data: str | os.PathLike[str], *, column: Column = None, samples: int | None = None, seed: int = 0
) -> list[Text]:
    """The texts of a file, in the file's order; blank ones are left out.

    Args:
        data: a file, or ``FILE:COLUMN``, or ``FILE:SOURCE,TARGET``.
        column: the column of a table; for tables with one column, or one called ``text`` or ``sentence``, not needed.
            Two of them for pairs of texts.
        samples: this many, drawn with ``seed`` in one pass (reservoir sampling, Vitter 1985, algorithm R); None: all.
        seed: of the drawing.

    Raises:
        BitlowerError: no such file or column, bytes that are not UTF-8 (with the line), no text, or fewer than asked.
    """
    _check_samples(samples)
    total, drawn = draw(_texts(data, column), samples, seed)
    if samples is not None and total < samples:
        raise too_short(data, total, samples)
    return [text for _, text in drawn]


@dataclass(frozen=True)
class TextSplit:
    """Texts to calibrate on, and others that are held out."""

    calibration: tuple[Text, ...]
    held_out: tuple[Text, ...]


def split_texts(
    data: str | os.PathLike[str] | Sequence[Text], *, samples: int | None, seed: int = 0, column: Column = None
) -> TextSplit:
    """Calibration texts and up to ``HELD_OUT`` further ones, drawn in one pass, both in the file's order.

    Args:
        data: a file (or ``FILE:COLUMN``), or the texts themselves.
        samples: of calibration; None takes up to ``SAMPLES`` and leaves an eighth, at most ``HELD_OUT``, over.
        seed: of the drawing.
        column: of a table, or two.

    Raises:
        BitlowerError: as :func:`read_texts`; too short is fewer than ``samples`` (``FEWEST`` if that is None).
    """
    name = data if isinstance(data, str | os.PathLike) else "the calibration data"
    items = _texts(data, column) if isinstance(data, str | os.PathLike) else enumerate(data, 1)
    calibration, held_out = split_drawn(items, name, samples=samples, seed=seed)
    return TextSplit(tuple(calibration), tuple(held_out))


def split_drawn(
    items: Iterable[tuple[int, T]], name: object, *, samples: int | None, seed: int, what: str = "texts"
) -> tuple[list[T], list[T]]:
    """What :func:`split_texts` does, for items of any kind, each with its place; ``what`` they are is for messages.

    Raises:
        BitlowerError: ``name`` has too few of them.
    """
    _check_samples(samples)
    total, drawn = draw(items, (SAMPLES if samples is None else samples) + HELD_OUT, seed)
    if total < (samples or FEWEST):
        raise too_short(name, total, samples or FEWEST, what)
    count = samples or min(SAMPLES, total - min(HELD_OUT, total // 8))
    order = list(range(len(drawn)))
    random.Random(f"{seed}/split").shuffle(order)
    calibration, held_out = sorted(order[:count]), sorted(order[count : count + HELD_OUT])
    return [drawn[place][1] for place in calibration], [drawn[place][1] for place in held_out]


def read_text(
    data: str | os.PathLike[str], *, column: Column = None, joiner: str | None = None, limit: int | None = None
) -> str:
    """A file as one long text.

    Args:
        data: a file, or ``FILE:COLUMN``.
        column: of a table, as for :func:`read_texts`.
        joiner: None takes a text file as it is, and joins the rows of a table with an empty line between them; else
            this stands between the lines (without their line breaks) or rows. Blank ones stay, nothing is stripped.
        limit: no more is read once there are so many characters; None: all.

    Raises:
        BitlowerError: no such file or column, two columns, bytes that are not UTF-8, or no text.
    """
    path, named = split_column(data)
    columns = text_column(path, column or named)
    check_one_column(columns)
    whole = joiner is None and not columns
    text = read_whole(path, limit) if whole else joined(path, columns, PARAGRAPH if joiner is None else joiner, limit)
    if not text.strip():
        raise BitlowerError(f"{path} holds no text")
    return text


def check_one_column(columns: Sequence[str]) -> None:
    """See that a file that is read as one long text has one column at most.

    Raises:
        BitlowerError: two are named.
    """
    if len(columns) > 1:
        raise BitlowerError(
            "pairs are for models that read texts, and this is a language model", hint="name one column"
        )


def split_windows(
    ids: torch.Tensor, length: int, samples: int, *, held_out: int = 0, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows of a long text to calibrate on, ``[samples, length]``, and up to ``held_out`` further ones.

    The text is cut into contiguous windows that do not overlap, the remainder is dropped; they are drawn with ``seed``,
    all equally likely, and stand in the text's order.

    Args:
        ids: the tokens of the text, ``[n]``.
        length: tokens of a window.
        samples: windows to calibrate on.
        held_out: windows to hold out, as far as any are left.
        seed: of the drawing.

    Raises:
        BitlowerError: the text has fewer than ``samples`` windows.
    """
    _check_samples(samples)
    count = check_windows(ids, length, samples, "calibration")
    order = random.Random(f"{seed}/windows").sample(range(count), min(count, samples + held_out))
    rows = ids[: count * length].view(count, length)
    return rows[sorted(order[:samples])], rows[sorted(order[samples:])]


def check_windows(ids: torch.Tensor, length: int, needed: int, what: str) -> int:
    """How many windows of ``length`` tokens the text ``ids`` ``[n]`` has.

    Raises:
        BitlowerError: fewer than ``needed``; ``what`` names the text.
    """
    count = ids.numel() // length
    if count < needed:
        raise BitlowerError(
            f"the {what} text is too short: {ids.numel()} tokens are {count} windows of {length}, {needed} are needed",
            hint="add text, or ask for fewer samples or shorter ones",
        )
    return count


def check_finite(batches: Iterable[Mapping[str, torch.Tensor]], what: str) -> None:
    """Refuse input batches that hold NaN or Inf.

    Raises:
        BitlowerError: which batch and which tensor.
    """
    for place, batch in enumerate(batches):
        for name, tensor in batch.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise BitlowerError(f"{what}: the tensor {name!r} of batch {place} holds NaN or Inf")


def _texts(data: str | os.PathLike[str], column: Column) -> Iterator[tuple[int, Text]]:
    """The texts of a file that are not blank, with their lines.

    Raises:
        BitlowerError: there is none.
    """
    path, named = split_column(data)
    empty = True
    for row in read_examples(path, column or named, None):
        empty = False
        yield row.line, row.values[0] if len(row.values) == 1 else (row.values[0], row.values[1])
    if empty:
        raise BitlowerError(f"{path} holds no text", hint="one text a line, or a table with a text column")


def read_examples(path: Path, column: Column, label: str | None) -> Iterator[Row]:
    """The rows of a file: a text or two, and the label if it has a column; nothing around them.

    Blank texts are left out where there is neither a second text nor a label.

    Raises:
        BitlowerError: no such file or column, or a text of a pair or with a label is empty.
    """
    texts = text_column(path, column)
    for row in read_rows(path, (*texts, *((label,) if label is not None else ()))):
        values = tuple(value.strip() for value in row.values)
        if all(values[: max(len(texts), 1)]):
            yield Row(row.line, values)
        elif len(values) > 1:
            raise BitlowerError(f"{path}, line {row.line}: the text is empty", hint="write one, or drop the line")


def text_column(path: Path, column: Column) -> tuple[str, ...]:
    """The columns to read texts from: those named, or the obvious one of a table.

    Two names with a comma between them are two columns, unless the table has one of that name.
    """
    if isinstance(column, list):
        return tuple(column)
    if column is not None:
        first, comma, second = column.partition(",")
        pair = comma and path.suffix.lower() in TABLES and column not in header(path)
        return (first.strip(), second.strip()) if pair else (column,)
    if path.suffix.lower() not in TABLES:
        return ()
    names = header(path)
    choices = names if len(names) == 1 else [name for name in _TEXT_COLUMNS if name in names][:1]
    if names and not choices:
        raise BitlowerError(f"{path} has several columns: {', '.join(names)}", hint=f"name one: {path}:NAME")
    return (choices[0],) if choices else ("0",)


def _check_samples(samples: int | None) -> None:
    if samples is not None and samples < 1:
        raise BitlowerError(f"cannot draw {samples} samples", hint="ask for at least 1")


def too_short(data: object, count: int, wanted: int, what: str = "texts") -> BitlowerError:
    """The error about ``data`` with ``count`` texts, or of ``what`` they are, where ``wanted`` are needed."""
    return BitlowerError(
        f"{data} is too short: {count} {what}, {wanted} are needed", hint=f"add {what}, or ask for fewer samples"
    )


def draw(items: Iterable[tuple[int, T]], samples: int | None, seed: int) -> tuple[int, list[tuple[int, T]]]:
    """How many there are, and ``samples`` of them in order, each set equally likely; memory is the sample's."""
    generator = random.Random(seed)
    reservoir: list[tuple[int, T]] = []
    count = 0
    for count, item in enumerate(items, start=1):
        if samples is None or len(reservoir) < samples:
            reservoir.append(item)
        elif (place := generator.randrange(count)) < samples:
            reservoir[place] = item
    return count, sorted(reservoir, key=lambda item: item[0])
