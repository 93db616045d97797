"""Quantizers in a graph: whether they are calibrated, and how a range is written into them."""

from __future__ import annotations

import torch
from torch import fx

from bitlower.ir import ops
from bitlower.ir.dataflow import operand
from bitlower.ir.diagnostics import BitlowerError
from bitlower.ir.program import Program
from bitlower.ir.tensors import get_tensor, set_tensor


def is_uncalibrated(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether ``node`` is a quantizer that has no scale yet."""
    if node.target is not ops.fake_quantize:
        return False
    scale = operand(node, 1)
    return scale.op == "get_attr" and not bool(get_tensor(module, str(scale.target)).any())


def set_range(module: fx.GraphModule, node: fx.Node, low: torch.Tensor, high: torch.Tensor) -> None:
    """Give ``node`` the scale and zero point of a range; ``low`` and ``high`` have the shape of its scale."""
    values = node.meta["quantizer"].spec.grid.qparams(low, high)
    for position, value in zip((1, 2), values, strict=True):
        set_tensor(module, str(operand(node, position).target), value.contiguous())


def require_calibrated(program: Program) -> None:
    """See that every quantizer has a range.

    Raises:
        BitlowerError: one has none; it is named.
    """
    for node, quantizer in program.quantizers():
        if is_uncalibrated(program.module, node):
            raise BitlowerError(f"the quantizer of {quantizer.tensor} has no range", hint="run `calibrate` first")
