"""Greedy generation with a KV cache, and how fast it is."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch

from bitlower.backends.tvm_kernels import Library
from bitlower.frontends.tokenize import decode, positions, text_ids, window_lead
from bitlower.ir import BitlowerError, Program
from bitlower.tools.evaluation.language_model import LanguageModel, language_model


@dataclass(frozen=True)
class Sample:
    """A continuation and how long it took.

    Args:
        prompt: its text.
        text: the continuation.
        prompt_tokens: of the prompt.
        new_tokens: of the continuation, with the token that ended it, if one did.
        prefill_tokens_per_second: tokens of the prompt in the first step.
        decode_tokens_per_second: tokens in the steps of one token each.
    """

    prompt: str
    text: str
    prompt_tokens: int
    new_tokens: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {k: round(v, 2) if isinstance(v, float) else v for k, v in asdict(self).items()}


def generate(
    model: Program | Library | LanguageModel,
    input_ids: torch.Tensor,
    max_new_tokens: int,
    *,
    attention_mask: torch.Tensor | None = None,
    stops: Collection[int] | None = None,
    pad: int | None = None,
) -> torch.Tensor:
    """The most likely tokens one by one: the prompts with what follows, ``[batch, prompt + new]`` int64.

    One graph computes prompt and steps; the cache grows by a token a step. It ends when every row has ended, after
    ``max_new_tokens``, or when the model's context is full.

    Args:
        model: a Program or a library with a cache, or anything behind
            :class:`~bitlower.tools.evaluation.language_model.LanguageModel`.
        input_ids: ``[batch, prompt]``; shorter prompts are padded on the left.
        max_new_tokens: at least 1.
        attention_mask: 0 where ``input_ids`` is padding; all ones if left out.
        stops: tokens that end a row; those of the model's configuration if left out.
        pad: what follows the end of a row; the first of ``stops`` if left out.

    Raises:
        BitlowerError: the shapes do not fit, padding stands on the right, the prompt is longer than the context, or the
            model is no causal language model.
    """
    model = language_model(model)
    if max_new_tokens < 1:
        raise BitlowerError(f"{max_new_tokens} new tokens make no sense", hint="ask for at least 1")
    stop = torch.tensor(list(model.stops if stops is None else stops), dtype=torch.int64)
    filler = pad if pad is not None else int(stop[0]) if len(stop) else 0
    done = torch.zeros(len(input_ids), dtype=torch.bool)
    tokens = [input_ids]
    for token in islice(_greedy(model, input_ids, attention_mask), _room(model, input_ids, max_new_tokens)):
        token[done] = filler  # the next step reads it
        tokens.append(token[:, None].clone())
        done |= torch.isin(token, stop)
        if bool(done.all()):
            break
    return torch.cat(tokens, dim=1)


def sample(
    model: Program | Library | LanguageModel,
    prompt: str,
    max_new_tokens: int,
    *,
    stops: Collection[int] | None = None,
    bos: str = "auto",
) -> Sample:
    """Continue ``prompt`` greedily, and time the prompt and the steps; a first run of the prompt is not timed.

    ``bos`` says what the prompt begins with; see :func:`~bitlower.frontends.tokenize.window_lead`.

    Raises:
        BitlowerError: as :func:`generate`; or the model has no tokenizer, or the prompt has no token.
    """
    model = language_model(model)
    lead = torch.tensor(window_lead(model.program, bos), dtype=torch.int64)
    ids = torch.cat([lead, text_ids(model.program, prompt)])[None]
    if not ids.numel():
        raise BitlowerError("a prompt has no token", hint="write a text, or take bos always")
    stop = set(model.stops if stops is None else stops)
    count = _room(model, ids, max_new_tokens)
    next(_greedy(model, ids, None))
    new: list[int] = []
    start = time.perf_counter()
    first = start
    for token in islice(_greedy(model, ids, None), count):
        new.append(int(token))
        if len(new) == 1:
            first = time.perf_counter()
        if new[-1] in stop:
            break
    steps = len(new) - 1
    rate = steps / (time.perf_counter() - first) if steps else None
    return Sample(prompt, decode(model.program, new), ids.shape[1], len(new), ids.shape[1] / (first - start), rate)


def samples(
    model: LanguageModel, prompts: Sequence[str], max_new_tokens: int, *, bos: str = "auto"
) -> tuple[Sample, ...]:
    """:func:`sample` for each prompt."""
    return tuple(sample(model, prompt, max_new_tokens, bos=bos) for prompt in prompts)


def _room(model: LanguageModel, ids: torch.Tensor, wanted: int) -> int:
    """How many of ``wanted`` tokens can follow the prompts ``ids``: the model need not read the last one."""
    longest, prompt = model.program.context_length, ids.shape[-1]
    if longest is None:
        return wanted
    if prompt > longest:
        raise BitlowerError(
            f"a prompt of {prompt} tokens does not fit the model",
            hint=f"it takes {longest} tokens, earlier and new ones",
        )
    return min(wanted, longest - prompt + 1)


def _greedy(model: LanguageModel, ids: torch.Tensor, mask: torch.Tensor | None) -> Iterator[torch.Tensor]:
    """The next token of every row, ``[batch]``, on and on; what the caller writes into it is what the next step reads.

    Raises:
        BitlowerError: the shapes do not fit, or padding stands on the right.
    """
    mask = torch.ones_like(ids) if mask is None else mask.long()
    if ids.dim() != 2 or ids.shape != mask.shape or not ids.numel():
        raise BitlowerError(f"prompts of the shape {list(ids.shape)} and a mask of {list(mask.shape)} do not fit")
    if not bool(mask[:, -1].all()):
        raise BitlowerError("a prompt is padded on the right", hint="pad on the left, so that all end together")
    feed = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)}
    cache: Any = None
    while True:
        logits, cache = model.step(feed, cache)
        token = logits[:, -1].argmax(-1)
        yield token
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        feed = {"input_ids": token[:, None], "attention_mask": mask, "position_ids": positions(mask)[:, -1:]}
