"""The operators of a fused graph that are no kernels: shapes, masks, rotary tables, and floats between kernels.

Those whose result is decided by its type are made here; all others by TVM's own converters for PyTorch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import tvm
from torch import fx
from tvm import relax, te, tirx

from bitlower.backends.tvm_kernels.internals import imported, imported_names
from bitlower.backends.tvm_kernels.relax.attention import convert_float_attention
from bitlower.backends.tvm_kernels.relax.builder import Frame, dimension, dtype_name
from bitlower.backends.tvm_kernels.relax.embedding import convert_float_embedding
from bitlower.backends.tvm_kernels.relax.entries import (
    convert_pad,
    convert_parts,
    convert_repeat,
    convert_select,
    convert_slice,
    convert_unbind,
    convert_where,
    filled,
    whole,
)
from bitlower.backends.tvm_kernels.relax.linear import convert_float_linear
from bitlower.backends.tvm_kernels.relax.quantize import dequantized, is_number, quantized, token_rounded
from bitlower.backends.tvm_kernels.relax.rowwise import convert_float_norm
from bitlower.backends.tvm_kernels.relax.views import heads_of, read_heads, swaps_heads
from bitlower.backends.tvm_kernels.spec.operators import where
from bitlower.backends.tvm_kernels.tir.function import i64
from bitlower.ir import BitlowerError, Grid, ScaleConvention, TensorType, ops
from bitlower.ir.operators import operand
from bitlower.ir.quantizer_node import QuantizerNode

aten = torch.ops.aten
Converter = Callable[[Frame, fx.Node], Any]


def convert_operator(frame: Frame, node: fx.Node) -> Any:
    """What an operator returns.

    Raises:
        BitlowerError: there is no converter for it.
    """
    if node.target in _CONVERTERS:
        return _CONVERTERS[node.target](frame, node)
    if "type" not in node.meta:
        return _scalar(frame, node)
    return _imported(frame, node)


def check_operator(node: fx.Node) -> None:
    """See that an operator has a converter, or is one that ``lower-integer`` and ``fuse`` take away.

    Raises:
        BitlowerError: there is none, or a dimension of its result cannot be computed.
    """
    kind = node.meta.get("type")
    if node.target not in _CONVERTERS and not str(node.target).startswith("bitlower."):
        arithmetic = kind is None and not isinstance(node.target, torch._ops.OpOverload)
        if not arithmetic and (kind is None or _name(node) not in imported_names()):
            raise _unknown(node)
    for size in kind.shape if kind is not None else ():
        try:
            dimension(size, {})
        except BitlowerError as error:
            raise BitlowerError(f"{where(node)}: {error.message}", hint=error.hint) from None


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _scalar(frame: Frame, node: fx.Node) -> Any:
    """Arithmetic of dimensions."""
    if not callable(node.target):
        raise _unknown(node)
    try:
        return node.target(*frame.value(node.args))
    except (TypeError, RuntimeError):
        raise _unknown(node) from None


def _imported(frame: Frame, node: fx.Node) -> Any:
    """Let TVM's importer convert it, and hold it to its type."""
    name = _name(node)
    if name not in imported_names() or node.kwargs.get("alpha", 1) != 1:
        raise _unknown(node)
    values = {source: frame.value(source) for source in node.all_input_nodes}
    if name.endswith((".Tensor", ".Scalar")):
        values = {source: _as_tensor(frame, value) for source, value in values.items()}
    try:
        value = imported(frame.builder, node, name, values)
        return frame.cast(_of_dtype(frame, value, node), frame.kind_of(node))
    except Exception as error:  # TVM raises many kinds
        raise BitlowerError(
            f"{where(node)}: TVM does not convert {node.target} here: {str(error).splitlines()[0]}",
            hint="export to another backend",
        ) from error


def _of_dtype(frame: Frame, value: Any, node: fx.Node) -> Any:
    """``value`` in the dtype of the node: sums of whole numbers are wider in PyTorch."""
    return frame.in_dtype(value, dtype_name(frame.kind_of(node)))


def _as_tensor(frame: Frame, value: Any) -> Any:
    """A dimension as a tensor of rank 0, made by a function of its own: TVM fuses none that reads a number."""
    if not tvm.ir.is_prim_expr(value):
        return value
    return frame.te(lambda size: te.compute((), lambda: size, name="size"), value, name="size", fuse=False)


def _unknown(node: fx.Node) -> BitlowerError:
    return BitlowerError(f"{where(node)}: there is no converter for {node.target}", hint="export to another backend")


def _size(frame: Frame, node: fx.Node) -> Any:
    x, axis = filled(node)
    return frame.shape(x.meta["type"])[axis]


def _getitem(frame: Frame, node: fx.Node) -> Any:
    source, index = node.args
    return frame.value(source)[index]


