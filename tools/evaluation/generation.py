"""Generation by whatever runs a language model, and how fast it is."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bitlower.backends.base import Model
from bitlower.frontends.tokenize import decode, text_ids, window_lead
from bitlower.ir import BitlowerError, Program
from bitlower.ir.generation import continue_prompts
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
    model: Program | Model | LanguageModel,
    input_ids: torch.Tensor,
    max_new_tokens: int,
    *,
    attention_mask: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """The prompts with what follows, ``[batch, prompt + new]`` int64; greedy, if the options do not say otherwise.

    Args:
        model: a Program or a library with a cache, or anything behind
            :class:`~bitlower.tools.evaluation.language_model.LanguageModel`.
        input_ids: ``[batch, prompt]``; shorter prompts are padded on the left.
        max_new_tokens: at least 1.
        attention_mask: 0 where ``input_ids`` is padding; all ones if left out.
        options: of :func:`~bitlower.ir.generation.continue_prompts`.

    Raises:
        BitlowerError: an argument does not fit, or the model is no causal language model.
    """
    model = language_model(model)
    return continue_prompts(
        model.program, model.step, input_ids, attention_mask, max_new_tokens=max_new_tokens, **options
    )


def sample(
    model: Program | Model | LanguageModel,
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
    model, clock = language_model(model), _Clock()
    lead = torch.tensor(window_lead(model.program, bos), dtype=torch.int64)
    ids = torch.cat([lead, text_ids(model.program, prompt)])[None]
    if not ids.numel():
        raise BitlowerError("a prompt has no token", hint="write a text, or take bos always")
    generate(model, ids, 1, stops=stops)
    tokens = generate(model, ids, max_new_tokens, stops=stops, streamer=clock)[0, ids.shape[1] :].tolist()
    start, first, last = clock.times[0], clock.times[1], clock.times[-1]
    steps = len(tokens) - 1
    rate = steps / (last - first) if steps else None
    return Sample(
        prompt, decode(model.program, tokens), ids.shape[1], len(tokens), ids.shape[1] / (first - start), rate
    )


class _Clock:
    """When the prompt and each new token came; a streamer of transformers."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """The prompt at first, then token after token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to be shown."""


def samples(
    model: LanguageModel, prompts: Sequence[str], max_new_tokens: int, *, bos: str = "auto"
) -> tuple[Sample, ...]:
    """:func:`sample` for each prompt."""
    return tuple(sample(model, prompt, max_new_tokens, bos=bos) for prompt in prompts)
