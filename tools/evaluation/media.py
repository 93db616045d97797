"""How often a classifier of pictures or sounds is right."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bitlower.ir import BitlowerError, Program
from bitlower.ir.files import check_name
from bitlower.ir.tasks import SOUND_CLASSES
from bitlower.tools.data.labels import class_names, class_of
from bitlower.tools.data.media import PICTURES, SOUNDS, Medium, media_rows
from bitlower.tools.data.tables import Row
from bitlower.tools.evaluation.figures import Figures, mean, point
from bitlower.tools.evaluation.results import Evaluation
from bitlower.tools.evaluation.runners import Array, Runner, Track, open_runner

MEDIA = {"image-classification": PICTURES, SOUND_CLASSES: SOUNDS}
"""What each of the tasks is about."""
_SEVERAL = 5
"""Classes that top-5 accuracy, ImageNet's other measure, looks at."""


def read_labelled(path: Path, columns: Sequence[str], task: str, medium: Medium) -> list[Row]:
    """The rows of a table: the path of a file, relative to the table's folder, and its label.

    Args:
        path: of the table.
        columns: ``path,label`` if empty.
        task: that it is for.
        medium: what the files hold.

    Raises:
        BitlowerError: no such file or column, no rows, or a file is missing.
    """
    columns = columns or ("path", "label")
    if len(columns) != 2:
        raise BitlowerError(f"{task} takes two columns", hint="--columns path,label")
    rows = list(media_rows(path, columns))
    if not rows:
        raise BitlowerError(f"{path} holds no rows")
    for row in rows:
        if not check_name(path.parent / row.values[0]).is_file():
            what = f"the {medium.one} {path.parent / row.values[0]} is missing"
            raise BitlowerError(f"{path}, line {row.line}: {what}")
    return rows


def evaluate_media(
    target: str | os.PathLike[str] | Program,
    task: str,
    path: Path,
    *,
    columns: Sequence[str],
    batch_size: int,
    track: Track,
) -> Evaluation:
    """Accuracy in percent, and top-5 accuracy where there are more classes than 5.

    Args:
        target: as :func:`~bitlower.tools.evaluation.evaluate.evaluate` has it.
        task: one of :data:`MEDIA`.
        path: of the table; files lie relative to its folder.
        columns: as :func:`read_labelled` has them.
        batch_size: files in a batch; so many are in memory.
        track: wraps the batches with a progress display.

    Raises:
        BitlowerError: the model classifies something else, a label is none, or a file is missing or none of them.
    """
    rows = read_labelled(path, columns, task, MEDIA[task])
    runner = open_runner(target)
    hits = media_hits(runner, task, path, rows, batch_size=batch_size, track=track)
    figures = Figures(len(rows), "rows", {metric: mean(values) for metric, values in hits.items()})
    scores = {metric: point(figure, len(rows)) for metric, figure in figures.by_name.items()}
    name = target.source if isinstance(target, Program) else os.fspath(target)
    return Evaluation(name, task, str(path), len(rows), scores, figures=figures)


def media_hits(
    runner: Runner, task: str, path: Path, rows: Sequence[Row], *, batch_size: int, track: Track
) -> dict[str, Array]:
    """Whether each of ``rows`` is right in the sense of each metric of :func:`evaluate_media`, by its name."""
    program, medium = runner.program, MEDIA[task]
    if not medium.reads(program) or not any(s.name == "logits" and s.type.rank == 2 for s in program.outputs):
        raise BitlowerError(
            f"{task} needs a model that classifies {medium.many}, and {program.source or 'this'} is none"
        )
    names = class_names(program.config)
    labels = [class_of(path, row, names, len(names) or None) for row in rows]
    ranked = []
    for first in track(range(0, len(rows), batch_size), "evaluating"):
        files = [path.parent / row.values[0] for row in rows[first : first + batch_size]]
        for batch in medium.batches(program, files, batch_size=batch_size):
            ranked.append(np.argsort(-runner.run(batch)["logits"], axis=-1, kind="stable")[:, :_SEVERAL])
    order = np.concatenate(ranked)
    right = order == np.asarray(labels)[:, None]
    hits = {"accuracy": right[:, 0]}
    if len(names) > _SEVERAL:
        hits["top-5 accuracy"] = right.any(1)
    return hits
