"""Compute what depends on stored tensors alone once, and not at every run."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

from bitlower.ir import ops
from bitlower.ir.program import Program
from bitlower.ir.quantization import numerics
from bitlower.ir.quantization.by_rows import by_rows
from bitlower.ir.storage import like, release, spill
from bitlower.ir.tensors import get_tensor, set_tensor


def with_float_weights(program: Program, chosen: Collection[str] | None = None, *, mapped: bool = False) -> Program:
    """A copy whose weights are rounded or dequantized once; it computes the same, bit for bit.

    Args:
        program: calibrated.
        chosen: the parameters whose nodes are replaced, which then have their own names again; all if None.
        mapped: whether all that is computed lies in files; otherwise what is computed from tensors that do.
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
            values = by_rows(stored, scale, zero, numerics.values, torch.float32)
        else:
            values = ops.fake_quantize(stored, scale, zero, *node.args[3:], **node.kwargs)
        target = f"folded.{node.name}" if chosen is None else parameter
        set_tensor(copy.module, target, spill(values) if mapped else like(values, stored))
        del values
        release(stored)
        with copy.graph.inserting_before(node):
            weight = copy.graph.get_attr(target)
        weight.meta = {key: value for key, value in node.meta.items() if key != "quantizer"}
        node.replace_all_uses_with(weight)
        copy.graph.erase_node(node)
    copy.recompile()
    return copy


def without_quantizers(program: Program) -> tuple[Program, dict[fx.Node, fx.Node]]:
    """The float model behind a simulated program: without what rounds, and its node for each node that is in both.

    Tensors are shared; what is written to ``program`` afterwards does not reach the reference.
    """
    reference = program.clone()
    for node in reference.graph.find_nodes(op="call_function", target=ops.fake_quantize):
        node.replace_all_uses_with(node.all_input_nodes[0])
        reference.graph.erase_node(node)
    reference.recompile()
    by_name = {node.name: node for node in reference.graph.nodes}
    return reference, {node: by_name[node.name] for node in program.graph.nodes if node.name in by_name}
