"""Token classification: the tag that a model gives each word, against that of the file.

The first token of a word carries its tag, as in the benchmark of Tjong Kim Sang and De Meulder (2003) for models with
pieces of words (Devlin et al., 2019, section 5.3). Figures are those of seqeval: an entity counts where its words and
its type are right.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from bitlower.frontends.token_rows import TokenRow, first_rows, word_rows
from bitlower.ir import BitlowerError, Program
from bitlower.tools.data.labels import class_names
from bitlower.tools.data.tagged import read_tagged
from bitlower.tools.evaluation.figures import Figure, Figures, Floats, of_sums, ratio
from bitlower.tools.evaluation.packages import metric_package
from bitlower.tools.evaluation.results import Evaluation
from bitlower.tools.evaluation.runners import Runner, Track, check_output, configuration, open_runner, run_rows

TOKEN_CLASSIFICATION = "token-classification"
_OUTSIDE = "O"
_ENTITY = re.compile(r"[BIESLU]-.+")
"""A tag of IOB, IOBES or BILOU that is not outside."""
_UNNAMED = {"LABEL_0": 0, "LABEL_1": 1}
"""The classes of a configuration that names none, as transformers has them."""


def evaluate_tags(
    target: str | os.PathLike[str] | Program,
    path: Path,
    *,
    columns: Sequence[str],
    batch_size: int,
    max_length: int,
    track: Track,
) -> Evaluation:
    """Tag the words of ``path`` with ``target``.

    Args:
        target: as :func:`~bitlower.tools.evaluation.evaluate.evaluate` has it.
        path: see :func:`~bitlower.tools.data.tagged.read_tagged`.
        columns: of words and tags.
        batch_size: sentences in a batch.
        max_length: tokens; words behind them do not count.
        track: wraps the batches with a progress display.

    Raises:
        BitlowerError: a tag that the model does not have (with file and line), a damaged file, a model that gives no
            logits for each token, or seqeval is not installed.
        CheckError: the model gives NaN.
    """
    sentences = read_tagged(path, columns)
    names = class_names(configuration(target)) or _UNNAMED
    expected = [sentence.tag_ids(path, names) for sentence in sentences]
    metric_package("seqeval.metrics", "seqeval")
    runner = open_runner(target)
    check_output(runner, TOKEN_CLASSIFICATION, "logits", (None, None, len(names)))
    rows = word_rows(runner.program, [sentence.words for sentence in sentences], max_length=max_length)
    predicted = _predicted(runner, rows, batch_size, track)
    both = [
        [(label, guesses[place]) for place, label in enumerate(labels) if place in guesses]
        for labels, guesses in zip(expected, predicted, strict=True)
    ]
    tags = {place: name for name, place in names.items()}
    gold, guessed = ([[tags[pair[side]] for pair in pairs] for pairs in both if pairs] for side in (0, 1))
    if not gold:
        raise BitlowerError(f"no word of {path} has a token", hint="is this the right tokenizer?")
    metrics, by_name = _metrics(gold, guessed, tags.values())
    notes, figures = tuple(_notes(rows, expected, predicted, tags.values())), Figures(len(gold), "sentences", by_name)
    name = target.source if isinstance(target, Program) else os.fspath(target)
    return Evaluation(name, TOKEN_CLASSIFICATION, str(path), len(sentences), metrics, notes, figures=figures)


def _predicted(runner: Runner, rows: Sequence[TokenRow[int]], batch_size: int, track: Track) -> list[dict[int, int]]:
    """Of each sentence the class of each word whose first token the model takes, by the word's place."""
    starts = first_rows(rows)
    result: list[dict[int, int]] = [{} for _ in starts]
    for place, outputs in run_rows(runner, starts, batch_size, track):
        classes = outputs["logits"].argmax(-1).tolist()
        for word, label in zip(starts[place].origins, classes, strict=True):
            if word is not None:
                result[place].setdefault(word, label)
    return result


def _metrics(
    gold: list[list[str]], guessed: list[list[str]], tags: Iterable[str]
) -> tuple[dict[str, float], dict[str, Figure]]:
    """Accuracy by word; F1, precision and recall by entity where tags name any, all other tags then being outside.

    The same as functions of the sentences.
    """
    pairs = list(zip(chain(*gold), chain(*guessed), strict=True))
    result = {"accuracy": 100 * sum(a == b for a, b in pairs) / len(pairs)}
    right = [sum(a == b for a, b in zip(*rows, strict=True)) for rows in zip(gold, guessed, strict=True)]
    figures = {"accuracy": ratio(right, [len(row) for row in gold])}
    if not _names_entities(tags):
        return result, figures
    seqeval = metric_package("seqeval.metrics", "seqeval")
    sides = [[[tag if _ENTITY.fullmatch(tag) else _OUTSIDE for tag in row] for row in side] for side in (gold, guessed)]
    for name in ("f1", "precision", "recall"):
        result[name] = 100 * float(getattr(seqeval, f"{name}_score")(*sides, zero_division=0))
    return result, figures | _entity_figures(*sides)


def _entity_figures(gold: list[list[str]], guessed: list[list[str]]) -> dict[str, Figure]:
    """F1, precision and recall from how many entities of each sentence are right, are there, and are named."""
    entities = metric_package("seqeval.metrics.sequence_labeling", "seqeval").get_entities
    sides = [(set(entities(a)), set(entities(b))) for a, b in zip(gold, guessed, strict=True)]
    counts = [(len(there & named), len(there), len(named)) for there, named in sides]

    def share(numerator: Sequence[float], denominator: Sequence[float]) -> Figure:
        """Of counts; 0 where there is nothing to count."""
        weights = np.stack([numerator, denominator], 1)
        return of_sums(counts, lambda sums: _share(*(sums @ weights).T))

    return {
        "f1": share((2, 0, 0), (0, 1, 1)),
        "precision": share((1, 0, 0), (0, 0, 1)),
        "recall": share((1, 0, 0), (0, 1, 0)),
    }


def _share(part: Floats, whole: Floats) -> Floats:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def _notes(
    rows: Sequence[TokenRow[int]],
    expected: Sequence[Sequence[int]],
    predicted: Sequence[Mapping[int, int]],
    tags: Iterable[str],
) -> Iterator[str]:
    read: list[set[int]] = [set() for _ in expected]
    for row in rows:
        read[row.text].update(word for word in row.origins if word is not None)
    words = sum(map(len, expected))
    cut = [len(known) - len(guesses) for known, guesses in zip(read, predicted, strict=True)]
    if total := sum(cut):
        longer = sum(map(bool, cut))
        yield f"{total} of {words} words are beyond what the model or max_length takes ({longer} sentences are cut)"
    if bare := words - sum(map(len, read)):
        yield f"{bare} of {words} words have no token, and do not count"
    if not _names_entities(tags):
        yield "the tags name no entities (B-…, I-…), so that there is no F1 by entity"


def _names_entities(tags: Iterable[str]) -> bool:
    return any(map(_ENTITY.fullmatch, tags))
