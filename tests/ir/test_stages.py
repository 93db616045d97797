"""An encoder-decoder cut in two computes, bit for bit, what it does as a whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bitlower.ir import BitlowerError, Program
from bitlower.ir.observe import run
from bitlower.ir.stages import (
    decoder_batch,
    encoder_batch,
    is_encoder_decoder,
    next_past,
    split_at_states,
    split_stages,
    whole_inputs,
)
from bitlower.ir.verifier import verify


@pytest.mark.parametrize("kind", ["bart", "t5", "whisper"])
def test_a_decoder_that_computes_keys_and_values_is_the_same_bit_for_bit(kind: str, seq2seq: Any) -> None:
    program = seq2seq.traced(kind)
    encoder, decoder = split_at_states(program).values()
    verify(encoder)
    verify(decoder)
    assert [spec.name for spec in encoder.outputs] == ["last_hidden_state"]
    (batch,) = seq2seq.batches(kind, 1, padded=False)
    read, ids = run(encoder, encoder_batch(batch)), batch["decoder_input_ids"]
    expected = run(program, batch)
    outputs = run(decoder, decoder.complete(decoder_batch(batch, read)))
    assert set(outputs) == set(expected)
    assert all(torch.equal(value, expected[name]) for name, value in outputs.items())
    first = decoder_batch({**batch, "decoder_input_ids": ids[:, :-1]}, read)
    past = next_past(run(decoder, decoder.complete(first)))
    handed = past["past_key_values.0.encoder.key"].shape[2]
    unread = {"encoder_hidden_states": torch.full_like(read["last_hidden_state"], torch.nan)}
    for part in (0, handed // 2):  # the states of positions that are handed are not read
        cut = {name: value[:, :, : handed - part] if ".encoder." in name else value for name, value in past.items()}
        states = {"encoder_hidden_states": read["last_hidden_state"]} if part else unread
        last = decoder_batch({**batch, "decoder_input_ids": ids[:, -1:]}, read) | cut | states
        assert torch.allclose(run(decoder, last)["logits"][:, 0], expected["logits"][:, -1], atol=1e-5)


@pytest.mark.parametrize("kind", ["bart", "marian", "t5", "whisper"])
def test_both_stages_are_the_whole_bit_for_bit(kind: str, seq2seq: Any) -> None:
    program = seq2seq.traced(kind)
    encoder, decoder = split_stages(program).values()
    verify(encoder)
    verify(decoder)
    (batch,) = seq2seq.batches(kind, 1, padded=False)
    cross = run(encoder, encoder_batch(batch))
    outputs = run(decoder, decoder_batch(batch, cross))
    expected = run(program, batch)
    assert {*cross, *outputs} == set(expected)
    assert all(torch.equal(value, expected[name]) for name, value in {**cross, **outputs}.items())


def test_a_step_reads_the_past_of_the_one_before(seq2seq: Any) -> None:
    program = seq2seq.traced("bart")
    encoder, decoder = split_stages(program).values()
    (batch,) = seq2seq.batches("bart", 1, padded=False)
    cross = run(encoder, encoder_batch(batch))
    ids = batch["decoder_input_ids"]
    first = run(decoder, decoder_batch({**batch, "decoder_input_ids": ids[:, :-1]}, cross))
    last = run(decoder, decoder_batch({**batch, "decoder_input_ids": ids[:, -1:]}, cross) | next_past(first))
    assert torch.allclose(last["logits"][:, 0], run(program, batch)["logits"][:, -1], atol=1e-5)


def test_names_are_those_of_the_onnx_ecosystem(seq2seq: Any) -> None:
    program = seq2seq.traced("bart")
    encoder, decoder = split_stages(program).values()
    assert [spec.name for spec in encoder.inputs] == ["input_ids", "attention_mask"]
    assert {spec.name for spec in encoder.outputs} == {
        f"present.{layer}.encoder.{part}" for layer in (0, 1) for part in ("key", "value")
    }
    names = [spec.name for spec in decoder.inputs]
    assert names[:2] == ["input_ids", "encoder_attention_mask"]
    assert set(names[2:]) == {
        f"past_key_values.{layer}.{side}.{part}"
        for layer in (0, 1)
        for side in ("decoder", "encoder")
        for part in ("key", "value")
    }
    whole = [spec.name for spec in whole_inputs(encoder.inputs, decoder.inputs)]
    assert whole == [spec.name for spec in program.inputs if spec.name != "decoder_attention_mask"]


def test_a_model_in_one_piece_has_no_stages(tiny_program: Program) -> None:
    assert not is_encoder_decoder(tiny_program)
    for split in (split_stages, split_at_states):
        with pytest.raises(BitlowerError, match="is no encoder with a decoder"):
            split(tiny_program)


def test_a_decoder_that_reads_more_of_the_source_is_refused(seq2seq: Any) -> None:
    for split in (split_stages, split_at_states):
        with pytest.raises(BitlowerError, match="one of them reads %input_ids"):
            split(seq2seq.reading_source())
