"""Fusions as data, and the one matcher that applies them: a root operator, its operands, and what follows it in stages.

A :class:`Fusion` says which operators it starts at, how its kernel's operands are read (codes instead of the values
that ``dequantize`` makes of them), and by which stages what follows is taken into the kernel. A stage that finds
something of its kind but cannot take it returns the reason.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from bitlower.ir import Quantizer, TensorType, kernels, ops
from bitlower.ir.dataflow import VIEWS
from bitlower.ir.operators import operand, set_argument
from bitlower.ir.quantizer_node import QuantizerNode
from bitlower.ir.rewrite import Miss, call_again, call_like, sole_user

aten = torch.ops.aten


@dataclass
class Match:
    """A kernel that is being put together around a root.

    Args:
        module: where the root is.
        root: the operator that the fusion started at.
        value: the last value that was taken in; stages go on from it.
        at: the kernel will stand before this node: the last that brings operands.
        arguments: of the kernel, by name.
        quantizers: what its codes and roundings stand for, by operand.
        fused_nodes: the operators that it does the work of.
        results: for each part, the node that each output stands in for.
        reasons: what could have been taken in and was not, and why.
    """

    module: fx.GraphModule
    root: fx.Node
    value: fx.Node
    at: fx.Node
    arguments: dict[str, Any] = field(default_factory=dict)
    quantizers: dict[str, Quantizer] = field(default_factory=dict)
    fused_nodes: list[fx.Node] = field(default_factory=list)
    results: list[dict[str, fx.Node]] = field(default_factory=lambda: [{}])
    reasons: list[str] = field(default_factory=list)

    def take(self, *nodes: fx.Node) -> None:
        """Let the kernel do the work of ``nodes``; the last of them is the value from here on."""
        self.fused_nodes += nodes
        self.value = nodes[-1]

    def read(self, name: str, node: fx.Node) -> None:
        """Let the operand ``name`` be ``node``, or its codes if it comes from ``dequantize``."""
        codes = codes_of(node)
        if codes is None:
            self.arguments[name] = node
            return
        dequantize, views = codes
        trip = QuantizerNode(dequantize)
        source = trip.value
        with self.root.graph.inserting_before(self.at):
            for view in views:
                kind = view.meta["type"].with_dtype(source.meta["type"].dtype)
                source = call_again(view, source, kind)
        self.arguments |= {name: source, f"{name}_scale": trip.scale, f"{name}_zero_point": trip.zero_point}
        self.quantizers[name] = dequantize.meta["quantizer"]
        self.fused_nodes.append(dequantize)

    def round(self, name: str, quantize: fx.Node) -> None:
        """Let the kernel round to the grid of ``quantize``."""
        quantizer: Quantizer = quantize.meta["quantizer"]
        self.arguments[f"{name}_grid"] = str(quantizer.spec.grid)
        self.quantizers[name] = quantizer
        view = QuantizerNode(quantize)
        if view.is_static:
            self.arguments |= {f"{name}_scale": view.scale, f"{name}_zero_point": view.zero_point}


Stage = Callable[[Match], str]
"""Takes what follows ``Match.value`` into the kernel, if it is of its kind; else returns a reason, or nothing."""


@dataclass(frozen=True)
class Fusion:
    """A rewrite of a root and what belongs to it into a kernel; an operator alone stays as it is.

    Args:
        name: kebab-case.
        roots: the operators whose nodes it is tried on.
        kernel: the kernel operator.
        start: reads the operands; returns a reason if it does not match, None where the node is of another kind.
        stages: what may follow, in this order; nothing may where several layers are merged.
        first: the names of the operands that the kernel has as arguments; the others are keyword arguments.
    """

    name: str
    roots: frozenset[Any]
    kernel: Any
    start: Callable[[Match], str | None]
    stages: tuple[Stage, ...]
    first: tuple[str, ...]


@dataclass
class Fused:
    """A kernel and what it took the place of.

    Args:
        fusion: the name of the fusion.
        node: the kernel.
        root: the operator that the fusion started at (no node of the graph any more).
        root_name: its name.
        operators: the names of all operators that it does the work of.
        results: the ``getitem`` nodes of all that it can give, by part and output.
    """

    fusion: str
    node: fx.Node
    root: fx.Node
    root_name: str
    operators: tuple[str, ...]
    results: dict[tuple[int, str], fx.Node]


def apply_fusions(fusions: Sequence[Fusion], module: fx.GraphModule) -> tuple[list[Fused], list[Miss]]:
    """Try each fusion at each of its roots, in graph order; the kernels, and what did not match."""
    fused_kernels: list[Fused] = []
    misses: list[Miss] = []
    gone: set[fx.Node] = set()
    for node in list(module.graph.nodes):
        for fusion in fusions:
            if node in gone or node.op != "call_function" or node.target not in fusion.roots:
                continue
            match = Match(module, node, node, node)
            match.fused_nodes.append(node)
            reason = fusion.start(match)
            if reason == "":
                stages = fusion.stages if len(match.results) == 1 else ()
                match.reasons += [text for stage in stages if (text := stage(match))]
                if len(match.fused_nodes) > 1:
                    fused_kernels.append(_build(fusion, match))
                    gone |= erase_dead([*match.fused_nodes, *(old for part in match.results for old in part.values())])
            path = str(node.meta.get("path", ""))
            misses += [Miss(fusion.name, node.name, path, text) for text in (reason, *match.reasons) if text]
    _trim(fused_kernels, gone)
    return fused_kernels, misses


def _build(fusion: Fusion, match: Match) -> Fused:
    """Put the kernel into the graph, with all outputs that it could give."""
    graph, arguments = match.root.graph, dict(match.arguments)
    match.results[0].setdefault("value", match.value)
    names = [name for name in kernels.OUTPUTS[fusion.kernel] if any(name in part for part in match.results)]
    for source in _nodes(arguments.values()):
        if source.op == "get_attr" and match.at < source:
            match.at.prepend(source)
    args = tuple(arguments.pop(name, None) for name in fusion.first)
    results: dict[tuple[int, str], fx.Node] = {}
    with graph.inserting_before(match.at):
        node = call_like(match.root, fusion.kernel, args, None, **arguments, outputs=" ".join(names))
        node.meta["quantizers"] = dict(match.quantizers)
        for output in kernels.outputs(node):
            old = match.results[output.part].get(output.name)
            item = call_like(match.root, operator.getitem, (node, len(results)), output.type)
            results[output.part, output.name] = item
            if old is not None:
                item.meta |= {key: old.meta[key] for key in ("path", "source") if key in old.meta}
                old.replace_all_uses_with(item)
    return Fused(
        fusion.name, node, match.root, match.root.name, tuple(str(n.target) for n in match.fused_nodes), results
    )


def _nodes(values: Iterable[Any]) -> list[fx.Node]:
    """The nodes among ``values``, and in lists among them."""
    nodes = []
    for value in values:
        nodes += [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, fx.Node)]
    return nodes


def _trim(fused_kernels: Iterable[Fused], gone: set[fx.Node]) -> None:
    """Let kernels give the values of codes where something reads them that takes no codes, and only what is read."""
    for fused in fused_kernels:
        node = fused.node
        results = {key: item for key, item in fused.results.items() if item not in gone}
        for part, codes in [(part, item) for (part, name), item in results.items() if name == "codes"]:
            values = [user for user in codes.users if user.target is ops.dequantize and user.users]
            if values:
                with node.graph.inserting_after(codes):
                    rounded = call_like(values[0], operator.getitem, (node, 0), values[0].meta["type"])
                for value in values:
                    value.replace_all_uses_with(rounded)
                results[part, "rounded"] = rounded
            gone |= erase_dead([user for user in codes.users if user.target is ops.dequantize])
            results = {key: item for key, item in results.items() if item not in gone}
        used = {name for (_, name), item in results.items() if item.users}
        names = [name for name in kernels.OUTPUTS[node.target] if name in used]
        node.update_kwarg("outputs", " ".join(names))
        order = [(output.part, output.name) for output in kernels.outputs(node)]
        for key, item in results.items():
            if key in order:
                set_argument(item, "index", order.index(key))
            if not item.users:
                node.graph.erase_node(item)


def erase_dead(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Erase those of ``nodes`` that nothing reads, and then what only they read; inputs stay."""
    pending, gone = list(nodes), set[fx.Node]()
    while pending:
        node = pending.pop()
        if node in gone or node.users or node.op in ("placeholder", "output"):
            continue
        sources = node.all_input_nodes
        node.graph.erase_node(node)
        gone.add(node)
        pending += sources
    return gone


