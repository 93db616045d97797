"""Arithmetic in half precision inside a float32 model (Falcon's ALiBi): computed in float32 and rounded afterwards.

That is what processors without half-precision arithmetic do, PyTorch among them, bit for bit: each operand is a half
number, float32 holds the exact product of two of them, and the result is rounded once. Runtimes that have no such
operators in half precision can then run the graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from bitlower.ir import TensorType
from bitlower.ir.rewrite import Rule, call_like, replace

aten = torch.ops.aten
_HALVES = (torch.bfloat16, torch.float16)
_OPERATORS = frozenset({aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor})


def widen_half(module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """``op(a, b)`` in half precision → ``half(op(float32(half(a)), float32(half(b))))``."""
    kind: TensorType = node.meta["type"]
    if kind.dtype not in _HALVES or node.kwargs:
        return None

    def wide(value: Any) -> Any:
        if not isinstance(value, fx.Node) or "type" not in value.meta:
            return value
        shape = value.meta["type"].shape
        half = call_like(node, aten.to.dtype, (value, kind.dtype), TensorType(kind.dtype, shape))
        return call_like(node, aten.to.dtype, (half, torch.float32), TensorType(torch.float32, shape))

    with node.graph.inserting_before(node):
        operands = tuple(wide(value) for value in node.args)
        computed = call_like(node, node.target, operands, TensorType(torch.float32, kind.shape))
    return replace(node, aten.to.dtype, (computed, kind.dtype), kind)


RULES = (Rule("half-precision", _OPERATORS, widen_half),)
