"""From a Program's weight to the arrays a kernel reads, and back.

Stored codes are unsigned, ``u = q − base`` with ``base = −2^(b−1)`` for signed grids; 8-bit ones are signed bytes: the
code less its zero point where that is a constant, else ``u − 128``.

Panels (version 1): outputs in panels of :data:`PANEL`, the last one filled up with zeros. A panel is a sequence of
steps of 32-bit words, one word an output; byte j of the words of a step belongs to inputs ≡ j (mod 4), which is what
one instruction of AVX512-VNNI multiplies. A step holds

- 8 bits: inputs 4s … 4s + 3, a byte each;
- 4 bits: inputs 8s … 8s + 7: input 4t + j in the bits 8j + 4t … of the word;
- 2 bits: inputs 16s … 16s + 15: input 4t + j in the bits 8j + 2t …;
- 3 bits: inputs 32s … 32s + 31 in three words: the two low bits as two words of 2 bits, the high ones as a word of
  1 bit.

Scales [N, groups] and zero points lie panel by panel too, [panels, groups, 64], and so do float weights,
[panels, K, 1, 64].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from bitlower.backends.tvm_kernels.spec.linear import Layout, LinearSpec
from bitlower.ir import BitlowerError, Grid

Array = npt.NDArray[Any]
PANEL = 64
"""Outputs of a panel: four vectors of 16 words."""


def planes(bits: int) -> tuple[int, ...]:
    """The bits that codes of ``bits`` bits are cut into, low ones first; each divides a byte."""
    return (2, 1) if bits == 3 else (bits,)


def panels(spec: LinearSpec) -> int:
    """How many panels the outputs take."""
    return -(-spec.n // PANEL)


def grid_of(spec: LinearSpec) -> Grid:
    """The grid of the weight, which is codes."""
    assert spec.weight is not None, "the weight is float"
    return spec.weight.grid


def base(spec: LinearSpec) -> int:
    """The smallest code of the grid, restricted or not."""
    grid = grid_of(spec)
    return -(1 << (grid.bits - 1)) if grid.signed else 0


def fixed_zero(spec: LinearSpec) -> int:
    """The stored code that means zero, for symmetric weights."""
    return 0 if spec.bits == 8 else spec.centre - base(spec)


def pack_linear(spec: LinearSpec, codes: Array, scale: Array, zero_point: Array) -> dict[str, Array]:
    """The arguments ``weight``, ``weight_scale``, ``weight_zero`` and ``weight_sum``, as far as the spec has them.

    Args:
        spec: the kernel.
        codes: integers [N, K].
        scale: float32, of rank 0, or [N | divisor, K | divisor] (a scale a block).
        zero_point: whole numbers in the shape of ``scale``.

    Raises:
        BitlowerError: shapes do not fit the spec, or a code does not fit its bits.
    """
    if codes.shape != (spec.n, spec.k):
        raise BitlowerError(f"the spec is of a weight {[spec.n, spec.k]}, not {list(codes.shape)}")
    scales, zeros = (_spread(spec, np.asarray(part)) for part in (scale, zero_point))
    stored, stored_zeros = _stored(spec, codes, zeros)
    pack = _pack_rows if spec.layout is Layout.ROWS else _pack_panels
    arrays = {"weight": pack(spec, stored), "weight_scale": _per_group(spec, scales.astype(np.float32))}
    if spec.has_zeros:
        arrays["weight_zero"] = _per_group(spec, stored_zeros)
    if spec.x_quant is not None:
        arrays["weight_sum"] = pack_vector(spec, _sums(spec, codes, scales, zeros))
    return arrays


def pack_float(spec: LinearSpec, weight: Array) -> dict[str, Array]:
    """The argument ``weight`` of a linear whose weight [N, K] is float.

    Raises:
        BitlowerError: it has another shape.
    """
    if weight.shape != (spec.n, spec.k):
        raise BitlowerError(f"the spec is of a weight {[spec.n, spec.k]}, not {list(weight.shape)}")
    stored = weight.astype(spec.dtype)
    if spec.layout is Layout.PANELS:
        stored = _filled(stored, 0, PANEL).reshape(panels(spec), PANEL, spec.k).transpose(0, 2, 1)[:, :, None]
    return {"weight": np.ascontiguousarray(stored)}


def unpack_linear(spec: LinearSpec, arrays: Mapping[str, Array]) -> tuple[Array, Array, Array]:
    """Codes [N, K], scales and zero points [N, groups]: the inverse of :func:`pack_linear`."""
    unpack = _unpack_rows if spec.layout is Layout.ROWS else _unpack_panels
    stored = unpack(spec, arrays["weight"]).astype(np.int32)
    scales = _from_groups(spec, arrays["weight_scale"])
    zeros = np.full(scales.shape, spec.centre, np.float32)
    if spec.has_zeros:
        zeros = _from_groups(spec, arrays["weight_zero"]).astype(np.float32) + base(spec)
    return stored + _shift(spec), scales, zeros


def pack_vector(spec: LinearSpec, vector: Array) -> Array:
    """One value an output (the last axis), with zeros up to the end of the last panel where the layout has panels."""
    if spec.layout is Layout.ROWS:
        return np.ascontiguousarray(vector)
    return _filled(vector, vector.ndim - 1, PANEL)


def _spread(spec: LinearSpec, scale: Array) -> Array:
    """A scale of any shape as [N, groups]."""
    if scale.ndim == 0:
        scale = scale.reshape(1, 1)
    groups = spec.k // spec.group_size
    rows, columns = scale.shape
    if spec.n % rows or groups % columns:
        raise BitlowerError(f"scales of shape {list(scale.shape)} do not fit {spec.n} outputs, {groups} groups")
    return np.repeat(np.repeat(scale, spec.n // rows, 0), groups // columns, 1)


def _stored(spec: LinearSpec, codes: Array, zeros: Array) -> tuple[Array, Array]:
    """Codes as they are stored, uint8 (8 bits: int8), and zero points, uint8.

    Raises:
        BitlowerError: a code does not fit.
    """
    whole = codes.astype(np.int32)
    if whole.size and not 0 <= whole.min() - base(spec) <= whole.max() - base(spec) < 1 << grid_of(spec).bits:
        raise BitlowerError(f"codes from {whole.min()} to {whole.max()} do not fit a grid of {grid_of(spec)}")
    stored_zeros = (zeros.astype(np.int32) - base(spec)).astype(np.uint8)
    return (whole - _shift(spec)).astype(np.uint8 if spec.bits < 8 else np.int8), stored_zeros


def _shift(spec: LinearSpec) -> int:
    """What is added to a stored code to give the code."""
    if spec.bits < 8:
        return base(spec)
    return base(spec) + 128 if spec.has_zeros else spec.centre


def _sums(spec: LinearSpec, codes: Array, scales: Array, zeros: Array) -> Array:
    """Σ (q − z) of each output over each activation group, int32; with several weight scales Σ s·(q − z), float32."""
    starts = np.cumsum([0, *spec.x_group_sizes[:-1]])
    centred = codes - np.repeat(zeros, spec.group_size, 1).astype(np.int64)
    if not spec.grouped:
        return np.add.reduceat(centred, starts, axis=1).T.astype(np.int32)
    real = centred * np.repeat(scales.astype(np.float64), spec.group_size, 1)
    return np.add.reduceat(real, starts, axis=1).T.astype(np.float32)


def _pack_rows(spec: LinearSpec, stored: Array) -> Array:
    if spec.bits == 8:
        return np.ascontiguousarray(stored)
    bits = np.unpackbits(stored[..., None], axis=-1, bitorder="little", count=spec.bits)
    stream = _filled(bits.reshape(spec.n, -1), 1, 32)
    return np.packbits(stream, axis=1, bitorder="little").view("<i4")


def _unpack_rows(spec: LinearSpec, words: Array) -> Array:
    if spec.bits == 8:
        return words
    bits = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    codes = bits[:, : spec.k * spec.bits].reshape(spec.n, spec.k, spec.bits)
    return np.packbits(codes, axis=-1, bitorder="little")[..., 0]


def _pack_panels(spec: LinearSpec, stored: Array) -> Array:
    """Words [panels, steps, words of a step, 64], int32."""
    lanes = _filled(stored, 0, PANEL).view(np.uint8).reshape(-1, PANEL, spec.k // spec.step, spec.step)
    words, low = [], 0
    for plane in planes(spec.bits):
        part = lanes >> low & ((1 << plane) - 1)
        turns = 8 // plane
        split = part.reshape(*part.shape[:3], -1, turns, 4)
        shifts = plane * np.arange(turns, dtype=np.uint8)[:, None]
        words.append(np.bitwise_or.reduce(split << shifts, axis=-2))
        low += plane
    joined = np.concatenate(words, axis=3).transpose(0, 2, 3, 1, 4)
    return np.ascontiguousarray(joined).view("<i4")[..., 0]


def _unpack_panels(spec: LinearSpec, words: Array) -> Array:
    lanes = np.ascontiguousarray(words[..., None]).view(np.uint8).transpose(0, 3, 1, 2, 4)
    codes, at, low = np.zeros((*lanes.shape[:3], spec.step), np.uint8), 0, 0
    for plane in planes(spec.bits):
        turns, count = 8 // plane, spec.step * plane // 32
        shifts = plane * np.arange(turns, dtype=np.uint8)[:, None]
        part = lanes[..., at : at + count, None, :] >> shifts & ((1 << plane) - 1)
        codes |= part.reshape(codes.shape) << low
        at, low = at + count, low + plane
    flat = codes.reshape(-1, spec.k)[: spec.n]
    return flat.view(np.int8) if spec.bits == 8 else flat


def _per_group(spec: LinearSpec, values: Array) -> Array:
    """[N, groups] as the layout has it."""
    if spec.layout is Layout.ROWS:
        return np.ascontiguousarray(values)
    parts = _filled(values, 0, PANEL).reshape(panels(spec), PANEL, -1)
    return np.ascontiguousarray(parts.transpose(0, 2, 1))


def _from_groups(spec: LinearSpec, values: Array) -> Array:
    if spec.layout is Layout.ROWS:
        return values
    return values.transpose(0, 2, 1).reshape(-1, values.shape[1])[: spec.n]


def _filled(array: Array, axis: int, multiple: int) -> Array:
    """``array`` with zeros after ``axis`` up to the next multiple."""
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, -array.shape[axis] % multiple)
    return np.ascontiguousarray(np.pad(array, widths))
