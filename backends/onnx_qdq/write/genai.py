"""``genai_config.json``: what onnxruntime-genai must know to generate text with a decoder, or from speech."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitlower.backends.artifact.json_files import write_json
from bitlower.backends.onnx_qdq.write.files import GENAI, MODEL, model_file
from bitlower.backends.onnx_qdq.write.genai_search import generation
from bitlower.ir import Program
from bitlower.ir.decoder_step import has_cache
from bitlower.ir.stages import CROSS, DECODER, ENCODER, OWN, STATES, is_encoder_decoder
from bitlower.ir.tasks import SPEECH_RECOGNITION
from bitlower.ir.tokens import PAST, PAST_NAME, PRESENT_NAME, is_past

TYPE = "decoder"
"""onnxruntime-genai's name for any decoder with a cache of keys and values, whatever its family."""
SPEECH_TYPE = "whisper"
"""Its name for an encoder of sound with a decoder: the one kind of encoder-decoder that it runs."""
ENDLESS = 2048
"""The tokens that a model without a limit of its own is said to take: the runtime asks for a number."""
_FEATURES = "input_features"


def write_genai_config(
    program: Program, folder: Path, session_config: Mapping[str, str]
) -> tuple[list[str], tuple[str, ...]]:
    """Write the file into ``folder`` for a decoder with logits and a cache; its name, and notes on what it cannot say.

    Of encoder-decoders, those that read speech get one (:func:`writes_speech`). A decoder with other states than keys
    and values gets none: the format has no names for them.

    Args:
        program: what was exported.
        folder: the artifact's.
        session_config: session configuration entries that the model is meant to run with.
    """
    described = writes_speech(program) or not is_encoder_decoder(program)
    if not has_cache(program) or not described or "logits" not in {spec.name for spec in program.outputs}:
        return [], ()
    states = [spec.name for spec in program.inputs if is_past(spec) and PAST not in spec.type.shape]
    if states:
        return [], (f"no {GENAI}: onnxruntime-genai has no place for states such as {states[0]}",)
    shapes = {spec.name: spec.type.shape for spec in (*program.inputs, *program.outputs)}
    entries = shapes["logits"][-1]
    said = generation(program, int(entries), _context_length(program))
    kind, sides = (SPEECH_TYPE, _speech_sides) if writes_speech(program) else (TYPE, _decoder)
    model = {"type": kind, "context_length": _context_length(program), **sides(program, shapes, session_config)}
    model |= {"vocab_size": entries, **said.tokens}
    write_json(folder / GENAI, {"model": model, "search": said.search})
    return [GENAI], said.notes


def writes_speech(program: Program) -> bool:
    """Whether onnxruntime-genai runs this encoder-decoder, which takes that the encoder returns its states too."""
    features = any(spec.name == _FEATURES for spec in program.inputs)
    return is_encoder_decoder(program) and program.task == SPEECH_RECOGNITION and features


def _decoder(
    program: Program, shapes: Mapping[str, tuple[Any, ...]], session_config: Mapping[str, str]
) -> dict[str, Any]:
    inputs: dict[str, Any] = {name: name for name in ("input_ids", "attention_mask", "position_ids") if name in shapes}
    config = program.config
    decoder = {
        **_side(MODEL, shapes, "", session_config),
        "hidden_size": config.get("hidden_size") or config.get("n_embd") or 0,
        "inputs": inputs | _names("past", PAST_NAME),
        "outputs": {"logits": "logits"} | _names("present", PRESENT_NAME),
    }
    decoder["num_attention_heads"] = (
        config.get("num_attention_heads") or config.get("n_head") or decoder["num_key_value_heads"]
    )
    return {"decoder": decoder}


def _speech_sides(
    program: Program, shapes: Mapping[str, tuple[Any, ...]], session_config: Mapping[str, str]
) -> dict[str, Any]:
    """Both sides: features of sound go in at the encoder, and its keys and values at the decoder."""
    encoder, decoder = (
        _side(model_file(stage), shapes, prefix, session_config) for stage, prefix in ((ENCODER, CROSS), (DECODER, OWN))
    )
    encoder["inputs"] = {"audio_features": _FEATURES}
    encoder["outputs"] = {STATES: STATES} | _names("cross_present", PRESENT_NAME, CROSS)
    decoder["inputs"] = (
        {"input_ids": "input_ids"} | _names("past", PAST_NAME, OWN) | _names("cross_past", PAST_NAME, CROSS)
    )
    decoder["outputs"] = {"logits": "logits"} | _names("present", PRESENT_NAME, OWN)
    return {"encoder": encoder, "decoder": decoder}


def _side(
    file: str, shapes: Mapping[str, tuple[Any, ...]], prefix: str, session_config: Mapping[str, str]
) -> dict[str, Any]:
    """A file, and the sizes of the keys that it returns under names with ``prefix``; as wide as its heads together."""
    keys = [shape for name, shape in shapes.items() if name.startswith(PRESENT_NAME) and name.endswith(f"{prefix}key")]
    _, heads, _, width = keys[0]
    return {
        "filename": file,
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": [], **session_config},
        "head_size": width,
        "hidden_size": heads * width,
        "num_attention_heads": heads,
        "num_hidden_layers": len(keys),
        "num_key_value_heads": heads,
    }


def _names(what: str, first: str, prefix: str = "") -> dict[str, str]:
    """How keys and values are called: ``past_key_names`` and the like."""
    return {f"{what}_{part}_names": f"{first}%d.{prefix}{part}" for part in ("key", "value")}


def _context_length(program: Program) -> int:
    return program.context_length or ENDLESS
