"""The float model behind a simulated Program: the same nodes by name, without what rounds them."""

from __future__ import annotations

from torch import fx

from bitlower.ir import Program, ops


def float_twin(program: Program) -> tuple[Program, dict[fx.Node, fx.Node]]:
    """``program`` without its fake quantizers, and the twin of each node that is in both.

    Tensors are shared; what is written to ``program`` afterwards does not reach the twin.
    """
    twin = program.clone()
    for node in twin.graph.find_nodes(op="call_function", target=ops.fake_quantize):
        node.replace_all_uses_with(node.all_input_nodes[0])
        twin.graph.erase_node(node)
    twin.recompile()
    by_name = {node.name: node for node in twin.graph.nodes}
    return twin, {node: by_name[node.name] for node in program.graph.nodes if node.name in by_name}
