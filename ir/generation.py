"""Greedy decoding of an encoder-decoder: the source is encoded once, and the target written token by token."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from bitlower.ir.assets import generation_settings
from bitlower.ir.diagnostics import BitlowerError
from bitlower.ir.fit import Batch
from bitlower.ir.observe import run
from bitlower.ir.program import Program
from bitlower.ir.stages import DECODER, ENCODER, decoder_batch, next_past, split_stages
from bitlower.ir.tokens import TARGET

Stage = Callable[[Batch], Mapping[str, torch.Tensor]]
"""A stage as a function of its inputs by name; a past that is left out is empty."""


def greedy_target(
    encode: Stage,
    decode: Stage,
    source: Batch,
    start: torch.Tensor,
    *,
    stops: Collection[int],
    new_tokens: int,
    pad: int = 0,
) -> torch.Tensor:
    """The most likely tokens one by one, ``[batch, start + new]`` int64.

    It ends when every row has ended, or after ``new_tokens``.

    Args:
        encode: returns the keys and values of cross-attention.
        decode: returns ``logits`` and the decoder's own keys and values.
        source: what the encoder reads, by name.
        start: what every target begins with, ``[batch, n]``.
        stops: tokens that end a row.
        new_tokens: at most so many follow.
        pad: what follows the end of a row.
    """
    cross, stop = encode(source), torch.tensor(list(stops), dtype=torch.int64)
    done = torch.zeros(len(start), dtype=torch.bool)
    target, feed = start, decoder_batch({**source, TARGET: start}, cross)
    for _ in range(new_tokens):
        outputs = decode(feed)
        token = outputs["logits"][:, -1].argmax(-1).masked_fill(done, pad)[:, None]
        target = torch.cat([target, token], 1)
        done |= torch.isin(token[:, 0], stop)
        if bool(done.all()):
            break
        feed = decoder_batch({**source, TARGET: token}, cross) | next_past(outputs)
    return target


def before_stop(row: Sequence[int], stops: Collection[int], start: int = 0) -> list[int]:
    """The tokens of ``row`` before the first from place ``start`` on that ends a target; all where none does."""
    ends = (place for place, token in enumerate(row) if place >= start and token in stops)
    return list(row[: next(ends, len(row))])


def own_targets(
    program: Program, source: Batch, prompt: Sequence[int], stops: Collection[int], longest: int
) -> list[list[int]]:
    """What ``program`` writes for each row of ``source`` behind ``prompt``, that included, without what ends it.

    No target has more than ``longest`` tokens, its prompt among them.
    """
    start = torch.tensor([list(prompt)] * len(next(iter(source.values()))), dtype=torch.int64)
    written = greedy_target(*program_stages(program), source, start, stops=stops, new_tokens=longest - len(prompt))
    return [before_stop(row, stops, len(prompt)) for row in written.tolist()]


def program_stages(program: Program) -> tuple[Stage, Stage]:
    """What encodes and what decodes in ``program``, an encoder-decoder.

    Raises:
        BitlowerError: it is none.
    """
    stages = split_stages(program)
    return (lambda batch: run(stages[ENCODER], batch)), (lambda batch: run(stages[DECODER], batch))


def start_token(program: Program) -> int | None:
    """The token that every target begins with; None if none is named."""
    value = _setting(program, "decoder_start_token_id")
    return value if isinstance(value, int) else None


def target_prompt(program: Program) -> list[int]:
    """What every target begins with: the start token, and ``forced_bos_token_id`` where one is named (a language).

    Raises:
        BitlowerError: the model names no start token.
    """
    first, forced = start_token(program), _setting(program, "forced_bos_token_id")
    if first is None:
        raise BitlowerError(
            f"{program.source or 'the model'} names no decoder_start_token_id, so that it cannot write targets itself",
            hint="name one in generation_config.json",
        )
    return [first, *([forced] if isinstance(forced, int) else [])]


def stop_tokens(program: Program) -> tuple[int, ...]:
    """The tokens that end a target."""
    value = _setting(program, "eos_token_id")
    return tuple(value) if isinstance(value, list) else (value,) if isinstance(value, int) else ()


def _setting(program: Program, name: str) -> Any:
    """What ``generation_config.json`` says, or else the model's configuration."""
    return generation_settings(program.assets).get(name, program.config.get(name))
