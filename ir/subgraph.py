"""Parts of a graph as modules of their own."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from bitlower.ir.diagnostics import BitlowerError, describe
from bitlower.ir.tensors import UncompiledModule


def subgraph(module: fx.GraphModule, inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> fx.GraphModule:
    """The part of a graph that computes ``outputs`` from ``inputs`` and from parameters.

    It takes the values of ``inputs`` in order and returns a tuple. Parameters and submodules are shared.

    Raises:
        BitlowerError: an output depends on an input of the model that is not among ``inputs``.
    """
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    between = needed(inputs, outputs)
    for node in module.graph.nodes:
        if node in between:
            if node.op == "placeholder":
                raise BitlowerError(f"a part of the graph reads {describe(node)}, which is not among its inputs")
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in outputs))
    return UncompiledModule(module, graph)


def needed(inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> set[fx.Node]:
    """The nodes between ``inputs`` and ``outputs``, the latter among them."""
    nodes, frontier = set[fx.Node](), [node for node in outputs if node not in inputs]
    while frontier:
        node = frontier.pop()
        if node not in nodes:
            nodes.add(node)
            frontier += [source for source in node.all_input_nodes if source not in inputs]
    return nodes
