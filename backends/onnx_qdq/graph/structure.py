"""Where quantization stands in an ONNX graph: what a code is computed from, what reads it, and what is constant."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from bitlower.backends.onnx_qdq.graph.code_operators import code_operator
from bitlower.backends.onnx_qdq.graph.nodes import Array

_BOUNDS = frozenset({"Clip", "Cast", "Min", "Max", "Identity"})


@dataclass(frozen=True)
class QuantizerInputs:
    """The float value that is rounded, its scale and its zero point (None: zero), and the operator that divides."""

    node: ir.Node
    x: ir.Value
    scale: ir.Value
    zero_point: ir.Value | None


def quantizer_inputs(codes: ir.Value) -> QuantizerInputs | None:
    """What ``codes`` are computed from, by ``QuantizeLinear`` or spelled out as ``Round(x / scale) + zero_point``."""
    node = _above(codes.producer(), _BOUNDS)
    if node is None or node.op_type not in ("QuantizeLinear", "Add", "Round"):
        return None
    if node.op_type == "QuantizeLinear":
        return _inputs(node, node.inputs[2] if len(node.inputs) > 2 else None)
    zero = node.inputs[1] if node.op_type == "Add" else None
    first = node.inputs[0]
    rounding = node if node.op_type == "Round" else first.producer() if first is not None else None
    if rounding is None or rounding.op_type != "Round" or rounding.inputs[0] is None:
        return None
    division = rounding.inputs[0].producer()
    return _inputs(division, zero) if division is not None and division.op_type == "Div" else None


def _inputs(node: ir.Node, zero: ir.Value | None) -> QuantizerInputs | None:
    x, scale = node.inputs[0], node.inputs[1]
    return QuantizerInputs(node, x, scale, zero) if x is not None and scale is not None else None


def _above(node: ir.Node | None, skipped: frozenset[str]) -> ir.Node | None:
    while node is not None and node.op_type in skipped:
        source = node.inputs[0]
        node = source.producer() if source is not None else None
    return node


def is_view(node: ir.Node) -> bool:
    """Whether the codes of the first input come out of ``node``, as they are."""
    return code_operator(node.op_type).passes_on == "view"


def constant(value: ir.Value | None) -> Array | None:
    """The contents of a constant, seen through operators that only move it; None if the value is computed."""
    value = stored_value(value)
    if value is None:
        return None
    if value.const_value is not None:
        return value.const_value.numpy()
    node = value.producer()
    return node.attributes["value"].as_tensor().numpy() if node is not None else None


def stored_value(value: ir.Value | None) -> ir.Value | None:
    """The constant of which ``value`` is a view; None if it is computed."""
    while value is not None and value.const_value is None:
        node = value.producer()
        if node is not None and node.op_type == "Constant" and "value" in node.attributes:
            return value
        value = node.inputs[0] if node is not None and is_view(node) else None
    return value


def readers(codes: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """Every node that computes with ``codes``, and at which input.

    Operators that codes come out of are looked through; one that computes with them too is yielded as well.
    """
    for node, index in codes.uses():
        operator = code_operator(node.op_type)
        passes_on = operator.passes_on in ("join", "unfold") or (index == 0 and operator.passes_on != "")
        if not passes_on or operator.reads:
            yield node, index
        if passes_on:
            yield from readers(node.outputs[0])
