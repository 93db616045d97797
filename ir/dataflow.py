"""Views of a graph that passes reason with: value chains, residual sums, fusion groups, block boundaries, liveness.

All of them are found from the flow of values, never from class or module names.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import networkx as nx
import torch
from torch import fx

from bitlower.ir import ops
from bitlower.ir.program import get_tensor

aten = torch.ops.aten

LINEAR = frozenset({aten.linear.default, aten.addmm.default})
MATMUL = frozenset({aten.matmul.default, aten.bmm.default, aten.mm.default})
ATTENTION = frozenset({aten.scaled_dot_product_attention.default})
SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default})
NORM = frozenset({aten.layer_norm.default, aten.rms_norm.default, aten.native_layer_norm.default})
EMBEDDING = frozenset({aten.embedding.default})
ADD = frozenset({aten.add.Tensor, aten.add_.Tensor})
ACTIVATION = frozenset({
    aten.gelu.default, aten.relu.default, aten.silu.default, aten.tanh.default, aten.sigmoid.default,
    aten.leaky_relu.default, aten.hardswish.default, aten.elu.default, aten.mish.default,
})  # fmt: skip
VIEWS = frozenset({
    aten.view.default, aten.reshape.default, aten.transpose.int, aten.permute.default, aten.contiguous.default,
    aten.slice.Tensor, aten.select.int, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.default,
    aten.expand.default, aten.flatten.using_ints, aten.clone.default, aten.alias.default, aten.t.default,
    aten.index_select.default,
})  # fmt: skip
"""Operators that move values and compute none: a per-tensor quantizer may stand before or after them."""
QUANTIZER = frozenset({ops.fake_quantize, ops.quantize, ops.dequantize})


@dataclass(frozen=True)
class Block:
    """A repeated part of the model, one attention each.

    ``source`` is the one value that enters; ``nodes`` lead to the last of them, the one value that leaves.
    """

    source: fx.Node
    nodes: tuple[fx.Node, ...]

    @property
    def output(self) -> fx.Node:
        """The value that leaves the block."""
        return self.nodes[-1]


def operand(node: fx.Node, position: int) -> fx.Node:
    """The argument of ``node`` at ``position``, which must be a node too."""
    value = node.args[position]
    assert isinstance(value, fx.Node), f"argument {position} of %{node.name} is no node"
    return value


def value_graph(graph: fx.Graph) -> nx.DiGraph[fx.Node]:
    """The graph as networkx sees it: an edge from each node to each of its users."""
    view: nx.DiGraph[fx.Node] = nx.DiGraph()
    view.add_nodes_from(graph.nodes)
    view.add_edges_from((source, node) for node in graph.nodes for source in node.all_input_nodes)
    return view


def value_root(node: fx.Node) -> fx.Node:
    """The node that computed the value which ``node`` passes on through views (and quantizers)."""
    while node.target in VIEWS or node.target in QUANTIZER:
        node = node.all_input_nodes[0]
    return node


def value_uses(node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """Every (node, user) edge where the value of ``node`` is computed with, looking through views."""
    uses = []
    for user in node.users:
        if user.target in VIEWS:
            uses += value_uses(user)
        else:
            uses.append((node, user))
    return uses


def is_float(node: fx.Node) -> bool:
    """Whether ``node`` is a floating-point tensor."""
    return "type" in node.meta and node.meta["type"].is_float


def activation_operand(linear: fx.Node) -> fx.Node:
    """The activation that a linear multiplies with its weight."""
    return operand(linear, 1 if linear.target is aten.addmm.default else 0)


def weight_operand(linear: fx.Node) -> fx.Node:
    """The weight of a linear: a parameter, or the quantizer over one."""
    return operand(linear, 2 if linear.target is aten.addmm.default else 1)


def parameter_of(node: fx.Node) -> fx.Node | None:
    """The ``get_attr`` node behind a weight operand, looking through quantizers and views; None for activations."""
    root = value_root(node)
    return root if root.op == "get_attr" else None


def linears(graph: fx.Graph) -> list[fx.Node]:
    """The linear layers: an activation times a parameter."""
    return [n for n in graph.nodes if n.target in LINEAR and parameter_of(weight_operand(n)) is not None]


def residual_sums(graph: fx.Graph) -> list[fx.Node]:
    """The additions ``x + f(x)`` of residual connections.

    One operand is an ancestor of the other through at least one linear layer or attention, and both have the shape of
    the sum; bias, mask, embedding and rotary additions are not of that kind.
    """
    view = value_graph(graph)
    computing = {n for n in graph.nodes if n.target in LINEAR | MATMUL | ATTENTION}
    return [n for n in graph.nodes if n.target in ADD and _joins_a_branch(n, view, computing)]


def _joins_a_branch(node: fx.Node, view: nx.DiGraph[fx.Node], computing: set[fx.Node]) -> bool:
    operands = [a for a in node.args[:2] if isinstance(a, fx.Node) and is_float(a) and a.op != "get_attr"]
    if len(operands) != 2 or not is_float(node):
        return False
    if any(value.meta["type"].shape != node.meta["type"].shape for value in operands):
        return False
    first, second = (value_root(value) for value in operands)
    for stream, branch in ((first, second), (second, first)):
        before: set[fx.Node] = nx.ancestors(view, branch)
        after: set[fx.Node] = nx.descendants(view, stream)
        if computing & (before | {branch}) & after:
            return True
    return False


def fusion_groups(graph: fx.Graph) -> list[tuple[fx.Node, ...]]:
    """Linears that read the same activation (query/key/value, gate/up): runtimes fuse them, so they share a scheme."""
    groups: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in linears(graph):
        value = activation_operand(node)
        while value.target in QUANTIZER:
            value = value.all_input_nodes[0]
        groups[value].append(node)
    return [tuple(nodes) for nodes in groups.values()]


def liveness(graph: fx.Graph) -> list[frozenset[fx.Node]]:
    """For each node in order, the values that are still needed after it (parameters left out)."""
    last: dict[fx.Node, int] = {}
    for position, node in enumerate(graph.nodes):
        for source in node.all_input_nodes:
            last[source] = position
    alive: set[fx.Node] = set()
    result = []
    for position, node in enumerate(graph.nodes):
        if node.op in ("placeholder", "call_function"):
            alive.add(node)
        alive = {n for n in alive if last.get(n, -1) > position}
        result.append(frozenset(alive))
    return result


def activations(module: fx.GraphModule) -> set[fx.Node]:
    """Float values that depend on a parameter and are none: masks, positions and rotary tables are not among them."""
    found: set[fx.Node] = set()
    for node in module.graph.nodes:
        if node.op != "call_function" or not is_float(node) or parameter_of(node) is not None:
            continue
        if any(n in found or _is_weight(module, n) for n in node.all_input_nodes):
            found.add(node)
    return found


def _is_weight(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether ``node`` is a parameter, or what a quantizer makes of one."""
    root = parameter_of(node)
    if root is None:
        return False
    return node.target in QUANTIZER or isinstance(get_tensor(module, str(root.target)), torch.nn.Parameter)


