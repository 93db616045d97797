"""Kernels over whole rows as ``te`` stages: norms and activation functions, with what is rounded after them."""

from __future__ import annotations

from typing import Any

from tvm import te, tirx

from bitlower.backends.tvm_kernels._build_linear import kept_value, static_codes
from bitlower.backends.tvm_kernels._expressions import Expr, apply, codes, const, decoded, operand, qparams
from bitlower.backends.tvm_kernels._spec import ActivationSpec, NormSpec
from bitlower.ir import QuantSpec

Tensors = dict[str, Any]


def norm_stages(spec: NormSpec, given: Tensors, rows: Any) -> Tensors:
    """Codes, their scales, values and the sum, as far as the spec has them."""
    shape = (rows, _i64(spec.columns))
    size = float(spec.columns)
    results: Tensors = {}

    def added(i: Expr, j: Expr) -> Expr:
        x = operand(spec.x_codes, given, "x", (i, j), spec.columns)
        return x + operand(spec.residual_codes, given, "residual", (i, j), spec.columns) if spec.residual else x

    total = te.compute(shape, added, name="total")
    if spec.keep_sum:
        results["sum"] = te.compute(shape, lambda i, j: total[i, j].astype(spec.dtype_of("sum")), name="sum")
    centred = _less_mean(spec, total, rows) if spec.kind == "layer" else total
    k = te.reduce_axis((0, _i64(spec.columns)), name="k")
    square = te.compute((rows,), lambda i: te.sum(centred[i, k] * centred[i, k], axis=k), name="square")

    def normal(i: Expr, j: Expr) -> Expr:
        mean = square[i] / tirx.const(size, "float32")
        y = centred[i, j] / tirx.sqrt(mean + tirx.const(spec.epsilon, "float32")) * given["weight"][j].astype("float32")
        return y + given["bias"][j].astype("float32") if spec.bias else y

    y = te.compute(shape, normal, name="normal")
    return results | result_stages(spec, given, y, rows)


def activation_stages(spec: ActivationSpec, given: Tensors, rows: Any) -> Tensors:
    """What an activation returns: values, codes, and their scales if these are dynamic."""
    width = spec.columns * (2 if spec.gate == "halves" else 1)

    def read(i: Expr, j: Expr) -> Expr:
        x = operand(spec.x_codes, given, "x", (i, j), width)
        return x + given["bias"][j].astype("float32") if spec.bias else x

    def value(i: Expr, j: Expr) -> Expr:
        y = apply(spec.function, read(i, j))
        if spec.gate == "separate":
            y = y * operand(spec.gate_codes, given, "gate", (i, j), spec.columns)
        elif spec.gate == "halves":
            y = y * read(i, j + _i64(spec.columns))
        return y + operand(spec.residual_codes, given, "residual", (i, j), spec.columns) if spec.residual else y

    y = te.compute((rows, _i64(spec.columns)), value, name="activated")
    return result_stages(spec, given, y, rows)


def result_stages(spec: NormSpec | ActivationSpec, given: Tensors, y: Any, rows: Any) -> Tensors:
    """What a kernel returns of the float32 rows ``y``: values, codes, and the scales of a dynamic quantizer."""
    shape, output, columns = (rows, _i64(spec.columns)), spec.output, spec.columns
    if output is None:
        return {"values": te.compute(shape, lambda i, j: y[i, j].astype(spec.dtype_of("values")), name="values")}
    if output.granularity.dynamic:
        return _dynamic_stages(spec, output, y, rows)
    found = {"codes": te.compute(shape, lambda i, j: static_codes(output, given, y[i, j], j, columns), name="codes")}
    if spec.keep:
        found["values"] = te.compute(shape, lambda i, j: kept_value(spec, given, y[i, j], j), name="values")
    return found


def _dynamic_stages(spec: NormSpec | ActivationSpec, output: QuantSpec, y: Any, rows: Any) -> Tensors:
    shape = (rows, _i64(spec.columns))
    low, high = (_extreme(y, rows, spec.columns, name) for name in ("low", "high"))
    scale = te.compute((rows,), lambda i: qparams(low[i], high[i], output.grid)[0], name="out_scale")
    zero = te.compute((rows,), lambda i: qparams(low[i], high[i], output.grid)[1], name="out_zero")
    dtype = "int8" if output.grid.signed else "uint8"

    def code(i: Expr, j: Expr) -> Expr:
        return codes(y[i, j], scale[i], zero[i], output.grid).astype(dtype)

    def kept(i: Expr, j: Expr) -> Expr:
        value = decoded(code(i, j), scale[i], zero[i]) if spec.keep == "rounded" else y[i, j]
        return value.astype(spec.dtype_of("values"))

    found = {"codes": te.compute(shape, code, name="codes"), "out_scale": scale, "out_zero": zero}
    return found | ({"values": te.compute(shape, kept, name="values")} if spec.keep else {})


def _less_mean(spec: NormSpec, total: Any, rows: Any) -> Any:
    k = te.reduce_axis((0, _i64(spec.columns)), name="k")
    added = te.compute((rows,), lambda i: te.sum(total[i, k], axis=k), name="added")

    def centred(i: Expr, j: Expr) -> Expr:
        y = total[i, j]
        return y - added[i] / const(float(spec.columns), y)

    return te.compute((rows, _i64(spec.columns)), centred, name="centred")


def _extreme(y: Any, rows: Any, columns: int, name: str) -> Any:
    """Minimum or maximum of each row."""
    k = te.reduce_axis((0, _i64(columns)), name="k")
    reduce = te.min if name == "low" else te.max
    return te.compute((rows,), lambda i: reduce(y[i, k], axis=k), name=name)


def _i64(value: int) -> Any:
    return tirx.IntImm("int64", value)
