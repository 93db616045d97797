"""What each operator says about the orders of its axes: which must be the same, and which must stay as they are.

A rule holds if the operator commutes with permutations: permuted operands give a permuted result. That is so for all
elementwise operators, for softmax and normalization along the permuted axis, and for products and sums over it. Axes
that an operator without a rule reads or writes are frozen.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from bitlower.ir import ops
from bitlower.ir.dataflow import ATTENTION, EMBEDDING, LINEAR, MATMUL, NORM, PARTS, QUANTIZER, SOFTMAX
from bitlower.ir.operators import AttentionNode, BinaryNode, EmbeddingNode, LinearNode, argument, operand
from bitlower.ir.permutation.order import Order, concatenation, product, unify
from bitlower.ir.permutation.relations import Axes, Axis, reason, shape_of, storage_key
from bitlower.ir.quantizer_node import QuantizerNode
from bitlower.ir.tensors import get_tensor
from bitlower.ir.types import Dim

aten = torch.ops.aten
_ELEMENTWISE = frozenset({
    aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.type_as.default, aten.contiguous.default,
    aten.alias.default, aten.log_softmax.int, aten.__and__.Tensor, aten.__or__.Tensor,
}) | SOFTMAX  # fmt: skip
"""Those without torch's tag; a softmax is one, whatever its axis."""
_UNIFORM = frozenset({
    aten.full.default, aten.zeros.default, aten.ones.default, aten.zeros_like.default, aten.ones_like.default,
    aten.full_like.default, aten.new_ones.default, aten.new_zeros.default, aten.new_full.default,
    aten.scalar_tensor.default,
})  # fmt: skip
_SIZES = frozenset({aten.sym_size.int, aten.sym_numel.default})
_RESHAPES = frozenset({
    aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.unsqueeze.default, aten.squeeze.dim,
    aten.squeeze.default, aten.unflatten.int,
})  # fmt: skip
_REDUCTIONS = frozenset({
    aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.linalg_vector_norm.default,
    aten.var.dim, aten.var.correction, aten.std.correction, aten.logsumexp.default, aten.prod.dim_int,
})  # fmt: skip


Rule = Callable[[Axes, fx.Node], None]


def apply_rule(axes: Axes, node: fx.Node) -> None:
    """Add what ``node``, a call, says about its axes."""
    rule = RULES.get(node.target)
    if rule is None and _is_elementwise(node.target):
        rule = _elementwise
    (rule or _unknown)(axes, node)


def _is_elementwise(target: Any) -> bool:
    tags = getattr(target, "tags", ())
    return torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags


def _tensors(node: fx.Node) -> list[fx.Node]:
    return [source for source in node.all_input_nodes if "type" in source.meta]


def _dim(value: Any, rank: int) -> int:
    return int(value) % rank if rank else 0


def _unknown(axes: Axes, node: fx.Node) -> None:
    if node.target is operator.getitem and operand(node, "source").target in PARTS | {ops.choose_qparams}:
        return
    for tensor in (*_tensors(node), node):
        axes.freeze(tensor, f"{reason(node)} depends on its order")


def _uniform(axes: Axes, node: fx.Node) -> None:
    """Values that are all alike, or sizes: nothing depends on an order."""


def _elementwise(axes: Axes, node: fx.Node) -> None:
    for source in _tensors(node):
        axes.broadcast(node, axes.of(source), axes.of(node))


def _linear(axes: Axes, node: fx.Node) -> None:
    view = LinearNode(node)
    rows, columns = axes.of(view.weight)
    if node.target is aten.addmm.default:
        rows, columns = columns, rows
    *leading, inputs = axes.of(view.x)
    *others, outputs = axes.of(node)
    for first, second in zip(leading, others, strict=True):
        axes.same(first, second, node)
    axes.same(inputs, columns, node)
    axes.same(outputs, rows, node)
    if view.bias is not None:
        axes.broadcast(node, axes.of(view.bias), axes.of(node))