def _same(frame: Frame, node: fx.Node) -> Any:
    return frame.value(node.all_input_nodes[0])


def _reshape(frame: Frame, node: fx.Node) -> Any:
    return frame.reshape(frame.value(operand(node, "self")), frame.shape(node.meta["type"]))


def _expand(frame: Frame, node: fx.Node) -> Any:
    shape = relax.ShapeExpr(frame.shape(node.meta["type"]))
    return frame.emit(relax.op.broadcast_to(frame.value(operand(node, "self")), shape))


def _to(frame: Frame, node: fx.Node) -> Any:
    return frame.emit(relax.op.astype(frame.value(operand(node, "self")), dtype_name(node.meta["type"])))


def _transpose(frame: Frame, node: fx.Node) -> Any:
    x = operand(node, "self")
    if x in frame.joined and swaps_heads(node):
        return frame.reshape(frame.joined[x], frame.shape(node.meta["type"]))
    strip = heads_of(frame, node)
    return _imported(frame, node) if strip is None else read_heads(frame, node, strip)


def _ones(frame: Frame, node: fx.Node) -> Any:
    kind = node.meta["type"]
    return frame.emit(relax.op.ones(relax.ShapeExpr(frame.shape(kind)), dtype_name(kind)))


def _cat(frame: Frame, node: fx.Node) -> Any:
    """Two values one after the other along an axis; TVM's own expression is fused with nothing where one is a past."""
    values, axis = filled(node, None, 0)
    if len(values) != 2 or whole(axis) % node.meta["type"].rank == node.meta["type"].rank - 1:
        return _imported(frame, node)
    axis, dtype = whole(axis) % node.meta["type"].rank, dtype_name(frame.kind_of(node))

    def body(first: Any, second: Any) -> Any:
        shape = [*first.shape[:axis], first.shape[axis] + second.shape[axis], *first.shape[axis + 1 :]]

        def value(*index: Any) -> Any:
            at = index[axis]
            later = second[(*index[:axis], at - first.shape[axis], *index[axis + 1 :])]
            return tirx.if_then_else(at < first.shape[axis], first[index].astype(dtype), later.astype(dtype))

        return te.compute(shape, value, name="cat")

    return frame.cast(frame.te(body, *frame.value(values), name="cat", fuse=True), frame.kind_of(node))


def _gather(frame: Frame, node: fx.Node) -> Any:
    """``x[…, i₀, i₁, …]`` with indices, which broadcast, for axes side by side; negative ones count from the end."""
    x, indices = filled(node)
    axes = [axis for axis, index in enumerate(indices) if index is not None]
    shape, first = frame.shape(node.meta["type"]), axes[0]
    if axes != [*range(first, axes[-1] + 1)] or any(indices[axis].meta["type"].dtype is torch.bool for axis in axes):
        raise _unknown(node)
    wide = max(indices[axis].meta["type"].rank for axis in axes)

    def body(x: Any, places: list[Any], shape: list[Any]) -> Any:
        def value(*index: Any) -> Any:
            entry = list(index[:first])
            for place, size in zip(places, x.shape[first:], strict=False):
                inner = index[first + wide - len(place.shape) : first + wide]
                at = place[tuple(_at(s, i) for s, i in zip(place.shape, inner, strict=True))]
                entry.append(tirx.if_then_else(at < i64(0), at + size, at))
            return x[(*entry, *index[first + wide :])]

        return te.compute(shape, value, name="gather")

    return frame.te(body, frame.value(x), [frame.value(indices[axis]) for axis in axes], shape, name="gather")


def _at(size: Any, index: Any) -> Any:
    return i64(0) if is_number(size, 1) else index


def _linear(frame: Frame, node: fx.Node) -> Any:
    result = convert_float_linear(frame, node)
    return _imported(frame, node) if result is None else result


def _rsub(frame: Frame, node: fx.Node) -> Any:
    """A number minus a tensor."""
    x, number, alpha = filled(node, None, None, 1)
    kind = frame.kind_of(node)
    if alpha != 1 or not isinstance(number, int | float):
        raise _unknown(node)
    dtype = dtype_name(kind)
    value = frame.in_dtype(_as_tensor(frame, frame.value(x)), dtype)
    return frame.cast(frame.emit(relax.op.subtract(relax.const(number, dtype), value)), kind)


def _pad(frame: Frame, node: fx.Node) -> Any:
    constant = filled(node, None, None, "constant")[2] == "constant"
    return convert_pad(frame, node) if constant else _imported(frame, node)


