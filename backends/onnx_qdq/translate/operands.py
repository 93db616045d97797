"""Whether the operands of a multiplication have codes that can be multiplied as integers."""

from __future__ import annotations

import torch
from torch import fx

from bitlower.ir import Quantizer, ops
from bitlower.ir.dataflow import VIEWS
from bitlower.ir.quantizer_node import QuantizerNode

CAT = torch.ops.aten.cat.default


def float_reason(left: fx.Node, right: fx.Node) -> str:
    """Why the product of two values is not one of integers; empty if it is."""
    for operand in (unviewed(left), unviewed(right)):
        if operand.target is CAT and all(part.target is ops.dequantize for part in operand.all_input_nodes):
            return "the activation is put together of slices with scales of their own"
        if operand.target is not ops.dequantize:
            return "the weight is float" if operand.op == "get_attr" else "an operand is float"
        quantizer: Quantizer = operand.meta["quantizer"]
        stored = QuantizerNode(operand).rounds_parameter
        what = "weight" if stored else "activation"
        if quantizer.spec.grid.bits > 8:
            return f"the {what} has {quantizer.spec.grid.bits} bits"
        kind = quantizer.spec.granularity.kind
        if kind not in (("tensor", "channel", "row-group") if stored else ("tensor", "token")):
            return f"the {what} is quantized {quantizer.spec.granularity}"
    return ""


def unviewed(node: fx.Node) -> fx.Node:
    """What ``node`` is a view of."""
    while node.target in VIEWS:
        node = node.all_input_nodes[0]
    return node
