"""How a model generates by default, in onnxruntime-genai's words; what that runtime does not know is named.

What goes over gives, without sampling, the tokens that ``generate`` of transformers returns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitlower.ir import Program
from bitlower.ir.assets import GENERATION, generation_settings

_KNOWN: dict[str, tuple[type, ...]] = {
    "do_sample": (bool,), "temperature": (int, float), "top_k": (int,), "top_p": (int, float),
    "repetition_penalty": (int, float), "no_repeat_ngram_size": (int,), "min_length": (int,), "max_length": (int,),
    "num_beams": (int,), "length_penalty": (int, float), "early_stopping": (bool,), "num_return_sequences": (int,),
}  # fmt: skip
"""The settings that onnxruntime-genai has, and the types that it takes."""
_DEFAULTS: dict[str, Any] = {
    "do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "num_beams": 1, "num_return_sequences": 1
}  # fmt: skip
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
_OTHER = ("_from_model_config", "transformers_version", "use_cache", "return_dict_in_generate", "cache_implementation")
"""Keys of ``generation_config.json`` that change no token."""
_UNSET_LENGTH = 20
"""What transformers takes for ``max_length`` where nobody says, which older files spell out."""


@dataclass(frozen=True)
class Generation:
    """What ``genai_config.json`` says about generation.

    Args:
        tokens: ``bos_token_id``, ``eos_token_id``, ``pad_token_id`` of the section ``model``.
        search: the section ``search``.
        notes: what could not be said, a line each.
    """

    tokens: dict[str, Any]
    search: dict[str, Any]
    notes: tuple[str, ...]


def generation(program: Program, vocabulary: int, context: int) -> Generation:
    """The settings of ``generation_config.json``, or of the model's configuration where there is none.

    Args:
        program: a decoder.
        vocabulary: entries of its logits.
        context: the most tokens that it takes.
    """
    form = generation_settings(program.assets)
    settings = {key: form.get(key, program.config.get(key)) for key in (*_KNOWN, *_TOKENS)}
    tokens, notes = _tokens(settings, vocabulary)
    search = dict(_DEFAULTS)
    for key, kinds in _KNOWN.items():
        value = settings[key]
        if value is None:
            continue
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            notes.append(f"onnxruntime-genai takes no {key} of {value!r}; it is left out")
        else:
            search[key] = value
    if search["num_return_sequences"] > search["num_beams"]:
        notes.append(f"onnxruntime-genai gives no {search['num_return_sequences']} sequences a prompt; it gives 1")
        search["num_return_sequences"] = 1
    length = search.get("max_length", _UNSET_LENGTH)
    search["max_length"] = context if length == _UNSET_LENGTH else min(length, context)
    unknown = sorted(key for key, value in form.items() if _matters(key, value))
    if unknown:
        notes.append(f"{GENERATION} has settings that onnxruntime-genai does not know: {', '.join(unknown)}")
    return Generation(tokens, {**search, "past_present_share_buffer": False}, tuple(notes))


def _tokens(settings: Mapping[str, Any], vocabulary: int) -> tuple[dict[str, Any], list[str]]:
    """The numbers of the special tokens, and notes.

    The runtime needs an end: with none named it takes the padding token, or token 0, and it refuses numbers beyond the
    vocabulary. A model without an end gets its padding token, which stands in no text, or else the last row of its
    table, which in most models is no token at all.
    """
    named = settings["eos_token_id"]
    ends = [end for end in (named if isinstance(named, list) else [named]) if _is_token(end, vocabulary)]
    bos, pad = settings["bos_token_id"], settings["pad_token_id"]
    notes = []
    if not ends:
        end, kind = (pad, "the padding token") if _is_token(pad, vocabulary) else (vocabulary - 1, "the last one")
        ends = [end]
        notes.append(
            f"the model names no token that ends a text, and onnxruntime-genai needs one: it takes {kind}, {end}"
        )
    tokens = {
        "bos_token_id": bos if _is_token(bos, vocabulary) else 0,
        "eos_token_id": ends if isinstance(named, list) or len(ends) > 1 else ends[0],
        "pad_token_id": pad if _is_token(pad, vocabulary) else ends[0],
    }
    return tokens, notes


def _is_token(value: Any, vocabulary: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocabulary


def _matters(key: str, value: Any) -> bool:
    """Whether a setting that the runtime does not have would change what is generated: neither nothing nor times 1."""
    ours = key in _KNOWN or key in _TOKENS or key in _OTHER or key.startswith("output_")
    return not ours and bool(value) and value != 1
