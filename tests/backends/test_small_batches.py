"""Batches that are cut or repeated for checks are still texts that a model takes."""

from __future__ import annotations

import torch

from bitlower.backends._selftest import keep_ends, small_batch
from bitlower.frontends import load


class Text(torch.nn.Module):
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return input_ids * attention_mask


def test_texts_that_are_cut_or_repeated_end_once_with_their_own_last_token() -> None:
    ids = torch.tensor([[1, 5, 6, 7, 8, 2, 0], [1, 9, 2, 0, 0, 0, 0]])
    whole = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    program = load(Text(), example_inputs=whole)
    small = small_batch(program, whole, rows=2, length=4)
    assert small["input_ids"].tolist() == [[1, 5, 6, 2], [1, 9, 2, 0]]
    long = {name: value[:, torch.arange(9) % 7] for name, value in whole.items()}
    keep_ends(program, long, whole)
    assert long["input_ids"].tolist() == [[1, 5, 6, 7, 8, 1, 0, 1, 2], [1, 9, 1, 0, 0, 0, 0, 1, 2]]
    assert torch.equal(small_batch(program, whole)["input_ids"], ids)
