"""From data files to a Program's batches: rows of texts for encoders, windows of one long text for language models.

What is left out takes these defaults:

===========  ==========================  =================================================
..           texts                       windows (task text-generation)
===========  ==========================  =================================================
samples      up to 128                   32
max_length   128 tokens, longer are cut  512 tokens, or as many as the model takes if fewer
batch_size   8                           1
held out     up to 16 more, or 32 [1]_   up to 2 more, or 2 [1]_
===========  ==========================  =================================================

.. [1] with a section ``evaluation``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch

from bitlower.frontends import batches
from bitlower.frontends.pairs import PairBatches, pair_batches
from bitlower.frontends.sound import reads_sound, sound_batches
from bitlower.frontends.tokenize import BOS, check_length, reads_files, text_ids, window_lead, windows
from bitlower.ir import Batch, BitlowerError, Program, nearest
from bitlower.ir.stages import is_encoder_decoder
from bitlower.tools.data.batches import Data
from bitlower.tools.data.named_rows import FileKind, NamedRows
from bitlower.tools.data.texts import (
    PARAGRAPH,
    Column,
    Text,
    TextSplit,
    check_one_column,
    read_text,
    read_texts,
    split_column,
    split_texts,
    split_windows,
)
from bitlower.tools.recipes.recipe import DataSection, Recipe

Calibration = str | os.PathLike[str] | Sequence[str] | Sequence[tuple[str, str]] | Sequence[Batch]
TEXTS, TEXT_LENGTH, TEXT_BATCH, HELD_OUT_TEXTS = 128, 128, 8, 32
"""Texts, tokens of each, texts of a batch and held-out texts, where a recipe does not say."""
WINDOWS, WINDOW_LENGTH, WINDOW_BATCH, HELD_OUT_WINDOWS = 32, 512, 1, 2
"""The same of windows of a long text, for language models; the authors of GPTQ take 128 of 2,048 tokens."""
LONGEST_TEXT = 1 << 24
"""Characters of a long text that are read at most."""


@dataclass(frozen=True)
class Amount:
    """How much data, with the defaults of the kind filled in.

    Args:
        samples: None: as many texts as there are, up to 128.
        max_length: tokens of each; None: ``WINDOW_LENGTH``, or what the model takes.
        batch_size: of them in a batch.
    """

    samples: int | None
    max_length: int | None
    batch_size: int

    @classmethod
    def of(cls, section: DataSection, decoder: bool) -> Amount:
        """What a section of a recipe asks for."""
        return cls.make(section.samples, section.max_length, decoder, section.batch_size)

    @classmethod
    def make(cls, samples: int | None, max_length: int | None, decoder: bool, batch_size: int | None = None) -> Amount:
        """Numbers that may be left out, for texts or for windows."""
        if decoder:
            return cls(samples or WINDOWS, max_length, batch_size or WINDOW_BATCH)
        return cls(samples, max_length or TEXT_LENGTH, batch_size or TEXT_BATCH)

    def length(self, program: Program) -> int:
        """Tokens of a sample for ``program``."""
        return self.max_length or min(WINDOW_LENGTH, program.context_length or WINDOW_LENGTH)


@dataclass(frozen=True)
class DataSource:
    """Data that have been read.

    Args:
        batches: makes a Program's input of them.
        samples: how many there are.
        rows: of texts that a run reads, each of them.
    """

    batches: Callable[[Program], Data]
    samples: int | None = None
    rows: tuple[NamedRows, ...] = ()

    def check_files(self, kind: FileKind | None) -> None:
        """See that the rows name files of this kind, if they name any.

        Raises:
            BitlowerError: one does not; its file and line are named.
        """
        if kind is not None:
            for rows in self.rows:
                rows.check(kind)


def recipe_source(recipe: Recipe, decoder: bool) -> DataSource:
    """The data of a recipe, which may have none; its files are read here.

    Raises:
        BitlowerError: a file is missing, damaged or too short, or a rule for windows is given for another model.
    """
    check_bos(recipe.model.bos, decoder)
    source = (
        _section_source(recipe, recipe.calibration, decoder) if recipe.calibration else DataSource(lambda _: Data())
    )
    if recipe.evaluation is None:
        return source
    held_out, rows = _evaluation(recipe, recipe.evaluation, decoder)
    return replace(
        source,
        batches=lambda program: replace(source.batches(program), evaluation=held_out(program)),
        rows=(*source.rows, *rows),
    )


def check_bos(bos: str, decoder: bool) -> None:
    """See that a rule for what windows begin with is known, and given for a model that reads windows.

    Raises:
        BitlowerError: it is not.
    """
    if bos not in BOS:
        raise BitlowerError(f"unknown rule {bos!r} for the beginning of windows", hint=nearest(bos, BOS))
    if bos != BOS[0] and not decoder:
        raise BitlowerError(
            f"bos {bos!r} is about the windows of language models, and this model reads texts", hint="leave it out"
        )


def python_source(
    calibration: Calibration | None,
    *,
    samples: int | None,
    seed: int,
    max_length: int | None,
    decoder: bool,
    bos: str = "auto",
) -> DataSource:
    """The data that a caller has: a file, texts, or batches as they are.

    Raises:
        BitlowerError: there are none, or a file is missing, damaged or too short.
    """
    check_bos(bos, decoder)
    if calibration is None:
        return DataSource(lambda program: Data())
    if not isinstance(calibration, str | os.PathLike):
        if not calibration:
            raise BitlowerError("the calibration data are empty")
        if isinstance(calibration[0], Mapping):
            return batches_source(cast(Sequence[Batch], calibration))
    texts = cast("str | os.PathLike[str] | Sequence[Text]", calibration)
    amount = Amount.make(samples, max_length, decoder)
    if not decoder:
        path, column = split_column(texts) if isinstance(texts, str | os.PathLike) else (None, None)
        return _texts(split_texts(texts, samples=samples, seed=seed), amount, path, column)
    text = read_text(texts, limit=LONGEST_TEXT) if isinstance(texts, str | os.PathLike) else _one_text(texts)
    return DataSource(lambda program: _windows(program, text, amount, seed, bos), amount.samples)


def _one_text(texts: Sequence[Text]) -> str:
    """The texts of a caller with an empty line between them.

    Raises:
        BitlowerError: there are pairs among them.
    """
    for text in texts:
        check_one_column(() if isinstance(text, str) else text)
    return PARAGRAPH.join(cast(Sequence[str], texts))


def batches_source(inputs: Sequence[Batch]) -> DataSource:
    """Input batches of a caller's as they are; the last eighth is held out."""
    cut = len(inputs) - len(inputs) // 8
    return DataSource(lambda program: Data(inputs[:cut], inputs[cut:]))


