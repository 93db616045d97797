"""Whether the operands of a multiplication have codes that can be multiplied as integers."""

from __future__ import annotations

import torch
from torch import fx

from bitlower.ir import Quantizer, ops
from bitlower.ir.dataflow import VIEWS
from bitlower.ir.quantizer_node import QuantizerNode

CAT = torch.ops.aten.cat.default


FLOAT_WEIGHT, FLOAT_OPERAND = "the weight is float", "an operand is float"
FLOAT_OPERANDS = frozenset({FLOAT_WEIGHT, FLOAT_OPERAND})
"""Reasons of products whose operands are not both quantized."""


def float_reason(left: fx.Node, right: fx.Node) -> str:
    """Why the product of two values is not one of integers; empty if it is.

    Where an operand is float, that is the reason (:data:`FLOAT_OPERANDS`); any other holds for quantized operands.
    """
    operands = (unviewed(left), unviewed(right))
    for operand in operands:
        if operand.target is not ops.dequantize and not _is_sliced(operand):
            return FLOAT_WEIGHT if operand.op == "get_attr" else FLOAT_OPERAND
    for operand in operands:
        if _is_sliced(operand):
            return "the activation is put together of slices with scales of their own"
        quantizer: Quantizer = operand.meta["quantizer"]
        stored = QuantizerNode(operand).rounds_parameter
        what = "weight" if stored else "activation"
        if quantizer.spec.grid.bits > 8:
            return f"the {what} has {quantizer.spec.grid.bits} bits"
        kind = quantizer.spec.granularity.kind
        if kind not in (("tensor", "channel", "row-group") if stored else ("tensor", "token")):
            return f"the {what} is quantized {quantizer.spec.granularity}"
    return ""


def _is_sliced(operand: fx.Node) -> bool:
    """Whether a value is put together of quantized slices."""
    return operand.target is CAT and all(part.target is ops.dequantize for part in operand.all_input_nodes)


def unviewed(node: fx.Node) -> fx.Node:
    """What ``node`` is a view of."""
    while node.target in VIEWS:
        node = node.all_input_nodes[0]
    return node
