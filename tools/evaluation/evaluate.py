"""Accuracy on labelled data, of an artifact (in onnxruntime or TVM) or of a float model (as a Program)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitlower.frontends import batches
from bitlower.frontends.tokenize import check_sizes
from bitlower.ir import Batch, BitlowerError, Program, nearest
from bitlower.ir.tasks import CAPTIONS
from bitlower.tools.data.labels import ClassifierHead
from bitlower.tools.data.texts import Row, number, read_rows, split_column
from bitlower.tools.evaluation.answers import QUESTION_ANSWERING, evaluate_answers
from bitlower.tools.evaluation.figures import Figure, Figures, label_figures, pearson_of, spearman_of
from bitlower.tools.evaluation.masked import FILL_MASK, evaluate_masked
from bitlower.tools.evaluation.media import MEDIA, evaluate_media
from bitlower.tools.evaluation.metrics import accuracy, f1, matthews, pearson, spearman
from bitlower.tools.evaluation.results import Evaluation
from bitlower.tools.evaluation.runners import Array, Runner, Track, open_runner
from bitlower.tools.evaluation.tags import TOKEN_CLASSIFICATION, evaluate_tags
from bitlower.tools.evaluation.targets import evaluate_targets
from bitlower.tools.evaluation.written import METRICS
from bitlower.tools.evaluation.zero_shot import evaluate_zero_shot

HEADS = {TOKEN_CLASSIFICATION: evaluate_tags, QUESTION_ANSWERING: evaluate_answers}
"""Heads that say something about single tokens."""
TASKS = ("sts-b", "classification", *HEADS, FILL_MASK, *MEDIA, CAPTIONS)
UNMEASURED = ("pre-training", "image-feature-extraction")
TOKENS, WINDOW = 128, 384
"""Tokens of a text, and of a question with a window of its context, where nobody says; the latter as BERT's authors."""
Measured = tuple[dict[str, float], dict[str, Figure]]
"""Metrics in percent, and the same as functions of the rows."""
STS_B_COLUMNS = ("4", "5", "6")
"""Score, first and second sentence in the STS benchmark's own files, which have no header line."""


def evaluate(
    target: str | os.PathLike[str] | Program,
    task: str,
    data: str | os.PathLike[str],
    *,
    columns: Sequence[str] = (),
    batch_size: int = 32,
    max_length: int | None = None,
    seed: int = 0,
    beams: int = 1,
    track: Track = lambda items, label: iter(items),
) -> Evaluation:
    """Measure ``target`` on ``data``, each figure with its interval.

    Args:
        target: an artifact's folder (ONNX or library), a model as the frontends take it, or a Program of any level.
        task: ``sts-b`` (score, two sentences: correlation of the score with the cosine of mean-pooled embeddings),
            ``classification`` (text, an optional second text, label; of a model with one output, a value),
            ``fill-mask`` (texts), ``image-classification``, ``zero-shot-image-classification`` (a picture's path,
            label), ``audio-classification`` (a sound's path, label), or one of :data:`HEADS` or
            :data:`~bitlower.tools.evaluation.written.METRICS`.
        data: a .tsv, .csv or .jsonl file, whose columns may be named behind a colon; for tags see
            :func:`~bitlower.tools.data.tagged.read_tagged`, for questions
            :func:`~bitlower.tools.data.questions.read_questions`.
        columns: by name or, in a file without a header line, by number from 0. ``sts-b`` takes the columns of the
            benchmark's own files if none is given, ``classification`` takes ``sentence,label``,
            those of pictures and sounds take ``path,label``; see
            :func:`~bitlower.tools.evaluation.targets.evaluate_targets` for what encoder-decoders write.
        batch_size: texts or pictures in a batch; texts of like length go together.
        max_length: in tokens; None: :data:`TOKENS`, or :data:`WINDOW` for questions.
        seed: of the masks of ``fill-mask``, and of the resamples that intervals come from.
        beams: of what encoder-decoders write; 1 searches greedily.
        track: wraps the batches with a progress display.

    Raises:
        BitlowerError: an unknown task, a missing file or column, a label that is none, or a model that does not fit.
    """
    _check_task(task, beams)
    measured = _measured(
        target,
        task,
        data,
        columns=columns,
        batch_size=batch_size,
        max_length=max_length,
        seed=seed,
        beams=beams,
        track=track,
    )
    return measured.with_intervals(seed=seed)


def _measured(
    target: str | os.PathLike[str] | Program,
    task: str,
    data: str | os.PathLike[str],
    *,
    columns: Sequence[str],
    batch_size: int,
    max_length: int | None,
    seed: int,
    beams: int,
    track: Track,
) -> Evaluation:
    """What :func:`evaluate` measures, before the intervals."""
    usual = WINDOW if task == QUESTION_ANSWERING else TOKENS
    length = usual if max_length is None else max_length
    check_sizes(batch_size, length)
    rows: dict[str, Any] = {"columns": columns, "batch_size": batch_size, "track": track}
    if task in METRICS:
        return evaluate_targets(target, task, data, max_length=length, beams=beams, **rows)
    path, named = split_column(data)
    rows["columns"] = columns = tuple(columns) or tuple(named.split(",") if named else ())
    if task in HEADS:
        return HEADS[task](target, path, max_length=length, **rows)
    if task == FILL_MASK:
        return evaluate_masked(target, path, max_length=length, seed=seed, **rows)
    if task in MEDIA:
        return evaluate_media(target, task, path, **rows)
    if task == CAPTIONS:
        return evaluate_zero_shot(target, path, **rows)
    texts = Texts(_read(path, task, columns), length, batch_size, track)
    measure = _sts_b if task == "sts-b" else _classification
    metrics, by_name = measure(open_runner(target), texts, path)
    name = target.source if isinstance(target, Program) else os.fspath(target)
    figures = Figures(len(texts.rows), "rows", by_name)
    return Evaluation(name, task, str(path), len(texts.rows), metrics, figures=figures)