def _section_source(recipe: Recipe, section: DataSection, decoder: bool) -> DataSource:
    """What a section asks for to calibrate on, and what it leaves over to hold out."""
    path, amount = recipe.resolve(section.data), Amount.of(section, decoder)
    if not decoder:
        texts = split_texts(path, samples=section.samples, seed=section.seed, column=section.column)
        return _texts(texts, amount, path, section.column)
    text = read_text(path, column=section.column, limit=LONGEST_TEXT)
    return DataSource(lambda program: _windows(program, text, amount, section.seed, recipe.model.bos), amount.samples)


def _evaluation(
    recipe: Recipe, section: DataSection, decoder: bool
) -> tuple[Callable[[Program], Sequence[Batch]], tuple[NamedRows, ...]]:
    """The texts, or windows of the text, of the section ``evaluation``, and the rows of the texts."""
    path, amount = recipe.resolve(section.data), Amount.of(section, decoder)
    if not decoder:
        texts = read_texts(path, column=section.column, samples=section.samples or HELD_OUT_TEXTS, seed=section.seed)
        rows = NamedRows.of_texts(path, section.column, texts)
        return lambda program: _rows(program, texts, amount, path.parent).batches, (rows,)
    text = read_text(path, column=section.column, limit=LONGEST_TEXT)
    amount = replace(amount, samples=section.samples or HELD_OUT_WINDOWS)
    return lambda program: _windows(program, text, amount, section.seed, recipe.model.bos).calibration, ()


def _texts(texts: TextSplit, amount: Amount, path: Path | None, column: Column) -> DataSource:
    """Texts of the file ``path``, or, where that is None, of a caller."""
    base = path.parent if path else Path()

    def made(program: Program) -> Data:
        calibration = _rows(program, texts.calibration, amount, base)
        held_out_rows = _rows(program, texts.held_out, amount, base)
        notes = [note for rows in (calibration, held_out_rows) for note in rows.notes]
        return Data(calibration.batches, held_out_rows.batches, notes=tuple(dict.fromkeys(notes)))

    drawn = (*texts.calibration, *texts.held_out)
    rows = NamedRows.of_texts(path, column, drawn) if path else NamedRows.of_caller(drawn)
    return DataSource(made, len(texts.calibration), (rows,))


@dataclass(frozen=True)
class _Rows:
    """Batches of texts, and notes on them."""

    batches: Sequence[Batch] = ()
    notes: tuple[str, ...] = ()


def _rows(program: Program, texts: Sequence[Text], amount: Amount, base: Path) -> _Rows:
    """Batches of ``texts``; of a model that reads sound or pictures they are paths, relative to ``base``."""
    if not texts:
        return _Rows()
    first = [text if isinstance(text, str) else text[0] for text in texts]
    second = [text[1] for text in texts if not isinstance(text, str)] or None
    length, size = amount.length(program), amount.batch_size
    if reads_files(program):
        first = [str(base / name) for name in first]
    if not is_encoder_decoder(program):
        return _Rows(batches(program, first, pairs=second, max_length=length, batch_size=size))
    if reads_sound(program):
        pairs = sound_batches(program, list(map(Path, first)), second, max_length=length, batch_size=size)
    else:
        pairs = pair_batches(program, first, second, max_length=length, batch_size=size)
    return _Rows(pairs.batches, tuple(_pair_notes(pairs, len(first), second is not None)))


def _pair_notes(pairs: PairBatches, count: int, paired: bool) -> Iterator[str]:
    if not paired:
        yield f"there are no targets: the float model writes those of the {count} sources itself"
    for what, cut in (("sources", pairs.cut_sources), ("targets", pairs.cut_targets)):
        if cut:
            yield f"{cut} of {count} {what} are longer than the model or max_length takes, and are cut"


def _windows(program: Program, text: str, amount: Amount, seed: int, bos: str) -> Data:
    """The batches of windows of ``text``, and of held-out ones; what they begin with takes of their length."""
    length, count = amount.length(program), amount.samples or WINDOWS
    check_length(program, length)
    lead = window_lead(program, bos)
    room = max(length - len(lead), 1)
    parts = split_windows(text_ids(program, text), room, count, held_out=HELD_OUT_WINDOWS, seed=seed)
    calibration, held_out = (window_batches(program, part, lead, amount.batch_size) for part in parts)
    return Data(calibration, held_out, lead)


def window_batches(program: Program, rows: torch.Tensor, lead: Sequence[int], batch_size: int) -> Sequence[Batch]:
    """Batches of the windows ``rows`` ``[count, length]``, each with the tokens ``lead`` in front."""
    if not len(rows):
        return ()
    first = torch.tensor([list(lead)] * len(rows), dtype=rows.dtype).view(len(rows), -1)
    return windows(program, torch.cat([first, rows], 1), batch_size=batch_size)
