"""``genai_config.json``: what onnxruntime-genai must know to generate text with a decoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitlower.backends._json import write_json
from bitlower.backends.onnx_qdq._folder import GENAI, MODEL
from bitlower.backends.onnx_qdq._genai_search import generation
from bitlower.ir import Program
from bitlower.ir.decoder_step import has_cache
from bitlower.ir.stages import is_encoder_decoder
from bitlower.ir.tokens import PAST, is_past

TYPE = "decoder"
"""onnxruntime-genai's name for any decoder with a cache of keys and values, whatever its family."""
ENDLESS = 2048
"""The tokens that a model without a limit of its own is said to take: the runtime asks for a number."""
_KEY, _VALUE = "past_key_values.%d.key", "past_key_values.%d.value"


def write_genai_config(
    program: Program, folder: Path, session_config: Mapping[str, str]
) -> tuple[list[str], tuple[str, ...]]:
    """Write the file into ``folder`` for a decoder with logits and a cache; its name, and notes on what it cannot say.

    A decoder with other states than keys and values gets none: the format has no names for them.

    Args:
        program: what was exported.
        folder: the artifact's.
        session_config: session configuration entries that the model is meant to run with.
    """
    if not has_cache(program) or is_encoder_decoder(program) or "logits" not in {spec.name for spec in program.outputs}:
        return [], ()
    states = [spec.name for spec in program.inputs if is_past(spec) and PAST not in spec.type.shape]
    if states:
        return [], (f"no {GENAI}: onnxruntime-genai has no place for states such as {states[0]}",)
    shapes = {spec.name: spec.type.shape for spec in (*program.inputs, *program.outputs)}
    entries = shapes["logits"][-1]
    said = generation(program, int(entries), _context_length(program))
    model = {**_model(program, shapes, session_config), "vocab_size": entries, **said.tokens}
    write_json(folder / GENAI, {"model": model, "search": said.search})
    return [GENAI], said.notes


def _model(
    program: Program, shapes: Mapping[str, tuple[Any, ...]], session_config: Mapping[str, str]
) -> dict[str, Any]:
    inputs: dict[str, Any] = {name: name for name in ("input_ids", "attention_mask", "position_ids") if name in shapes}
    _, heads, _, width = shapes[_KEY % 0]
    config = program.config
    options: dict[str, Any] = {"log_id": "onnxruntime-genai", "provider_options": [], **session_config}
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
        "decoder": decoder,
    }


def _context_length(program: Program) -> int:
    return program.context_length or ENDLESS
