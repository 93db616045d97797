"""Generation: what a decoder writes behind a prompt, and what an encoder-decoder writes from a source.

Transformers' own ``generate`` chooses the tokens (:mod:`bitlower.ir._generating_model`); the model is whatever runs
one step, so that no float weights are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from bitlower.ir.assets import generation_settings
from bitlower.ir.decoder_step import Step, as_tensor
from bitlower.ir.diagnostics import BitlowerError
from bitlower.ir.fit import Batch
from bitlower.ir.observe import run
from bitlower.ir.program import Program
from bitlower.ir.quiet import quiet
from bitlower.ir.stages import DECODER, ENCODER, encoder_batch, next_past, split_stages
from bitlower.ir.tokens import MASK, TOKENS

if TYPE_CHECKING:
    from transformers import GenerationConfig
    from transformers.generation import BaseStreamer

Stage = Callable[[Batch], Mapping[str, torch.Tensor]]
"""A stage as a function of its inputs by name; a past that is left out is empty."""
Decode = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""The same of a decoder, which may return tensors of its runtime, as it takes them for a past."""


def continue_prompts(
    program: Program,
    step: Step,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    max_new_tokens: int,
    stops: Collection[int] | None = None,
    pad: int | None = None,
    streamer: BaseStreamer | None = None,
    **settings: Any,
) -> torch.Tensor:
    """The prompts with what follows, ``[batch, prompt + new]`` int64: the most likely tokens one by one.

    It ends when every row has ended, after ``max_new_tokens``, or when the model's context is full.

    Args:
        program: a causal language model's; it may have no graphs.
        step: what computes it.
        input_ids: ``[batch, prompt]``; shorter prompts are padded on the left.
        attention_mask: 0 where ``input_ids`` is padding; all ones if left out.
        max_new_tokens: at least 1.
        stops: tokens that end a row; the model's ``eos_token_id`` if left out.
        pad: what follows the end of a row; the model's ``pad_token_id``, or the first of ``stops``, if left out.
        streamer: transformers' way to see tokens as they come; not with beams.
        settings: of transformers' ``GenerationConfig``: ``num_beams``, ``length_penalty``, ``do_sample``, …; over those
            of the model's ``generation_config.json``, of which ``do_sample`` and ``num_beams`` do not count.

    Raises:
        BitlowerError: the shapes do not fit, padding stands on the right, the prompt is longer than the context, a
            setting is unknown or does not fit, or there are beams and a streamer.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    if input_ids.dim() != 2 or input_ids.shape != mask.shape or not input_ids.numel():
        raise BitlowerError(
            f"prompts of the shape {list(input_ids.shape)} and a mask of {list(mask.shape)} do not fit",
            hint="both are [batch, prompt]",
        )
    if not bool(mask[:, -1].all()):
        raise BitlowerError("a prompt is padded on the right", hint="pad on the left, so that all end together")
    new_tokens = _room(program, input_ids, max_new_tokens)
    config = _config(program, new_tokens, stops, pad, settings)
    if streamer is not None and (config.num_beams or 1) > 1:
        raise BitlowerError("beams are known at the end only, and a streamer sees tokens as they come", hint="drop one")
    return _generate(step, False, config, inputs=input_ids, attention_mask=mask, streamer=streamer)


def write_targets(
    program: Program,
    encode: Stage,
    decode: Decode,
    source: Batch,
    *,
    max_new_tokens: int,
    start: torch.Tensor | None = None,
    stops: Collection[int] | None = None,
    pad: int | None = None,
    **settings: Any,
) -> torch.Tensor:
    """The most likely target of each source, token by token: ``[batch, start + new]`` int64.

    The source is encoded once. It ends as :func:`continue_prompts`.

    Args:
        program: an encoder-decoder's; it may have no graphs.
        encode: returns the keys and values of cross-attention.
        decode: returns ``logits`` and the decoder's own keys and values. At each step it reads the
            same tensors of ``encode``.
        source: what the encoder reads, by name.
        max_new_tokens: at most so many follow the start, and no more than the model takes.
        start: what every target begins with, ``[batch, n]``; the model's ``decoder_start_token_id`` if left out.
        stops: tokens that end a target; the model's ``eos_token_id`` if left out.
        pad: what follows the end; the model's ``pad_token_id``, or the first of ``stops``, if left out.
        settings: as of :func:`continue_prompts`.

    Raises:
        BitlowerError: there is no source, an input is missing or unknown, the model names no token that targets begin
            with and none is given, the start does not fit the sources or is longer than the context, or a setting is
            unknown or does not fit.
    """
    if not source:
        read = [spec.name for spec in program.inputs if spec.name in encoder_batch({spec.name: spec})]
        raise BitlowerError("there is no source to write a target for", hint=f"the encoder reads {', '.join(read)}")
    main = source.get(TOKENS, next(iter(source.values())))
    if start is None:
        start = torch.tensor([target_prompt(program)[:1]] * len(main), dtype=torch.int64)
    if start.dim() != 2 or len(start) != len(main) or not start.numel():
        raise BitlowerError(
            f"a start of the shape {list(start.shape)} does not fit {len(main)} sources", hint="it is [batch, n]"
        )
    config = _config(program, _room(program, start, max_new_tokens), stops, pad, settings)
    config.decoder_start_token_id = start[:, 0].tolist()  # so that transformers puts nothing before it

    def step(feed: Batch, cache: Any) -> tuple[torch.Tensor, Any]:
        outputs = decode({**feed, **(cache or {})})
        return as_tensor(outputs["logits"]), next_past(outputs)

    mask = {MASK: source[MASK]} if MASK in source else {}
    return _generate(
        step, True, config, inputs=main, decoder_input_ids=start, encoder_outputs=dict(encode(source)), **mask
    )


def _generate(step: Step, encoder_decoder: bool, config: GenerationConfig, **inputs: Any) -> torch.Tensor:
    from bitlower.ir._generating_model import GeneratingModel

    with quiet():
        tokens: torch.Tensor = GeneratingModel(step, encoder_decoder, config).generate(**inputs)
    return tokens


def _config(
    program: Program,
    new_tokens: int,
    stops: Collection[int] | None,
    pad: int | None,
    settings: Mapping[str, Any],
) -> GenerationConfig:
    from bitlower.ir._generation_config import generation_config

    ends = tuple(stop_tokens(program) if stops is None else stops)
    if pad is None:
        pad = setting(program, "pad_token_id")
    filler = pad if pad is not None else ends[0] if ends else 0
    with quiet():
        return generation_config(program, max_new_tokens=new_tokens, stops=ends, pad=filler, asked=settings)


def _room(program: Program, start: torch.Tensor, wanted: int) -> int:
    """How many of ``wanted`` tokens can follow ``start``: the model need not read the last one."""
    if wanted < 1:
        raise BitlowerError(f"{wanted} new tokens make no sense", hint="ask for at least 1")
    longest, prompt = program.context_length, start.shape[-1]
    if longest is None:
        return wanted
    if prompt > longest:
        raise BitlowerError(
            f"a prompt of {prompt} tokens does not fit the model",
            hint=f"it takes {longest} tokens, earlier and new ones",
        )
    return min(wanted, longest - prompt + 1)


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
    if longest <= len(prompt):
        return start.tolist()
    written = write_targets(
        program, *program_stages(program), source, start=start, stops=stops, max_new_tokens=longest - len(prompt)
    )
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
    value = setting(program, "decoder_start_token_id")
    return value if isinstance(value, int) else None


def target_prompt(program: Program) -> list[int]:
    """What every target begins with: the start token, and ``forced_bos_token_id`` where one is named (a language).

    Raises:
        BitlowerError: the model names no start token.
    """
    first, forced = start_token(program), setting(program, "forced_bos_token_id")
    if first is None:
        raise BitlowerError(
            f"{program.source or 'the model'} names no decoder_start_token_id, so that it cannot write targets itself",
            hint="name one in generation_config.json",
        )
    return [first, *([forced] if isinstance(forced, int) else [])]


def stop_tokens(program: Program) -> tuple[int, ...]:
    """The tokens that end a target."""
    value = setting(program, "eos_token_id")
    return tuple(value) if isinstance(value, list) else (value,) if isinstance(value, int) else ()


def setting(program: Program, name: str) -> Any:
    """What ``generation_config.json`` says, or else the model's configuration."""
    return generation_settings(program.assets).get(name, program.config.get(name))