def _cumsum(frame: Frame, node: fx.Node) -> Any:
    """Sums up to each place of an axis."""
    x, axis = filled(node)[:2]
    kind: TensorType = node.meta["type"]
    axis, dtype = whole(axis) % kind.rank, dtype_name(kind)

    def body(x: Any) -> Any:
        k = te.reduce_axis((0, x.shape[axis]), name="k")

        def value(*index: Any) -> Any:
            entry = x[(*index[:axis], k, *index[axis + 1 :])].astype(dtype)
            return te.sum(tirx.Select(k.var <= index[axis], entry, tirx.const(0, dtype)), axis=k)

        return te.compute(x.shape, value, name="cumsum")

    return frame.te(body, frame.value(x), name="cumsum")


def _layer_norm(frame: Frame, node: fx.Node) -> Any:
    return _norm(frame, node, "layer", *filled(node, None, None, None, None, 1e-5)[:5])


def _rms_norm(frame: Frame, node: fx.Node) -> Any:
    x, shape, weight, eps = filled(node, None, None, None, None)
    return _norm(frame, node, "rms", x, shape, weight, None, eps)


def _norm(frame: Frame, node: fx.Node, name: str, x: Any, shape: Any, weight: Any, bias: Any, eps: Any) -> Any:
    if len(shape) != 1:
        raise BitlowerError(f"%{node.name}: norms go over the last axis, not over {len(shape)}")
    value, gain, shift = (frame.value(part) for part in (x, weight, bias))
    values = dtype_name(frame.kind_of(node))
    return convert_float_norm(frame, x.meta["type"], name, value, gain, shift, eps, values)


def _quantize(frame: Frame, node: fx.Node) -> Any:
    grid = node.meta["quantizer"].spec.grid
    chosen = _chosen(node)
    if chosen is not None and chosen[0] == grid:
        return frame.value(chosen[1])[2]
    view = QuantizerNode(node)
    x, scale, zero_point = map(frame.value, (view.value, view.scale, view.zero_point))
    return quantized(frame, x, scale, zero_point, grid)


def _chosen(node: fx.Node) -> tuple[Grid, fx.Node] | None:
    """The ``choose_qparams`` that a quantize of the same value has scale and zero point from, and its grid."""
    own = QuantizerNode(node)
    choice = operand(own.scale, "source") if own.scale.target is operator.getitem else own.scale
    pair = own.scale.args == (choice, 0) and own.zero_point.args == (choice, 1)
    chosen = pair and choice.target is ops.choose_qparams and operand(choice, "x") is own.value
    return (_grid(choice), choice) if chosen else None


def _dequantize(frame: Frame, node: fx.Node) -> Any:
    return dequantized(frame, *frame.value(node.args))


def _choose(frame: Frame, node: fx.Node) -> Any:
    """Scale and zero point, and the codes, which quantizing the same value takes."""
    x = operand(node, "x")
    codes, scale, zero = token_rounded(frame, frame.value(x), x.meta["type"], _grid(node))
    return [scale, zero, codes]


def _grid(node: fx.Node) -> Grid:
    _, bits, signed, symmetric, restricted, convention = node.args
    return Grid(whole(bits), bool(signed), bool(symmetric), bool(restricted), ScaleConvention(str(convention)))


_CONVERTERS: dict[Any, Converter] = {
    operator.getitem: _getitem,
    aten.sym_size.int: _size,
    aten.contiguous.default: _same,
    aten.clone.default: _same,
    aten.dropout.default: _same,
    aten.alias.default: _same,
    aten.reshape.default: _reshape,
    aten.view.default: _reshape,
    aten.flatten.using_ints: _reshape,
    aten.unsqueeze.default: _reshape,
    aten.squeeze.dim: _reshape,
    aten.unflatten.int: _reshape,
    aten.expand.default: _expand,
    aten.to.dtype: _to,
    aten.to.device: _to,
    aten.to.dtype_layout: _to,
    aten._to_copy.default: _to,
    aten.transpose.int: _transpose,
    aten.permute.default: _transpose,
    aten.new_ones.default: _ones,
    aten.slice.Tensor: convert_slice,
    aten.select.int: convert_select,
    aten.unbind.int: convert_unbind,
    aten.repeat.default: convert_repeat,
    aten.pad.default: _pad,
    aten.rsub.Scalar: _rsub,
    aten.where.self: convert_where,
    aten.where.ScalarOther: convert_where,
    aten.where.ScalarSelf: convert_where,
    aten.where.Scalar: convert_where,
    aten.split.Tensor: convert_parts,
    aten.split_with_sizes.default: convert_parts,
    aten.chunk.default: convert_parts,
    aten.cat.default: _cat,
    aten.index.Tensor: _gather,
    aten.cumsum.default: _cumsum,
    aten.embedding.default: convert_float_embedding,
    aten.linear.default: _linear,
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: _rms_norm,
    aten.scaled_dot_product_attention.default: convert_float_attention,
    ops.quantize: _quantize,
    ops.dequantize: _dequantize,
    ops.choose_qparams: _choose,
}
