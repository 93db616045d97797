"""Views of a graph that passes reason with: value chains, residual sums, fusion groups, liveness.

All of them are found from the flow of values, never from class or module names.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Collection, Iterator

import networkx as nx
import torch
from torch import fx

from bitlower.ir import ops
from bitlower.ir.activations import ACTIVATIONS
from bitlower.ir.operators import BinaryNode, ConvNode, EmbeddingNode, LinearNode, argument, operand, operators_of
from bitlower.ir.tensors import get_tensor
from bitlower.ir.tokens import TARGET, TOKENS

aten = torch.ops.aten

LINEAR = operators_of("linear")
CONVOLUTION = operators_of("convolution")
MATMUL = operators_of("product")
ATTENTION = operators_of("attention")
SOFTMAX = operators_of("softmax")
NORM = operators_of("norm")
EMBEDDING = operators_of("embedding")
ADD = operators_of("sum")
ACTIVATION = frozenset(row.target for row in ACTIVATIONS)
VIEWS = frozenset({
    aten.view.default, aten.reshape.default, aten.transpose.int, aten.permute.default, aten.contiguous.default,
    aten.slice.Tensor, aten.select.int, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.default,
    aten.expand.default, aten.flatten.using_ints, aten.clone.default, aten.alias.default, aten.t.default,
    aten.index_select.default,
})  # fmt: skip
"""Operators that move values and compute none: a per-tensor quantizer may stand before or after them."""
PARTS = frozenset({
    aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int,
})  # fmt: skip
"""Operators that cut a value into several, each of them taken out by ``getitem``."""
QUANTIZER = frozenset({ops.fake_quantize, ops.quantize, ops.dequantize})


def value_graph(graph: fx.Graph) -> nx.DiGraph[fx.Node]:
    """The graph as networkx sees it: an edge from each node to each of its users."""
    view: nx.DiGraph[fx.Node] = nx.DiGraph()
    view.add_nodes_from(graph.nodes)
    view.add_edges_from((source, node) for node in graph.nodes for source in node.all_input_nodes)
    return view


def value_root(node: fx.Node) -> fx.Node:
    """The node that computed the value which ``node`` passes on through views, parts (and quantizers)."""
    while _passes_on(node) or node.target in QUANTIZER:
        node = node.all_input_nodes[0]
    return node


def value_uses(node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """Every (node, user) edge where the value of ``node`` is computed with, looking through views and parts."""
    uses = []
    for user in node.users:
        if _passes_on(user):
            uses += value_uses(user)
        else:
            uses.append((node, user))
    return uses


def _passes_on(node: fx.Node) -> bool:
    """Whether ``node`` moves values of its operand and computes none."""
    if node.target is operator.getitem:
        return operand(node, "source").target in PARTS
    return node.target in VIEWS or node.target in PARTS


def is_float(node: fx.Node) -> bool:
    """Whether ``node`` is a floating-point tensor."""
    return "type" in node.meta and node.meta["type"].is_float


def parameter_of(node: fx.Node) -> fx.Node | None:
    """The ``get_attr`` node behind a weight operand, looking through quantizers and views; None for activations."""
    root = value_root(node)
    return root if root.op == "get_attr" else None


def linears(graph: fx.Graph) -> list[fx.Node]:
    """The linear layers: an activation times a parameter."""
    return [n for n in graph.nodes if n.target in LINEAR and parameter_of(LinearNode(n).weight) is not None]


def convolutions(graph: fx.Graph) -> list[fx.Node]:
    """The convolutions of an activation with a parameter."""
    return [n for n in graph.nodes if n.target in CONVOLUTION and parameter_of(ConvNode(n).weight) is not None]


def residual_sums(graph: fx.Graph) -> list[fx.Node]:
    """The additions ``x + f(x)`` of residual connections.

    One operand is an ancestor of the other through at least one linear layer or attention, and both have the shape of
    the sum. Bias, mask, embedding and rotary additions are not of that kind. Nor is that of scores and a bias of
    positions that earlier layers read too (T5), nor the sum of two branches that run side by side (attention and
    feed-forward of GPT-NeoX) before the stream is added to it.
    """
    position = {node: i for i, node in enumerate(graph.nodes)}
    return [n for n in graph.nodes if n.target in ADD and _joined_stream(n, position)]


def residual_streams(graph: fx.Graph) -> set[fx.Node]:
    """What computed the values ``x`` of all residual sums ``x + f(x)``."""
    position = {node: i for i, node in enumerate(graph.nodes)}
    return {stream for n in graph.nodes if n.target in ADD and (stream := _joined_stream(n, position))}


def _joined_stream(node: fx.Node, position: dict[fx.Node, int]) -> fx.Node | None:
    """What computed the stream that a residual sum adds a branch to; None where ``node`` is no such sum."""
    terms = BinaryNode(node).left, BinaryNode(node).right
    operands = [a for a in terms if isinstance(a, fx.Node) and is_float(a) and a.op != "get_attr"]
    if len(operands) != 2 or not is_float(node):
        return None
    if any(value.meta["type"].shape != node.meta["type"].shape for value in operands):
        return None
    stream, branch = sorted((value_root(value) for value in operands), key=position.__getitem__)
    return stream if _computes_from(branch, stream, position) and not _leads_to_softmax(node) else None


def _computes_from(branch: fx.Node, stream: fx.Node, position: dict[fx.Node, int]) -> bool:
    """Whether a path leads from ``stream`` to ``branch`` through a linear layer, a matmul or an attention."""
    frontier, seen = [(branch, False)], set[tuple[fx.Node, bool]]()
    while frontier:
        node, computed = frontier.pop()
        if node is stream and computed:
            return True
        if position[node] <= position[stream] or (node, computed) in seen:
            continue
        seen.add((node, computed))
        computed = computed or node.target in LINEAR | MATMUL | ATTENTION
        frontier += [(source, computed) for source in node.all_input_nodes]
    return False


def ancestors(graph: fx.Graph, nodes: Collection[fx.Node]) -> set[fx.Node]:
    """What ``nodes`` depend on."""
    sources: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node in nodes or node in sources:
            sources.update(node.all_input_nodes)
    return sources


def constants(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that depend on no input: parameters, and what is computed from them alone."""
    constant_nodes: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr" or (node.op == "call_function" and constant_nodes.issuperset(node.all_input_nodes)):
            constant_nodes.add(node)
    return constant_nodes


