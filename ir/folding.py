"""Compute what depends on stored tensors alone once, and not at every run."""

from __future__ import annotations

from collections.abc import Collection

from bitlower.ir import numerics, ops
from bitlower.ir.program import Program, get_tensor, set_tensor
from bitlower.ir.storage import like


def with_float_weights(program: Program, chosen: Collection[str] | None = None) -> Program:
    """A copy whose weights are rounded or dequantized once; it computes the same, bit for bit.

    Args:
        program: closed.
        chosen: the parameters whose nodes are replaced, which then have their own names again; all if None.
    """
    copy = program.clone()
    for node in list(copy.graph.nodes):
        if node.target not in (ops.fake_quantize, ops.dequantize):
            continue
        if not all(part.op == "get_attr" for part in node.all_input_nodes):
            continue
        parameter = node.meta["quantizer"].tensor if "quantizer" in node.meta else ""
        if chosen is not None and parameter not in chosen:
            continue
        stored, scale, zero = (get_tensor(copy.module, str(part.target)).detach() for part in node.all_input_nodes)
        if node.target is ops.dequantize:
            values = numerics.values(stored, scale, zero)
        else:
            values = ops.fake_quantize(stored, scale, zero, *node.args[3:])
        target = f"folded.{node.name}" if chosen is None else parameter
        set_tensor(copy.module, target, like(values, stored))
        with copy.graph.inserting_before(node):
            weight = copy.graph.get_attr(target)
        weight.meta = {key: value for key, value in node.meta.items() if key != "quantizer"}
        node.replace_all_uses_with(weight)
        copy.graph.erase_node(node)
    copy.recompile()
    return copy
