"""Operators whose results are entries of their operands, at other places: slices, parts, repetitions, choices."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import fx
from tvm import relax, te, tirx

from bitlower.backends.tvm_kernels.relax.builder import Frame, dtype_name
from bitlower.backends.tvm_kernels.relax.quantize import is_number
from bitlower.backends.tvm_kernels.relax.views import Strip, strip_of
from bitlower.backends.tvm_kernels.tir.function import i64
from bitlower.ir import TensorType
from bitlower.ir.operators import argument, operand

aten = torch.ops.aten


def filled(node: fx.Node, *defaults: Any) -> list[Any]:
    """The arguments of a node, with defaults for the last ones where they are left out."""
    return [*node.args, *defaults[len(node.args) :]]


def whole(value: Any) -> int:
    """A number that is known when the library is made."""
    assert isinstance(value, int), f"{value} is no number"
    return value


def convert_slice(frame: Frame, node: fx.Node) -> Any:
    """``x[…, start:end:step, …]``; the type says how long the result is."""
    x, axis, start, _, step = filled(node, None, 0, None, None, 1)
    kind: TensorType = x.meta["type"]
    axis, start = whole(axis) % kind.rank, frame.value(start)
    first = i64(0) if start is None else _place(start, frame.shape(kind)[axis])
    shape = frame.shape(node.meta["type"])

    def body(x: Any, shape: list[Any], first: Any) -> Any:
        def value(*index: Any) -> Any:
            place = list(index)
            place[axis] = first + index[axis] * i64(whole(step))
            return x[tuple(place)]

        return te.compute(shape, value, name="slice")

    return frame.te(body, frame.value(x), shape, first, name="slice")


def convert_select(frame: Frame, node: fx.Node) -> Any:
    """``x[…, index, …]``."""
    x, axis, at = filled(node)
    kind: TensorType = x.meta["type"]
    axis = whole(axis) % kind.rank
    return _selected(frame, x, axis, _place(frame.value(at), frame.shape(kind)[axis]))


def convert_unbind(frame: Frame, node: fx.Node) -> list[Any]:
    """``x[…, 0, …]``, ``x[…, 1, …]`` and so on, along an axis whose length is known."""
    x, axis = filled(node, None, node.kwargs.get("dim", 0))
    kind: TensorType = x.meta["type"]
    axis = whole(axis) % kind.rank
    return [_selected(frame, x, axis, i64(at)) for at in range(whole(kind.shape[axis]))]


def _selected(frame: Frame, x: fx.Node, axis: int, place: Any) -> Any:
    sizes = frame.shape(x.meta["type"])

    def body(x: Any, shape: list[Any], place: Any) -> Any:
        return te.compute(shape, lambda *index: x[(*index[:axis], place, *index[axis:])], name="select")

    return frame.te(body, frame.value(x), [*sizes[:axis], *sizes[axis + 1 :]], place, name="select")


def convert_repeat(frame: Frame, node: fx.Node) -> Any:
    """``x`` over and over along each axis; of more axes than it has, the first are new."""
    x, counts = filled(node)
    shape, new = frame.shape(node.meta["type"]), len(counts) - x.meta["type"].rank

    def body(x: Any, shape: list[Any]) -> Any:
        def value(*index: Any) -> Any:
            sizes = zip(x.shape, index[new:], counts[new:], strict=True)
            return x[tuple(at if is_number(frame.value(n), 1) else tirx.floormod(at, size) for size, at, n in sizes)]

        return te.compute(shape, value, name="repeat")

    return frame.te(body, frame.value(x), shape, name="repeat")


def convert_pad(frame: Frame, node: fx.Node) -> Any:
    """``x`` with a number before and behind it, or less of it, along its last axes; how much may be symbolic."""
    x, amounts, _, fill = filled(node, None, None, "constant", None)
    shape, kind = frame.shape(node.meta["type"]), frame.kind_of(node)
    starts = [i64(n) if isinstance(n, int) else n for n in frame.value(amounts)[::2][::-1]]
    first = kind.rank - len(starts)
    number = tirx.const(fill or 0, dtype_name(kind))

    def body(x: Any, shape: list[Any], starts: list[Any]) -> Any:
        def value(*index: Any) -> Any:
            places = [at - start for at, start in zip(index[first:], starts, strict=True)]
            inside = [at >= i64(0) for at in places]
            inside += [at < size for at, size in zip(places, x.shape[first:], strict=True)]
            return tirx.if_then_else(tirx.all(*inside), x[(*index[:first], *places)], number)

        return te.compute(shape, value, name="pad")

    return frame.te(body, frame.value(x), shape, starts, name="pad")


def convert_where(frame: Frame, node: fx.Node) -> Any:
    """One of two tensors or numbers, entry by entry, in the dtype of the result."""
    kind = frame.kind_of(node)
    condition, *choices = frame.value(node.args)
    dtype = dtype_name(kind)
    tensors = [relax.const(c, dtype) if isinstance(c, int | float) else frame.in_dtype(c, dtype) for c in choices]
    return frame.cast(frame.emit(relax.op.where(condition, *tensors)), kind)


def convert_parts(frame: Frame, node: fx.Node) -> list[Any]:
    """``x`` cut along an axis: into pieces of a size, of several sizes, or into a number of equal ones."""
    x, sizes, axis = filled(node, None, None, node.kwargs.get("dim", 0))
    axis = whole(axis) % x.meta["type"].rank
    extent = whole(x.meta["type"].shape[axis])
    if isinstance(sizes, Sequence):
        ends = list(accumulate(map(whole, sizes)))
    else:
        size = -(-extent // whole(sizes)) if node.target is aten.chunk.default else whole(sizes)
        ends = [min(end, extent) for end in range(size, extent + size, size)]
    value = frame.value(x)
    _note_strips(frame, node, axis, [0, *ends])
    return [
        frame.emit(relax.op.strided_slice(value, axes=[axis], begin=[start], end=[end]))
        for start, end in pairwise([0, *ends])
    ]


def _note_strips(frame: Frame, node: fx.Node, axis: int, starts: list[int]) -> None:
    """Note where the parts of rows lie, for what can read them there."""
    x = operand(node, "self")
    whole = strip_of(frame, x)
    if whole is None or axis != 2:
        return
    for user in node.users:
        if user.target is operator.getitem:
            start = starts[argument(user, "index")]
            frame.strips[user] = Strip(whole.value, whole.columns, whole.start + start)


def _place(value: Any, size: Any) -> Any:
    """A place on an axis; negative ones count from its end."""
    if not isinstance(value, int):
        return value
    return i64(value) if value >= 0 else tirx.max(size + i64(value), i64(0))
