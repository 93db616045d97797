from __future__ import annotations

import torch

from bitlower.backends._unseen import Seen, describe_sizes
from bitlower.ir import Program, TensorType, ValueSpec


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
    assert describe_sizes(tiny_program, other) == "batch 5, sequence 5"
    rows, columns = [0, 1, 0, 1, 0], [0, 1, 2, 3, 0]
    assert torch.equal(other["input_ids"], batch(2, 4)["input_ids"][rows][:, columns])


def test_without_symbolic_dimensions_there_is_no_other_batch(tiny_program: Program) -> None:
    tiny_program.inputs = (ValueSpec("x", TensorType(torch.float32, (2, 4))),)
    seen = Seen(tiny_program)
    seen.add({"x": torch.zeros(2, 4)})
    assert seen.other() is None
