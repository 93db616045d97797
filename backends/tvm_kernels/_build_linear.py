"""Linears and embedding tables as ``te`` stages.

A linear with integer activations sums in int32 within each segment (a run of inputs with one scale on either side), and
segments in float32: ``y = Σ_a s_a · (Σ_g s_g · Σ_k q_k (u_k − z_g) − z_a · Σ_a s·(u − z))``, the last sum being the
argument ``weight_sum``. With float activations the weight is dequantized first, in a stage of its own.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from tvm import te, tirx

from bitlower.backends.tvm_kernels._expressions import Expr, apply, codes, decoded, operand, scale_index, with_lanes
from bitlower.backends.tvm_kernels._packing import PANEL, fixed_zero, planes
from bitlower.backends.tvm_kernels._spec import ActivationSpec, EmbeddingSpec, Layout, LinearSpec, NormSpec
from bitlower.ir import QuantSpec

Tensors = dict[str, Any]


def linear_stages(spec: LinearSpec, given: Tensors, rows: Any) -> Tensors:
    """The result of a linear, ``codes`` or ``values``."""
    total = _float_product(spec, given, rows) if spec.activation is None else _integer_product(spec, given, rows)

    def epilogue(i: Expr, j: Expr) -> Expr:
        return finish(spec, given, total(i, j), i, j)

    shape, output = (rows, _i64(spec.outputs)), spec.output
    if output is None:
        return {"values": te.compute(shape, epilogue, name="values")}
    if not spec.keep:

        def code(i: Expr, j: Expr) -> Expr:
            return static_codes(output, given, epilogue(i, j), j, spec.outputs)

        return {"codes": te.compute(shape, code, name="codes")}
    y = te.compute(shape, epilogue, name="finished")
    return {
        "codes": te.compute(shape, lambda i, j: static_codes(output, given, y[i, j], j, spec.outputs), name="codes"),
        "values": te.compute(shape, lambda i, j: kept_value(spec, given, y[i, j], j), name="values"),
    }


def finish(spec: LinearSpec, given: Tensors, y: Expr, i: Expr, j: Expr) -> Expr:
    """Bias, function, rounding and residual of a float32 sum at row ``i``, output ``j`` (which may be a vector)."""
    if spec.bias:
        y = y + given["bias"][j].astype(with_lanes("float32", y))
    y = apply(spec.function, y)
    if spec.rounded is not None:
        y = rounded(spec.rounded, given, "rounded", y, j, spec.outputs)
    if spec.residual:
        y = y + operand(spec.residual_codes, given, "residual", (i, j), spec.outputs)
    return y if spec.output is not None else y.astype(with_lanes(spec.dtype_of("values"), y))


def kept_value(spec: LinearSpec | NormSpec | ActivationSpec, given: Tensors, y: Expr, j: Expr) -> Expr:
    """What a static kernel with codes returns as its float result."""
    if spec.keep == "rounded" and spec.output is not None:
        columns = spec.outputs if isinstance(spec, LinearSpec) else spec.columns
        y = rounded(spec.output, given, "out", y, j, columns)
    return y.astype(with_lanes(spec.dtype_of("values"), y))


def rounded(quantizer: QuantSpec, given: Tensors, stem: str, y: Expr, column: Expr, columns: int) -> Expr:
    """The value of the code of ``y`` in a static quantizer."""
    at = scale_index(quantizer, column, columns)
    scale, zero = given[f"{stem}_scale"][at], given[f"{stem}_zero"][at]
    return decoded(codes(y, scale, zero, quantizer.grid), scale, zero)


def static_codes(output: QuantSpec, given: Tensors, y: Expr, column: Expr, columns: int) -> Expr:
    """Codes of a static quantizer, in their dtype."""
    at = scale_index(output, column, columns)
    dtype = with_lanes("int8" if output.grid.signed else "uint8", y)
    return codes(y, given["out_scale"][at], given["out_zero"][at], output.grid).astype(dtype)


def stored_code(spec: LinearSpec, weight: Any, n: Expr, k: Expr) -> Expr:
    """The stored code of output ``n`` and input ``k``, int32."""
    if spec.layout is Layout.ROWS:
        return _row_code(spec, weight, n, k)
    panel, lane = n // _i64(PANEL), n % _i64(PANEL)
    step, inner = k // _i64(spec.step), k % _i64(spec.step)
    value, word, low = tirx.const(0, "int32"), 0, 0
    for plane in planes(spec.width):
        span = 32 // plane
        bit = (inner % _i64(4)) * _i64(8) + (inner // _i64(4) % _i64(8 // plane)) * _i64(plane)
        bits = weight[panel, step, _i64(word) + inner // _i64(span), lane] >> bit.astype("int32")
        value = value | (bits & tirx.const((1 << plane) - 1, "int32")) << tirx.const(low, "int32")
        word, low = word + spec.step // span, low + plane
    return value.astype("int8").astype("int32") if spec.width == 8 else value


def _row_code(spec: LinearSpec, weight: Any, n: Expr, k: Expr) -> Expr:
    if spec.width == 8:
        return weight[n, k].astype("int32")
    mask = tirx.const((1 << spec.width) - 1, "int32")
    bit = k * _i64(spec.width)
    low = weight[n, bit // _i64(32)] >> (bit % _i64(32)).astype("int32")
    if 32 % spec.width == 0:
        return low & mask
    last = weight.shape[1] - 1
    following = weight[n, tirx.min(bit // _i64(32) + 1, last)].astype("uint32")
    both = following.astype("uint64") << tirx.const(32, "uint64")
    both = both | weight[n, bit // _i64(32)].astype("uint32").astype("uint64")
    return (both >> (bit % _i64(32)).astype("uint64")).astype("int32") & mask


def centred_code(spec: LinearSpec, given: Tensors, n: Expr, k: Expr) -> Expr:
    """The stored code less its zero point, int32."""
    code = stored_code(spec, given["weight"], n, k)
    if not spec.has_zeros:
        return code - tirx.const(fixed_zero(spec), "int32")
    zero = _by_group(spec, given["weight_zero"], n, k).astype("int32")
    return code - zero + tirx.const(128 if spec.width == 8 else 0, "int32")


def dequantized(spec: LinearSpec, given: Tensors, n: Expr, k: Expr) -> Expr:
    """The real weight, float32."""
    if spec.weight is None:
        index = (n, k) if spec.layout is Layout.ROWS else (n // _i64(PANEL), k, _i64(0), n % _i64(PANEL))
        return given["weight"][index].astype("float32")
    scale = _by_group(spec, given["weight_scale"], n, k)
    return centred_code(spec, given, n, k).astype("float32") * scale


def _by_group(spec: LinearSpec, values: Any, n: Expr, k: Expr) -> Expr:
    group = k // _i64(spec.group)
    if spec.layout is Layout.ROWS:
        return values[n, group]
    return values[n // _i64(PANEL), group, n % _i64(PANEL)]


def _float_product(spec: LinearSpec, given: Tensors, rows: Any) -> Any:
    shape = (_i64(spec.outputs), _i64(spec.inputs))
    wide = te.compute(shape, lambda n, k: dequantized(spec, given, n, k).astype(spec.dtype), name="dequantized")
    k = te.reduce_axis((0, _i64(spec.inputs)), name="k")
    product = te.compute(
        (rows, shape[0]),
        lambda i, j: te.sum(
            given["x"][i, k].astype(spec.dtype).astype("float32") * wide[j, k].astype("float32"), axis=k
        ),
        name="product",
    )
    return lambda i, j: product[i, j]


def _integer_product(spec: LinearSpec, given: Tensors, rows: Any) -> Any:
    """The dequantized sum over all segments as a function of row and output."""
    partial = _segments(spec, given, rows)
    token = spec.activation is not None and spec.activation.granularity.dynamic
    ends = list(accumulate(spec.activation_sizes))

    def total(i: Expr, j: Expr) -> Expr:
        y, start, at = None, 0, 0
        for part, end in enumerate(ends):
            scale, zero = (given[name][i if token else part] for name in ("x_scale", "x_zero"))
            held = []
            while start < end:
                held.append((start, partial[at]))
                start, at = start + spec.segment_sizes[at], at + 1
            term = _activation_group(spec, given, held, part, i, j, zero) * scale
            y = term if y is None else y + term
        return y

    return total


def _activation_group(
    spec: LinearSpec, given: Tensors, held: list[tuple[int, Any]], part: int, i: Expr, j: Expr, zero: Expr
) -> Expr:
    """One activation group's sum but for its scale: that of its segments less the share of the zero point."""
    if not spec.grouped:
        [(start, sums)] = held
        exact = sums[i, j] - zero.astype("int32") * given["weight_sum"][part, j]
        return exact.astype("float32") * _by_group(spec, given["weight_scale"], j, _i64(start))
    y = None
    for start, sums in held:
        term = sums[i, j].astype("float32") * _by_group(spec, given["weight_scale"], j, _i64(start))
        y = term if y is None else y + term
    return y - zero * given["weight_sum"][part, j]


