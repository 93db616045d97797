"""What a kernel must compute, in float64: written from the semantics of the Program, and not from the kernels.

``q = clamp(round_half_even(x / s) + z)`` and ``x̂ = (q − z)·s`` (:mod:`bitlower.ir.quantization.numerics`); ranges of
dynamic quantizers as :meth:`bitlower.ir.Grid.qparams` has them, in float32 as there. A result with codes is given
before the rounding, for a float32 kernel may round a value on the other side of a tie.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import erf, expit

from bitlower.backends.tvm_kernels.spec.linear import LinearSpec
from bitlower.backends.tvm_kernels.spec.rowwise import ActivationSpec, NormSpec
from bitlower.ir import QuantSpec

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Operand:
    """Codes with their scales and zero points.

    Args:
        codes: integers [rows, columns].
        scale: rank 0, or [rows | divisor, columns | divisor]: one for a block.
        zero_point: whole numbers in the shape of ``scale``.
    """

    codes: Array
    scale: Array
    zero_point: Array

    def values(self) -> Array:
        """The real values, float64 [rows, columns]."""
        shape = self.codes.shape
        return np.asarray((self.codes - _spread(self.zero_point, shape)) * _spread(self.scale, shape))


Value = Operand | Array


def linear(
    spec: LinearSpec, x: Value, weight: Value, *, bias: Array | None = None, residual: Value | None = None
) -> Array:
    """``function(x̂ · Ŵᵀ + bias) + residual``, float64 [rows, outputs]."""
    y: Array = _real(x) @ _real(weight).T
    if bias is not None:
        y = y + bias
    y = apply(spec.activation, y)
    return y if residual is None else y + _real(residual)


def norm(spec: NormSpec, x: Value, weight: Array, *, bias: Array | None = None, residual: Value | None = None) -> Array:
    """The normalized rows, float64 [rows, columns]."""
    y = _real(x) + (0 if residual is None else _real(residual))
    if spec.kind == "layer":
        y = y - y.mean(-1, keepdims=True)
    y = y / np.sqrt((y * y).mean(-1, keepdims=True) + spec.epsilon) * weight
    return np.asarray(y if bias is None else y + bias)


def activation(
    spec: ActivationSpec,
    x: Value,
    *,
    gate: Value | None = None,
    bias: Array | None = None,
    residual: Value | None = None,
) -> Array:
    """``function(x + bias) · gate + residual``, float64 [rows, columns]."""
    y = _real(x) + (0 if bias is None else bias)
    if spec.gate == "halves":
        y = apply(spec.activation, y[:, : spec.columns]) * y[:, spec.columns :]
    else:
        y = apply(spec.activation, y) * (1 if gate is None else _real(gate))
    return y if residual is None else y + _real(residual)


def fake(quantizer: QuantSpec, y: Array, scale: Array, zero_point: Array) -> Array:
    """``y`` rounded to a grid: ``(q − z)·s``."""
    codes = np.clip(np.round(ratio(y, scale, zero_point)), quantizer.grid.quant_min, quantizer.grid.quant_max)
    return Operand(codes, scale, zero_point).values()


def _real(x: Value) -> Array:
    return x.values() if isinstance(x, Operand) else x.astype(np.float64)


def apply(function: str, y: Array) -> Array:
    """An activation function of :data:`~bitlower.backends.tvm_kernels.spec.base.ACTIVATION_FUNCTIONS`."""
    match function:
        case "relu":
            return np.maximum(y, 0)
        case "gelu":
            return np.asarray(0.5 * y * (1 + erf(y / np.sqrt(2))))
        case "gelu-tanh":
            return np.asarray(0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3))))
        case "silu":
            return np.asarray(y * expit(y))
        case "tanh":
            return np.asarray(np.tanh(y))
        case "sigmoid":
            return np.asarray(expit(y))
        case "":
            return y
    raise ValueError(f"{function} has no expression here: see docs/operators.md")


def ratio(y: Array, scale: Array, zero_point: Array) -> Array:
    """The codes of ``y`` before they are rounded and clamped: ``y / s + z``."""
    return np.asarray(y / _spread(scale, y.shape) + _spread(zero_point, y.shape))


def row_ranges(spec: QuantSpec, y: Array) -> tuple[Array, Array]:
    """Scale and zero point of each row by its minimum and maximum, float32 [rows, 1]."""
    low, high = (torch.from_numpy(np.asarray(end)) for end in (y.min(-1, keepdims=True), y.max(-1, keepdims=True)))
    scale, zero = spec.grid.qparams(low, high)
    return scale.numpy(), zero.numpy()


def _spread(part: Array, shape: tuple[int, ...]) -> Array:
    part = np.asarray(part, np.float64)
    if part.ndim == 0:
        return part
    for axis, size in enumerate(shape):
        part = np.repeat(part, size // part.shape[axis], axis)
    return part