def fusion_groups(graph: fx.Graph) -> list[tuple[fx.Node, ...]]:
    """Linears that read the same activation (query/key/value, gate/up): runtimes fuse them, so they share a scheme."""
    groups: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in linears(graph):
        value = LinearNode(node).x
        while value.target in QUANTIZER:
            value = value.all_input_nodes[0]
        groups[value].append(node)
    return [tuple(nodes) for nodes in groups.values()]


def liveness(graph: fx.Graph, *, outputs: bool = True) -> list[frozenset[fx.Node]]:
    """For each node in order, the values that are still needed after it (parameters left out).

    Args:
        graph: the graph.
        outputs: whether what is given out at the end is needed until then.
    """
    last: dict[fx.Node, int] = {}
    for position, node in enumerate(graph.nodes):
        if node.op != "output" or outputs:
            last |= dict.fromkeys(node.all_input_nodes, position)
    alive: set[fx.Node] = set()
    result = []
    for position, node in enumerate(graph.nodes):
        if node.op in ("placeholder", "call_function"):
            alive.add(node)
        alive = {n for n in alive if last.get(n, -1) > position}
        result.append(frozenset(alive))
    return result


def activations(module: fx.GraphModule) -> set[fx.Node]:
    """Float values that depend on a parameter and on an input.

    Masks, positions and rotary tables are not among them, nor is what is computed from parameters alone.
    """
    return {node for node in carriers(module) if is_float(node)}