def _check_task(task: str, beams: int) -> None:
    """See that something measures ``task``, and searches with so many beams.

    Raises:
        BitlowerError: nothing does.
    """
    if task in UNMEASURED:
        raise BitlowerError(
            f"measuring is not available for {task}",
            hint=f"{', '.join((*TASKS, *METRICS))} and text-generation can be measured",
        )
    if task not in (*TASKS, *METRICS):
        raise BitlowerError(f"unknown evaluation {task!r}", hint=nearest(task, (*TASKS, *METRICS)))
    if beams != 1 and task not in METRICS:
        raise BitlowerError(f"{task} searches for nothing, and has no beams", hint="leave out --beams")


@dataclass(frozen=True)
class Texts:
    """Rows to run, and how."""

    rows: Sequence[Row]
    max_length: int
    batch_size: int
    track: Track

    def outputs(self, runner: Runner, first: int, second: int | None, choose: Callable[..., Array]) -> Array:
        """``choose(outputs, batch)`` for each row, in the rows' order; run sorted by length, so padding is short."""
        lengths = [sum(map(len, row.values)) for row in self.rows]
        order = np.argsort(lengths, kind="stable")
        texts = [self.rows[i].values[first] for i in order]
        pairs = None if second is None else [self.rows[i].values[second] for i in order]
        inputs = batches(runner.program, texts, pairs=pairs, max_length=self.max_length, batch_size=self.batch_size)
        results = [choose(runner.run(batch), batch) for batch in self.track(inputs, "evaluating")]
        together = np.concatenate(results)
        ordered = np.empty_like(together)
        ordered[order] = together
        return ordered


def mean_pool(hidden: Array, mask: Array) -> Array:
    """The mean over the tokens that the mask keeps: ``[batch, sequence, d]`` to ``[batch, d]``."""
    weight = mask[..., None].astype(np.float64)
    return np.asarray((hidden * weight).sum(1) / np.maximum(weight.sum(1), 1e-9))


def cosine(a: Array, b: Array) -> Array:
    """The cosine of each row of ``a`` with that of ``b``."""
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.asarray((a * b).sum(-1) / np.maximum(norms, 1e-12))


def _correlations(predicted: Array, expected: Array, names: Sequence[str]) -> Measured:
    """Pearson's and Spearman's, in percent, in the order of ``names``."""
    both = {"pearson": (pearson, pearson_of), "spearman": (spearman, spearman_of)}
    values = {name: 100 * both[name][0](predicted, expected) for name in names}
    return values, {name: both[name][1](predicted, expected) for name in names}


def _sts_b(runner: Runner, texts: Texts, path: Path) -> Measured:
    output = runner.program.outputs[0].name
    if output != "last_hidden_state":
        raise BitlowerError(f"sts-b needs token embeddings, the model gives {output!r}", hint="is the task right?")

    def pool(outputs: dict[str, Array], batch: Batch) -> Array:
        return mean_pool(outputs[output], batch["attention_mask"].numpy())

    scores = np.array([number(path, row, row.values[0]) for row in texts.rows])
    similarity = cosine(texts.outputs(runner, 1, None, pool), texts.outputs(runner, 2, None, pool))
    return _correlations(similarity, scores, ("spearman", "pearson"))


def _classification(runner: Runner, texts: Texts, path: Path) -> Measured:
    if "logits" not in [spec.name for spec in runner.program.outputs]:
        raise BitlowerError("classification needs logits, the model gives none", hint="is the task right?")
    if any(spec.name == "logits" and spec.type.rank != 2 for spec in runner.program.outputs):
        raise BitlowerError(
            "classification needs one row of logits for each text, the model gives one for each token",
            hint="token-classification measures tags of words",
        )

    head = ClassifierHead.of(runner.program)
    labels, second = head.tensor(path, texts.rows).numpy(), 1 if len(texts.rows[0].values) == 3 else None
    if head.regression:
        values = texts.outputs(runner, 0, second, lambda outputs, batch: outputs["logits"][:, 0])
        return _correlations(values, labels, ("pearson", "spearman"))
    predictions = texts.outputs(runner, 0, second, lambda outputs, batch: outputs["logits"].argmax(-1))
    scores = {
        "accuracy": accuracy(predictions, labels),
        "f1": f1(predictions, labels),
        "matthews": matthews(predictions, labels),
    }
    return {name: 100 * value for name, value in scores.items()}, label_figures(predictions, labels)


def _read(path: Path, task: str, columns: tuple[str, ...]) -> list[Row]:
    if task == "sts-b":
        columns = columns or STS_B_COLUMNS
        if len(columns) != 3:
            raise BitlowerError("sts-b takes three columns", hint="--columns score,sentence1,sentence2")
    else:
        columns = columns or ("sentence", "label")
        if len(columns) not in (2, 3):
            raise BitlowerError("classification takes two or three columns", hint="--columns text[,text2],label")
    rows = list(read_rows(path, columns))
    if not rows:
        raise BitlowerError(f"{path} holds no rows")
    return rows
