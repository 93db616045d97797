"""Texts as rows of tokens that know where they come from: a word, or some characters of a text.

Evaluations of what a model says about single tokens read these. A row has no padding; :func:`padded_rows` adds it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from bitlower.frontends._tokenizer import tokenizer_of
from bitlower.frontends.pairs import padded
from bitlower.frontends.tokenize import explaining, model_inputs, token_limit
from bitlower.ir import Batch, BitlowerError, Program

T = TypeVar("T")
Span = tuple[int, int]
"""The first character of a text, and the one behind the last."""
OVERLAP = 128
"""Tokens that a window of a context shares with the last one, at most half of it; as in transformers' examples."""


@dataclass(frozen=True)
class TokenRow(Generic[T]):
    """The tokens of one text, or of a part of it that the model takes.

    Args:
        ids: the tokens.
        types: which of two texts each belongs to, 0 or 1, where the tokenizer tells.
        origins: what each token stands for; None for tokens that the tokenizer adds.
        text: the place of the text, from 0.
    """

    ids: tuple[int, ...]
    types: tuple[int, ...]
    origins: tuple[T | None, ...]
    text: int


@dataclass(frozen=True)
class PaddedRows:
    """Rows as an input batch, int64, each padded at its end to the longest; ``places`` are those of the rows."""

    places: tuple[int, ...]
    inputs: Batch


def word_rows(program: Program, sentences: Sequence[Sequence[str]], *, max_length: int) -> list[TokenRow[int]]:
    """Sentences that are split into words; what a token stands for is the place of its word.

    A sentence with more than ``max_length`` tokens becomes several rows, in order; so does one that is longer than the
    model takes. A tokenizer that puts no space before a text gets one before each word but the first.

    Raises:
        BitlowerError: the program has no tokenizer that says which tokens a word has.
    """
    tokenizer = _placing(program)
    spaced = getattr(tokenizer, "add_prefix_space", None) is False
    words = [[" " * (spaced and place > 0) + word for place, word in enumerate(words)] for words in sentences]
    with explaining(program):
        encoded = tokenizer(words, is_split_into_words=True, **_settings(program, max_length))
    return _rows(encoded, encoded.word_ids)


def text_rows(program: Program, texts: Sequence[str], *, max_length: int) -> list[TokenRow[Span]]:
    """Texts as they are; a token stands for characters of its text.

    A text with more than ``max_length`` tokens becomes several rows, as in :func:`word_rows`.

    Raises:
        BitlowerError: the program has no tokenizer that says where tokens stand.
    """
    tokenizer = _placing(program)
    with explaining(program):
        encoded = tokenizer(list(texts), **_settings(program, max_length))
    return _rows(encoded, lambda place: _spans(encoded, place, 0))


def context_rows(
    program: Program, question: str, context: str, *, text: int, max_length: int, where: str
) -> list[TokenRow[Span]]:
    """A question with each window of its context, windows overlapping; tokens of the context stand for characters.

    Args:
        program: with a tokenizer that says where tokens stand.
        question: is in every row as a whole.
        context: is cut into windows.
        text: the place of the question, for the rows.
        max_length: tokens of a row.
        where: the question's place in a file, for messages.

    Raises:
        BitlowerError: the question leaves no room for a context, or the tokenizer does not say where tokens stand.
    """
    tokenizer, limit = _placing(program), token_limit(program, max_length)
    with explaining(program):
        asked = len(tokenizer(question, add_special_tokens=False, verbose=False)["input_ids"])
    room = limit - asked - tokenizer.num_special_tokens_to_add(pair=True)
    if room < 2:
        raise BitlowerError(
            f"{where}: the question has {asked} tokens, which leave no room for a context in {limit}",
            hint="shorten it, or raise max_length if the model takes more",
        )
    settings = _settings(program, max_length) | {"truncation": "only_second", "stride": min(OVERLAP, room // 2)}
    with explaining(program):
        encoded = tokenizer([question], [context], **settings)
    return [replace(row, text=text) for row in _rows(encoded, lambda place: _spans(encoded, place, 1))]


def first_rows(rows: Sequence[TokenRow[T]]) -> list[TokenRow[T]]:
    """The first row of each text."""
    return [row for place, row in enumerate(rows) if place == 0 or row.text != rows[place - 1].text]


def mask_token(program: Program) -> int:
    """The token that stands for one to be guessed.

    Raises:
        BitlowerError: the tokenizer has none.
    """
    token = tokenizer_of(program).mask_token_id
    if token is None:
        raise BitlowerError(
            f"the tokenizer of {program.source or 'the model'} has no token for a mask",
            hint="masked language models have one; text-generation measures causal ones",
        )
    return int(token)


def first_token(program: Program, row: TokenRow[T]) -> int:
    """The place of the token that stands for the whole of ``row`` (``[CLS]``); 0 where the tokenizer has none."""
    token = tokenizer_of(program).cls_token_id
    return row.ids.index(token) if token in row.ids else 0


def padded_rows(program: Program, rows: Sequence[TokenRow[T]], *, batch_size: int) -> list[PaddedRows]:
    """Batches of ``rows`` for ``program``; rows of like length go together, so that padding is short.

    Raises:
        BitlowerError: the tokenizer has no padding token, or the model does not know a token.
    """
    pad = tokenizer_of(program, pads=True).pad_token_id
    order = sorted(range(len(rows)), key=lambda place: len(rows[place].origins))
    result = []
    for first in range(0, len(order), batch_size):
        places = tuple(order[first : first + batch_size])
        ids, mask = padded([rows[place].ids for place in places], pad)
        types, _ = padded([rows[place].types for place in places], 0)
        known = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        result.append(PaddedRows(places, model_inputs(program, known)))
    return result


def _placing(program: Program) -> Any:
    """The tokenizer of ``program``, which says where its tokens come from.

    Raises:
        BitlowerError: it does not, or there is none.
    """
    tokenizer = tokenizer_of(program)
    if not tokenizer.is_fast:
        raise BitlowerError(
            f"the tokenizer of {program.source or 'the model'} does not say where in a text its tokens stand",
            hint="put its tokenizer.json beside config.json",
        )
    return tokenizer


def _settings(program: Program, max_length: int) -> dict[str, Any]:
    """How texts are tokenized: what is too long goes on in further rows."""
    return {
        "truncation": True, "max_length": token_limit(program, max_length), "return_overflowing_tokens": True,
        "return_offsets_mapping": True, "return_token_type_ids": True, "verbose": False,
    }  # fmt: skip


def _spans(encoded: Any, place: int, sequence: int) -> list[Span | None]:
    """The characters that each token of a row stands for; None but for tokens of the text ``sequence``, 0 or 1."""
    pairs = zip(encoded.sequence_ids(place), encoded["offset_mapping"][place], strict=True)
    return [span if own == sequence else None for own, span in pairs]


def _rows(encoded: Any, origins: Callable[[int], Sequence[T | None]]) -> list[TokenRow[T]]:
    """The rows of what a tokenizer returned; ``origins`` of a row are asked for by its place."""
    columns = zip(encoded["input_ids"], encoded["token_type_ids"], encoded["overflow_to_sample_mapping"], strict=True)
    return [
        TokenRow(tuple(ids), tuple(types), tuple(origins(place)), text)
        for place, (ids, types, text) in enumerate(columns)
    ]
