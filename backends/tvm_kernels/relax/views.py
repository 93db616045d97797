"""Values that lie in the rows of a larger one: parts of merged layers, and their heads. Kernels read them in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from tvm import te

from bitlower.backends.tvm_kernels.relax.builder import Frame
from bitlower.backends.tvm_kernels.tir.function import i64
from bitlower.ir import TensorType, kernels
from bitlower.ir.operators import argument, operand, swapped_axes

aten = torch.ops.aten
_VIEWS = (aten.reshape.default, aten.view.default, aten.unflatten.int)


@dataclass(frozen=True)
class Strip:
    """Columns of a value ``[batch, length, columns]``.

    Args:
        value: the whole of it.
        columns: how many it has.
        start: the first of ours.
    """

    value: Any
    columns: int
    start: int


def strip_of(frame: Frame, node: Any) -> Strip | None:
    """Where the value ``[batch, length, size]`` of a node lies; None if it has another shape."""
    if not isinstance(node, fx.Node) or "type" not in node.meta:
        return None
    kind: TensorType = node.meta["type"]
    if node in frame.strips:
        strip: Strip = frame.strips[node]
        return strip
    size = kind.shape[-1] if kind.rank == 3 else None
    return Strip(frame.value(node), size, 0) if isinstance(size, int) else None


def heads_of(frame: Frame, node: Any) -> Strip | None:
    """Where the value ``[batch, heads, length, head_dim]`` lies, head after head, before it was transposed."""
    if not isinstance(node, fx.Node) or not swaps_heads(node):
        return None
    view = operand(node, "self")
    if view.target not in _VIEWS:
        return None
    source, kind = operand(view, "self"), view.meta["type"]
    if kind.rank != 4 or source.meta["type"].rank != 3:
        return None
    same = source.meta["type"].shape[:2] == kind.shape[:2]
    return strip_of(frame, source) if same and all(isinstance(size, int) for size in kind.shape[2:]) else None


def swaps_heads(node: fx.Node) -> bool:
    """Whether ``node`` is ``[batch, heads, length, head_dim]`` with heads and length in each other's place."""
    if node.target is aten.transpose.int:
        return swapped_axes(node) == {1, 2} and bool(node.meta["type"].rank == 4)
    return node.target is aten.permute.default and list(argument(node, "dims")) == [0, 2, 1, 3]


def joins_heads(node: fx.Node) -> bool:
    """Whether ``node`` joins the heads of its only operand, ``[batch, heads, length, head_dim]``."""
    alone = node.target is kernels.fused_pointwise and not {"factor", "residual"} & set(kernels.arguments(node))
    return alone and bool(kernels.arguments(node).get("heads"))


def read_heads(frame: Frame, node: fx.Node, strip: Strip) -> Any:
    """Heads with axes of their own, ``[batch, heads, length, head_dim]``, as an expression that others may take in."""
    kind: TensorType = node.meta["type"]
    heads, head_dim = kind.shape[1], kind.shape[-1]
    assert isinstance(heads, int), f"a number of heads that is the symbolic {heads}"
    assert isinstance(head_dim, int), f"heads of the symbolic size {head_dim}"

    def body(rows: Any) -> Any:
        shape = (rows.shape[0], i64(heads), rows.shape[1], i64(head_dim))

        def value(batch: Any, head: Any, length: Any, at: Any) -> Any:
            return rows[batch, length, i64(strip.start) + head * i64(head_dim) + at]

        return te.compute(shape, value, name="heads")

    return frame.te(body, strip.value, name="heads")
