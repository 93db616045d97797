"""Encoder-decoders against transformers: signatures, exactness token by token, padding, limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from bitlower.frontends import load
from bitlower.ir import BitlowerError, Length
from bitlower.ir.verifier import verify


@pytest.mark.parametrize("kind", ["bart", "marian", "t5", "whisper"])
def test_interface(kind: str, seq2seq: Any) -> None:
    program = seq2seq.traced(kind)
    verify(program)
    inputs = {spec.name: str(spec.type) for spec in program.inputs}
    outputs = {spec.name: str(spec.type) for spec in program.outputs}
    sound = kind == "whisper"
    assert program.task == ("automatic-speech-recognition" if sound else "text2text-generation")
    first = {"input_features": "float32[batch, 8, 100]"} if sound else {
        "input_ids": "int64[batch, encoder_sequence]", "attention_mask": "int64[batch, encoder_sequence]",
    }  # fmt: skip
    assert dict(list(inputs.items())[: len(first)]) == first
    assert inputs["decoder_input_ids"] == "int64[batch, sequence]"
    assert inputs["decoder_attention_mask"] == "int64[batch, past + sequence]"
    assert inputs["past_key_values.1.decoder.value"] == "float32[batch, 2, past, 8]"
    assert outputs["logits"] == "float32[batch, sequence, 32]"
    assert outputs["present.1.decoder.key"] == "float32[batch, 2, past + sequence, 8]"
    length = "50" if sound else "encoder_sequence"
    assert outputs["present.0.encoder.key"] == f"float32[batch, 2, {length}, 8]"
    assert len(outputs) == 1 + 2 * 2 * 2


@pytest.mark.parametrize("kind", ["bart", "marian", "t5", "whisper"])
def test_a_target_at_once_and_in_steps_is_the_models(kind: str, seq2seq: Any) -> None:
    model, program = seq2seq.model_of(kind), seq2seq.traced(kind)
    batch = {**seq2seq.source(kind, rows=3, length=9), **seq2seq.target(rows=3, length=6)}
    ids = batch.pop("decoder_input_ids")
    read = {name: value for name, value in batch.items() if "decoder" not in name}
    with torch.no_grad():
        expected = model(**read, decoder_input_ids=ids).logits
    whole = program(**read, decoder_input_ids=ids, decoder_attention_mask=torch.ones_like(ids))["logits"]
    assert torch.allclose(whole, expected, atol=1e-4)
    past: dict[str, torch.Tensor] = {}
    for place in range(6):
        step = {
            "decoder_input_ids": ids[:, place : place + 1],
            "decoder_attention_mask": torch.ones(3, place + 1).long(),
        }
        outputs = program(**read, **step, **past)
        assert torch.allclose(outputs["logits"][:, 0], expected[:, place], atol=1e-4)
        past = {
            name.replace("present", "past_key_values"): value for name, value in outputs.items() if ".decoder." in name
        }


@pytest.mark.parametrize("kind", ["bart", "marian", "t5", "whisper"])
def test_padding_changes_no_token_of_a_target(kind: str, seq2seq: Any) -> None:
    program, (batch,) = seq2seq.traced(kind), seq2seq.batches(kind, 1)
    padded = program(**batch)["logits"]
    alone = {name: value[-1:] for name, value in batch.items()}
    alone |= {name: value[:, :-2] for name, value in alone.items() if "decoder" in name}
    assert torch.allclose(padded[-1:, :-2], program(**alone)["logits"], atol=1e-4)


def test_both_sides_have_limits_of_their_own(seq2seq: Any) -> None:
    bart, t5, whisper = (seq2seq.traced(kind) for kind in ("bart", "t5", "whisper"))
    assert (bart.context_length, bart.lengths) == (24, {"encoder_sequence": Length(maximum=24)})
    assert (t5.context_length, t5.lengths) == (None, {})
    assert (whisper.context_length, whisper.lengths) == (20, {})


def test_what_reads_other_features_is_refused_before_work() -> None:
    config = transformers.Speech2TextConfig(
        vocab_size=32, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, conv_channels=8, input_feat_per_channel=8,
    )  # fmt: skip
    with pytest.raises(BitlowerError, match="Speech2TextForConditionalGeneration reads input_features, not token ids"):
        load(transformers.Speech2TextForConditionalGeneration(config))