def cut_points(module: fx.GraphModule) -> list[fx.Node]:
    """The nodes after which their own value is the only activation alive: the model can be cut there."""
    values = activations(module)
    nodes = list(module.graph.nodes)
    return [n for n, alive in zip(nodes, liveness(module.graph), strict=True) if n in values and alive & values == {n}]


def blocks(module: fx.GraphModule) -> list[Block]:
    """The repeated blocks of a transformer, in order: each runs from a cut point before an attention to the next."""
    nodes = list(module.graph.nodes)
    position = {node: i for i, node in enumerate(nodes)}
    cuts = cut_points(module)
    starts: list[fx.Node] = []
    for node in nodes:
        if node.target in ATTENTION | SOFTMAX:
            start = max((c for c in cuts if position[c] < position[node]), key=position.__getitem__, default=None)
            if start is not None and start not in starts:
                starts.append(start)
    if not starts:
        return []
    ends = [*starts[1:], _end_of_last(nodes, position, cuts, starts)]
    return [
        Block(start, tuple(nodes[position[start] + 1 : position[end] + 1]))
        for start, end in zip(starts, ends, strict=True)
    ]


def _end_of_last(
    nodes: list[fx.Node], position: dict[fx.Node, int], cuts: list[fx.Node], starts: list[fx.Node]
) -> fx.Node:
    """The cut point that makes the last block compute what the one before it does, else the last of the same type."""
    start = starts[-1]
    later = [c for c in cuts if position[c] > position[start] and c.meta.get("type") == start.meta.get("type")]
    if not later:
        return nodes[-2]
    if len(starts) > 1:
        before = _operators(nodes[position[starts[-2]] + 1 : position[start] + 1])
        for cut in later:
            if _operators(nodes[position[start] + 1 : position[cut] + 1]) == before:
                return cut
    return later[-1]


def _operators(nodes: Iterable[fx.Node]) -> list[str]:
    return [str(node.target) for node in nodes if node.op == "call_function"]
