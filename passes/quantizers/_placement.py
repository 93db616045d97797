"""Where quantizers go: every tensor of a transformer and its role, found from the graph."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import fx

from bitlower.ir import BitlowerError, Program, Quantizer, QuantSpec, TensorType, ops, set_tensor
from bitlower.ir.dataflow import (
    ACTIVATION,
    ADD,
    EMBEDDING,
    LINEAR,
    NORM,
    SOFTMAX,
    convolutions,
    is_context,
    is_float,
    is_scores,
    linears,
    parameter_of,
    residual_sums,
    value_root,
    value_uses,
    vocabularies,
)
from bitlower.ir.operators import ROWS, ConvNode, LinearNode, NodeView, operand, value_operands

aten = torch.ops.aten


@dataclass(frozen=True)
class QuantizationSite:
    """A tensor that may be quantized.

    Args:
        role: its role in the scheme.
        value: the node whose value is rounded.
        edges: the users that read the rounded value; empty: all of them.
        paths: the module paths that it belongs to, for patterns.
        head: whether it is a language model's output head, the table that this shares, or one of the same shape.
        positions: whether it is a table that no token ids index, and no linear reads.
    """

    role: str
    value: fx.Node
    edges: tuple[fx.Node, ...] = field(default=())
    paths: tuple[str, ...] = field(default=())
    head: bool = False
    positions: bool = False

    @property
    def tensor(self) -> str:
        """The parameter's name, or the node's."""
        return str(self.value.target) if self.value.op == "get_attr" else self.value.name


def weight_sites(graph: fx.Graph) -> Iterator[QuantizationSite]:
    """The parameters of linears, convolutions, embeddings and norms.

    A tied one is one site, its users read the same codes.

    The output head of a language model has the role of the table that it is tied to, or could be: ``embedding-table``.
    """
    uses: dict[fx.Node, list[tuple[str, fx.Node, str]]] = {}
    for node in graph.nodes:
        for role, parameter, reader in _parameters(node):
            uses.setdefault(parameter, []).append((role, reader, _path(node)))
    tables = dict(vocabularies(graph))
    heads = {
        parameter
        for parameter, reads in uses.items()
        if any(reader.target in LINEAR and _ends_the_graph(reader) for _, reader, _ in reads)
        and parameter.meta["type"].shape in tables.values()
    }
    shapes = {parameter.meta["type"].shape for parameter in heads}
    for parameter, reads in uses.items():
        table = parameter in heads or any(role == "embedding-table" for role, _, _ in reads)
        role = "embedding-table" if table else reads[0][0]
        readers, paths = tuple(reader for _, reader, _ in reads), tuple(path for _, _, path in reads)
        goes_along = parameter in tables and parameter.meta["type"].shape in shapes
        positions = parameter not in tables and all(role == "embedding-table" for role, _, _ in reads)
        yield QuantizationSite(role, parameter, readers, paths, parameter in heads or goes_along, positions)


def _ends_the_graph(node: fx.Node) -> bool:
    """Whether an output is computed from ``node`` by elementwise steps or views alone."""
    while len(node.users) == 1:
        node = next(iter(node.users))
        if node.op == "output":
            return True
        if node.target in LINEAR or node.target in NORM:
            return False
    return False


def routing(graph: fx.Graph) -> set[fx.Node]:
    """What chooses experts: all that the ``topk`` of a mixture of experts is computed from, back to linear layers."""
    frontier = [operand(node, "self") for node in graph.nodes if node.target is aten.topk.default]
    seen: set[fx.Node] = set()
    while frontier:
        node = frontier.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target not in LINEAR:
            frontier += node.all_input_nodes
    return seen


def _parameters(node: fx.Node) -> list[tuple[str, fx.Node, fx.Node]]:
    """The role of the parameter that ``node`` computes with, the parameter, and what reads it: ``node`` or a view."""
    row = ROWS.get(node.target)
    if row is None or not row.role:
        return []
    value, reader = NodeView(node).argument(row.parameter), node
    if not isinstance(value, fx.Node) or parameter_of(value) is None:
        return []
    while value.op != "get_attr":
        reader, value = value, value.all_input_nodes[0]
    return [(row.role, value, reader)]


def value_sites(graph: fx.Graph) -> Iterator[QuantizationSite]:
    """The activations that have a role of their own, in execution order (Bondarenko et al. §3, figure 1)."""
    sums = set(residual_sums(graph))
    embedded: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_function" or not is_float(node):
            continue
        role = _role(node, sums, embedded)
        if role == "embedding-sum":
            embedded.add(node)
        if role:
            yield QuantizationSite(role, node, (), (_path(node),))


def _role(node: fx.Node, sums: set[fx.Node], embedded: set[fx.Node]) -> str:
    if node in sums:
        return "residual"
    if node.target in ADD and _sums_embeddings(node, embedded):
        return "embedding-sum"
    if node.target in NORM:
        return "norm"
    if node.target in SOFTMAX:
        return "probs"
    if is_context(node):
        return "context"
    if is_scores(node):
        return "scores"
    if node.target in ACTIVATION or _is_gate(node):
        return "activation" if not all(_is_gate(user) for user in node.users) else ""
    if node.target in LINEAR:
        users = [user for _, user in value_uses(node)]
        if users and all(user.target in ACTIVATION or _is_gate(user) for user in users):
            return ""
        return "logits" if users and all(user.op == "output" for user in users) else "linear-output"
    return ""


def _sums_embeddings(node: fx.Node, embedded: set[fx.Node]) -> bool:
    operands = [value_root(term) for term in value_operands(node)]
    return len(operands) == 2 and all(o.target in EMBEDDING or o in embedded for o in operands)


def _is_gate(node: fx.Node) -> bool:
    """The product of an activation function and another linear's output (gated feed-forward)."""
    operands = [value_root(factor) for factor in value_operands(node)] if node.target is aten.mul.Tensor else []
    if len(operands) != 2:
        return False
    return any(a.target in ACTIVATION and b.target in LINEAR for a, b in (operands, operands[::-1]))