def carriers(module: fx.GraphModule) -> set[fx.Node]:
    """The activations, and the codes of those that are quantized."""
    touched, fed = set[fx.Node](), set[fx.Node]()
    for node in module.graph.nodes:
        if node.op == "placeholder" or any(n in fed for n in node.all_input_nodes):
            fed.add(node)
        if node.op != "call_function" or not _carries_floats(node) or parameter_of(node) is not None:
            continue
        if any(n in touched or _is_weight(module, n) for n in node.all_input_nodes):
            touched.add(node)
    return touched & fed


def _carries_floats(node: fx.Node) -> bool:
    """Whether ``node`` is a float tensor, the codes of one, or returns several tensors."""
    if node.target is ops.quantize:
        return True
    if "type" in node.meta or not isinstance(node.target, torch._ops.OpOverload):
        return is_float(node)
    return any("Tensor" in str(value.type) for value in node.target._schema.returns)


def _is_weight(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether ``node`` is a parameter, or what a quantizer makes of one."""
    root = parameter_of(node)
    if root is None:
        return False
    return node.target in QUANTIZER or isinstance(get_tensor(module, str(root.target)), torch.nn.Parameter)


def vocabularies(graph: fx.Graph) -> Iterator[tuple[fx.Node, tuple[int | str, ...]]]:
    """The tables that token ids index, and their shapes."""
    for node in graph.nodes:
        if node.target in EMBEDDING and value_root(EmbeddingNode(node).ids).target in (TOKENS, TARGET):
            table = EmbeddingNode(node).table
            yield parameter_of(table) or table, table.meta["type"].shape


def unrounded(node: fx.Node) -> fx.Node:
    """The value that the quantizers ending in ``node`` round."""
    while node.target in QUANTIZER:
        node = node.all_input_nodes[0]
    return node


def before_repeat(node: fx.Node) -> fx.Node | None:
    """The keys or values ``[batch, kv_heads, length, head_dim]`` whose heads ``node`` repeats one by one.

    None if it is no such repetition; models write one for grouped queries (Ainslie et al. 2023).
    """
    if node.target is aten.repeat_interleave.self_int:
        plain = argument(node, "dim") in (1, -3) and argument(node, "output_size") is None
        return operand(node, "self") if plain else None
    if node.target not in (aten.reshape.default, aten.view.default, aten.flatten.using_ints):
        return None
    expanded = operand(node, "self")
    if expanded.target is not aten.expand.default:
        return None
    added = operand(expanded, "self")
    if added.target is not aten.unsqueeze.default or argument(added, "dim") not in (2, -3):
        return None
    source = operand(added, "self")
    before, wide, after = (n.meta["type"].shape for n in (source, expanded, node))
    fits = len(before) == len(after) == 4 and len(wide) == 5
    same = fits and (before[0], *before[2:]) == (after[0], *after[2:]) and wide[:2] == before[:2]
    return source if same and wide[1] * wide[2] == after[1] and wide[3:] == before[2:] else None


def is_scores(node: fx.Node) -> bool:
    """Whether ``node`` is the product QKᵀ of an explicit attention: a matmul that reaches a softmax elementwise."""
    return node.target in MATMUL and _leads_to_softmax(node)


def _leads_to_softmax(node: fx.Node) -> bool:
    elementwise = {aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.where.self, aten.masked_fill.Scalar} | VIEWS
    frontier = list(node.users)
    while frontier:
        user = frontier.pop()
        if user.target in SOFTMAX:
            return True
        if user.target in elementwise or "quantizer" in user.meta:
            frontier += user.users
    return False


def is_context(node: fx.Node) -> bool:
    """Whether ``node`` is the product of attention probabilities and values."""
    if node.target in ATTENTION:
        return True
    first = BinaryNode(node).left if node.target in MATMUL else None
    while first is not None and (first.target in VIEWS or "quantizer" in first.meta):
        first = first.all_input_nodes[0]
    return first is not None and first.target in SOFTMAX
