"""Question answering: the span of a context that a model points to, against SQuAD's answers.

Long contexts are read in windows that overlap, and the best span of all of them is the answer (Devlin et al., 2019,
section 4.2). Figures are those of SQuAD's own script, as torchmetrics has them: letters in lower case, without
punctuation and articles.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bitlower.frontends.token_rows import OVERLAP, Span, TokenRow, context_rows, first_token
from bitlower.ir import Program
from bitlower.tools.data.questions import Question, read_questions
from bitlower.tools.evaluation.figures import Figures, mean
from bitlower.tools.evaluation.packages import metric_package
from bitlower.tools.evaluation.results import Evaluation
from bitlower.tools.evaluation.runners import Array, Runner, Track, check_output, open_runner, run_rows

QUESTION_ANSWERING = "question-answering"
LONGEST_ANSWER = 30
"""Tokens of an answer at most, as in the script for SQuAD that came with BERT."""
_SIDES = ("start_logits", "end_logits")


@dataclass(frozen=True)
class _Best:
    """The best span so far, the score of it, and the least score of the windows for no answer."""

    score: float
    span: Span
    none: float


def evaluate_answers(
    target: str | os.PathLike[str] | Program,
    path: Path,
    *,
    columns: Sequence[str],
    batch_size: int,
    max_length: int,
    track: Track,
) -> Evaluation:
    """Answer the questions of ``path`` with ``target``.

    Args:
        target: as :func:`~bitlower.tools.evaluation.evaluate.evaluate` has it.
        path: see :func:`~bitlower.tools.data.questions.read_questions`.
        columns: of question, context and answers.
        batch_size: windows in a batch.
        max_length: tokens of a window, with the question.
        track: wraps the batches with a progress display.

    Raises:
        BitlowerError: a damaged file, a question that leaves no room for a context, a model that gives no scores for
            the first and last token of an answer, or torchmetrics is not installed.
        CheckError: the model gives NaN.
    """
    questions = read_questions(path, columns)
    metric_package("torchmetrics.functional.text", "torchmetrics")
    runner = open_runner(target)
    for name in _SIDES:
        check_output(runner, QUESTION_ANSWERING, name, (None, None))
    rows = [
        row
        for place, question in enumerate(questions)
        for row in context_rows(
            runner.program, question.question.strip(), question.context, text=place, max_length=max_length,
            where=question.where,
        )
    ]  # fmt: skip
    optional = not all(question.answers for question in questions)
    answers = _answers(runner, questions, rows, optional, batch_size, track)
    name = target.source if isinstance(target, Program) else os.fspath(target)
    scores, notes = _squad(questions, answers), tuple(_notes(questions, rows))
    metrics = {metric: float(np.mean(values)) for metric, values in scores.items()}
    by_name = {metric: mean(values, scale=1.0) for metric, values in scores.items()}
    figures = Figures(len(questions), "questions", by_name)
    return Evaluation(name, QUESTION_ANSWERING, str(path), len(questions), metrics, notes, figures=figures)


def best_span(start: Array, end: Array) -> tuple[float, int, int]:
    """The pair of places with the largest sum of scores; the end lies up to ``LONGEST_ANSWER - 1`` behind the start.

    Args:
        start: scores of the first token of an answer, ``[tokens]``.
        end: of the last one, ``[tokens]``.
    """
    start, end = start.astype(np.float64), end.astype(np.float64)
    best = (-np.inf, 0, 0)
    for further in range(min(LONGEST_ANSWER, len(start))):
        sums = start[: len(start) - further] + end[further:]
        first = int(sums.argmax())
        if sums[first] > best[0]:
            best = (float(sums[first]), first, first + further)
    return best


def _answers(
    runner: Runner,
    questions: Sequence[Question],
    rows: Sequence[TokenRow[Span]],
    optional: bool,
    batch_size: int,
    track: Track,
) -> list[str]:
    """The text of the best span of each question's windows; empty where that is ``optional`` and scores more."""
    best = [_Best(-np.inf, (0, 0), np.inf)] * len(questions)
    for place, outputs in run_rows(runner, rows, batch_size, track):
        row = rows[place]
        start, end = (outputs[name] for name in _SIDES)
        best[row.text] = _better(best[row.text], row, start, end, first_token(runner.program, row))
    return [
        "" if optional and answer.none > answer.score else question.context[slice(*answer.span)]
        for question, answer in zip(questions, best, strict=True)
    ]


def _better(best: _Best, row: TokenRow[Span], start: Array, end: Array, whole: int) -> _Best:
    """``best``, or the best span of another window; ``whole`` is the token that stands for no answer."""
    places = [(place, span) for place, span in enumerate(row.origins) if span is not None]
    none = min(best.none, float(start[whole]) + float(end[whole]))
    if not places:
        return _Best(best.score, best.span, none)
    chosen = [place for place, _ in places]
    score, first, last = best_span(start[chosen], end[chosen])
    if score > best.score:
        return _Best(score, (places[first][1][0], places[last][1][1]), none)
    return _Best(best.score, best.span, none)


def _squad(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, list[float]]:
    """F1 of words and exact matches of each question in percent, each against the nearest of the answers."""
    squad = metric_package("torchmetrics.functional.text", "torchmetrics").squad
    scores = [
        squad(
            [{"id": "", "prediction_text": answer}],
            [{"id": "", "answers": {"text": list(question.answers) or [""], "answer_start": []}}],
        )
        for question, answer in zip(questions, answers, strict=True)
    ]
    return {name: [float(score[name]) for score in scores] for name in ("f1", "exact_match")}


def _notes(questions: Sequence[Question], rows: Sequence[TokenRow[Span]]) -> Iterator[str]:
    counts = np.bincount([row.text for row in rows], minlength=len(questions))
    if longer := int((counts > 1).sum()):
        windows = f"{counts[counts > 1].sum()} that overlap by up to {OVERLAP} tokens"
        yield f"{longer} of {len(questions)} contexts are longer than a window, and are read in {windows}"
    if unanswered := sum(not question.answers for question in questions):
        yield f"{unanswered} of {len(questions)} questions have no answer, and the model may say so"
