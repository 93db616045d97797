"""From data files to what passes train on: batches of texts with their labels, or windows of one long text.

What is left out takes these defaults:

===========  ================================  =================================================
..           texts                             windows (task text-generation)
===========  ================================  =================================================
samples      all that are not held out         all that are not held out
held out     a tenth of them, at most 512      a tenth of them, at most 32
max_length   128 tokens, longer are cut        512 tokens, or as many as the model takes if fewer
batch_size   32                                1
===========  ================================  =================================================

Texts and windows to train on stand in an order that is drawn, so that no batch has neighbours of a sorted file alone.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar, cast

import torch

from bitlower.frontends import batches
from bitlower.frontends.tokenize import check_length, reads_files, text_ids, window_lead
from bitlower.ir import Batch, BitlowerError, Program
from bitlower.tools.data.batches import Data
from bitlower.tools.data.labels import ClassifierHead
from bitlower.tools.data.media import Medium, check_section, look_at, media_examples
from bitlower.tools.data.named_rows import NamedRows
from bitlower.tools.data.sources import (
    LONGEST_TEXT,
    TEXT_LENGTH,
    WINDOW_BATCH,
    Amount,
    Calibration,
    DataSource,
    check_bos,
    window_batches,
)
from bitlower.tools.data.texts import (
    PARAGRAPH,
    Row,
    check_one_column,
    check_windows,
    draw,
    read_examples,
    read_text,
    split_column,
    split_windows,
    too_short,
)
from bitlower.tools.recipes.places import with_place
from bitlower.tools.recipes.recipe import Recipe, TrainingSection

TEXT_BATCH = 32
"""Texts of a step where a recipe does not say."""
SHARE = 0.1
"""Of texts or windows are held out where nobody says how many, but at most so many:"""
MOST_TEXTS, MOST_WINDOWS = 512, 32
"""How much is held out at most: an evaluation should not outweigh the steps between two."""
T = TypeVar("T")
Make = Callable[[Program], Data]


@dataclass(frozen=True)
class Examples:
    """Rows of a text or two, and then a label if there are labels, to train on or to hold out.

    ``path`` names the file in messages.
    """

    path: Path
    rows: tuple[Row, ...]
    labelled: bool = False

    def named(self) -> NamedRows:
        """The rows with the name of their file."""
        return NamedRows(self.path, lambda: self.rows)

    def batches(self, program: Program, max_length: int, batch_size: int) -> list[Batch]:
        """Input batches of ``program`` in the order of the rows, with ``labels`` ``[batch]`` if there are labels.

        Raises:
            BitlowerError: a label does not fit the model's head, or the texts are none for its tokenizer.
        """
        labels = ClassifierHead.of(program).tensor(self.path, self.rows) if self.labelled else None
        columns = list(zip(*(row.values for row in self.rows), strict=True))
        texts, *pairs = columns[:-1] if self.labelled else columns
        if reads_files(program):
            texts = tuple(str(self.path.parent / text) for text in texts)
        pair = pairs[0] if pairs else None
        made: list[Batch] = [*batches(program, texts, pairs=pair, max_length=max_length, batch_size=batch_size)]
        if labels is None:
            return made
        return [{**batch, "labels": part} for batch, part in zip(made, torch.split(labels, batch_size), strict=True)]


def with_training(source: DataSource, recipe: Recipe, decoder: bool, medium: Medium | None = None) -> DataSource:
    """``source`` with what the recipe's section ``training`` asks for; the section's files are read here.

    Args:
        source: what the recipe calibrates on.
        recipe: whole.
        decoder: whether the model reads windows of a text.
        medium: what files hold that the model reads alone, instead of texts.

    Raises:
        BitlowerError: a file or column is missing, damaged or too short, a text is empty, or labels or pairs are asked
            for of a language model.
    """
    section = recipe.training
    if section is None:
        return source
    for key in ("label", "column") if decoder else ():
        with_place(recipe._source, ("training", key), _check_windowed, key, getattr(section, key))
    other = recipe.resolve(section.held_out) if isinstance(section.held_out, str) else None
    return _adding(source, *_make(section, recipe.resolve(section.data), other, decoder, recipe.model.bos, medium))


def python_training(
    source: DataSource,
    training: Calibration | None,
    *,
    seed: int,
    max_length: int | None,
    decoder: bool,
    bos: str = "auto",
    medium: Medium | None = None,
) -> DataSource:
    """``source`` with the training data that a caller has: a file, texts or paths, or batches as they are.

    The last tenth of the batches is held out.

    Raises:
        BitlowerError: as :func:`with_training`.
    """
    if training is None:
        return source
    check_bos(bos, decoder)
    if isinstance(training, str | os.PathLike):
        path, column = split_column(training)
        section = TrainingSection(data=str(path), column=column, max_length=max_length, seed=seed)
        return _adding(source, *_make(section, path, None, decoder, bos, medium))
    section = TrainingSection(data="the training data", max_length=max_length, seed=seed)
    if len(training) < 2:
        raise too_short(section.data, len(training), 2)
    if isinstance(training[0], Mapping):
        inputs = cast(Sequence[Batch], training)
        cut = len(inputs) - _left_out(section, len(inputs), len(inputs))
        return _adding(source, lambda program: Data(training=inputs[:cut], held_out=inputs[cut:]))
    texts = cast(Sequence[str], training)
    if decoder:
        return _adding(source, lambda program: _windows(program, [PARAGRAPH.join(texts)], section, bos))
    name, rows = Path(section.data), [Row(place, (os.fspath(text),)) for place, text in enumerate(texts, 1)]
    parts = split_examples(name, rows, section)
    if medium is not None:
        check_section(max_length, medium)
        look_at(name, rows, medium)
    return _adding(source, lambda program: _texts(program, parts, section))


def _make(
    section: TrainingSection, path: Path, other: Path | None, decoder: bool, bos: str, medium: Medium | None = None
) -> tuple[Make, tuple[NamedRows, ...]]:
    """Read ``path``, and ``other`` if that is held out: what makes batches of them, and the rows of texts."""
    if medium is not None:
        return _make_of_files(section, path, other, medium), ()
    if decoder:
        texts = [read_text(file, column=section.column, limit=LONGEST_TEXT) for file in (path, other) if file]
        return lambda program: _windows(program, texts, section, bos), ()
    parts = split_examples(path, read_examples(path, section.column, section.label), section)
    if other is not None:
        rows = tuple(read_examples(other, section.column, section.label))
        if not rows:
            raise too_short(other, 0, 1)
        parts = (parts[0], Examples(other, rows, section.label is not None))
    return lambda program: _texts(program, parts, section), tuple(part.named() for part in parts)


def _make_of_files(section: TrainingSection, path: Path, other: Path | None, medium: Medium) -> Make:
    """The same of files that the model reads alone; each is looked at here."""
    check_section(section.max_length, medium)
    parts = split_examples(path, media_examples(path, medium, section.column, section.label), section)
    if other is not None:
        rows = tuple(media_examples(other, medium, section.column, section.label))
        if not rows:
            raise too_short(other, 0, 1)
        parts = (parts[0], Examples(other, rows, section.label is not None))
    for part in parts:
        look_at(part.path, part.rows, medium)
    return lambda program: _texts(program, parts, section)


def split_examples(path: Path, rows: Iterable[Row], section: TrainingSection) -> tuple[Examples, Examples]:
    """Rows to train on, in an order that is drawn, and held-out ones in the file's order."""
    samples, seed, most = section.samples, section.seed, MOST_TEXTS
    needed = None if samples is None else samples + _left_out(section, 0, most)
    total, drawn = draw(((row.line, row) for row in rows), needed, seed)
    least = needed or (1 if isinstance(section.held_out, str) else 2)
    if total < least:
        raise too_short(path, total, least)
    shuffled = _shuffled([row for _, row in drawn], seed)
    cut = len(shuffled) - _left_out(section, len(shuffled), most)
    held_out = sorted(shuffled[cut:], key=lambda row: row.line)
    labelled = section.label is not None
    return Examples(path, tuple(shuffled[:cut]), labelled), Examples(path, tuple(held_out), labelled)


