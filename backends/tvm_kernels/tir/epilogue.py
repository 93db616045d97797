"""The end of every linear: what is made of a float32 sum, and written."""

from __future__ import annotations

from tvm.script.ir_builder import tirx as T

from bitlower.backends.tvm_kernels.spec.linear import LinearSpec
from bitlower.backends.tvm_kernels.spec.rowwise import ActivationSpec, NormSpec
from bitlower.backends.tvm_kernels.tir.expressions import Expr, apply, codes, decoded, operand, scale_index, with_lanes
from bitlower.backends.tvm_kernels.tir.function import Buffers
from bitlower.ir import QuantSpec


def write(spec: LinearSpec, buffers: Buffers, row: Expr, at: Expr, y: Expr) -> None:
    """Write what the kernel returns of the sum, or vector of sums, at ``at``."""
    y = T.Bind(finish(spec, buffers, y, row, at))
    if spec.output is None:
        T.buffer_store(buffers["values"], y, [row, at])
        return
    T.buffer_store(buffers["codes"], static_codes(spec.output, buffers, y, at, spec.outputs), [row, at])
    if spec.keep:
        T.buffer_store(buffers["values"], kept_value(spec, buffers, y, at), [row, at])


def finish(spec: LinearSpec, given: Buffers, y: Expr, i: Expr, j: Expr) -> Expr:
    """Bias, function, rounding and residual of a float32 sum at row ``i``, output ``j`` (which may be a vector)."""
    if spec.bias:
        y = y + given["bias"][j].astype(with_lanes("float32", y))
    y = apply(spec.function, y)
    if spec.rounded is not None:
        y = rounded(spec.rounded, given, "rounded", y, j, spec.outputs)
    if spec.residual:
        y = y + operand(spec.residual_codes, given, "residual", (i, j), spec.outputs)
    return y if spec.output is not None else y.astype(with_lanes(spec.dtype_of("values"), y))


def kept_value(spec: LinearSpec | NormSpec | ActivationSpec, given: Buffers, y: Expr, j: Expr) -> Expr:
    """What a static kernel with codes returns as its float result."""
    if spec.keep == "rounded" and spec.output is not None:
        columns = spec.outputs if isinstance(spec, LinearSpec) else spec.columns
        y = rounded(spec.output, given, "out", y, j, columns)
    return y.astype(with_lanes(spec.dtype_of("values"), y))


def rounded(quantizer: QuantSpec, given: Buffers, stem: str, y: Expr, column: Expr, columns: int) -> Expr:
    """The value of the code of ``y`` in a static quantizer."""
    at = scale_index(quantizer, column, columns)
    scale, zero = given[f"{stem}_scale"][at], given[f"{stem}_zero"][at]
    return decoded(codes(y, scale, zero, quantizer.grid), scale, zero)


def static_codes(output: QuantSpec, given: Buffers, y: Expr, column: Expr, columns: int) -> Expr:
    """Codes of a static quantizer, in their dtype."""
    at = scale_index(output, column, columns)
    dtype = with_lanes("int8" if output.grid.signed else "uint8", y)
    return codes(y, given["out_scale"][at], given["out_zero"][at], output.grid).astype(dtype)
