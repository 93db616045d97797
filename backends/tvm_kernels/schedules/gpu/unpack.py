"""Stored words of a weight unpacked by a thread: to codes, or to four signed bytes."""

from __future__ import annotations

from typing import Any

from tvm import tirx

from bitlower.backends.tvm_kernels.spec.linear import LinearSpec
from bitlower.backends.tvm_kernels.tir.expressions import Expr


def zero_shift(spec: LinearSpec) -> int:
    """What unsigned activation codes are lessened by, to be signed bytes."""
    return 0 if spec.x_quant is None or spec.x_quant.grid.signed else 128


def signed_bytes(spec: LinearSpec, word: Expr) -> Any:
    """Four activation codes as signed bytes."""
    return word ^ tirx.const(-0x7F7F7F80, "int32") if zero_shift(spec) else word


def code_at(spec: LinearSpec, words: Any, k: int) -> Any:
    """Stored code ``k`` of a chunk, int32."""
    bit, bits = k * spec.bits, spec.bits
    if bits == 8:
        return (words[bit // 32] << tirx.const(24 - bit % 32, "int32")) >> tirx.const(24, "int32")
    value = words[bit // 32] >> tirx.const(bit % 32, "int32")
    if bit % 32 + bits > 32:
        low = tirx.const((1 << (32 - bit % 32)) - 1, "int32")
        value = (value & low) | (words[bit // 32 + 1] << tirx.const(32 - bit % 32, "int32"))
    return value & tirx.const((1 << bits) - 1, "int32")


def bytes_at(spec: LinearSpec, words: Any, quad: int) -> Any:
    """Stored codes 4·quad … 4·quad + 3 of a chunk, a byte each."""
    if spec.bits == 8:
        return words[quad]
    if spec.bits == 3:
        parts = [code_at(spec, words, 4 * quad + i) << tirx.const(8 * i, "int32") for i in range(4)]
        return parts[0] | parts[1] | parts[2] | parts[3]
    bit = 4 * quad * spec.bits
    mask = (1 << 4 * spec.bits) - 1
    word = (words[bit // 32] >> tirx.const(bit % 32, "int32")) & tirx.const(mask, "int32")
    pairs, single = (0x00FF00FF, 0x0F0F0F0F) if spec.bits == 4 else (0x000F000F, 0x03030303)
    shift = 16 - 2 * spec.bits
    word = (word | (word << tirx.const(shift, "int32"))) & tirx.const(pairs, "int32")
    return (word | (word << tirx.const(shift // 2, "int32"))) & tirx.const(single, "int32")
