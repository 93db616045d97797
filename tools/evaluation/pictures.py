"""How often a classifier of pictures is right."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bitlower.frontends.pictures import picture_batches, reads_pictures
from bitlower.ir import BitlowerError, Program
from bitlower.ir.files import check_name
from bitlower.tools.data.labels import class_names, class_of
from bitlower.tools.data.pictures import picture_rows
from bitlower.tools.data.tables import Row
from bitlower.tools.evaluation.metrics import accuracy
from bitlower.tools.evaluation.results import Evaluation
from bitlower.tools.evaluation.runners import Runner, Track, open_runner

PICTURES = "image-classification"
_SEVERAL = 5
"""Classes that top-5 accuracy, ImageNet's other measure, looks at."""


def read_labelled(path: Path, columns: Sequence[str]) -> list[Row]:
    """The rows of a table: the path of a picture, relative to the table's folder, and its label.

    Args:
        path: of the table.
        columns: ``path,label`` if empty.

    Raises:
        BitlowerError: no such file or column, no rows, or a picture is missing.
    """
    columns = columns or ("path", "label")
    if len(columns) != 2:
        raise BitlowerError(f"{PICTURES} takes two columns", hint="--columns path,label")
    rows = list(picture_rows(path, columns))
    if not rows:
        raise BitlowerError(f"{path} holds no rows")
    for row in rows:
        if not check_name(path.parent / row.values[0]).is_file():
            raise BitlowerError(f"{path}, line {row.line}: the picture {path.parent / row.values[0]} is missing")
    return rows


def evaluate_pictures(
    target: str | os.PathLike[str] | Program, path: Path, *, columns: Sequence[str], batch_size: int, track: Track
) -> Evaluation:
    """Accuracy in percent, and top-5 accuracy where there are more classes than 5.

    Args:
        target: as :func:`~bitlower.tools.evaluation.evaluate.evaluate` has it.
        path: of the table; pictures lie relative to its folder.
        columns: as :func:`read_labelled` has them.
        batch_size: pictures in a batch; so many are in memory.
        track: wraps the batches with a progress display.

    Raises:
        BitlowerError: the model classifies no pictures, a label is none, or a file is missing or no picture.
    """
    rows = read_labelled(path, columns)
    runner = open_runner(target)
    scores = picture_scores(runner, path, rows, batch_size=batch_size, track=track)
    name = target.source if isinstance(target, Program) else os.fspath(target)
    return Evaluation(name, PICTURES, str(path), len(rows), scores)


def picture_scores(
    runner: Runner, path: Path, rows: Sequence[Row], *, batch_size: int, track: Track
) -> dict[str, float]:
    """What :func:`evaluate_pictures` measures on ``rows``, by name."""
    program = runner.program
    if not reads_pictures(program) or "logits" not in [spec.name for spec in program.outputs]:
        raise BitlowerError(
            f"{PICTURES} needs a model that classifies pictures, and {program.source or 'this'} is none"
        )
    names = class_names(program.config)
    labels = [class_of(path, row, names, len(names) or None) for row in rows]
    ranked = []
    for first in track(range(0, len(rows), batch_size), "evaluating"):
        files = [path.parent / row.values[0] for row in rows[first : first + batch_size]]
        for batch in picture_batches(program, files, batch_size=batch_size):
            ranked.append(np.argsort(-runner.run(batch)["logits"], axis=-1, kind="stable")[:, :_SEVERAL])
    order = np.concatenate(ranked)
    scores = {"accuracy": 100 * accuracy(order[:, 0], labels)}
    if len(names) > _SEVERAL:
        hits = (order == np.asarray(labels)[:, None]).any(1)
        scores["top-5 accuracy"] = 100 * float(hits.mean())
    return scores
