"""``genai_config.json``: what onnxruntime-genai must know to generate text with a decoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitlower.backends._json import write_json
from bitlower.backends._steps import has_cache
from bitlower.backends.onnx_qdq._folder import GENAI, MODEL
from bitlower.ir import Program
from bitlower.ir.json_files import parse_json

TYPE = "decoder"
"""onnxruntime-genai's name for any decoder with a cache of keys and values, whatever its family."""
ENDLESS = 2048
"""The tokens that a model without a limit of its own is said to take: the runtime asks for a number."""
_KEY, _VALUE = "past_key_values.%d.key", "past_key_values.%d.value"


def write_genai_config(program: Program, folder: Path, session_config: Mapping[str, str]) -> list[str]:
    """Write the file into ``folder`` for a decoder with logits and a cache; its name, or nothing for other programs.

    Args:
        program: what was exported.
        folder: the artefact's.
        session_config: session configuration entries that the model is meant to run with.
    """
    if not has_cache(program) or "logits" not in {spec.name for spec in program.outputs}:
        return []
    write_json(folder / GENAI, {"model": _model(program, session_config), "search": _search(program)})
    return [GENAI]


def _model(program: Program, session_config: Mapping[str, str]) -> dict[str, Any]:
    shapes = {spec.name: spec.type.shape for spec in (*program.inputs, *program.outputs)}
    inputs: dict[str, Any] = {name: name for name in ("input_ids", "attention_mask", "position_ids") if name in shapes}
    _, heads, _, width = shapes[_KEY % 0]
    config = program.config
    options: dict[str, Any] = {"log_id": "onnxruntime-genai", "provider_options": [], **session_config}
    eos = _setting(program, "eos_token_id", default=0)
    decoder: dict[str, Any] = {
        "filename": MODEL,
        "session_options": options,
        "head_size": width,
        "hidden_size": config.get("hidden_size") or config.get("n_embd") or 0,
        "num_attention_heads": config.get("num_attention_heads") or config.get("n_head") or heads,
        "num_hidden_layers": sum(name.startswith("past_key_values.") for name in shapes) // 2,
        "num_key_value_heads": heads,
        "inputs": {**inputs, "past_key_names": _KEY, "past_value_names": _VALUE},
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    return {
        "type": TYPE,
        "context_length": _context_length(program),
        "vocab_size": shapes["logits"][-1],
        "bos_token_id": _setting(program, "bos_token_id", default=0),
        "eos_token_id": eos,
        "pad_token_id": _setting(program, "pad_token_id", default=eos[0] if isinstance(eos, list) else eos),
        "decoder": decoder,
    }


def _search(program: Program) -> dict[str, Any]:
    """The model's own defaults for generation, and caches that grow."""
    given = {
        key: _setting(program, key, default=default)
        for key, default in (("do_sample", False), ("temperature", 1.0), ("top_k", 50), ("top_p", 1.0))
    }
    return {
        **given,
        "max_length": _context_length(program),
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": False,
    }


def _context_length(program: Program) -> int:
    return program.context_length or ENDLESS


def _setting(program: Program, key: str, *, default: Any) -> Any:
    """A value of ``generation_config.json``, else of the model's configuration, else ``default``."""
    try:
        generation = parse_json(program.assets.get("generation_config.json", b"{}"))
    except ValueError:
        generation = {}
    for source in (generation, program.config):
        value = source.get(key) if isinstance(source, dict) else None
        if value is not None:
            return value
    return default