def _segments(spec: LinearSpec, given: Tensors, rows: Any) -> list[Any]:
    """The integer sum of each segment, int32 [rows, outputs]."""
    starts = [0, *accumulate(spec.segment_sizes)]
    return [
        _segment(spec, given, rows, f"segment_{at}", *bounds)
        for at, bounds in enumerate(zip(starts, spec.segment_sizes, strict=False))
    ]


def _segment(spec: LinearSpec, given: Tensors, rows: Any, name: str, start: int, size: int) -> Any:
    k = te.reduce_axis((0, _i64(size)), name="k")

    def body(i: Expr, j: Expr) -> Expr:
        code = given["x"][i, k + _i64(start)].astype("int32")
        return te.sum(code * centred_code(spec, given, j, k + _i64(start)), axis=k)

    return te.compute((rows, _i64(spec.outputs)), body, name=name)


def embedding_stages(spec: EmbeddingSpec, given: Tensors, rows: Any) -> Tensors:
    """The dequantized rows of a table."""
    table = spec.table()

    def row(i: Expr, j: Expr) -> Expr:
        return dequantized(table, given, given["ids"][i], j).astype(spec.dtype)

    return {"values": te.compute((rows, _i64(spec.columns)), row, name="values")}


def _i64(value: int) -> Any:
    return tirx.IntImm("int64", value)
