"""A residual stream as linear algebra sees it: what writes it, what reads it, what stands in the way of a new basis.

Another basis is exact where all that touches the stream is linear in it, up to norms whose results only linears read
(QuaRot, Ashkboos et al. 2024, §3; SliceGPT, Ashkboos et al. 2024, §3). Pre-norm transformers are made so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import fx

from bitlower.ir import BitlowerError, describe
from bitlower.ir.dataflow import ADD, EMBEDDING, NORM, VIEWS, parameter_of
from bitlower.ir.operators import LinearNode, NormNode, argument
from bitlower.ir.permutation.domains import Domain

aten = torch.ops.aten
LINEAR = aten.linear.default
_MOVES = VIEWS | {aten.to.dtype, aten.to.device}
_SCALES = frozenset({aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar})


@dataclass
class Stream:
    """The parts of a residual stream.

    Args:
        domain: its channels.
        tables: the embeddings that write it.
        writers: the linears that write it.
        vectors: the parameters that are added to it.
        norms: the norms of it, each with the linears that read the result.
        readers: the linears that read the stream itself.
        ends: what the graph gives out of it, each with the norm that it comes from; None for the stream itself.
    """

    domain: Domain
    tables: list[fx.Node] = field(default_factory=list)
    writers: list[fx.Node] = field(default_factory=list)
    vectors: list[fx.Node] = field(default_factory=list)
    norms: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    readers: list[fx.Node] = field(default_factory=list)
    ends: list[tuple[fx.Node, fx.Node | None]] = field(default_factory=list)


def trace_stream(graph: fx.Graph, domain: Domain) -> Stream:
    """Look at everything that touches the channels of ``domain``, a residual stream.

    Raises:
        BitlowerError: something stands in the way of another basis; it is named.
    """
    if domain.frozen:
        raise BitlowerError(f"rotate: the residual stream has no other basis: {domain.frozen}")
    return _Tracer(graph, domain).stream


class _Tracer:
    """Goes through the graph once; ``origin`` holds the norm whose result a value is, None for the stream itself."""

    def __init__(self, graph: fx.Graph, domain: Domain) -> None:
        self.stream = Stream(domain)
        self.origin: dict[fx.Node, fx.Node | None] = {}
        axes = {node: axis for node, axis in domain.values if _is_fed(node) or node.target in EMBEDDING}
        for node in graph.nodes:
            self._read(node, inside=node in axes)
            if node in axes:
                if axes[node] != len(node.meta["type"].shape) - 1 or (node, axes[node]) not in domain.whole:
                    refuse(node, "the channels are not its whole last axis")
                self.origin[node] = self._origin(node)

    def _read(self, node: fx.Node, *, inside: bool) -> None:
        """Note what reads the channels."""
        if node.op == "output":
            self.stream.ends = [(n, self.origin[n]) for n in node.all_input_nodes if n in self.origin]
        elif node.target is LINEAR and LinearNode(node).x in self.origin:
            norm = self.origin[LinearNode(node).x]
            (self.stream.readers if norm is None else self.stream.norms[norm]).append(node)
        elif not inside and "type" in node.meta and any(n in self.origin for n in node.all_input_nodes):
            refuse(node, "it reads the channels and is no linear layer")

    def _origin(self, node: fx.Node) -> fx.Node | None:
        """The norm whose result ``node`` is; None if it is a value of the stream itself."""
        if node.target in EMBEDDING:
            self.stream.tables.append(node)
            return None
        if node.target is LINEAR:
            self.stream.writers.append(node)
            return None
        if node.target in NORM:
            return self._norm(node)
        if node.target in ADD:
            self._sum(node)
            return None
        sources = [source for source in node.all_input_nodes if source in self.origin]
        if len(sources) == 1 and (node.target in _MOVES or (node.target in _SCALES and _by_number(node))):
            return self.origin[sources[0]]
        refuse(node, "it is not linear in the channels")

    def _norm(self, node: fx.Node) -> fx.Node:
        if self.origin.get(NormNode(node).x, node) is not None:
            refuse(node, "it normalizes what another norm gives")
        self.stream.norms[node] = []
        return node

    def _sum(self, node: fx.Node) -> None:
        """Each term must be a value of the stream, or a parameter."""
        for term in node.all_input_nodes:
            norm = self.origin.get(term)
            if norm is not None:
                path = norm.meta.get("path", norm.name)
                refuse(node, f"it adds what the norm {path} gives, whose weight cannot move into linears (post-norm)")
            if term not in self.origin:
                parameter = parameter_of(term)
                if parameter is None:
                    refuse(node, f"it adds %{term.name} to the stream")
                self.stream.vectors.append(parameter)


def _is_fed(node: fx.Node) -> bool:
    """Whether ``node`` depends on an input, and so is no parameter or computed from parameters alone."""
    pending, seen = [node], set[fx.Node]()
    while pending:
        current = pending.pop()
        if current.op == "placeholder":
            return True
        if current not in seen:
            seen.add(current)
            pending += current.all_input_nodes
    return False


def _by_number(node: fx.Node) -> bool:
    """Whether the second factor is a number, or a tensor of one entry."""
    other = argument(node, "other")
    return not isinstance(other, fx.Node) or other.meta["type"].shape in ((), (1,))


def refuse(node: fx.Node, why: str) -> NoReturn:
    """Say what stands in the way.

    Raises:
        BitlowerError: always.
    """
    raise BitlowerError(
        f"rotate: the residual stream has no other basis at {describe(node)}: {why}",
        hint="rotation is for pre-norm models after `clean`; `peg-permute` and `smooth` work on all",
    )
