"""Stored words of panels unpacked in vectors: to signed bytes, or to float32 codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tvm
from tvm import tirx

from bitlower.backends.tvm_kernels.schedules.cpu.vectors import splat
from bitlower.backends.tvm_kernels.spec.linear import LinearSpec
from bitlower.backends.tvm_kernels.spec.packing import fixed_zero, planes
from bitlower.backends.tvm_kernels.tir.expressions import Expr

_EACH_BYTE = 0x01010101


def centred_bytes(spec: LinearSpec, words: Sequence[Expr], zero: Expr) -> list[Any]:
    """The codes of a step less their zero points: int32x16 of four signed bytes for each four inputs.

    Args:
        spec: the linear.
        words: the words of the step, int32x16.
        zero: :func:`zero_bytes`.
    """
    if spec.bits == 8:
        return list(words)
    return [_bytewise_less(word, zero) for word in code_bytes(spec, words)]


def code_bytes(spec: LinearSpec, words: Sequence[Expr]) -> list[Any]:
    """The stored codes of a step of fewer than 8 bits: int32x16 of four bytes for each four inputs."""
    turns = spec.step // 4
    unpacked: list[Any] = [None] * turns
    at = low = 0
    for plane in planes(spec.bits):
        each = 8 // plane
        for turn in range(turns):
            part = _shifted(words[at + turn // each], plane * (turn % each) - low)
            part = part & splat(tirx.const(((1 << plane) - 1 << low) * _EACH_BYTE, "int32"))
            unpacked[turn] = part if unpacked[turn] is None else unpacked[turn] | part
        at, low = at + turns // each, low + plane
    return unpacked


def zero_bytes(spec: LinearSpec, zero: Expr | None) -> Any:
    """The zero points (uint8x16, or the constant of the grid) on each byte of each lane."""
    if zero is None:
        return splat(tirx.const(fixed_zero(spec) * _EACH_BYTE, "int32"))
    return zero.astype("int32x16") * splat(tirx.const(_EACH_BYTE, "int32"))


def float_codes(spec: LinearSpec, words: Sequence[Expr], turn: int) -> Any:
    """The stored codes of input ``turn`` of a step, less their zero point where that is a constant, float32x16."""
    if spec.bits == 8:
        return (_shifted(words[0], 8 * turn - 24) >> splat(tirx.const(24, "int32"))).astype("float32x16")
    total, at, low = None, 0, 0
    for plane in planes(spec.bits):
        span = 32 // plane
        inner = turn % span
        part = _shifted(words[at + turn // span], inner % 4 * 8 + inner // 4 * plane - low)
        if spec.bits not in (2, 4) or not _looks_up(spec):
            part = part & splat(tirx.const((1 << plane) - 1 << low, "int32"))
        total = part if total is None else total | part
        at, low = at + spec.step // span, low + plane
    return _as_float(spec, total)


def _looks_up(spec: LinearSpec) -> bool:
    """Whether vectors are looked up in a register by another."""
    return "avx512f" in spec.target.features


def _as_float(spec: LinearSpec, code: Any) -> Any:
    """Codes 0 … 15 as float32.

    AVX512 looks them up in one register by their lowest four bits; those above a code are not looked at.
    """
    zero = 0 if spec.has_zeros else fixed_zero(spec)
    if not _looks_up(spec):
        return (code - splat(tirx.const(zero, "int32"))).astype("float32x16")
    entries = tirx.Ramp(tirx.const(0, "int32"), tirx.const(1, "int32"), 16)
    codes = entries & splat(tirx.const((1 << spec.bits) - 1, "int32"))
    table = (codes - splat(tirx.const(zero, "int32"))).astype("float32x16")
    name = tvm.target.codegen.llvm_lookup_intrinsic_id("llvm.x86.avx512.permvar.sf.512")
    return tirx.call_llvm_pure_intrin("float32x16", name, table, code)


def _shifted(word: Expr, count: int) -> Any:
    """``word`` to the right by ``count`` bits; to the left if that is negative."""
    if count == 0:
        return word
    shift = splat(tirx.const(abs(count), "int32"))
    return word >> shift if count > 0 else word << shift


def _bytewise_less(word: Expr, zero: Expr) -> Any:
    left, right = (tirx.reinterpret("int8x64", part) for part in (word, zero))
    return tirx.reinterpret("int32x16", left - right)