def _matmul(axes: Axes, node: fx.Node) -> None:
    view = BinaryNode(node)
    first, second, result = (axes.of(part) for part in (view.left, view.right, node))
    if len(first) < 2 or len(second) < 2:
        return _unknown(axes, node)
    axes.same(first[-1], second[-2], node)
    axes.same(first[-2], result[-2], node)
    axes.same(second[-1], result[-1], node)
    for part in (first, second):
        axes.broadcast(node, part[:-2], result[:-2])
    return None


def _attention(axes: Axes, node: fx.Node) -> None:
    """Softmax(QKᵀ)V; several query heads may share one head of keys and values (grouped queries)."""
    view = AttentionNode(node)
    q, k, v, result = (axes.of(part) for part in (view.query, view.key, view.value, node))
    axes.same(q[-1], k[-1], node)
    axes.same(v[-1], result[-1], node)
    axes.same(q[-2], result[-2], node)
    axes.same(k[-2], v[-2], node)
    for part in (q, k, v):
        axes.broadcast(node, part[:-3], result[:-3])
    if len(q) > 2:
        axes.same(q[-3], result[-3], node)
        for heads in (k[-3], v[-3]):
            axes.same(_repeated(q[-3], heads), q[-3], node)
    if view.mask is not None:
        axes.broadcast(node, axes.of(view.mask), [*result[:-1], k[-2]])


