"""Rotary embeddings in Relax."""

from __future__ import annotations

from typing import Any

from tvm import te, tirx

from bitlower.backends.tvm_kernels.relax.builder import columns_of
from bitlower.backends.tvm_kernels.relax.call import Call
from bitlower.backends.tvm_kernels.relax.quantize import spread
from bitlower.backends.tvm_kernels.tir.function import i64


def convert_rotary(call: Call) -> list[Any]:
    """The results of a ``fused_rotary``."""
    half = columns_of(call.type_of("x")) // 2

    def body(x: Any, cos: Any, sin: Any) -> Any:
        def real(index: Any) -> Any:
            return x[index].astype("float32")

        def value(*index: Any) -> Any:
            *outer, at = index
            first = at < i64(half)
            place = tirx.if_then_else(first, at + half, at - half)
            other = real((*outer, place))
            turned = tirx.if_then_else(first, tirx.const(0.0, "float32") - other, other)
            return real(index) * spread(cos, x.shape, index) + turned * spread(sin, x.shape, index)

        return te.compute(x.shape, value, name="rotary")

    tables = [call.frame.value(call.arguments[name]) for name in ("cos", "sin")]
    floats = call.quantizer("x") is None
    x = call.frame.value(call.arguments["x"]) if floats else call.real("x")
    return call.finished(call.frame.te(body, x, *tables, name="rotary"))
