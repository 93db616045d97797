"""Operators that only move, repeat or choose entries, in a library as in PyTorch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("tvm", reason="the extra tvm is not installed")

from bitlower.backends.tvm_kernels import compile_program
from bitlower.frontends import load

aten = torch.ops.aten
KINDS = {
    aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar,
    aten.unbind.int, aten.repeat.default, aten.select.int, aten.slice.Tensor,
}  # fmt: skip


class Entries(torch.nn.Module):
    """Each operator on a value whose first axis is known at run time only."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(12, 12)
        self.choice = torch.nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x, seen = self.linear(x), self.choice(x) > 0
        first, second, third = x.view(-1, 3, 4).unbind(1)
        fewer, last = x.view(-1, 3, 4).unbind(-1)[1], x.view(-1, 3, 4)[:, -1]
        return {
            "between tensors": torch.where(seen, first, second),
            "tensor or number": torch.where(seen, third, -float("inf")),
            "number or tensor": torch.where(seen, 0.5, third),
            "numbers": torch.where(seen, 2.0, -1.0),
            "whole numbers": torch.where(seen, seen.long(), 7),
            "broadcast": torch.where(seen[:, :1], first, 1),
            "along the last axis": fewer,
            "from the end": last,
            "every other": x[:, 1::2],
            "in place": x.repeat(2, 1),
            "with an axis before": first.repeat(2, 1, 3),
            "as often as there are rows": torch.arange(3).repeat(x.shape[0], 1),
        }


def test_entries_are_where_pytorch_has_them() -> None:
    generator = torch.Generator().manual_seed(0)

    def batch(rows: int) -> dict[str, torch.Tensor]:
        return {"x": torch.randn(rows, 12, generator=generator)}

    torch.manual_seed(0)
    model = Entries().eval()
    program = load(model, example_inputs=batch(5))
    assert {node.target for node in program.graph.nodes} >= KINDS
    library = compile_program(program)
    for rows in (5, 1, 9):
        inputs = batch(rows)
        found = list(library(**inputs).values())
        for (name, expected), value in zip(model(**inputs).items(), found, strict=True):
            torch.testing.assert_close(value, expected, msg=name)
