"""Codes of fewer than 8 bits as nodes and constants of a graph."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import torch

from bitlower.backends.onnx_qdq.encoding.narrow import type_bits
from bitlower.backends.onnx_qdq.graph.nodes import Array
from bitlower.backends.onnx_qdq.rewrite.editor import Editor
from bitlower.ir import packing

_TYPES = {2: (ir.DataType.INT2, ir.DataType.UINT2), 4: (ir.DataType.INT4, ir.DataType.UINT4)} | {
    8: (ir.DataType.INT8, ir.DataType.UINT8)
}
"""Signed and unsigned types by bits."""


def typed_codes(editor: Editor, name: str, codes: Array, bits: int) -> ir.Value:
    """Codes as a constant of the ONNX type of ``bits``: 2, 4 or 8."""
    dtype = _TYPES[bits][codes.dtype == np.uint8]
    if bits == 8:
        return editor.lazy(name, "input first", dtype, codes.shape, lambda: codes)
    return editor.lazy(name, "input first", dtype, codes.shape, lambda: _packed(codes, bits))


def _packed(codes: Array, bits: int) -> Array:
    return packing.pack_onnx(torch.from_numpy(np.array(codes, order="C")), bits).numpy()


def byte_codes(editor: Editor, at: ir.Node, name: str, codes: Array, bits: int) -> ir.Value:
    """Codes as bytes, cast from a narrower constant where there is a type: onnxruntime casts once, at load."""
    stored = type_bits(bits, editor.opset)
    value = typed_codes(editor, name, codes, stored)
    if stored == 8:
        return value
    dtype = ir.DataType.from_numpy(codes.dtype)
    return editor.emit(at, "Cast", [value], like=value, dtype=dtype, to=int(dtype))


def unfold_rows(editor: Editor, at: ir.Node, rows: ir.Value, bits: int, count: int) -> ir.Value:
    """The unsigned codes of packed rows ``[…, bytes]``: uint8 ``[…, count]``, by ONNX's bit operators.

    Code k lies in the bits k·b to k·b + b − 1 of its row, in one byte or in two neighbours. What the second byte gives
    beyond the code is cut off with all else above b bits.
    """
    first, shift = np.divmod(np.arange(count) * bits, 8)
    codes = _shifted(editor, at, rows, bits, ("low", first), "RIGHT", shift)
    if 8 % bits:
        second = np.minimum(first + 1, packing.packed_bytes(count, bits) - 1)
        high = _shifted(editor, at, rows, bits, ("high", second), "LEFT", np.minimum(8 - shift, 7))
        codes = editor.emit(at, "BitwiseOr", [codes, high], dtype=ir.DataType.UINT8)
    mask = editor.constant(f"mask_{bits}", np.uint8((1 << bits) - 1))
    return editor.emit(at, "BitwiseAnd", [codes, mask], dtype=ir.DataType.UINT8)


def _shifted(
    editor: Editor,
    at: ir.Node,
    rows: ir.Value,
    bits: int,
    bytes_: tuple[str, Array],
    direction: str,
    shift: Sequence[int] | Array,
) -> ir.Value:
    """The byte of each code, shifted."""
    name, index = bytes_
    count = len(index)
    places = editor.constant(f"{name}_bytes_{bits}_{count}", np.asarray(index, np.int64))
    gathered = editor.emit(at, "Gather", [rows, places], dtype=ir.DataType.UINT8, axis=-1)
    amounts = editor.constant(f"{name}_shifts_{bits}_{count}", np.asarray(shift, np.uint8))
    return editor.emit(at, "BitShift", [gathered, amounts], dtype=ir.DataType.UINT8, direction=direction)
