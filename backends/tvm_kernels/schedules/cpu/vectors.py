"""What CPU kernels share: vectors of 16 lanes in registers, tiles of rows, the product of bytes, the processor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tvm
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from bitlower.backends.tvm_kernels.spec.target import Target
from bitlower.backends.tvm_kernels.tir.expressions import Expr, const
from bitlower.backends.tvm_kernels.tir.function import i64

LANES = 16


def ramp(start: Expr) -> Any:
    """The indices of a vector from ``start`` on."""
    return tirx.Ramp(start, const(1, start), LANES)


def splat(value: Expr) -> Any:
    """One value on every lane."""
    return tirx.Broadcast(value, LANES)


def local(count: int, dtype: str) -> list[Any]:
    """``count`` vectors that live in registers: each is a buffer on the stack, as TVM has them below 1 KiB."""
    return [T.alloc_buffer((LANES,), dtype, scope="global") for _ in range(count)]


def get(vectors: Sequence[Any], at: int) -> Any:
    """Vector ``at`` of :func:`local` ones."""
    return vectors[at][ramp(tirx.const(0, "int32"))]


def put(vectors: Sequence[Any], at: int, value: Expr) -> None:
    """Set vector ``at`` of :func:`local` ones."""
    T.buffer_store(vectors[at], value, [ramp(tirx.const(0, "int32"))])


def fill(vectors: Sequence[Any], dtype: str) -> None:
    """Set all :func:`local` vectors to zero."""
    for at in range(len(vectors)):
        put(vectors, at, splat(tirx.const(0, dtype)))


def over_rows(m: Any, tiles: Sequence[int], body: Callable[[int, Expr], None]) -> None:
    """``body(tile, first row)`` over all rows: the largest tile as often as it fits, then each smaller one."""
    largest = tiles[-1]
    with T.serial(i64(0), m // i64(largest)) as block:
        body(largest, block * i64(largest))
    done = m // i64(largest) * i64(largest)
    for tile in reversed(tiles[:-1]):
        with T.serial(i64(0), (m - done) // i64(tile)) as block:
            body(tile, done + block * i64(tile))
        done = done + (m - done) // i64(tile) * i64(tile)


def prefetch(buffer: Any, index: Sequence[Expr]) -> None:
    """Ask memory for the line of ``buffer`` at ``index``, which may lie past its end."""
    address = tirx.address_of(tirx.BufferLoad(buffer, list(index)))
    hints = [tirx.const(value, "int32") for value in (0, 3, 1)]  # to read, to the first-level cache, data
    T.evaluate(tirx.call_llvm_intrin("", "llvm.prefetch", address, *hints))


def dot(target: Target, total: Expr, unsigned: Expr, signed: Expr) -> Any:
    """``total`` plus, on each lane, the products of four unsigned and four signed bytes.

    All are int32x16. AVX512-VNNI has an instruction for it (its operands are vectors of bytes in LLVM 20 and later);
    elsewhere it is written in shifts and products.
    """
    if target.byte_products == "vpdpbusd":
        name = tvm.target.codegen.llvm_lookup_intrinsic_id("llvm.x86.avx512.vpdpbusd.512")
        left, right = tirx.reinterpret("uint8x64", unsigned), tirx.reinterpret("int8x64", signed)
        return tirx.call_llvm_pure_intrin("int32x16", name, total, left, right)
    for byte in range(4):
        high = signed << splat(tirx.const(24 - 8 * byte, "int32"))
        left = (unsigned >> splat(tirx.const(8 * byte, "int32"))) & splat(tirx.const(255, "int32"))
        total = total + left * (high >> splat(tirx.const(24, "int32")))
    return total
