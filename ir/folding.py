"""Compute what depends on stored tensors alone once, and not at every run."""

from __future__ import annotations

from bitlower.ir import numerics, ops
from bitlower.ir.program import Program, get_tensor, set_tensor
from bitlower.ir.storage import like


def with_float_weights(program: Program) -> Program:
    """A copy whose weights are rounded or dequantized once; it computes the same, bit for bit."""
    copy = program.clone()
    for node in list(copy.graph.nodes):
        if node.target not in (ops.fake_quantize, ops.dequantize):
            continue
        if not all(part.op == "get_attr" for part in node.all_input_nodes):
            continue
        stored, scale, zero = (get_tensor(copy.module, str(part.target)).detach() for part in node.all_input_nodes)
        if node.target is ops.dequantize:
            values = numerics.values(stored, scale, zero)
        else:
            values = ops.fake_quantize(stored, scale, zero, *node.args[3:])
        target = f"folded.{node.name}"
        set_tensor(copy.module, target, like(values, stored))
        with copy.graph.inserting_before(node):
            weight = copy.graph.get_attr(target)
        weight.meta = {key: value for key, value in node.meta.items() if key != "quantizer"}
        node.replace_all_uses_with(weight)
        copy.graph.erase_node(node)
    copy.recompile()
    return copy
