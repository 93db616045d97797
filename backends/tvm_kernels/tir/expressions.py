"""Scalar and vector expressions that kernels share: codes, functions, ranges.

Every function takes float32 expressions of any number of lanes. Division is a true division and rounding is half to
even, as in :mod:`bitlower.ir.quantization.numerics`. The error function and the exponential are polynomials, which
every target computes alike and in vectors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from tvm import te, tirx

from bitlower.backends.tvm_kernels.spec.base import static_scales
from bitlower.ir import Grid, QuantSpec, ScaleConvention

Expr = Any
_TINY = float(np.finfo(np.float32).tiny)
_ERF_TOP = (
    *(-2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05),
    *(-7.34990630326855e-04, -2.95459980854025e-03, -1.60960333262415e-02),
)
_ERF_BOTTOM = (
    *(-1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03, -7.37332916720468e-03),
    -1.42647390514189e-02,
)
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_LOG2 = (0.693359375, -2.12194440e-4)


def const(value: float, like: Expr) -> Expr:
    """``value`` in the dtype of ``like``, on every lane."""
    return tirx.const(value, dtype_of(like))


def dtype_of(x: Expr) -> str:
    """The dtype of an expression, ``float32`` or, with lanes, ``float32x16``."""
    return str(x.dtype if isinstance(x, te.TensorSlice) else x.ty.dtype)


def clamp(x: Expr, low: float, high: float) -> Expr:
    """``x`` between the two."""
    return tirx.max(tirx.min(x, const(high, x)), const(low, x))


def codes(x: Expr, scale: Expr, zero: Expr, grid: Grid) -> Expr:
    """``clamp(round_half_even(x / scale) + zero)`` as int32."""
    ratio = tirx.nearbyint(x / scale) + zero
    return clamp(ratio, grid.quant_min, grid.quant_max).astype(with_lanes("int32", x))


def decoded(code: Expr, scale: Expr, zero: Expr) -> Expr:
    """``(code − zero) · scale``, float32."""
    return (code.astype(with_lanes("float32", code)) - zero) * scale


def operand(
    quantizer: QuantSpec | None, buffers: Mapping[str, Any], name: str, at: tuple[Expr, Expr], columns: int
) -> Expr:
    """The float32 value at a row and column (or a vector of columns) of an operand that may be codes."""
    stored = buffers[name][at]
    if quantizer is None:
        return stored.astype(with_lanes("float32", stored))
    row, column = at
    place = row if quantizer.granularity.dynamic else scale_index(quantizer, column, columns)
    return decoded(stored, buffers[f"{name}_scale"][place], buffers[f"{name}_zero"][place])


def scale_index(quantizer: QuantSpec, column: Expr, columns: int) -> Expr:
    """Which of its stored scales a static quantizer has for a column: each is for a block of them."""
    block = columns // static_scales(quantizer, columns)
    if block == columns:
        return tirx.IntImm("int64", 0)
    return column if block == 1 else column // const(block, column)


def apply(activation: str, x: Expr) -> Expr:
    """An activation function of :data:`~bitlower.backends.tvm_kernels.spec.base.ACTIVATION_FUNCTIONS`."""
    match activation:
        case "relu":
            return tirx.max(x, const(0.0, x))
        case "gelu":
            return const(0.5, x) * x * (const(1.0, x) + erf(x * const(1 / math.sqrt(2), x)))
        case "gelu-tanh":
            inner = x * (const(1.0, x) + const(0.044715, x) * x * x)
            return x / (const(1.0, x) + exp(inner * const(-2 * math.sqrt(2 / math.pi), x)))
        case "silu":
            return x / (const(1.0, x) + exp(const(0.0, x) - x))
        case "tanh":
            return const(2.0, x) / (const(1.0, x) + exp(const(-2.0, x) * x)) - const(1.0, x)
        case "sigmoid":
            return const(1.0, x) / (const(1.0, x) + exp(const(0.0, x) - x))
        case "":
            return x
    raise ValueError(f"{activation} has no expression here: see docs/operators.md")


def erf(x: Expr) -> Expr:
    """The error function: an odd rational approximation on [−4, 4] (Eigen, ``generic_fast_erf_float``)."""
    x = clamp(x, -4.0, 4.0)
    square = x * x
    return x * _polynomial(square, _ERF_TOP) / _polynomial(square, _ERF_BOTTOM)


def exp(x: Expr) -> Expr:
    """The exponential: ``2ⁿ · e^r``, |r| ≤ ln 2 / 2, by a polynomial of degree 7 (Cephes, ``expf``)."""
    x = clamp(x, -87.0, 88.0)
    n = tirx.nearbyint(x * const(math.log2(math.e), x))
    r = x - n * const(_LOG2[0], x) - n * const(_LOG2[1], x)
    value = _polynomial(r, _EXP) * r * r + r + const(1.0, x)
    whole = n.astype(with_lanes("int32", x)) + tirx.const(127, with_lanes("int32", x))
    return value * tirx.reinterpret(with_lanes("float32", x), whole << tirx.const(23, with_lanes("int32", x)))


def qparams(low: Expr, high: Expr, grid: Grid) -> tuple[Expr, Expr]:
    """Scale and zero point for values in [low, high], as :meth:`bitlower.ir.Grid.qparams`."""
    zero = const(0.0, low)
    low, high = tirx.min(low, zero), tirx.max(high, zero)
    if not grid.symmetric:
        scale = _safe((high - low) / const(grid.quant_max - grid.quant_min, low))
        return scale, clamp(const(grid.quant_min, low) - tirx.nearbyint(low / scale), grid.quant_min, grid.quant_max)
    if not grid.signed and grid.convention is ScaleConvention.QMAX:
        return _safe(high / const(grid.quant_max, low)), zero
    half, top = 1 << (grid.bits - 1), tirx.max(zero - low, high)
    match grid.convention:
        case ScaleConvention.QMAX:
            return _safe(top / const(half - 1, low)), zero
        case ScaleConvention.HALF_RANGE:
            return _safe(top / const(half, low)), zero
        case ScaleConvention.HALF_RANGE_EPS:
            wide = tirx.Select(top > zero, top + const(5e-6, low), top)
            return _safe(wide / const(half, low)), zero
        case ScaleConvention.OFFSET:
            return _safe(const(2.0, low) * top / const(2 * half - 1, low)), const(half, low)


def _safe(scale: Expr) -> Expr:
    one, tiny = const(1.0, scale), const(_TINY, scale)
    return tirx.Select(scale > const(0.0, scale), tirx.max(scale, tiny), one)


def _polynomial(x: Expr, coefficients: tuple[float, ...]) -> Expr:
    """Horner's scheme, highest power first."""
    total = const(coefficients[0], x)
    for coefficient in coefficients[1:]:
        total = total * x + const(coefficient, x)
    return total


def spread(value: Expr, like: Expr) -> Expr:
    """The scalar ``value`` on as many lanes as ``like`` has."""
    lanes = with_lanes("", like)[1:]
    return tirx.Broadcast(value, int(lanes)) if lanes else value


def with_lanes(dtype: str, like: Expr) -> str:
    """``dtype`` with as many lanes as ``like`` has."""
    _, _, lanes = dtype_of(like).partition("x")
    return f"{dtype}x{lanes}" if lanes else dtype
