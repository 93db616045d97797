"""How a model generates: what its own files say, and over it what the caller asks for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from transformers import GenerationConfig

from bitlower.ir.assets import generation_settings
from bitlower.ir.diagnostics import BitlowerError, nearest
from bitlower.ir.program import Program

SETTINGS = frozenset({
    "begin_suppress_tokens", "bad_words_ids", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty", "epsilon_cutoff", "eta_cutoff", "exponential_decay_length_penalty",
    "forced_bos_token_id", "forced_eos_token_id", "length_penalty", "min_length", "min_new_tokens", "min_p",
    "no_repeat_ngram_size", "num_beams", "num_return_sequences", "remove_invalid_values", "renormalize_logits",
    "repetition_penalty", "sequence_bias", "suppress_tokens", "temperature", "top_k", "top_p", "typical_p",
})  # fmt: skip
"""Of transformers' ``GenerationConfig`` those that choose tokens from scores; the rest is about its own models."""
_CHOSEN_BY_CALL = {"do_sample", "num_beams", "num_return_sequences"}
"""What a model's files do not decide: a call that says nothing searches greedily."""


def generation_config(
    program: Program, *, max_new_tokens: int, stops: Collection[int], pad: int, asked: Mapping[str, Any]
) -> GenerationConfig:
    """The settings of one call.

    Args:
        program: its ``generation_config.json`` counts, or else its configuration, as in transformers.
        max_new_tokens: at most so many follow.
        stops: tokens that end a row.
        pad: what follows the end of a row.
        asked: settings of transformers' ``GenerationConfig``, over those of the model.

    Raises:
        BitlowerError: a setting is unknown or has a value that transformers refuses.
    """
    for name in asked:
        if name not in SETTINGS:
            raise BitlowerError(f"generate has no setting {name!r}", hint=nearest(name, SETTINGS))
    stated = generation_settings(program.assets) or program.config
    stated = {"forced_bos_token_id": program.config.get("forced_bos_token_id"), **stated}  # a language
    own = {name: stated[name] for name in SETTINGS - _CHOSEN_BY_CALL if stated.get(name) is not None}
    try:
        return GenerationConfig(
            **{**own, **asked}, max_new_tokens=max_new_tokens, eos_token_id=list(stops) or None, pad_token_id=pad
        )
    except (TypeError, ValueError) as error:
        raise BitlowerError(f"the settings for generating do not fit: {str(error).splitlines()[0]}") from None