def input_sites(graph: fx.Graph) -> Iterator[QuantizationSite]:
    """The activations that linears read, one site for all linears that read the same; and those of convolutions."""
    readers: dict[tuple[str, fx.Node], list[fx.Node]] = {}
    for node in linears(graph):
        readers.setdefault(("linear-input", LinearNode(node).x), []).append(node)
    for node in convolutions(graph):
        readers.setdefault(("convolution-input", ConvNode(node).x), []).append(node)
    for (role, value), nodes in readers.items():
        yield QuantizationSite(role, value, tuple(nodes), tuple(_path(node) for node in nodes))


def insert_quantizer(program: Program, site: QuantizationSite, spec: QuantSpec) -> fx.Node:
    """Put an uncalibrated (or dynamic) quantizer on ``site``; all edges of the site then read the rounded value.

    Raises:
        BitlowerError: the granularity does not fit the tensor; the message names it.
    """
    graph, value = program.graph, site.value
    kind = value.meta["type"]
    with graph.inserting_after(value):
        if spec.granularity.dynamic:
            last, scale, zero = _dynamic_qparams(value, spec, kind)
        else:
            last, scale, zero = value, *_stored_qparams(program, site, spec, kind)
    with graph.inserting_after(last if spec.granularity.dynamic else zero):
        args = (value, scale, zero, spec.grid.quant_min, spec.grid.quant_max)
        state: dict[str, fx.node.Argument] = {} if spec.granularity.dynamic else {"calibrated": False}
        node = graph.create_node("call_function", ops.fake_quantize, args, state, name=f"{value.name}_quantized")
    node.meta = _meta(site, value) | {"type": kind, "quantizer": Quantizer(site.role, spec, site.tensor)}
    own = {
        node,
        *(n for source in node.all_input_nodes if source is not value for n in (source, *source.all_input_nodes)),
    }
    for user in list(value.users):
        if user not in own and (not site.edges or user in site.edges):
            user.replace_input_with(value, node)
    return node


def _stored_qparams(
    program: Program, site: QuantizationSite, spec: QuantSpec, kind: TensorType
) -> tuple[fx.Node, fx.Node]:
    try:
        shape = spec.granularity.scale_shape(kind.shape)
    except BitlowerError as error:
        raise BitlowerError(f"{site.tensor} ({site.role}): {error.message}", hint=error.hint) from None
    graph, nodes = program.graph, []
    for part in ("zero_point", "scale"):
        target = f"quantizers.{site.value.name}.{part}"
        set_tensor(program.module, target, torch.zeros(shape))
        node = graph.create_node("get_attr", target, name=f"{site.value.name}_{part}")
        node.meta = {"type": TensorType(torch.float32, shape)}
        nodes.append(node)
    return nodes[1], nodes[0]


def _dynamic_qparams(value: fx.Node, spec: QuantSpec, kind: TensorType) -> tuple[fx.Node, fx.Node, fx.Node]:
    grid, graph = spec.grid, value.graph
    args = (value, grid.bits, grid.signed, grid.symmetric, grid.restricted, str(grid.convention))
    chosen = graph.create_node("call_function", ops.choose_qparams, args, name=f"{value.name}_qparams")
    chosen.meta = {key: value.meta[key] for key in ("path", "source") if key in value.meta}
    parts = []
    previous = chosen
    for index in (0, 1):
        with graph.inserting_after(previous):
            part = graph.call_function(operator.getitem, (chosen, index))
        part.meta = dict(chosen.meta) | {"type": TensorType(torch.float32, (*kind.shape[:-1], 1))}
        parts.append(part)
        previous = part
    return parts[1], parts[0], parts[1]


def _meta(site: QuantizationSite, value: fx.Node) -> dict[str, object]:
    """What a pass inserts inherits the path of the value, or of the first reader of a parameter or input."""
    like = site.edges[0] if site.edges and value.op != "call_function" else value
    return {key: like.meta[key] for key in ("path", "source") if key in like.meta}


def _path(node: fx.Node) -> str:
    return str(node.meta.get("path", ""))
