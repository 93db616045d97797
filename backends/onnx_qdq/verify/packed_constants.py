"""Packed weights and tables against the Program's codes, scales and zero points, bit for bit."""

from __future__ import annotations

import math
import re

import numpy as np
import onnx_ir as ir

from bitlower.backends.onnx_qdq.encoding.narrow import PACKED, unpack_rows
from bitlower.backends.onnx_qdq.encoding.nbits import at_inputs, unpack_codes, unpack_zeros
from bitlower.backends.onnx_qdq.graph.code_operators import code_operator
from bitlower.backends.onnx_qdq.graph.structure import constant, stored_value
from bitlower.backends.onnx_qdq.runtime.session import Array
from bitlower.ir import packing

_COPY = re.compile(r"_\d+$")


def packed_weights(graph: ir.Graph) -> dict[str, list[ir.Node]]:
    """The MatMulNBits nodes by the name of the codes that they multiply with, which may bear a number at its end."""
    nodes: dict[str, list[ir.Node]] = {}
    for node in graph:
        codes = stored_value(node.inputs[1]) if code_operator(node.op_type).packed == "matrix" else None
        if codes is not None and codes.name:
            nodes.setdefault(_COPY.sub("", codes.name).removesuffix(PACKED), []).append(node)
    return nodes


def packed_tables(graph: ir.Graph) -> dict[str, list[ir.Node]]:
    """The nodes that read packed rows of codes one by one, by the name of the codes.

    They gather rows, or bytes of all rows to unfold the whole table.
    """
    nodes: dict[str, list[ir.Node]] = {}
    for node in graph:
        rows = node.inputs[0] if code_operator(node.op_type).packed == "rows" else None
        if rows is not None and rows.name and rows.name.endswith(PACKED):
            nodes.setdefault(rows.name.removesuffix(PACKED), []).append(node)
    return nodes


def check_rows(gather: ir.Node, name: str, codes: Array, bits: int) -> list[str]:
    """Whether the packed rows that ``gather`` reads are the codes of the Program's table called ``name``."""
    stored = constant(gather.inputs[0])
    if stored is None or stored.shape != (codes.shape[0], packing.packed_bytes(codes.shape[1], bits)):
        return [f"the packed rows of {name} do not have the shape of its codes {list(codes.shape)}"]
    unpacked = unpack_rows(stored, bits, codes.shape[1], is_signed=codes.dtype == np.int8)
    differing = np.count_nonzero(unpacked != codes)
    return [f"{differing} of the {codes.size} codes of {name} are not the program's"] if differing else []


def check_blocks(gather: ir.Node, name: str, codes: Array, scale: Array | None, zero: Array | None) -> list[str]:
    """What of a GatherBlockQuantized is not the Program's table called ``name``, its codes left out."""
    bits, block = (int(gather.attributes.get_int(key, 0) or 0) for key in ("bits", "block_size"))
    scales, zeros = (constant(value) for value in ([*gather.inputs, None][2:4]))
    if scales is None:
        return [f"the scale of {name} is no constant in the model"]
    return _check_parameters(name, codes, (scale, zero), (scales, zeros), (bits, block))


def check_packed(linear: ir.Node, name: str, codes: Array, scale: Array | None, zero: Array | None) -> list[str]:
    """What of a MatMulNBits is not the Program's weight called ``name``."""
    bits, block, rows, depth = (
        int(linear.attributes.get_int(key, default) or default)
        for key, default in (("bits", 4), ("block_size", 0), ("N", 0), ("K", 0))
    )
    if codes.shape == (depth, rows) != (rows, depth):
        codes, scale, zero = codes.T, _turned(scale), _turned(zero)
    if codes.shape != (rows, depth):
        return [f"{linear.name} multiplies with [{rows}, {depth}], where the codes of {name} are {list(codes.shape)}"]
    stored = [constant(value) for value in linear.inputs[1:4]] + [None]
    if stored[0] is None or stored[1] is None:
        return [f"the codes or scales of {name} are no constants in the model"]
    problems = []
    stored[0] = stored[0].reshape(rows, -1, block * bits // 8)
    differing = np.count_nonzero(unpack_codes(stored[0], bits, depth, is_signed=codes.dtype == np.int8) != codes)
    if differing:
        problems.append(f"{differing} of the {codes.size} codes of {name} are not the program's")
    return problems + _check_parameters(name, codes, (scale, zero), (stored[1], stored[2]), (bits, block))


def _check_parameters(
    name: str,
    codes: Array,
    expected: tuple[Array | None, Array | None],
    stored: tuple[Array, Array | None],
    layout: tuple[int, int],
) -> list[str]:
    """Compare scales and zero points that are stored by row and block; ``layout`` is the bits and the block size."""
    (rows, depth), (bits, block) = codes.shape, layout
    zeros = unpack_zeros(stored[1], rows, -(-depth // block), bits, is_signed=codes.dtype == np.int8)
    problems = []
    for what, ours, theirs in zip(("scale", "zero point"), expected, (stored[0].reshape(rows, -1), zeros), strict=True):
        if ours is None or not _same(ours, theirs, (rows, depth), block):
            problems.append(f"the {what} of {name} is not the program's")
    return problems


def _same(ours: Array, theirs: Array, shape: tuple[int, ...], block: int) -> bool:
    """Whether the Program's scales are the blocks' ones, at every input where either may change."""
    width = shape[1] // (ours.shape[1] if ours.ndim == 2 else 1)
    inputs = range(0, shape[1], math.gcd(width, block))
    wanted = at_inputs(ours, shape, inputs).astype(np.float32)
    return np.array_equal(wanted, theirs[:, np.array(inputs) // block].astype(np.float32))


def _turned(array: Array | None) -> Array | None:
    return array.T if array is not None else None
