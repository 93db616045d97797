"""Sizes that a model takes: batches are padded to them, results are cut back, and a program keeps them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bitlower.frontends import load
from bitlower.ir import BitlowerError, CheckError, Length, Program
from bitlower.ir.document import encode
from bitlower.ir.observe import run
from bitlower.ir.serialize import decode
from bitlower.ir.verifier import verify
from bitlower.passes import Context, PassManager, parse_pipeline


class Blocks(nn.Module):
    """A sum over the tokens that the mask keeps, the tokens themselves, and how many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        values = self.table(input_ids)
        return {"tokens": values, "sum": (values * attention_mask[..., None]).sum(1), "ids": input_ids}


def batch(rows: int, length: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(3, 20, (rows, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    program = load(Blocks(), example_inputs=batch(2, 8))
    program.lengths = {"sequence": Length(minimum=5, maximum=18, multiple=4)}
    program.config = {"pad_token_id": 2}
    return program


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 40), st.integers(0, 60))
def test_a_padded_size_is_the_smallest_that_is_taken(minimum: int, multiple: int, size: int, room: int) -> None:
    length = Length(minimum, minimum + multiple + room, multiple)
    taken = [n for n in range(minimum, minimum + multiple + room + 1) if n % multiple == 0]
    assert [n for n in range(1, 120) if length.takes(n)] == taken
    assert length.longest == taken[-1]
    larger = [n for n in taken if n >= size]
    assert length.padded(size) == (larger[0] if larger else size)


@pytest.mark.parametrize("numbers", [(0, None, 1), (1, None, 0), (5, 4, 1), (9, 11, 4)])
def test_sizes_that_none_is_are_refused(numbers: tuple[int, int | None, int]) -> None:
    with pytest.raises(BitlowerError, match="no size is"):
        Length(*numbers)


def test_lengths_are_told_in_words() -> None:
    assert str(Length(3, 512, 16)) == "a multiple of 16, at least 3, at most 512"
    assert str(Length()) == "any"


@pytest.mark.parametrize(("size", "padded"), [(3, 8), (8, 8), (9, 12), (16, 16)])
def test_batches_are_padded_with_the_padding_token_and_a_mask_of_zeros(program, size: int, padded: int) -> None:
    given = batch(2, size)
    fitted = program.fitted(given)
    assert fitted["input_ids"].shape == fitted["attention_mask"].shape == (2, padded)
    assert torch.equal(fitted["input_ids"][:, :size], given["input_ids"])
    assert bool((fitted["input_ids"][:, size:] == 2).all())
    assert not fitted["attention_mask"][:, size:].any()
    assert (fitted is given) == (size == padded)


@pytest.mark.parametrize("size", [1, 8, 13])
def test_results_have_the_size_that_was_given(program, size: int) -> None:
    given = batch(3, size)
    expected = program.module.table.weight[given["input_ids"]]
    for found in (program(**given), run(program, given)):
        assert torch.equal(found["tokens"], expected)
        assert torch.equal(found["ids"], given["input_ids"])
        torch.testing.assert_close(found["sum"], expected.sum(1))


def test_what_is_too_long_is_refused_in_one_line(program) -> None:
    message = "'input_ids' has 17 in the dimension 'sequence', the model takes a multiple of 4, at least 5, at most 18"
    with pytest.raises(BitlowerError, match=message):
        program(**batch(1, 17))


def test_passes_see_padded_batches(program) -> None:
    context = Context(calibration=[batch(2, 3)], evaluation=[batch(1, 8)])
    PassManager(parse_pipeline("clean")).run(program, context)
    assert [b["input_ids"].shape[1] for b in (*context.calibration, *context.evaluation)] == [8, 8]


def test_lengths_are_saved_printed_hashed_and_kept_by_clones(program) -> None:
    back = decode(*encode(program))
    assert back.lengths == program.clone().lengths == program.lengths
    assert "size sequence: a multiple of 4, at least 5, at most 18\n" in str(program)
    other = program.clone()
    other.lengths["sequence"] = Length(multiple=4)
    assert other.digest() != program.digest()
    assert back.digest() == program.digest()


def test_a_length_of_no_dimension_is_found(program) -> None:
    verify(program)
    wrong = program.clone()
    wrong.lengths["pixels"] = Length(multiple=4)
    with pytest.raises(CheckError, match="no input has the dimension 'pixels', which is said to be a multiple of 4"):
        verify(wrong)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_numbers_of_another_width_are_cast(dtype: torch.dtype) -> None:
    program = load(nn.Linear(4, 2), example_inputs={"input": torch.randn(3, 4)})
    given = torch.randn(5, 4).to(dtype)
    assert torch.equal(program(input=given)["output"], program(input=given.float())["output"])
