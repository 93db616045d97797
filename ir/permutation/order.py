"""The order of the entries of an axis, as terms that are unified: what domains of permutations are solved with.

An :class:`Order` stands for the order of ``size`` entries. It is a *leaf* (any permutation), a *product* (entries lie
as a row-major grid: heads times their dimensions) or a *concatenation* (entries of one part after those of the next:
queries, keys and values in one matrix). To equate two orders is first-order unification: a leaf takes the other's
form, products and concatenations are refined until their parts have equal sizes. Where no such refinement exists, all
that lies inside is frozen: it stays in the order that it has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch

PRODUCT, CONCATENATION = "product", "concatenation"


class Order:
    """The order of ``size`` entries; equate it with others by :func:`unify`, and look at it by :meth:`leaves`."""

    __slots__ = ("frozen", "kind", "parts", "same", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.kind = ""
        self.parts: list[Order] = []
        self.same: Order | None = None
        self.frozen = ""
        """Why the entries stay where they are; empty if they need not."""

    def find(self) -> Order:
        """The one that stands for all that are equal to this one."""
        order = self
        while order.same is not None:
            order.same, order = order.same.same or order.same, order.same
        return order

    def flat(self, kind: str) -> list[Order]:
        """The parts, if this is of ``kind``, with those of parts of the same kind in their places; else itself."""
        order = self.find()
        if order.kind != kind:
            return [order]
        return [inner for part in order.parts for inner in part.flat(kind)]

    def leaves(self) -> Iterator[Order]:
        """The leaves of which this order is made, outermost (or first) first; one may come more than once."""
        order = self.find()
        if not order.kind:
            yield order
        for part in order.parts:
            yield from part.leaves()

    def freeze(self, reason: str) -> None:
        """Let all the entries stay where they are; the first reason is kept."""
        for leaf in self.leaves():
            leaf.frozen = leaf.frozen or reason

    def spread(self, leaves: Mapping[Order, torch.Tensor]) -> torch.Tensor:
        """The permutation of this axis, int64 ``[size]``, where those of ``leaves`` are reordered; others stay."""
        order = self.find()
        if not order.kind:
            return leaves.get(order, torch.arange(order.size))
        result = order.parts[0].spread(leaves)
        for part in order.parts[1:]:
            inner = part.spread(leaves)
            if order.kind == CONCATENATION:
                result = torch.cat([result, inner + result.numel()])
            else:
                result = (result[:, None] * inner.numel() + inner).reshape(-1)
        return result

    def _become(self, kind: str, sizes: Sequence[int]) -> None:
        """Refine a leaf into parts of ``sizes``."""
        self.kind, self.parts = kind, [Order(size) for size in sizes]
        for part in self.parts:
            part.frozen = self.frozen


def product(orders: Sequence[Order]) -> Order:
    """A row-major grid of ``orders``, outermost first; axes of one entry play no part."""
    return _compose(PRODUCT, [order for order in orders if order.size != 1], math.prod(o.size for o in orders))


def concatenation(orders: Sequence[Order]) -> Order:
    """The entries of ``orders``, one after the other; empty ones play no part."""
    return _compose(CONCATENATION, [order for order in orders if order.size], sum(o.size for o in orders))


def _compose(kind: str, parts: list[Order], size: int) -> Order:
    if len(parts) == 1:
        return parts[0]
    order = Order(size)
    if parts:
        order.kind, order.parts = kind, parts
    return order


def unify(first: Order, second: Order, reason: str) -> None:
    """Let two axes have one order.

    Args:
        first: of as many entries as ``second``.
        second: see ``first``.
        reason: is kept with what has to be frozen because the two have no common form.
    """
    first, second = first.find(), second.find()
    if first is second:
        return
    if first.size == second.size and not (first.kind and second.kind):
        leaf, other = (first, second) if not first.kind else (second, first)
        if leaf.frozen:
            other.freeze(leaf.frozen)
        leaf.same = other
    elif first.size != second.size or not _align(first, second, reason):
        first.freeze(reason)
        second.freeze(reason)


def _align(first: Order, second: Order, reason: str) -> bool:
    """Refine two products or concatenations to parts of equal sizes and equate those; False if they resist.

    A product beside a concatenation is one part, to be cut.
    """
    kind = first.kind if first.kind == second.kind else CONCATENATION
    left, right = first.flat(kind), second.flat(kind)
    while left and right:
        if left[0].size == right[0].size:
            unify(left.pop(0), right.pop(0), reason)
            left, right = ([part for o in side for part in o.flat(kind)] for side in (left, right))
            continue
        larger, size = (left, right[0].size) if left[0].size > right[0].size else (right, left[0].size)
        if not _cut(larger[0], kind, size):
            return False
        left, right = ([part for o in side for part in o.flat(kind)] for side in (left, right))
    return not left and not right


def _cut(order: Order, kind: str, size: int) -> bool:
    """Refine ``order`` towards a first part of ``size`` entries by one step; False if its form does not allow it.

    A product becomes a concatenation where the cut leaves whole rows of its outermost factor.
    """
    order = order.find()
    if kind == PRODUCT:
        if order.kind or order.size % size:
            return False
        order._become(PRODUCT, (size, order.size // size))
        return True
    if order.kind == PRODUCT:
        return _cut_rows(order, size)
    if order.kind:
        return False
    order._become(CONCATENATION, (size, order.size - size))
    return True


def _cut_rows(order: Order, size: int) -> bool:
    """Turn a product of rows into concatenated products, to be cut between rows."""
    outer, *inner = order.flat(PRODUCT)
    row = math.prod(part.size for part in inner)
    if size % row:
        return False
    if not outer.kind:
        outer._become(CONCATENATION, (size // row, outer.size - size // row))
    order.kind, order.parts = CONCATENATION, [product([piece, *inner]) for piece in outer.flat(CONCATENATION)]
    return True
