from __future__ import annotations

import pytest
import torch

from bitlower.backends.artifact import unseen
from bitlower.backends.artifact.unseen import NEW, Seen, at
from bitlower.ir import CheckError, Program, TensorType, ValueSpec, batch_sizes
from bitlower.ir.types import Length


def decoder(program: Program) -> Program:
    """``program`` with the inputs of a decoder; only these are looked at."""
    shapes = {
        "input_ids": ("batch", "sequence"),
        "attention_mask": ("batch", "past + sequence"),
        "past_key_values.0.key": ("batch", 2, "past", 4),
        "images": ("batch", 3, 8, 8),
    }
    program.inputs = tuple(ValueSpec(name, TensorType(torch.float32, shape)) for name, shape in shapes.items())
    return program


def batch(rows: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.arange(rows * length, dtype=torch.float32).reshape(rows, length)
    return {"input_ids": ids, "attention_mask": ids + 100, "images": torch.rand(rows, 3, 8, 8)}


def test_every_symbolic_dimension_has_a_size_that_no_batch_had(tiny_program: Program) -> None:
    seen = Seen(decoder(tiny_program))
    for rows, length in ((3, 7), (4, 12), (2, 4)):
        seen.add(batch(rows, length))
    other = seen.other()
    assert other is not None
    assert {name: tuple(t.shape) for name, t in other.items()} == {
        "input_ids": (5, 5), "attention_mask": (5, 5), "images": (5, 3, 8, 8),
    }  # fmt: skip
    assert seen.describe(other) == "batch 5, sequence 5"
    rows, columns = [0, 1, 0, 1, 0], [0, 1, 2, 3, 0]
    assert torch.equal(other["input_ids"], batch(2, 4)["input_ids"][rows][:, columns])


@pytest.mark.parametrize("left", [False, True])
def test_tokens_that_are_no_padding_are_kept(tiny_program: Program, left: bool) -> None:
    """Of twelve tokens four are padding."""
    given = {name: value for name, value in batch(2, 12).items() if name != "images"}
    kept = torch.arange(12) >= 4 if left else torch.arange(12) < 8
    given["attention_mask"] = kept.float().expand(2, 12)
    seen = Seen(decoder(tiny_program))
    seen.add(given)
    other = seen.other()
    assert other is not None
    assert bool(other["attention_mask"].all())
    columns = torch.arange(5, 12) if left else torch.arange(7)
    assert torch.equal(other["input_ids"], given["input_ids"][[0, 1, 0]][:, columns])


def test_without_symbolic_dimensions_there_is_no_other_batch(tiny_program: Program) -> None:
    tiny_program.inputs = (ValueSpec("x", TensorType(torch.float32, (2, 4))),)
    seen = Seen(tiny_program)
    seen.add({"x": torch.zeros(2, 4)})
    assert seen.other() is None
    assert seen.describe(None) == "none: all sizes are fixed"


def test_a_size_that_can_be_no_other_is_said_to_be_as_before(tiny_program: Program) -> None:
    """The other one comes padded, as the program takes it."""
    program = decoder(tiny_program)
    program.inputs = tuple(spec for spec in program.inputs if "past" not in str(spec.type.shape))
    program.lengths = {"sequence": Length(4, 4, 1)}
    seen = Seen(program)
    seen.add(batch(3, 4))
    other = seen.other()
    assert other is not None
    assert seen.describe(other) == "batch 4, sequence 4 as before"
    program.lengths = {"sequence": Length(4, None, 4), "batch": Length(3, 3, 1)}
    other = seen.other()
    assert other is not None
    assert seen.describe(other) == "batch 3 as before, sequence 8"
    assert other["input_ids"].shape == (3, 8)
    program.lengths["sequence"] = Length(4, 4, 4)
    assert seen.other() is None
    assert seen.describe(None) == "none: no other size of batch, sequence is taken"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (CheckError("one code is wrong", hint="mend it"), f"at batch 3, {NEW}: one code is wrong; mend it"),
        (RuntimeError("shape\nmore"), f"the program itself fails at batch 3, {NEW}: shape"),
        (IndexError(), f"the program itself fails at batch 3, {NEW}: IndexError"),
    ],
)
def test_what_fails_names_the_sizes(error: Exception, message: str) -> None:
    with pytest.raises(CheckError) as caught, at("batch 3"):
        raise error
    assert str(caught.value) == message


@pytest.mark.parametrize(("limit", "length"), [(1 << 30, 40), (4 * 2 * 20 * 100, 20), (1, 16)])
def test_batches_are_cut_to_outputs_that_fit(
    tiny_program: Program, limit: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The self-test's batch comes first and is small anyway; at the least 16 tokens are compared."""
    monkeypatch.setattr(batch_sizes, "LARGEST_OUTPUTS", limit)
    shapes = {"input_ids": ("batch", "sequence"), "attention_mask": ("batch", "sequence")}
    tiny_program.inputs = tuple(ValueSpec(name, TensorType(torch.int64, shape)) for name, shape in shapes.items())
    tiny_program.outputs = (ValueSpec("logits", TensorType(torch.float32, ("batch", "sequence", 100))),)
    ids = torch.arange(80).reshape(2, 40)
    small, whole = unseen.with_small_batch(tiny_program, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    assert small["input_ids"].shape == (2, 16)
    assert {name: tuple(tensor.shape) for name, tensor in whole.items()} == dict.fromkeys(shapes, (2, length))
