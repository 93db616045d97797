"""Linears as ``te`` stages without a schedule: what runs on every CPU where no panels fit.

The function has int64 indices throughout, takes the buffers of
:func:`~bitlower.backends.tvm_kernels.spec.arguments.arguments` in order, and bears the spec's name and family. A linear
with integer activations sums in int32 within each segment (a run of inputs with one scale on either side), and segments
in float32: ``y = Σ_a s_a · (Σ_g s_g · Σ_k q_k (u_k − z_g) − z_a · Σ_a s·(u − z))``, the last sum being the argument
``weight_sum``. With float activations the weight is dequantized first, in a stage of its own.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from tvm import te, tirx

from bitlower.backends.tvm_kernels.spec.arguments import arguments
from bitlower.backends.tvm_kernels.spec.linear import LinearSpec
from bitlower.backends.tvm_kernels.tir.epilogue import finish, kept_value, static_codes
from bitlower.backends.tvm_kernels.tir.expressions import Expr
from bitlower.backends.tvm_kernels.tir.function import Buffers, attributes, i64
from bitlower.backends.tvm_kernels.tir.weight import centred_code, dequantized, scale_of


def build(spec: LinearSpec, name: str = "") -> Any:
    """The unscheduled PrimFunc of a linear whose weight lies in rows; ``name`` if it is not the spec's."""
    m = tirx.Var("m", "int64")
    buffers: Buffers = {}
    for argument in arguments(spec):
        if not argument.written:
            shape = [m if size is None else i64(size) for size in argument.shape]
            buffers[argument.name] = te.placeholder(shape, dtype=argument.dtype, name=argument.name)
    tensors = buffers | _stages(spec, buffers, m)
    func = te.create_prim_func([tensors[argument.name] for argument in arguments(spec)], index_dtype_override="int64")
    for key, value in attributes(spec, name).items():
        func = func.with_attr(key, value)
    return func


def _stages(spec: LinearSpec, buffers: Buffers, m: Any) -> Buffers:
    """The result of a linear, ``codes`` or ``values``."""
    total = _float_product(spec, buffers, m) if spec.x_quant is None else _integer_product(spec, buffers, m)

    def epilogue(i: Expr, j: Expr) -> Expr:
        return finish(spec, buffers, total(i, j), i, j)

    shape, output = (m, i64(spec.n)), spec.output
    if output is None:
        return {"values": te.compute(shape, epilogue, name="values")}
    if not spec.keep:

        def code(i: Expr, j: Expr) -> Expr:
            return static_codes(output, buffers, epilogue(i, j), j, spec.n)

        return {"codes": te.compute(shape, code, name="codes")}
    y = te.compute(shape, epilogue, name="finished")
    return {
        "codes": te.compute(shape, lambda i, j: static_codes(output, buffers, y[i, j], j, spec.n), name="codes"),
        "values": te.compute(shape, lambda i, j: kept_value(spec, buffers, y[i, j], j), name="values"),
    }


def _float_product(spec: LinearSpec, buffers: Buffers, m: Any) -> Any:
    shape = (i64(spec.n), i64(spec.k))
    wide = te.compute(shape, lambda n, k: dequantized(spec, buffers, n, k).astype(spec.dtype), name="dequantized")
    k = te.reduce_axis((0, i64(spec.k)), name="k")
    product = te.compute(
        (m, shape[0]),
        lambda i, j: te.sum(
            buffers["x"][i, k].astype(spec.dtype).astype("float32") * wide[j, k].astype("float32"), axis=k
        ),
        name="product",
    )
    return lambda i, j: product[i, j]


def _integer_product(spec: LinearSpec, buffers: Buffers, m: Any) -> Any:
    """The dequantized sum over all segments as a function of row and output."""
    partial = _segments(spec, buffers, m)
    token = spec.x_quant is not None and spec.x_quant.granularity.dynamic
    ends = list(accumulate(spec.x_group_sizes))

    def total(i: Expr, j: Expr) -> Expr:
        y, start, at = None, 0, 0
        for part, end in enumerate(ends):
            scale, zero = (buffers[name][i if token else part] for name in ("x_scale", "x_zero"))
            segments = []
            while start < end:
                segments.append((start, partial[at]))
                start, at = start + spec.segment_sizes[at], at + 1
            term = _activation_group(spec, buffers, segments, part, i, j, zero) * scale
            y = term if y is None else y + term
        return y

    return total


def _activation_group(
    spec: LinearSpec, buffers: Buffers, segments: list[tuple[int, Any]], part: int, i: Expr, j: Expr, zero: Expr
) -> Expr:
    """One activation group's sum but for its scale: that of its segments less the share of the zero point."""
    if not spec.grouped:
        [(start, sums)] = segments
        exact = sums[i, j] - zero.astype("int32") * buffers["weight_sum"][part, j]
        return exact.astype("float32") * scale_of(spec, buffers["weight_scale"], j, i64(start))
    y = None
    for start, sums in segments:
        term = sums[i, j].astype("float32") * scale_of(spec, buffers["weight_scale"], j, i64(start))
        y = term if y is None else y + term
    return y - zero * buffers["weight_sum"][part, j]


def _segments(spec: LinearSpec, buffers: Buffers, m: Any) -> list[Any]:
    """The integer sum of each segment, int32 [M, N]."""
    starts = [0, *accumulate(spec.segment_sizes)]
    return [
        _segment(spec, buffers, m, f"segment_{at}", *bounds)
        for at, bounds in enumerate(zip(starts, spec.segment_sizes, strict=False))
    ]


def _segment(spec: LinearSpec, buffers: Buffers, m: Any, name: str, start: int, size: int) -> Any:
    k = te.reduce_axis((0, i64(size)), name="k")

    def body(i: Expr, j: Expr) -> Expr:
        code = buffers["x"][i, k + i64(start)].astype("int32")
        return te.sum(code * centred_code(spec, buffers, j, k + i64(start)), axis=k)

    return te.compute((m, i64(spec.n)), body, name=name)
