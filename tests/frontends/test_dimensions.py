"""Names of sizes that vary come from what torch finds equal; bounds and multiples from what it had to assume."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from bitlower.frontends import load
from bitlower.ir import Program
from bitlower.ir.verifier import verify


class Attention(nn.Module):
    def __init__(self, *, first: bool) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=first)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        values: torch.Tensor = self.inner(x, x, x, attn_mask=mask, need_weights=False)[0]
        return values


def signature(program: Program) -> list[str]:
    return [str(spec) for spec in (*program.inputs, *program.outputs)]


@pytest.mark.parametrize(
    ("first", "shape"), [(True, "batch, sequence, 8"), (False, "sequence, batch, 8")], ids=["batch", "sequence"]
)
def test_a_mask_over_pairs_of_tokens_names_the_sequence(first: bool, shape: str) -> None:
    model = Attention(first=first).eval()

    def batch(rows: int, length: int) -> dict[str, torch.Tensor]:
        mask = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)
        return {"x": torch.randn((rows, length, 8) if first else (length, rows, 8)), "mask": mask}

    program = load(model, example_inputs=batch(2, 5))
    assert signature(program) == [f"x: float32[{shape}]", "mask: bool[sequence, sequence]", f"output: float32[{shape}]"]
    other = batch(3, 7)
    with torch.no_grad():
        torch.testing.assert_close(program(**other)["output"], model(**other))


class Table(nn.Module):
    """Scores of rows against a table that comes in too."""

    def forward(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return x @ table.T


def test_sizes_that_are_not_equal_have_names_of_their_own() -> None:
    program = load(Table(), example_inputs={"x": torch.randn(3, 4), "table": torch.randn(5, 4)})
    assert signature(program) == [
        "x: float32[batch, sequence]",
        "table: float32[table_0, sequence]",
        "output: float32[batch, table_0]",
    ]


class Windows(nn.Module):
    """Means over windows of four tokens, with learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(30, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, length, width = x.shape
        return (x + self.places[:length]).view(rows, length // 4, 4, width).mean(2)


def test_a_multiple_and_a_bound_that_the_model_asks_for_belong_to_the_program() -> None:
    program = load(Windows(), example_inputs={"x": torch.randn(2, 8, 6)})
    verify(program)
    assert {name: str(length) for name, length in program.lengths.items()} == {
        "sequence": "a multiple of 4, at most 30"
    }
    assert signature(program) == ["x: float32[batch, sequence, 6]", "output: float32[batch, (sequence//4), 6]"]
    given = torch.randn(3, 11, 6)
    expected = Windows.forward(program.module, functional.pad(given, (0, 0, 0, 1)))
    torch.testing.assert_close(program(x=given)["output"], expected)


def test_what_nothing_bounds_has_no_lengths() -> None:
    assert load(nn.Linear(4, 2), example_inputs={"input": torch.randn(3, 4)}).lengths == {}
