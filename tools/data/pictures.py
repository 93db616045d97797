"""Picture files as data: a folder of them, or a file with a column of their paths.

What is left out takes these defaults: up to 128 pictures, 8 in a batch, and up to 16 more held out (32 with a section
``evaluation``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from bitlower.frontends.pictures import ENDINGS, picture_batches, read_picture
from bitlower.ir import Batch, BitlowerError, Program
from bitlower.tools.data.batches import Data
from bitlower.tools.data.sources import HELD_OUT_TEXTS, TEXT_BATCH, Calibration, DataSource, batches_source, check_bos
from bitlower.tools.data.tables import TABLES, Row, header, read_rows, split_column
from bitlower.tools.data.texts import Column, draw, split_drawn, too_short
from bitlower.tools.recipes.recipe import DataSection, Recipe

WHAT = "pictures"
COLUMNS = ("path", "image", "file_name", "file")
"""Names of the column of paths in tables with several columns; ``file_name`` is that of ``metadata.csv``."""


def picture_recipe(recipe: Recipe) -> DataSource:
    """The data of a recipe for a model of pictures; the files that are drawn are opened here, to see that they can be.

    Raises:
        BitlowerError: a file is missing, no picture or cut off, there are too few, or the recipe asks for training or
            for what is about texts.
    """
    check_bos(recipe.model.bos, False)
    refuse_training(recipe.training)
    source = DataSource(lambda program: Data())
    if (section := recipe.calibration) is not None:
        _check_section(section.max_length)
        items = picture_paths(recipe.resolve(section.data), section.column)
        source = _split(items, section.data, section.samples, section.seed, section.batch_size)
    if (held_out := recipe.evaluation) is None:
        return source
    paths = _evaluation(recipe.resolve(held_out.data), held_out)
    size = held_out.batch_size or TEXT_BATCH

    def both(program: Program) -> Data:
        return replace(source.batches(program), evaluation=picture_batches(program, paths, batch_size=size))

    return replace(source, batches=both)


def refuse_training(training: object) -> None:
    """See that a model of pictures is not to be trained on files.

    Args:
        training: what is asked for; None is nothing, and input batches will do.

    Raises:
        BitlowerError: it is.
    """
    in_memory = isinstance(training, Sequence) and len(training) > 0 and isinstance(training[0], Mapping)
    if training is not None and not in_memory:
        raise BitlowerError("training on picture files is not available", hint="give input batches, from Python")


def python_pictures(
    calibration: Calibration | None, *, samples: int | None, seed: int, max_length: int | None, bos: str = "auto"
) -> DataSource:
    """The pictures that a caller has: a folder, a file of paths, paths, or batches as they are.

    Raises:
        BitlowerError: as :func:`picture_recipe`.
    """
    check_bos(bos, False)
    _check_section(max_length)
    if calibration is None:
        return DataSource(lambda program: Data())
    if isinstance(calibration, str | os.PathLike):
        path, column = split_column(calibration)
        return _split(picture_paths(path, column), str(path), samples, seed, None)
    if len(calibration) and isinstance(calibration[0], Mapping):
        return batches_source(cast(Sequence[Batch], calibration))
    paths = [Path(str(name)) for name in calibration]
    return _split(enumerate(paths, 1), "the calibration data", samples, seed, None)


def picture_paths(path: Path, column: Column = None) -> Iterator[tuple[int, Path]]:
    """The paths of pictures, in order, each with its place from 1 (its line in a file).

    Args:
        path: a folder, whose pictures (and those of the folders in it) are taken in the order of their names; or a
            file of paths, which are relative to its folder.
        column: of a table; not needed where it has one column, or one of :data:`COLUMNS`.

    Raises:
        BitlowerError: the folder has no picture, or there is no such file or column.
    """
    if not path.is_dir():
        for row in picture_rows(path, [_column(path, column)]):
            yield row.line, path.parent / row.values[0]
        return
    if column is not None:
        raise BitlowerError(f"{path} is a folder, and has no column {column!r}", hint="leave `column` out")
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in ENDINGS and not file.name.startswith("."))
    if not files:
        raise BitlowerError(f"the folder {path} has no pictures", hint=f"files that end with {', '.join(ENDINGS)}")
    yield from enumerate(files, 1)


def picture_rows(path: Path, columns: Sequence[str | None]) -> Iterator[Row]:
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


def _column(path: Path, column: Column) -> str | None:
    """The column of paths: the one that is named, or the obvious one of a table; None where lines are paths."""
    if isinstance(column, list):
        raise BitlowerError("pairs are of texts, and this model reads pictures", hint="name one column, that of paths")
    if column is not None or path.suffix.lower() not in TABLES:
        return column
    names = [name.strip() for name in header(path)]
    choices = names if len(names) == 1 else [name for name in COLUMNS if name in names][:1]
    if names and not choices:
        raise BitlowerError(f"{path} has several columns: {', '.join(names)}", hint=f"name one: {path}:NAME")
    return choices[0] if choices else "0"


def _split(
    items: Iterator[tuple[int, Path]], name: str, samples: int | None, seed: int, batch_size: int | None
) -> DataSource:
    """Pictures to calibrate on and held-out ones."""
    calibration, held_out = split_drawn(items, name, samples=samples, seed=seed, what=WHAT)
    _check(calibration + held_out)
    size = batch_size or TEXT_BATCH

    def made(program: Program) -> Data:
        rows, others = (picture_batches(program, paths, batch_size=size) for paths in (calibration, held_out))
        return Data(rows, others)

    return DataSource(made, len(calibration))


def _evaluation(path: Path, section: DataSection) -> list[Path]:
    """The pictures of the section ``evaluation``."""
    _check_section(section.max_length)
    wanted = section.samples or HELD_OUT_TEXTS
    total, drawn = draw(picture_paths(path, section.column), wanted, section.seed)
    if total < wanted:
        raise too_short(path, total, wanted, WHAT)
    paths = [picture for _, picture in drawn]
    _check(paths)
    return paths


def _check(paths: Sequence[Path]) -> None:
    """See that pictures can be read, whole.

    Raises:
        BitlowerError: one cannot, and is named.
    """
    for path in paths:
        read_picture(path)


def _check_section(max_length: int | None) -> None:
    if max_length is not None:
        raise BitlowerError("max_length is in tokens, and this model reads pictures", hint="leave it out")
