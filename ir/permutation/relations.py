"""The orders of the axes of every tensor in a graph, and the ways in which operators relate them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from bitlower.ir.permutation.order import Order, unify
from bitlower.ir.tensors import get_tensor
from bitlower.ir.types import Dim

Axis = Order | None
"""The order of an axis; None where its size is symbolic (batch, sequence): such axes keep their order."""


class Axes:
    """The orders of the axes of every tensor in a graph, one relation richer with each operator.

    Args:
        module: its nodes carry types.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.orders: dict[fx.Node, list[Axis]] = {}
        self._tied: dict[tuple[object, ...], list[Axis]] = {}
        self.lookups: dict[tuple[object, ...], Order] = {}
        """Stored indices by :func:`storage_key`, each with the order of the axis that it points into."""

    def of(self, node: fx.Node) -> list[Axis]:
        """The axes of ``node``, a tensor; tied parameters have the same ones."""
        if node not in self.orders:
            fresh = [Order(size) if isinstance(size, int) else None for size in shape_of(node)]
            if node.op == "get_attr":
                fresh = self._tied.setdefault(storage_key(get_tensor(self.module, str(node.target))), fresh)
            self.orders[node] = fresh
        return self.orders[node]

    def same(self, first: Axis, second: Axis, node: fx.Node) -> None:
        """The two have one order, because of ``node``; a fixed one beside a symbolic one is frozen."""
        if first is not None and second is not None:
            unify(first, second, reason(node))
        elif first is not None or second is not None:
            (first or second).freeze(f"{reason(node)} takes its length from the input")  # type: ignore[union-attr]

    def carry(self, node: fx.Node, source: fx.Node, axes: Sequence[tuple[int, int]]) -> None:
        """The pairs ``(axis of source, axis of node)`` have one order."""
        for first, second in axes:
            self.same(self.of(source)[first], self.of(node)[second], node)

    def broadcast(self, node: fx.Node, source: Sequence[Axis], target: Sequence[Axis]) -> None:
        """The axes ``source``, from the last backwards, are those of ``target`` or have one entry."""
        for first, second in zip(reversed(source), reversed(target), strict=False):
            if first is None or first.size != 1:
                self.same(first, second, node)

    def freeze(self, node: fx.Node, why: str) -> None:
        """Let every axis of ``node`` stay in its order."""
        for order in self.of(node):
            if order is not None:
                order.freeze(why)


def shape_of(node: fx.Node) -> tuple[Dim, ...]:
    """The shape of ``node``; empty for what is no tensor."""
    return node.meta["type"].shape if "type" in node.meta else ()


def storage_key(tensor: torch.Tensor) -> tuple[object, ...]:
    """What two names of one tensor have in common."""
    place = (tensor.untyped_storage()._cdata, tensor.storage_offset())
    return (*place, tensor.dtype, tuple(tensor.shape), tensor.stride())


def reason(node: fx.Node) -> str:
    """How a reason names ``node``."""
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    path = node.meta.get("path")
    return f"{target.partition('.')[0]} in {path}" if path else f"%{node.name} ({target.partition('.')[0]})"
