"""Orders as terms: unification refines them, and permutations of leaves spread to whole axes."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from bitlower.ir.permutation.order import Order, concatenation, product, unify


def same(first: Order, second: Order) -> None:
    unify(first, second, "they differ")


def test_leaves_are_one_after_unification() -> None:
    first, second, third = Order(4), Order(4), Order(4)
    same(first, second)
    same(third, second)
    assert first.find() is third.find()
    assert list(first.leaves()) == [second.find()]


def test_a_product_is_refined_to_common_factors() -> None:
    """12 = 4 · 3 = 2 · 6 = 2 · 2 · 3."""
    axis, four, three, two, six = (Order(n) for n in (12, 4, 3, 2, 6))
    same(axis, product([four, three]))
    same(axis, product([two, six]))
    assert [leaf.size for leaf in axis.leaves()] == [2, 2, 3]
    assert list(six.leaves())[1] is three.find()
    assert not any(leaf.frozen for leaf in axis.leaves())


def test_a_concatenation_is_cut_where_the_other_is() -> None:
    whole, parts = Order(10), [Order(4), Order(6)]
    same(whole, concatenation(parts))
    same(whole, concatenation([Order(6), Order(4)]))
    assert [leaf.size for leaf in whole.leaves()] == [4, 2, 4]


def test_rows_of_a_product_can_be_concatenated() -> None:
    """Two heads of queries and one of keys, four wide each, in one matrix."""
    whole, heads, width = Order(12), Order(3), Order(4)
    same(whole, product([heads, width]))
    queries, keys = Order(8), Order(4)
    same(whole, concatenation([queries, keys]))
    assert [leaf.size for leaf in heads.leaves()] == [2, 1]
    assert list(keys.leaves()) == [width.find()]
    assert [leaf.size for leaf in queries.leaves()] == [2, 4]


def test_what_has_no_common_form_is_frozen() -> None:
    for first, second in [
        (product([Order(2), Order(3)]), product([Order(3), Order(2)])),
        (product([Order(2), Order(3)]), concatenation([Order(2), Order(4)])),
        (Order(5), Order(6)),
    ]:
        same(first, second)
        assert {leaf.frozen for order in (first, second) for leaf in order.leaves()} == {"they differ"}


def test_a_frozen_order_freezes_what_is_equal_to_it() -> None:
    whole, part = Order(6), Order(2)
    whole.freeze("it is looked up")
    same(part, Order(2))
    same(whole, product([part, Order(3)]))
    assert {leaf.frozen for leaf in whole.leaves()} == {"it is looked up"}
    assert part.find().frozen == "it is looked up"


def test_parts_of_one_entry_or_none_play_no_part() -> None:
    axis = Order(4)
    assert product([Order(1), axis, Order(1)]) is axis
    assert concatenation([Order(0), axis]) is axis


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.randoms())
def test_spread_moves_a_grid_as_indexing_does(outer: int, inner: int, tail: int, random) -> None:
    """Against numpy-style indexing of the reshaped axis."""
    rows, columns, rest = Order(outer), Order(inner), Order(tail)
    axis = concatenation([product([rows, columns]), rest])
    orders = {}
    for leaf in (rows, columns, rest):
        order = list(range(leaf.size))
        random.shuffle(order)
        orders[leaf] = torch.tensor(order)
    grid = torch.arange(outer * inner).reshape(outer, inner)[orders[rows]][:, orders[columns]]
    expected = torch.cat([grid.reshape(-1), outer * inner + orders[rest]])
    assert torch.equal(axis.spread(orders), expected)