def _repeated(heads: Axis, shared: Axis) -> Axis:
    """``shared`` with each entry repeated as often as makes the size of ``heads``."""
    if heads is None or shared is None or heads.size == shared.size:
        return shared
    return product([shared, Order(heads.size // shared.size)])


def _norm(axes: Axes, node: fx.Node) -> None:
    if "type" not in node.meta:
        return _unknown(axes, node)
    return _elementwise(axes, node)


def _embedding(axes: Axes, node: fx.Node) -> None:
    *places, width = axes.of(node)
    rows, columns = axes.of(EmbeddingNode(node).table)
    axes.same(columns, width, node)
    if rows is not None:
        rows.freeze(f"{reason(node)} looks its rows up by number")
    for first, second in zip(axes.of(EmbeddingNode(node).ids), places, strict=True):
        axes.same(first, second, node)


def _permute(axes: Axes, node: fx.Node) -> None:
    rank = len(shape_of(node))
    if node.target is aten.permute.default:
        order = [_dim(axis, rank) for axis in argument(node, "dims")]
    else:
        order = list(range(rank))
        dims = (argument(node, "dim0"), argument(node, "dim1")) if node.target is aten.transpose.int else (0, -1)
        first, second = (_dim(axis, rank) for axis in dims)
        order[first], order[second] = order[second], order[first]
    axes.carry(node, operand(node, "self"), [(axis, place) for place, axis in enumerate(order)])


def _reshape(axes: Axes, node: fx.Node) -> None:
    """Equal axes at both ends are themselves; those between are split and merged, from the last one on."""
    left, right = _sized(axes, operand(node, "self")), _sized(axes, node)
    for end in (0, -1):
        while left and right and left[end][0] == right[end][0]:
            axes.same(left.pop(end)[1], right.pop(end)[1], node)
    while left and right:
        block = _last_block(left, right)
        if block is None:
            break
        unify(product(block[0]), product(block[1]), reason(node))
    for _, order in (*left, *right):
        if order is not None and order.size != 1:
            order.freeze(f"{reason(node)} merges it with an axis of the input's length")


def _sized(axes: Axes, node: fx.Node) -> list[tuple[Dim, Axis]]:
    return list(zip(shape_of(node), axes.of(node), strict=True))


def _last_block(left: list[tuple[Dim, Axis]], right: list[tuple[Dim, Axis]]) -> tuple[list[Order], list[Order]] | None:
    """Take the fewest last axes off both sides that hold equally many entries; None if a symbolic one is in the way."""
    counts, sizes = [0, 0], [1, 1]
    while sizes[0] != sizes[1] or not any(counts):
        side = 0 if sizes[0] <= sizes[1] else 1
        available = (left, right)[side]
        order = available[-1 - counts[side]][1] if counts[side] < len(available) else None
        if order is None:
            return None
        counts[side] += 1
        sizes[side] *= order.size
    return _take(left, counts[0]), _take(right, counts[1])


def _take(axes: list[tuple[Dim, Axis]], count: int) -> list[Order]:
    """Take the last ``count`` axes off, whose sizes are known."""
    orders = [order for _, order in axes[len(axes) - count :] if order is not None]
    del axes[len(axes) - count :]
    return orders


def _slice(axes: Axes, node: fx.Node) -> None:
    source = operand(node, "self")
    rank = len(shape_of(node))
    axis = _dim(argument(node, "dim"), rank)
    axes.carry(node, source, [(i, i) for i in range(rank) if i != axis])
    whole, part = axes.of(source)[axis], axes.of(node)[axis]
    start, step = argument(node, "start") or 0, argument(node, "step")
    if whole is None or part is None or step != 1 or not isinstance(start, int):
        for order in (whole, part):
            if order is not None:
                order.freeze(f"{reason(node)} takes out a part of it")
        return
    start = min(start + whole.size if start < 0 else start, whole.size)
    rest = whole.size - start - part.size
    unify(whole, concatenation([Order(start), part, Order(rest)]), reason(node))


def _select(axes: Axes, node: fx.Node) -> None:
    source = operand(node, "self")
    rank = len(shape_of(source))
    axis = _dim(argument(node, "dim"), rank)
    order = axes.of(source)[axis]
    if order is not None:
        order.freeze(f"{reason(node)} takes out an entry of it")
    axes.carry(node, source, [(i, i - (i > axis)) for i in range(rank) if i != axis])


def _split(axes: Axes, node: fx.Node) -> None:
    """Parts along an axis, each taken out by ``getitem``."""
    source = operand(node, "self")
    parts = {argument(user, "index"): user for user in node.users if user.target is operator.getitem}
    rank = len(shape_of(source))
    axis = _dim(argument(node, "dim"), rank)
    whole = axes.of(source)[axis]
    sizes = _part_sizes(node, whole)
    pieces: list[Order] = []
    for index, size in enumerate(sizes):
        order = axes.of(parts[index])[axis] if index in parts else Order(size)
        pieces.append(order or Order(size))
    for part in parts.values():
        axes.carry(part, source, [(i, i) for i in range(rank) if i != axis])
    if whole is not None:
        unify(whole, concatenation(pieces), reason(node))


def _part_sizes(node: fx.Node, whole: Axis) -> list[int]:
    """How many entries each part has; none where the axis is symbolic."""
    if whole is None:
        return []
    if node.target is aten.split_with_sizes.default:
        return list(argument(node, "split_sizes"))
    if node.target is aten.chunk.default:
        size = -(-whole.size // argument(node, "chunks"))
    else:
        size = argument(node, "split_size")
    return [min(size, whole.size - start) for start in range(0, whole.size, size)]


def _unbind(axes: Axes, node: fx.Node) -> None:
    source = operand(node, "self")
    rank = len(shape_of(source))
    axis = _dim(argument(node, "dim"), rank)
    order = axes.of(source)[axis]
    if order is not None:
        order.freeze(f"{reason(node)} takes its entries out")
    for part in node.users:
        axes.carry(part, source, [(i, i - (i > axis)) for i in range(rank) if i != axis])


def _cat(axes: Axes, node: fx.Node) -> None:
    sources: list[fx.Node] = argument(node, "tensors")
    rank = len(shape_of(node))
    axis = _dim(argument(node, "dim"), rank)
    for source in sources:
        axes.carry(node, source, [(i, i) for i in range(rank) if i != axis])
    pieces = [axes.of(source)[axis] for source in sources]
    whole = axes.of(node)[axis]
    known = [piece for piece in pieces if piece is not None]
    if whole is not None and len(known) == len(pieces):
        unify(whole, concatenation(known), reason(node))
        return
    for order in (whole, *known):
        if order is not None:
            order.freeze(f"{reason(node)} makes an axis of the input's length")


def _repeat_interleave(axes: Axes, node: fx.Node) -> None:
    source, repeats, axis = operand(node, "self"), argument(node, "repeats"), argument(node, "dim")
    if axis is None or not isinstance(repeats, int):
        return _unknown(axes, node)
    rank = len(shape_of(node))
    axes.carry(node, source, [(i, i) for i in range(rank) if i != _dim(axis, rank)])
    order = axes.of(source)[_dim(axis, rank)]
    repeated = product([order, Order(repeats)]) if order is not None else None
    axes.same(repeated, axes.of(node)[_dim(axis, rank)], node)
    return None


def _index_select(axes: Axes, node: fx.Node) -> None:
    """A gather by a stored index: the index adapts to the order of what it points into."""
    source, index = operand(node, "self"), operand(node, "index")
    if index.op != "get_attr":
        return _unknown(axes, node)
    rank = len(shape_of(node))
    place = _dim(argument(node, "dim"), rank)
    axes.carry(node, source, [(i, i) for i in range(rank) if i != place])
    axes.same(axes.of(index)[0], axes.of(node)[place], node)
    order = axes.of(source)[place]
    if order is not None:
        key = storage_key(get_tensor(axes.module, str(index.target)))
        unify(order, axes.lookups.setdefault(key, order), reason(node))
    return None


def _reduction(axes: Axes, node: fx.Node) -> None:
    """Sums and the like: the result does not depend on the order of the axes that go."""
    source, dims = operand(node, "self"), argument(node, "dim")
    rank = len(shape_of(source))
    reduced = {_dim(d, rank) for d in ([dims] if isinstance(dims, int) else dims or range(rank))}
    remaining_axes = [axis for axis in range(rank) if axis not in reduced]
    places = remaining_axes if len(shape_of(node)) == rank else range(len(remaining_axes))
    axes.carry(node, source, list(zip(remaining_axes, places, strict=True)))


def _quantizer(axes: Axes, node: fx.Node) -> None:
    """Rounding: a scale an entry has the entries' order; one a block lets blocks move, and entries alike in each."""
    view = QuantizerNode(node)
    axes.broadcast(node, axes.of(view.value), axes.of(node))
    for parameter in (view.scale, view.zero_point):
        for scales, values in zip(reversed(axes.of(parameter)), reversed(axes.of(node)), strict=False):
            if scales is not None and values is not None and 1 < scales.size < values.size:
                scales = product([scales, Order(values.size // scales.size)])
            if scales is None or scales.size != 1:
                axes.same(scales, values, node)


def _choose_qparams(axes: Axes, node: fx.Node) -> None:
    source = operand(node, "x")
    for part in node.users:
        axes.carry(part, source, [(i, i) for i in range(len(shape_of(source)) - 1)])


RULES: dict[Any, Rule] = {
    **dict.fromkeys(LINEAR, _linear),
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.chunk.default: _split,
    aten.unbind.int: _unbind,
    aten.cat.default: _cat,
    aten.expand.default: _elementwise,
    aten.repeat_interleave.self_int: _repeat_interleave,
    aten.index_select.default: _index_select,
    ops.choose_qparams: _choose_qparams,
    **dict.fromkeys((aten.transpose.int, aten.permute.default, aten.t.default), _permute),
    **dict.fromkeys(MATMUL, _matmul),
    **dict.fromkeys(ATTENTION, _attention),
    **dict.fromkeys(NORM, _norm),
    **dict.fromkeys(EMBEDDING, _embedding),
    **dict.fromkeys(QUANTIZER, _quantizer),
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(_UNIFORM | _SIZES, _uniform),
    **dict.fromkeys(_RESHAPES, _reshape),
    **dict.fromkeys(_REDUCTIONS, _reduction),
}
