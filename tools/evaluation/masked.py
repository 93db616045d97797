"""Masked language models: how well a model guesses masked tokens, the same ones for whoever has the tokenizer.

Of each text a share of the tokens is replaced by the mask, all at once (Devlin et al., 2019, section 3.1, who replace
some of them by other tokens). The pseudo-perplexity is the exponential of the mean cross-entropy of these tokens;
Salazar et al. (2020) mask each token alone, which gives smaller numbers.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
from scipy.special import log_softmax

from bitlower.frontends.token_rows import Span, TokenRow, first_rows, mask_token, text_rows
from bitlower.ir import BitlowerError, Program
from bitlower.tools.data.texts import read_texts
from bitlower.tools.evaluation.figures import Figures, exponential, ratio
from bitlower.tools.evaluation.results import Evaluation
from bitlower.tools.evaluation.runners import Array, Track, check_output, open_runner, run_rows

FILL_MASK = "fill-mask"
SHARE = 0.15
"""Of the tokens of a text that are masked, one at least; as BERT was trained."""
_UNITS = {"cross_entropy": "nats a token", "pseudo_perplexity": ""}


@dataclass(frozen=True)
class MaskedRow:
    """A text with masks: the row that a model reads, the places of the masks and the tokens under them."""

    row: TokenRow[Span]
    places: tuple[int, ...]
    tokens: tuple[int, ...]


def evaluate_masked(
    target: str | os.PathLike[str] | Program,
    path: Path,
    *,
    columns: Sequence[str],
    batch_size: int,
    max_length: int,
    seed: int,
    track: Track,
) -> Evaluation:
    """Let ``target`` guess masked tokens of the texts of ``path``.

    Args:
        target: as :func:`~bitlower.tools.evaluation.evaluate.evaluate` has it.
        path: one text a line, or a table.
        columns: of a table, the one with the texts.
        batch_size: texts in a batch.
        max_length: tokens; longer texts are cut.
        seed: of the masks.
        track: wraps the batches with a progress display.

    Raises:
        BitlowerError: no text, two columns, or a model that gives no logits over its tokens or has no mask.
        CheckError: the model gives NaN.
    """
    if len(columns) > 1:
        raise BitlowerError("fill-mask takes one column", hint="--columns text")
    texts = [str(text) for text in read_texts(path, column=columns[0] if columns else None)]
    runner = open_runner(target)
    check_output(runner, FILL_MASK, "logits", (None, None, runner.program.config.get("vocab_size")))
    mask, rows = mask_token(runner.program), text_rows(runner.program, texts, max_length=max_length)
    masked = [masked_row(row, mask, seed) for row in first_rows(rows)]
    hits, losses = np.zeros(len(masked)), [list[float]() for _ in masked]
    for place, outputs in run_rows(runner, [entry.row for entry in masked], batch_size, track):
        entry = masked[place]
        logits = outputs["logits"][list(entry.places)].astype(np.float64)
        hits[place] = (logits.argmax(-1) == entry.tokens).sum()
        losses[place] = (-log_softmax(logits, axis=-1)[range(len(entry.tokens)), list(entry.tokens)]).tolist()
    total = sum(map(len, losses))
    if not total:
        raise BitlowerError(f"no text of {path} has a token", hint="is this the right tokenizer?")
    loss = math.fsum(chain(*losses)) / total
    perplexity = math.exp(loss) if loss < 700 else math.inf
    metrics = {"accuracy": 100 * float(hits.sum()) / total, "cross_entropy": loss, "pseudo_perplexity": perplexity}
    name = target.source if isinstance(target, Program) else os.fspath(target)
    notes = tuple(_notes(rows, masked, seed))
    return Evaluation(name, FILL_MASK, str(path), len(texts), metrics, notes, _UNITS, _figures(masked, hits, losses))


def _figures(masked: Sequence[MaskedRow], hits: Array, losses: Sequence[Sequence[float]]) -> Figures:
    """The metrics by text; texts with the same tokens under the same masks compare."""
    tokens, sums = [len(row) for row in losses], [math.fsum(row) for row in losses]
    loss = ratio(sums, tokens, scale=1.0)
    by_name = {"accuracy": ratio(hits, tokens), "cross_entropy": loss, "pseudo_perplexity": exponential(loss)}
    rows = repr([(entry.row.ids, entry.tokens) for entry in masked])
    return Figures(len(masked), "texts", by_name, hashlib.sha256(rows.encode()).hexdigest())


def masked_row(row: TokenRow[Span], mask: int, seed: int) -> MaskedRow:
    """``row`` with ``mask`` in place of tokens that are drawn with ``seed`` and the place of its text.

    Tokens that the tokenizer adds stay; a row that has no others gets no mask.
    """
    own = [place for place, span in enumerate(row.origins) if span is not None]
    count = max(1, round(SHARE * len(own))) if own else 0
    places = tuple(sorted(random.Random(f"{seed}/mask/{row.text}").sample(own, count)))
    ids = tuple(mask if place in places else token for place, token in enumerate(row.ids))
    return MaskedRow(replace(row, ids=ids), places, tuple(row.ids[place] for place in places))


def _notes(rows: Sequence[TokenRow[Span]], masked: Sequence[MaskedRow], seed: int) -> Iterator[str]:
    total = sum(span is not None for entry in masked for span in entry.row.origins)
    yield f"{sum(len(entry.places) for entry in masked)} of {total} tokens are masked, drawn with seed {seed}"
    if cut := len({row.text for row, following in pairwise(rows) if row.text == following.text}):
        yield f"{cut} of {len(masked)} texts are longer than the model or max_length takes, and are cut"
