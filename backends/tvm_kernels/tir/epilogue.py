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
    T.buffer_store(buffers["codes"], static_codes(spec.output, buffers, y, at, spec.n), [row, at])
    if spec.keep:
        T.buffer_store(buffers["values"], kept_value(spec, buffers, y, at), [row, at])


def finish(spec: LinearSpec, buffers: Buffers, y: Expr, i: Expr, j: Expr) -> Expr:
    """Bias, function, rounding and residual of a float32 sum at row ``i``, output ``j`` (which may be a vector)."""
    if spec.bias:
        y = y + buffers["bias"][j].astype(with_lanes("float32", y))
    y = apply(spec.activation, y)
    if spec.rounded is not None:
        y = rounded(spec.rounded, buffers, "rounded", y, j, spec.n)
    if spec.residual:
        y = y + operand(spec.residual_codes, buffers, "residual", (i, j), spec.n)
    return y if spec.output is not None else y.astype(with_lanes(spec.dtype_of("values"), y))


def kept_value(spec: LinearSpec | NormSpec | ActivationSpec, buffers: Buffers, y: Expr, j: Expr) -> Expr:
    """What a static kernel with codes returns as its float result."""
    if spec.keep == "rounded" and spec.output is not None:
        columns = spec.n if isinstance(spec, LinearSpec) else spec.columns
        y = rounded(spec.output, buffers, "out", y, j, columns)
    return y.astype(with_lanes(spec.dtype_of("values"), y))


def rounded(quantizer: QuantSpec, buffers: Buffers, stem: str, y: Expr, column: Expr, columns: int) -> Expr:
    """The value of the code of ``y`` in a static quantizer."""
    at = scale_index(quantizer, column, columns)
    scale, zero = buffers[f"{stem}_scale"][at], buffers[f"{stem}_zero"][at]
    return decoded(codes(y, scale, zero, quantizer.grid), scale, zero)


def static_codes(output: QuantSpec, buffers: Buffers, y: Expr, column: Expr, columns: int) -> Expr:
    """Codes of a static quantizer, in their dtype."""
    at = scale_index(output, column, columns)
    dtype = with_lanes("int8" if output.grid.signed else "uint8", y)
    return codes(y, buffers["out_scale"][at], buffers["out_zero"][at], output.grid).astype(dtype)
