"""The real weights of a kernel, from the words of a weight in rows."""

from __future__ import annotations

from typing import Any

from tvm import tirx

from bitlower.backends.tvm_kernels.spec.linear import LinearSpec
from bitlower.backends.tvm_kernels.spec.packing import fixed_zero
from bitlower.backends.tvm_kernels.tir.expressions import Expr
from bitlower.backends.tvm_kernels.tir.function import Buffers, i64


def stored_code(spec: LinearSpec, weight: Any, n: Expr, k: Expr) -> Expr:
    """The stored code of output ``n`` and input ``k`` of a weight in rows, int32."""
    if spec.bits == 8:
        return weight[n, k].astype("int32")
    mask = tirx.const((1 << spec.bits) - 1, "int32")
    bit = k * i64(spec.bits)
    low = weight[n, bit // i64(32)] >> (bit % i64(32)).astype("int32")
    if 32 % spec.bits == 0:
        return low & mask
    last = weight.shape[1] - 1
    following = weight[n, tirx.min(bit // i64(32) + 1, last)].astype("uint32")
    both = following.astype("uint64") << tirx.const(32, "uint64")
    both = both | weight[n, bit // i64(32)].astype("uint32").astype("uint64")
    return (both >> (bit % i64(32)).astype("uint64")).astype("int32") & mask


def centred_code(spec: LinearSpec, buffers: Buffers, n: Expr, k: Expr) -> Expr:
    """The stored code less its zero point, int32."""
    code = stored_code(spec, buffers["weight"], n, k)
    if not spec.has_zeros:
        return code - tirx.const(fixed_zero(spec), "int32")
    zero = scale_of(spec, buffers["weight_zero"], n, k).astype("int32")
    return code - zero + tirx.const(128 if spec.bits == 8 else 0, "int32")


def dequantized(spec: LinearSpec, buffers: Buffers, n: Expr, k: Expr) -> Expr:
    """The real weight, float32."""
    if spec.weight is None:
        return buffers["weight"][n, k].astype("float32")
    scale = scale_of(spec, buffers["weight_scale"], n, k)
    return centred_code(spec, buffers, n, k).astype("float32") * scale


def scale_of(spec: LinearSpec, values: Any, n: Expr, k: Expr) -> Expr:
    """The scale, or zero point, of output ``n`` and input ``k``."""
    return values[n, k // i64(spec.group_size)]
