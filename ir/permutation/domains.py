"""Permutation domains: which axes of which tensors have to share one order of their entries.

Reordering the channels of a residual stream leaves a transformer's function as it is, if every tensor along it follows:
embedding columns, norm parameters, the columns of linears that read it, the rows and biases of those that write it
(Bondarenko et al. 2021, §4, for one layer). A *domain* is such a set of axes. It is found from operators alone, by
unifying axes (:mod:`bitlower.ir.permutation.rules`), so it covers feed-forward inner channels, attention heads and the
dimensions inside heads as well as residual streams, in any architecture.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from bitlower.ir.dataflow import residual_sums
from bitlower.ir.permutation.order import Order
from bitlower.ir.permutation.relations import Axes, storage_key
from bitlower.ir.permutation.rules import apply_rule

Orders = Mapping["Domain", torch.Tensor]
"""A permutation for each domain, int64 ``[size]``: the entry ``i`` comes from the old entry ``order[i]``."""


@dataclass(frozen=True, eq=False)
class Domain:
    """Axes that share one order; any permutation of it, applied to all of them, leaves the function as it is.

    Args:
        size: how many entries are ordered.
        values: activations and other computed tensors, each with the axis.
        parameters: stored tensors by name, each with the axis; a tied one under the name that the graph reads.
        inputs: placeholders, each with the axis: what comes in is in the old order.
        outputs: nodes that the graph gives out, each with the axis: what goes out must be in the old order.
        whole: the places among ``values`` and ``parameters`` where the domain is the whole axis; elsewhere it is a part
            (the dimensions inside each head, the value part of a joint projection).
        frozen: why the entries cannot be reordered; empty if they can.
        residual: whether it is the channels of a residual stream.
    """

    size: int
    values: tuple[tuple[fx.Node, int], ...]
    parameters: tuple[tuple[str, int], ...]
    inputs: tuple[tuple[fx.Node, int], ...]
    outputs: tuple[tuple[fx.Node, int], ...]
    whole: frozenset[tuple[fx.Node | str, int]]
    frozen: str
    residual: bool

    @property
    def structure(self) -> Literal["free", "within", "frozen"]:
        """``within``: it is only a part of some axis, such as the dimensions inside each head."""
        if self.frozen:
            return "frozen"
        return "free" if len(self.whole) == len(self.values) + len(self.parameters) else "within"

    def __str__(self) -> str:
        kind = "residual stream" if self.residual else "channels"
        why = f" ({self.frozen})" if self.frozen else ""
        places = f"{len(self.values)} values, {len(self.parameters)} parameters"
        return f"{self.size} {kind}, {self.structure}{why}: {places}"


class Domains(Sequence[Domain]):
    """The domains of a graph, in the order in which the graph first touches them.

    Args:
        leaf_domains: the domains, each with the leaf that stands for it.
        axes: what they were found with.
    """

    def __init__(self, leaf_domains: Mapping[Order, Domain], axes: Axes) -> None:
        self._leaf_domains, self._axes = dict(leaf_domains), axes
        self._domains = tuple(leaf_domains.values())
        self._leaf = {domain: leaf for leaf, domain in leaf_domains.items()}
        self._stored = {str(node.target): orders for node, orders in axes.orders.items() if node.op == "get_attr"}

    def __getitem__(self, index: int) -> Domain:  # type: ignore[override]
        return self._domains[index]

    def __len__(self) -> int:
        return len(self._domains)

    def __iter__(self) -> Iterator[Domain]:
        return iter(self._domains)

    def at(self, place: fx.Node | str, axis: int) -> tuple[Domain, ...]:
        """The domains that make up an axis of a value (a node) or a parameter (its name), outermost first."""
        order = self._order(place, axis)
        leaves = dict.fromkeys(order.leaves()) if order is not None else {}
        return tuple(self._leaf_domains[leaf] for leaf in leaves if leaf in self._leaf_domains)

    def spread(self, place: fx.Node | str, axis: int, orders: Orders) -> torch.Tensor:
        """The permutation of a whole axis, int64, that follows from ``orders``; its size must be known."""
        order = self._order(place, axis)
        assert order is not None, f"axis {axis} of {place} has no known size"
        return order.spread(self._by_leaf(orders))

    def lookup(self, index: torch.Tensor, orders: Orders) -> torch.Tensor | None:
        """The permutation of the axis that the stored ``index`` points into; None if it points into none."""
        order = self._axes.lookups.get(storage_key(index))
        return None if order is None else order.spread(self._by_leaf(orders))

    def _order(self, place: fx.Node | str, axis: int) -> Order | None:
        return (self._stored[place] if isinstance(place, str) else self._axes.of(place))[axis]

    def _by_leaf(self, orders: Orders) -> dict[Order, torch.Tensor]:
        return {self._leaf[domain]: order for domain, order in orders.items()}


def domains(module: fx.GraphModule) -> Domains:
    """Find all permutation domains of a graph.

    Args:
        module: of a Program at any level; its nodes carry types, as every Program's do.
    """
    axes = Axes(module)
    for node in module.graph.nodes:
        if node.op == "call_function":
            apply_rule(axes, node)
    return Domains(_collect(axes, module.graph), axes)


def _collect(axes: Axes, graph: fx.Graph) -> dict[Order, Domain]:
    """Every leaf of more than one entry, with all the places where it occurs."""
    places: dict[Order, list[tuple[fx.Node, int]]] = defaultdict(list)
    whole: dict[Order, set[tuple[fx.Node | str, int]]] = defaultdict(set)
    for node in graph.nodes:
        for axis, order in enumerate(axes.of(node)):
            for leaf in dict.fromkeys(order.leaves()) if order is not None else ():
                places[leaf].append((node, axis))
                if order is not None and leaf is order.find():
                    whole[leaf].add((_name(node), axis))
    sums = {(node, axis) for node in residual_sums(graph) for axis in [len(axes.of(node)) - 1]}
    ends = set(graph.output_node().all_input_nodes)
    return {
        leaf: Domain(
            size=leaf.size,
            values=tuple(place for place in occurrences if place[0].op != "get_attr"),
            parameters=tuple(dict.fromkeys((str(n.target), axis) for n, axis in occurrences if n.op == "get_attr")),
            inputs=tuple(place for place in occurrences if place[0].op == "placeholder"),
            outputs=tuple(place for place in occurrences if place[0] in ends),
            whole=frozenset(whole[leaf]),
            frozen=leaf.frozen,
            residual=any(place in sums for place in occurrences),
        )
        for leaf, occurrences in places.items()
        if leaf.size > 1
    }


def _name(node: fx.Node) -> fx.Node | str:
    """How a place is called: a parameter by its name, a value by its node."""
    return str(node.target) if node.op == "get_attr" else node
