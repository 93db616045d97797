"""Operators that only move, repeat or choose entries, in a library as in PyTorch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("tvm", reason="the extra tvm is not installed")

from bitlower.backends.tvm_kernels import TvmKernels, compile_program
from bitlower.frontends import load
from bitlower.ir import BitlowerError, TensorType

aten = torch.ops.aten
KINDS = {
    aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar,
    aten.unbind.int, aten.repeat.default, aten.pad.default, aten.rsub.Scalar, aten.select.int, aten.slice.Tensor,
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
            "between numbers": torch.nn.functional.pad(x, (1, 2, 0, 3), value=0.5),
            "without its ends": torch.nn.functional.pad(first, (-1, -1)),
            "around rows": torch.nn.functional.pad(first, (0, 0, x.shape[0], 1)),
            "from a number": torch.rsub(first, 3),
            "from a number, whole": torch.rsub(torch.arange(4), 3),
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


def test_what_has_no_converter_is_known_before_work() -> None:
    """A dimension that is no sum, product or quotient (blocks of LongT5), and a number read from a tensor (DeBERTa)."""
    program = load(Entries().eval(), example_inputs={"x": torch.randn(5, 12)})
    check = TvmKernels().check_program
    check(program)
    node = next(node for node in program.graph.nodes if node.target is aten.repeat.default)
    sized = node.meta["type"]
    node.meta["type"] = TensorType(sized.dtype, ("batch + (PythonMod(-batch, 128))", 12))
    with pytest.raises(BitlowerError, match=r"%repeat.*: the dimension 'batch \+ .* is no expression that a library"):
        check(program)
    node.meta["type"] = sized
    with program.graph.inserting_after(node):
        program.graph.call_function(aten.item.default, (node,))
    with pytest.raises(BitlowerError, match=r"%item.*: there is no converter for aten\.item\.default"):
        check(program)
