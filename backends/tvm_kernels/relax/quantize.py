"""Quantize and dequantize as ``te`` expressions, in any granularity: what is left outside kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import te, tirx

from bitlower.backends.tvm_kernels.relax.builder import Frame, product
from bitlower.backends.tvm_kernels.spec.rowwise import ActivationSpec
from bitlower.backends.tvm_kernels.tir import expressions as expressions
from bitlower.backends.tvm_kernels.tir.function import i64
from bitlower.ir import Granularity, Grid, QuantSpec, TensorType

Expr = Any


def spread(part: Any, shape: Sequence[Any], index: Sequence[Any]) -> Expr:
    """The entry of a scale that belongs to ``index`` of a tensor of ``shape``."""
    places = []
    for size, count, at in zip(shape, part.shape, index, strict=True) if part.shape else ():
        if is_number(count, 1):
            places.append(i64(0))
        elif isinstance(size, tirx.IntImm) and isinstance(count, tirx.IntImm) and size.value != count.value:
            places.append(at // i64(size.value // count.value))
        else:
            places.append(at)
    return part[tuple(places)] if places else part()


def is_number(size: Any, value: int) -> bool:
    """Whether a dimension is that number."""
    return isinstance(size, tirx.IntImm) and size.value == value


def quantized(frame: Frame, x: Any, scale: Any, zero: Any, grid: Grid) -> Any:
    """The codes of float32 values, in the dtype of the grid."""
    dtype = str(grid.dtype).removeprefix("torch.")

    def body(x: Any, scale: Any, zero: Any) -> Any:
        def code(*index: Expr) -> Expr:
            near, centre = (spread(part, x.shape, index) for part in (scale, zero))
            return expressions.codes(x[index], near, centre, grid).astype(dtype)

        return te.compute(x.shape, code, name="codes")

    return frame.te(body, x, scale, zero, name="quantize")


def dequantized(frame: Frame, codes: Any, scale: Any, zero: Any) -> Any:
    """The float32 values of codes."""

    def body(codes: Any, scale: Any, zero: Any) -> Any:
        def value(*index: Expr) -> Expr:
            parts = (spread(part, codes.shape, index) for part in (scale, zero))
            return expressions.decoded(codes[index], *parts)

        return te.compute(codes.shape, value, name="values")

    return frame.te(body, codes, scale, zero, name="dequantize")


def token_rounded(frame: Frame, x: Any, kind: TensorType, grid: Grid) -> tuple[Any, Any, Any]:
    """Codes, and scale and zero point of each token, float32 ``[…, 1]``: one kernel for grids of 8 bits."""
    columns = kind.shape[-1]
    if not isinstance(columns, int) or grid.bits > 8:
        scale, zero = _token_qparams(frame, x, grid)
        return quantized(frame, x, scale, zero, grid), scale, zero
    quantizer = QuantSpec(grid, Granularity.per_token())
    spec = ActivationSpec(target=frame.target, columns=columns, output=quantizer)
    *outer, _ = shape = frame.shape(kind)
    results = frame.call(spec, {"x": frame.rows(x, kind)}, product(outer))
    parts = [frame.reshape(results[name], [*outer, frame.dim(1)]) for name in ("out_scale", "out_zero")]
    return frame.reshape(results["codes"], shape), *parts


def _token_qparams(frame: Frame, x: Any, grid: Grid) -> tuple[Any, Any]:

    def body(x: Any, which: int) -> Any:
        shape = (*x.shape[:-1], i64(1))
        ends = [_extreme(x, reduce, name) for reduce, name in ((te.min, "low"), (te.max, "high"))]

        def value(*index: Expr) -> Expr:
            low, high = (end[index[:-1]] for end in ends)
            return expressions.qparams(low, high, grid)[which]

        return te.compute(shape, value, name=("scale", "zero")[which])

    scale = frame.te(lambda x: body(x, 0), x, name="token_scale")
    return scale, frame.te(lambda x: body(x, 1), x, name="token_zero")


def _extreme(x: Any, reduce: Any, name: str) -> Any:
    k = te.reduce_axis((0, x.shape[-1]), name="k")
    return te.compute(x.shape[:-1], lambda *index: reduce(x[(*index, k)], axis=k), name=name)


def activated(frame: Frame, activation: str, x: Any) -> Any:
    """An activation function as an expression of its own."""

    def body(x: Any) -> Any:
        return te.compute(x.shape, lambda *index: expressions.apply(activation, x[index]), name="activated")

    return frame.te(body, x, name=activation.replace("-", "_"))
