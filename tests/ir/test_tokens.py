"""Which tokens count: masks with and without a past, values laid out in every way."""

from __future__ import annotations

import pytest
import torch

from bitlower.ir.tokens import ENCODER_SEQUENCE, token_dim, token_ids, token_mask, token_rows, value_mask

IDS = torch.tensor([[5, 6, 7], [8, 9, 4]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]])
"""Two past tokens and three of now; the second row is padded on the left."""
NOW = torch.tensor([[True, True, True], [False, True, True]])


def test_the_last_columns_are_the_tokens_of_now() -> None:
    assert torch.equal(token_mask({"input_ids": IDS, "attention_mask": MASK}), NOW)
    assert torch.equal(token_mask({"input_ids": IDS, "attention_mask": NOW.long()}), NOW)


def test_without_ids_the_mask_is_that_of_the_tokens() -> None:
    assert torch.equal(token_mask({"attention_mask": NOW.long()}), NOW)


def test_nothing_says_so() -> None:
    assert token_mask({"input_ids": IDS}) is None
    assert token_mask({"attention_mask": torch.ones(2, 1, 3, 3)}) is None
    assert value_mask(("batch", "sequence", 4), {"input_ids": IDS}) is None


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (("batch", "sequence", 4), NOW[:, :, None]),
        (("batch", 2, "sequence", 4), NOW[:, None, :, None]),
        (("batch*sequence", 4), NOW.reshape(6, 1)),
        (("sequence*batch",), NOW.reshape(6)),
        (("batch", 2, "past + sequence", 4), MASK.bool()[:, None, :, None]),
        (("batch", 2, "sequence", "past + sequence"), NOW[:, None, :, None] & MASK.bool()[:, None, None, :]),
        (("batch", 4), None),
        (("sequence", 4), None),
        ((), None),
    ],
)
def test_masks_follow_the_layout(shape: tuple[int | str, ...], expected: torch.Tensor | None) -> None:
    found = value_mask(shape, {"input_ids": IDS, "attention_mask": MASK})
    if expected is None:
        assert found is None
    else:
        assert torch.equal(found, expected)


def test_no_padding_is_no_mask() -> None:
    batch = {"input_ids": IDS, "attention_mask": torch.ones(2, 5, dtype=torch.int64)}
    assert value_mask(("batch", "sequence", 4), batch) is None


def test_rows_are_the_tokens_that_are_there() -> None:
    value = torch.arange(24.0).reshape(2, 3, 4)
    batch = {"input_ids": IDS, "attention_mask": MASK}
    assert torch.equal(token_rows(value, ("batch", "sequence", 4), batch), value[NOW])
    flat = value.reshape(6, 4)
    assert torch.equal(token_rows(flat, ("batch*sequence", 4), batch), value[NOW])
    assert torch.equal(token_rows(value[:, 0], ("batch", 4), batch), value[:, 0])


SOURCE = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
PAIR = {
    "input_ids": torch.zeros(2, 4, dtype=torch.int64), "attention_mask": SOURCE, "decoder_input_ids": IDS,
    "decoder_attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
}  # fmt: skip


def test_a_source_and_a_target_have_masks_of_their_own() -> None:
    target = PAIR["decoder_attention_mask"].bool()
    assert torch.equal(token_mask(PAIR), target)
    assert torch.equal(token_mask(PAIR, ENCODER_SEQUENCE), SOURCE.bool())
    assert torch.equal(token_ids(PAIR), IDS)
    assert torch.equal(token_ids(PAIR, ENCODER_SEQUENCE), PAIR["input_ids"])
    scores = value_mask(("batch", 2, "sequence", "encoder_sequence"), PAIR)
    assert torch.equal(scores, target[:, None, :, None] & SOURCE.bool()[:, None, None, :])
    assert torch.equal(value_mask(("batch*encoder_sequence", 4), PAIR), SOURCE.bool().reshape(8, 1))
    assert value_mask(("batch", 60, 4), PAIR) is None


def test_the_decoder_alone_knows_the_mask_of_the_source() -> None:
    batch = {"input_ids": IDS, "encoder_attention_mask": SOURCE}
    assert token_mask(batch) is None
    assert torch.equal(value_mask(("batch", "encoder_sequence", 4), batch), SOURCE.bool()[:, :, None])


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (("batch", "encoder_sequence", 4), "encoder_sequence"),
        (("batch*sequence", 4), "sequence"),
        (("batch", 2, "sequence", "encoder_sequence"), "sequence"),
        (("batch", 60, 4), None),
        (("sequence",), None),
    ],
)
def test_the_dimension_of_tokens(shape: tuple[int | str, ...], expected: str | None) -> None:
    assert token_dim(shape) == expected


def test_the_mask_of_a_sound_is_of_its_samples_and_of_no_tokens() -> None:
    batch = {"input_values": torch.zeros(2, 50), "attention_mask": torch.ones(2, 50, dtype=torch.int64)}
    assert token_mask(batch) is None
    assert value_mask(("batch", "sequence", 4), batch) is None