def codes_of(node: fx.Node) -> tuple[fx.Node, list[fx.Node]] | None:
    """The ``dequantize`` that ``node`` comes from and the views between, in order; None if it comes from elsewhere.

    Views are looked through where one scale belongs to the whole tensor.
    """
    views: list[fx.Node] = []
    while node.target in VIEWS:
        views.insert(0, node)
        node = operand(node, "self")
    if node.target is not ops.dequantize:
        return None
    scale = QuantizerNode(node).scale.meta.get("type")
    plain = isinstance(scale, TensorType) and scale.rank == 0
    return (node, views) if plain or not views else None


def stored_codes(node: object) -> fx.Node | None:
    """The ``dequantize`` of a stored tensor that ``node`` is, if it is one."""
    if not isinstance(node, fx.Node) or node.target is not ops.dequantize:
        return None
    return node if QuantizerNode(node).rounds_parameter else None


def round_trip(value: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The static ``quantize`` and ``dequantize`` that everything reads ``value`` through, if there are such."""
    quantize = sole_user(value)
    if quantize is None or quantize.target is not ops.quantize or not QuantizerNode(quantize).is_static:
        return None
    dequantize = sole_user(quantize)
    return (quantize, dequantize) if dequantize is not None and dequantize.target is ops.dequantize else None
