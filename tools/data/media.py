"""Picture and sound files as data: a folder of them, or a file with a column of their paths.

What is left out takes these defaults: up to 128 files, 8 in a batch, and up to 16 more held out (32 with a section
``evaluation``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch

from bitlower.frontends import pictures, waveforms
from bitlower.frontends.sound import check_sound
from bitlower.frontends.task import is_picture_model, is_sound_model
from bitlower.ir import Batch, BitlowerError, Program
from bitlower.tools.data.batches import Data
from bitlower.tools.data.sources import HELD_OUT_TEXTS, TEXT_BATCH, Calibration, DataSource, batches_source, check_bos
from bitlower.tools.data.tables import TABLES, Row, header, read_rows, split_column
from bitlower.tools.data.texts import Column, draw, split_drawn, too_short
from bitlower.tools.recipes.recipe import DataSection, Recipe

COLUMNS = ("path", "image", "audio", "file_name", "file")
"""Names of the column of paths in tables with several columns; ``file_name`` is that of ``metadata.csv``."""


@dataclass(frozen=True)
class Medium:
    """What files hold that a model reads.

    Args:
        one: of them, in words.
        endings: of the names of such files, in small letters.
        look: raises a BitlowerError where a file is missing or none of them.
        reads: whether a Program reads them alone.
        batches: makes a Program's input of files.
    """

    one: str
    endings: tuple[str, ...]
    look: Callable[[Path], object]
    reads: Callable[[Program], bool]
    batches: Callable[..., Sequence[Batch]]

    @property
    def many(self) -> str:
        """Several of them, in words."""
        return f"{self.one}s"


PICTURES = Medium("picture", pictures.ENDINGS, pictures.read_picture, pictures.reads_pictures, pictures.picture_batches)
SOUNDS = Medium("sound", waveforms.ENDINGS, check_sound, waveforms.reads_waveforms, waveforms.waveform_batches)


def medium_of(model: str | os.PathLike[str] | torch.nn.Module, task: str | None) -> Medium | None:
    """What ``model`` will be traced to read alone, pictures or sounds; None if it is neither.

    Raises:
        BitlowerError: there is no such model.
    """
    if is_sound_model(model, task):
        return SOUNDS
    return PICTURES if is_picture_model(model, task) else None


def media_recipe(recipe: Recipe, medium: Medium) -> DataSource:
    """The data of a recipe for a model of such files; those that are drawn are looked at here, to see what they are.

    Raises:
        BitlowerError: a file is missing, none of them or cut off, there are too few, or the recipe asks for what is
            about texts.
    """
    check_bos(recipe.model.bos, False)
    source = DataSource(lambda program: Data())
    if (section := recipe.calibration) is not None:
        check_section(section.max_length, medium)
        items = media_paths(recipe.resolve(section.data), medium, section.column)
        source = _split(items, section.data, medium, section.samples, section.seed, section.batch_size)
    if (held_out := recipe.evaluation) is None:
        return source
    paths = _evaluation(recipe.resolve(held_out.data), medium, held_out)
    size = held_out.batch_size or TEXT_BATCH

    def both(program: Program) -> Data:
        return replace(source.batches(program), evaluation=medium.batches(program, paths, batch_size=size))

    return replace(source, batches=both)


def python_media(
    calibration: Calibration | None,
    medium: Medium,
    *,
    samples: int | None,
    seed: int,
    max_length: int | None,
    bos: str = "auto",
) -> DataSource:
    """The files that a caller has: a folder, a file of paths, paths, or batches as they are.

    Raises:
        BitlowerError: as :func:`media_recipe`.
    """
    check_bos(bos, False)
    check_section(max_length, medium)
    if calibration is None:
        return DataSource(lambda program: Data())
    if isinstance(calibration, str | os.PathLike):
        path, column = split_column(calibration)
        return _split(media_paths(path, medium, column), str(path), medium, samples, seed, None)
    if len(calibration) and isinstance(calibration[0], Mapping):
        return batches_source(cast(Sequence[Batch], calibration))
    paths = [Path(str(name)) for name in calibration]
    return _split(enumerate(paths, 1), "the calibration data", medium, samples, seed, None)


def media_paths(path: Path, medium: Medium, column: Column = None) -> Iterator[tuple[int, Path]]:
    """The paths of pictures or sounds, in order, each with its place from 1 (its line in a file).

    Args:
        path: a folder, whose files of that kind (and those of the folders in it) are taken in the order of their names;
            or a file of paths, which are relative to its folder.
        medium: what the files hold.
        column: of a table; not needed where it has one column, or one of :data:`COLUMNS`.

    Raises:
        BitlowerError: the folder has none of them, or there is no such file or column.
    """
    if not path.is_dir():
        for row in media_rows(path, [_column(path, medium, column)]):
            yield row.line, path.parent / row.values[0]
        return
    if column is not None:
        raise BitlowerError(f"{path} is a folder, and has no column {column!r}", hint="leave `column` out")
    ours = (file for file in path.rglob("*") if file.suffix.lower() in medium.endings)
    files = sorted(file for file in ours if not file.name.startswith("."))
    if not files:
        endings = ", ".join(medium.endings)
        raise BitlowerError(f"the folder {path} has no {medium.many}", hint=f"files that end with {endings}")
    yield from enumerate(files, 1)


def media_examples(path: Path, medium: Medium, column: Column, label: str | None) -> list[Row]:
    """The rows to train on: a path, relative to the folder of ``path`` or absolute, and the label if it has a column.

    Args:
        path: as :func:`media_paths` has it.
        medium: what the files hold.
        column: of paths.
        label: the column of labels.

    Raises:
        BitlowerError: as :func:`media_paths`, or there are labels in no table.
    """
    if label is None:
        return [Row(line, (os.path.abspath(file),)) for line, file in media_paths(path, medium, column)]
    if path.suffix.lower() not in TABLES or path.is_dir():
        raise BitlowerError(f"{path} has no column {label!r} of labels", hint="give a table with paths and labels")
    return list(media_rows(path, [_column(path, medium, column), label]))


def look_at(path: Path, rows: Sequence[Row], medium: Medium) -> None:
    """See that the files that ``rows`` of ``path`` name can be read.

    Raises:
        BitlowerError: one cannot; it is named, and its line where ``path`` is no folder.
    """
    for row in rows:
        try:
            medium.look(path.parent / row.values[0])
        except BitlowerError as error:
            place = "" if path.is_dir() else f"{path}, line {row.line}: "
            raise BitlowerError(f"{place}{error.message}", hint=error.hint) from None


def media_rows(path: Path, columns: Sequence[str | None]) -> Iterator[Row]:
    """The rows of a file: a path first, and whatever else is asked for; blank lines are left out.

    Args:
        path: of the file.
        columns: None stands for the line itself, alone.

    Raises:
        BitlowerError: no such file or column, or a path of a row with several values is empty.
    """
    for row in read_rows(path, [column for column in columns if column is not None]):
        values = tuple(value.strip() for value in row.values)
        if values[0]:
            yield Row(row.line, values)
        elif len(values) > 1:
            raise BitlowerError(f"{path}, line {row.line}: the path is empty", hint="write one, or drop the line")


def _column(path: Path, medium: Medium, column: Column) -> str | None:
    """The column of paths: the one that is named, or the obvious one of a table; None where lines are paths."""
    if isinstance(column, list):
        what = f"pairs are of texts, and this model reads {medium.many}"
        raise BitlowerError(what, hint="name one column, that of paths")
    if column is not None or path.suffix.lower() not in TABLES:
        return column
    names = [name.strip() for name in header(path)]
    choices = names if len(names) == 1 else [name for name in COLUMNS if name in names][:1]
    if names and not choices:
        raise BitlowerError(f"{path} has several columns: {', '.join(names)}", hint=f"name one: {path}:NAME")
    return choices[0] if choices else "0"


def _split(
    items: Iterator[tuple[int, Path]],
    name: str,
    medium: Medium,
    samples: int | None,
    seed: int,
    batch_size: int | None,
) -> DataSource:
    """Files to calibrate on and held-out ones."""
    calibration, held_out = split_drawn(items, name, samples=samples, seed=seed, what=medium.many)
    _check(calibration + held_out, medium)
    size = batch_size or TEXT_BATCH

    def made(program: Program) -> Data:
        first, second = (medium.batches(program, paths, batch_size=size) for paths in (calibration, held_out))
        return Data(first, second)

    return DataSource(made, len(calibration))


def _evaluation(path: Path, medium: Medium, section: DataSection) -> list[Path]:
    """The files of the section ``evaluation``."""
    check_section(section.max_length, medium)
    wanted = section.samples or HELD_OUT_TEXTS
    total, drawn = draw(media_paths(path, medium, section.column), wanted, section.seed)
    if total < wanted:
        raise too_short(path, total, wanted, medium.many)
    paths = [file for _, file in drawn]
    _check(paths, medium)
    return paths


def _check(paths: Sequence[Path], medium: Medium) -> None:
    """See that files can be read.

    Raises:
        BitlowerError: one cannot, and is named.
    """
    for path in paths:
        medium.look(path)


def check_section(max_length: int | None, medium: Medium) -> None:
    """See that a section of files asks for nothing in tokens.

    Raises:
        BitlowerError: it does.
    """
    if max_length is not None:
        raise BitlowerError(f"max_length is in tokens, and this model reads {medium.many}", hint="leave it out")
