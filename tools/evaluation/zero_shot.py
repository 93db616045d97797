"""How often a model of texts and pictures finds the class of a picture by its name (CLIP, Radford et al., 2021, 3.1).

A picture belongs to the class whose prompt lies nearest to it, by the cosine of the embeddings: scale and bias of the
logits change no order.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bitlower.frontends import batches
from bitlower.frontends.captions import reads_captions
from bitlower.ir import BitlowerError, Program
from bitlower.ir.tasks import CAPTIONS
from bitlower.tools.data.media import PICTURES
from bitlower.tools.evaluation.figures import Figures, accuracy_of, point
from bitlower.tools.evaluation.media import read_labelled
from bitlower.tools.evaluation.results import Evaluation
from bitlower.tools.evaluation.runners import Array, Runner, Track, open_runner

PROMPT = "This is a photo of {}."
"""What is said of a class, as transformers' pipeline says it."""
_TEXTS, _PICTURES = "text_embeds", "image_embeds"
_LENGTH = 128
"""Tokens of a prompt at most."""


def evaluate_zero_shot(
    target: str | os.PathLike[str] | Program, path: Path, *, columns: Sequence[str], batch_size: int, track: Track
) -> Evaluation:
    """Accuracy in percent; the classes are the labels that the table has.

    Args:
        target: as :func:`~bitlower.tools.evaluation.evaluate.evaluate` has it.
        path: of the table; pictures lie relative to its folder.
        columns: of the path and of the label, which is the name of a class; ``path,label`` if empty.
        batch_size: pictures in a batch, and prompts; so many are in memory.
        track: wraps the batches with a progress display.

    Raises:
        BitlowerError: the model reads no texts with pictures, there is one class alone, or a file is missing or no
            picture.
    """
    rows = read_labelled(path, columns, CAPTIONS, PICTURES)
    files = [str(path.parent / row.values[0]) for row in rows]
    labels = [row.values[1] for row in rows]
    classes = sorted(set(labels))
    if len(classes) < 2:
        raise BitlowerError(f"{path} has one label alone, {classes[0]!r}", hint="give pictures of several classes")
    runner = open_runner(target)
    program = runner.program
    if not reads_captions(program) or not {_TEXTS, _PICTURES} <= {spec.name for spec in program.outputs}:
        raise BitlowerError(
            f"{CAPTIONS} needs a model that embeds texts and pictures, and {program.source or 'this'} is none"
        )
    prompts = [PROMPT.format(name) for name in classes]
    texts = _embedded(runner, _TEXTS, files[:1] * len(prompts), prompts, batch_size, lambda items, label: iter(items))
    pictures = _embedded(runner, _PICTURES, files, prompts[:1] * len(files), batch_size, track)
    nearest = (_unit(pictures) @ _unit(texts).T).argmax(1)
    right = accuracy_of(nearest, [classes.index(label) for label in labels])
    name = target.source if isinstance(target, Program) else os.fspath(target)
    figures = Figures(len(rows), "rows", {"accuracy": right})
    return Evaluation(name, CAPTIONS, str(path), len(rows), {"accuracy": point(right, len(rows))}, figures=figures)


def _embedded(
    runner: Runner, output: str, files: Sequence[str], texts: Sequence[str], size: int, track: Track
) -> Array:
    """One of the model's embeddings, ``[rows, d]`` float64, of so many pictures with a text each."""
    rows = []
    for first in track(range(0, len(files), size), "evaluating"):
        part = slice(first, first + size)
        for batch in batches(runner.program, files[part], pairs=texts[part], max_length=_LENGTH, batch_size=size):
            rows.append(runner.run(batch)[output].astype(np.float64))
    return np.concatenate(rows)


def _unit(rows: Array) -> Array:
    return np.asarray(rows / np.linalg.norm(rows, axis=-1, keepdims=True))
