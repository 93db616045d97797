"""Codes of fewer than 8 bits in an ONNX file: ONNX's own 2- and 4-bit types, and rows of packed bytes for tables."""

from __future__ import annotations

import numpy as np
import torch

from bitlower.backends.onnx_qdq.graph.nodes import Array
from bitlower.ir import packing

INT2_OPSET = 25
"""The first opset with 2-bit types."""
SMALL = 1 << 14
"""Tables of fewer codes take a byte each: unfolding them costs more than they save."""
PACKED = "_packed"
"""What follows the name of a table's codes where they lie in packed rows."""
ROWS = "rows"
"""The layout of such tensors."""


def type_bits(bits: int, opset: int) -> int:
    """The bits of the smallest ONNX type that holds codes of ``bits``, which are 8 at most."""
    if bits <= 2 and opset >= INT2_OPSET:
        return 2
    return 4 if bits <= 4 else 8


def is_packable(codes: Array, bits: int) -> bool:
    """Whether a table's rows are worth packing."""
    return bits < 8 and codes.size >= SMALL


def pack_rows(codes: Array, bits: int) -> Array:
    """Codes ``[rows, n]`` as bytes, ``[rows, ⌈n·bits / 8⌉]``; signed ones with half of their range added."""
    return packing.pack(packing.unsigned(torch.from_numpy(np.array(codes, order="C")), bits), bits).numpy()


def unpack_rows(rows: Array, bits: int, count: int, *, is_signed: bool) -> Array:
    """The inverse of :func:`pack_rows`."""
    codes = packing.unpack(torch.from_numpy(np.array(rows)), bits, count)
    return (packing.signed(codes, bits) if is_signed else codes).numpy()


SIGN_BIT = 128
"""What unsigned codes of 8 bits are above the signed ones that they were made of; bit by bit, what differs."""


def offset(codes: Array, bits: int) -> int:
    """What packing adds to a code."""
    return 1 << (bits - 1) if codes.dtype == np.int8 else 0


def part_name(start: int, stop: int) -> str:
    """What follows a weight's name where it is only the inputs from ``start`` to ``stop`` (excluded)."""
    return f"[{start}:{stop}]"
