"""The operators of a fused graph that are no kernels: shapes, masks, rotary tables, and floats between kernels.

Those whose result is decided by its type are made here; all others by TVM's own converters for PyTorch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
import tvm
from torch import fx
from tvm import relax, te, tirx
from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

from bitlower.backends.tvm_kernels._frame import i64
from bitlower.backends.tvm_kernels._relax_attention import convert_float_attention
from bitlower.backends.tvm_kernels._relax_frame import Frame, dtype_name
from bitlower.backends.tvm_kernels._relax_quantize import dequantized, is_number, quantized, token_qparams
from bitlower.backends.tvm_kernels._relax_rows import convert_float_norm
from bitlower.ir import BitlowerError, Grid, ScaleConvention, TensorType, ops

aten = torch.ops.aten
Converter = Callable[[Frame, fx.Node], Any]


def convert_operator(frame: Frame, node: fx.Node) -> Any:
    """What an operator gives.

    Raises:
        BitlowerError: there is no converter for it.
    """
    if node.target in _CONVERTERS:
        return _CONVERTERS[node.target](frame, node)
    if "type" not in node.meta:
        return _scalar(frame, node)
    return _imported(frame, node)


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
    importer = ExportedProgramImporter()
    importer.block_builder = frame.builder
    name = getattr(node.target, "__name__", str(node.target))
    if name not in importer.convert_map or node.kwargs.get("alpha", 1) != 1:
        raise _unknown(node)
    for argument in node.all_input_nodes:
        value = frame.value(argument)
        importer.env[argument] = _as_tensor(frame, value) if name.endswith((".Tensor", ".Scalar")) else value
    return frame.cast(importer.convert_map[name](node), node.meta["type"])


def _as_tensor(frame: Frame, value: Any) -> Any:
    """A dimension as a tensor of rank 0, made by a function of its own: TVM fuses none that reads a number."""
    if not tvm.ir.is_prim_expr(value):
        return value
    return frame.te(lambda size: te.compute((), lambda: size, name="size"), value, name="size", alone=True)


def _unknown(node: fx.Node) -> BitlowerError:
    return BitlowerError(f"%{node.name}: there is no converter for {node.target}", hint="export to another backend")


def _given(node: fx.Node, *defaults: Any) -> list[Any]:
    """The arguments of a node, and defaults for the last ones."""
    return [*node.args, *defaults[len(node.args) :]]


def _size(frame: Frame, node: fx.Node) -> Any:
    x, axis = _given(node)
    return frame.shape(x.meta["type"])[axis]


def _getitem(frame: Frame, node: fx.Node) -> Any:
    held, index = node.args
    return frame.value(held)[index]


def _same(frame: Frame, node: fx.Node) -> Any:
    return frame.value(node.args[0])


def _reshape(frame: Frame, node: fx.Node) -> Any:
    return frame.reshape(frame.value(node.args[0]), frame.shape(node.meta["type"]))


def _expand(frame: Frame, node: fx.Node) -> Any:
    shape = relax.ShapeExpr(frame.shape(node.meta["type"]))
    return frame.emit(relax.op.broadcast_to(frame.value(node.args[0]), shape))


def _to(frame: Frame, node: fx.Node) -> Any:
    return frame.emit(relax.op.astype(frame.value(node.args[0]), dtype_name(node.meta["type"])))


def _ones(frame: Frame, node: fx.Node) -> Any:
    kind = node.meta["type"]
    return frame.emit(relax.op.ones(relax.ShapeExpr(frame.shape(kind)), dtype_name(kind)))


def _slice(frame: Frame, node: fx.Node) -> Any:
    """``x[…, start:end:step, …]``; the type says how long the result is."""
    x, axis, start, _, step = _given(node, None, 0, None, None, 1)
    kind: TensorType = x.meta["type"]
    axis, start = _int(axis) % kind.rank, frame.value(start)
    first = i64(0) if start is None else _index(start, frame.shape(kind)[axis])
    shape = frame.shape(node.meta["type"])

    def body(x: Any, shape: list[Any], first: Any) -> Any:
        def value(*index: Any) -> Any:
            place = list(index)
            place[axis] = first + index[axis] * i64(_int(step))
            return x[tuple(place)]

        return te.compute(shape, value, name="slice")

    return frame.te(body, frame.value(x), shape, first, name="slice")


def _select(frame: Frame, node: fx.Node) -> Any:
    """``x[…, index, …]``."""
    x, axis, at = _given(node)
    kind: TensorType = x.meta["type"]
    axis = _int(axis) % kind.rank
    place = _index(frame.value(at), frame.shape(kind)[axis])
    shape = frame.shape(node.meta["type"])

    def body(x: Any, shape: list[Any], place: Any) -> Any:
        return te.compute(shape, lambda *index: x[(*index[:axis], place, *index[axis:])], name="select")

    return frame.te(body, frame.value(x), shape, place, name="select")


def _parts(frame: Frame, node: fx.Node) -> list[Any]:
    """``x`` cut along an axis: into pieces of a size, of several sizes, or into a number of equal ones."""
    x, given, axis = _given(node, None, None, node.kwargs.get("dim", 0))
    axis = _int(axis) % x.meta["type"].rank
    extent = _int(x.meta["type"].shape[axis])
    if isinstance(given, Sequence):
        ends = list(accumulate(map(_int, given)))
    else:
        size = -(-extent // _int(given)) if node.target is aten.chunk.default else _int(given)
        ends = [min(end, extent) for end in range(size, extent + size, size)]
    value = frame.value(x)
    return [
        frame.emit(relax.op.strided_slice(value, axes=[axis], begin=[start], end=[end]))
        for start, end in pairwise([0, *ends])
    ]


def _int(value: Any) -> int:
    assert isinstance(value, int), f"{value} is no number"
    return value


def _index(value: Any, size: Any) -> Any:
    """A place on an axis; negative ones count from its end."""
    if not isinstance(value, int):
        return value
    return i64(value) if value >= 0 else tirx.max(size + i64(value), i64(0))


def _gather(frame: Frame, node: fx.Node) -> Any:
    """``x[i₀, i₁, …]`` with a tensor of indices for every axis, which broadcast."""
    x, indices = _given(node)
    if None in indices or len(indices) != x.meta["type"].rank:
        return _imported(frame, node)
    shape = frame.shape(node.meta["type"])

    def body(x: Any, places: list[Any], shape: list[Any]) -> Any:
        def value(*index: Any) -> Any:
            found = []
            for place, size in zip(places, x.shape, strict=True):
                inner = index[len(index) - len(place.shape) :]
                at = place[tuple(_at(s, i) for s, i in zip(place.shape, inner, strict=True))]
                found.append(tirx.if_then_else(at < i64(0), at + size, at))
            return x[tuple(found)]

        return te.compute(shape, value, name="gather")

    return frame.te(body, frame.value(x), frame.value(indices), shape, name="gather")


def _at(size: Any, index: Any) -> Any:
    return i64(0) if is_number(size, 1) else index


def _layer_norm(frame: Frame, node: fx.Node) -> Any:
    return _norm(frame, node, "layer", *_given(node, None, None, None, None, 1e-5)[:5])


def _rms_norm(frame: Frame, node: fx.Node) -> Any:
    x, shape, weight, eps = _given(node, None, None, None, None)
    return _norm(frame, node, "rms", x, shape, weight, None, eps)


def _norm(frame: Frame, node: fx.Node, name: str, x: Any, shape: Any, weight: Any, bias: Any, eps: Any) -> Any:
    if len(shape) != 1:
        raise BitlowerError(f"%{node.name}: norms go over the last axis, not over {len(shape)}")
    value, gain, shift = (frame.value(part) for part in (x, weight, bias))
    return convert_float_norm(frame, x.meta["type"], name, value, gain, shift, eps)


def _quantize(frame: Frame, node: fx.Node) -> Any:
    x, scale, zero = (frame.value(part) for part in node.args[:3])
    return quantized(frame, x, scale, zero, node.meta["quantizer"].spec.grid)


def _dequantize(frame: Frame, node: fx.Node) -> Any:
    return dequantized(frame, *frame.value(node.args))


def _choose(frame: Frame, node: fx.Node) -> Any:
    x, bits, signed, symmetric, restricted, convention = node.args
    grid = Grid(_int(bits), bool(signed), bool(symmetric), bool(restricted), ScaleConvention(str(convention)))
    return list(token_qparams(frame, frame.value(x), grid))


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
    aten.new_ones.default: _ones,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.split.Tensor: _parts,
    aten.split_with_sizes.default: _parts,
    aten.chunk.default: _parts,
    aten.index.Tensor: _gather,
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: _rms_norm,
    aten.scaled_dot_product_attention.default: convert_float_attention,
    ops.quantize: _quantize,
    ops.dequantize: _dequantize,
    ops.choose_qparams: _choose,
}
