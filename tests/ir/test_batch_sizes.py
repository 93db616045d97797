"""Batches that are cut or repeated for checks are still texts that a model takes."""

from __future__ import annotations

import pytest
import torch

from bitlower.frontends import load
from bitlower.ir import TensorType
from bitlower.ir.batch_sizes import LENGTH, keep_ends, small_batch, within


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


@pytest.mark.parametrize(("limit", "length"), [(1 << 20, 90), (2 * 90 * 8 * 4, 90), (2 * 40 * 8 * 4, 40), (1, LENGTH)])
def test_batches_are_cut_to_the_tokens_whose_values_fit(limit: int, length: int) -> None:
    """Two rows of 90 tokens, each of which has 8 float32 values."""
    ids = torch.arange(1, 181).reshape(2, 90)
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    program = load(Text(), example_inputs=whole)
    rows, tokens = program.inputs[0].type.shape
    part = within(program, whole, [TensorType(torch.float32, (rows, tokens, 8))], limit)
    assert part["input_ids"].shape == part["attention_mask"].shape == (2, length)
    assert torch.equal(part["input_ids"][:, : length - 1], ids[:, : length - 1])
