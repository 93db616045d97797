"""From sources and targets to batches of an encoder-decoder, teacher-forced: each token of a target is given the last.

The decoder reads a target behind its start token and without its last. Where there are no targets, the model's own are
taken, by greedy decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bitlower.frontends._tokenizer import tokenizer_of
from bitlower.ir import BitlowerError, Program, ValueSpec
from bitlower.ir.generation import own_targets, start_token, stop_tokens, target_prompt
from bitlower.ir.tokens import BATCH, ENCODER_SEQUENCE, MASK, SEQUENCE, TARGET, TARGET_MASK, TOKENS, TOTAL

_OWN = 64
"""Tokens of a target that the model writes itself, at most."""


@dataclass(frozen=True)
class PairBatches:
    """Batches, and how many of the sources and of the targets were too long and are cut."""

    batches: list[dict[str, torch.Tensor]]
    cut_sources: int
    cut_targets: int


def pair_batches(
    program: Program, sources: Sequence[str], targets: Sequence[str] | None, *, max_length: int, batch_size: int
) -> PairBatches:
    """Batches in the order of ``sources``, int64, each side padded to its longest of the batch.

    Args:
        program: an encoder-decoder of text, with tokenizer files among its assets.
        sources: what the encoder reads.
        targets: what the decoder is to write; None: what the model writes itself.
        max_length: in tokens, of each side; longer texts are cut.
        batch_size: pairs in a batch.

    Raises:
        BitlowerError: the program has no tokenizer that can pad, or names no token that targets begin with.
    """
    tokenizer = tokenizer_of(program, pads=True)
    longest = program.lengths[ENCODER_SEQUENCE].longest if ENCODER_SEQUENCE in program.lengths else None
    limits = [min(max_length, longest or max_length), min(max_length, program.context_length or max_length)]
    read, cut_sources = _tokens(tokenizer, {"text": list(sources)}, limits[0])
    written, cut_targets = None, 0
    if targets is not None:
        written, cut_targets = _tokens(tokenizer, {"text_target": list(targets)}, limits[1])
    batches: list[dict[str, torch.Tensor]] = []
    for first in range(0, len(read), batch_size):
        part = slice(first, first + batch_size)
        ids, mask = padded(read[part], tokenizer.pad_token_id)
        source = {TOKENS: ids, MASK: mask}
        if written is not None:
            rows = [shifted(program, row) for row in written[part]]
        else:
            rows = own_targets(program, source, target_prompt(program), stop_tokens(program), min(limits[1], _OWN))
        target, target_mask = padded(rows, tokenizer.pad_token_id)
        batches.append({**source, TARGET: target, TARGET_MASK: target_mask})
    return PairBatches(batches, cut_sources, cut_targets)


def random_pairs(program: Program, *, count: int, length: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """``count`` batches of one source and one target, drawn at random: for comparisons that need no data.

    Raises:
        BitlowerError: the model does not say how many tokens it knows.
    """
    generator = torch.Generator().manual_seed(seed)
    entries = program.config.get("decoder_vocab_size") or program.config.get("vocab_size")
    if not isinstance(entries, int):
        raise BitlowerError(f"{program.source or 'the model'} does not say how many tokens it knows (vocab_size)")
    longest = program.lengths[ENCODER_SEQUENCE].longest if ENCODER_SEQUENCE in program.lengths else None
    sizes = {BATCH: 1, ENCODER_SEQUENCE: min(length, longest or length)}
    sizes[SEQUENCE] = sizes[TOTAL] = min(length, program.context_length or length)

    def drawn(spec: ValueSpec) -> torch.Tensor:
        shape = [sizes[dim] if isinstance(dim, str) else dim for dim in spec.type.shape]
        if spec.type.is_float:
            return torch.randn(shape, generator=generator)
        if spec.name in (MASK, TARGET_MASK):
            return torch.ones(shape, dtype=spec.type.dtype)
        return torch.randint(entries, shape, generator=generator, dtype=spec.type.dtype)

    read = [spec for spec in program.inputs if "past" not in spec.type.shape]
    return [{spec.name: drawn(spec) for spec in read} for _ in range(count)]


def shifted(program: Program, target: Sequence[int]) -> list[int]:
    """What the decoder reads of a target: its start token, then all but the last.

    The start token is ``decoder_start_token_id``; the last token of the target itself where none is named (mBART, whose
    targets end with their language).

    Raises:
        BitlowerError: the target is empty.
    """
    if not target:
        raise BitlowerError("a target has no token", hint="write a text, or drop the pair")
    start = start_token(program)
    return [target[-1] if start is None else start, *target[:-1]]


def _tokens(tokenizer: Any, texts: dict[str, list[str]], limit: int) -> tuple[list[list[int]], int]:
    """The tokens of each text, and how many texts are cut to ``limit``."""
    whole = tokenizer(**texts, verbose=False)["input_ids"]
    rows = tokenizer(**texts, truncation=True, max_length=limit, verbose=False)["input_ids"]
    return rows, sum(len(row) > limit for row in whole)


def padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of one length, ``[batch, longest]`` int64, and which of their tokens are no padding."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows], dtype=torch.int64)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], dtype=torch.int64)
    return ids, mask
