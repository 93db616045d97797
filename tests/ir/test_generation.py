"""Greedy targets against those of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bitlower.ir.generation import greedy_target, program_stages


@pytest.mark.parametrize("kind", ["bart", "t5", "marian"])
def test_tokens_are_those_of_transformers(kind: str, seq2seq: Any) -> None:
    model, batch = seq2seq.model_of(kind), seq2seq.source(kind, rows=4)
    start = torch.full((4, 1), model.config.decoder_start_token_id)
    expected = model.generate(**batch, max_new_tokens=12, num_beams=1, do_sample=False, eos_token_id=9, pad_token_id=1)
    found = greedy_target(*program_stages(seq2seq.traced(kind)), batch, start, stops=[9], new_tokens=12, pad=1)
    assert torch.equal(found, expected)


def test_rows_that_have_ended_are_filled_up_and_all_of_them_end_it(seq2seq: Any) -> None:
    batch = seq2seq.source("bart")
    start = torch.full((2, 1), 2)
    stages = program_stages(seq2seq.traced("bart"))
    free = greedy_target(*stages, batch, start, stops=(), new_tokens=6)
    first = free[:, 1].tolist()
    short = greedy_target(*stages, batch, start, stops=first, new_tokens=6, pad=1)
    assert short.tolist() == [[2, token] for token in first]
    assert free.shape == (2, 7)