def _left_out(section: TrainingSection, total: int, most: int) -> int:
    """How many are held out, of ``total`` or beside the samples asked for; at most ``most`` where nobody says."""
    if isinstance(section.held_out, str):
        return 0
    share = section.held_out or SHARE
    count = total * share if section.samples is None else section.samples * share / (1 - share)
    return max(1, round(count) if section.held_out else min(most, round(count)))


def _shuffled(items: Sequence[T], seed: int) -> list[T]:
    order = list(items)
    random.Random(f"{seed}/training").shuffle(order)
    return order


def _texts(program: Program, parts: tuple[Examples, Examples], section: TrainingSection) -> Data:
    length, size = section.max_length or TEXT_LENGTH, section.batch_size or TEXT_BATCH
    training, held_out = (part.batches(program, length, size) for part in parts)
    return Data(training=training, held_out=held_out)


def _windows(program: Program, texts: Sequence[str], section: TrainingSection, bos: str) -> Data:
    """Windows of the first text to train on, in an order that is drawn; held out are others of it, or the second's."""
    amount = Amount(section.samples, section.max_length, section.batch_size or WINDOW_BATCH)
    length = amount.length(program)
    check_length(program, length)
    lead = window_lead(program, bos)
    room = max(length - len(lead), 1)
    ids = text_ids(program, texts[0])
    count = check_windows(ids, room, 1 if len(texts) > 1 else 2, "training")
    left = _left_out(section, count, MOST_WINDOWS)
    samples = section.samples or count - left
    check_windows(ids, room, samples + left, "training")
    rows, held_out = split_windows(ids, room, samples, held_out=left, seed=section.seed)
    if len(texts) > 1:
        other = text_ids(program, texts[1])
        windows = check_windows(other, room, 1, "held-out")
        held_out = other[: windows * room].view(windows, room)
    rows = rows[_shuffled(range(samples), section.seed)]
    training, held_out_batches = (window_batches(program, part, lead, amount.batch_size) for part in (rows, held_out))
    return Data(lead=lead, training=training, held_out=held_out_batches)


def _adding(source: DataSource, make: Make, rows: tuple[NamedRows, ...] = ()) -> DataSource:
    def both(program: Program) -> Data:
        trained, data = make(program), source.batches(program)
        return replace(data, training=trained.training, held_out=trained.held_out, lead=data.lead or trained.lead)

    return replace(source, batches=both, rows=(*source.rows, *rows))


def _check_windowed(key: str, value: str | list[str] | None) -> None:
    if key == "label" and value is not None:
        raise BitlowerError(
            "labels are for models that read texts, and this is a language model", hint="leave `label` out"
        )
    check_one_column(value if isinstance(value, list) else ())
