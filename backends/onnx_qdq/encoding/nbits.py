"""How weights of at most 8 bits lie in an ONNX file, and which of them the runtime multiplies without unfolding them.

onnxruntime's ``MatMulNBits`` takes codes of 2, 4 and 8 bits in blocks of 16, 32, 64, 128 or 256 inputs that share a
scale. At the accuracy levels 0 to 3 its activations stay float, at level 4 it rounds them to 8 bits, block by block.
On a CPU 2- and 8-bit codes have a fast kernel only at level 4; without it they are far slower than a float matmul.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bitlower.backends.onnx_qdq.graph.nodes import Array
from bitlower.ir import QuantSpec, packing

FLOAT_ACTIVATIONS = 1
"""The accuracy level at which MatMulNBits computes in float32."""
ROUNDS_ACTIVATIONS = 4
"""The accuracy level at which MatMulNBits quantizes its float activations to 8 bits."""
SMALLEST_BLOCK, _LARGEST, _ROW = 16, 256, 128
"""The blocks that the kernel takes, and the one for weights with one scale a row."""
_SMALLEST_2, _LARGEST_2 = 32, 128
"""The blocks for which there is a fast kernel for 2-bit codes; others are stored in 4 bits."""


@dataclass(frozen=True)
class Container:
    """How a weight is stored.

    Args:
        bits: of a code; 3-bit codes lie in 4 bits, 5- to 7-bit ones in 8.
        block: so many consecutive inputs share a scale; a row of one scale is cut into blocks too.
    """

    bits: int
    block: int


def container(
    spec: QuantSpec, shape: Sequence[int], scale_shape: Sequence[int], accuracy_level: int
) -> Container | str:
    """The container of a weight [out, in], or why the runtime has no kernel for it.

    Args:
        spec: of its quantizer.
        shape: of the weight.
        scale_shape: of its scales, blocked as the Program's are.
        accuracy_level: at which it is to be multiplied.
    """
    bits = spec.grid.bits
    if bits > 8:
        return f"the weight has {bits} bits"
    if bits > 4 and accuracy_level != ROUNDS_ACTIVATIONS:
        return f"{bits}-bit codes have no fast kernel at accuracy level {accuracy_level}"
    depth, columns = shape[1], scale_shape[1] if len(scale_shape) == 2 else 1
    along_inputs = spec.granularity.kind == "group" and columns < depth
    group = spec.granularity.group_size if along_inputs else depth // columns
    block = min(_ROW, 1 << (depth.bit_length() - 1)) if columns == 1 else min(group & -group, _LARGEST)
    if block < SMALLEST_BLOCK:
        return f"groups of {group} inputs are no multiple of {SMALLEST_BLOCK}"
    if bits == 2 and accuracy_level == ROUNDS_ACTIVATIONS and block >= _SMALLEST_2:
        return Container(2, min(block, _LARGEST_2))
    return Container(8 if bits > 4 else 4, block)


def pack_codes(codes: Array, kind: Container) -> Array:
    """Codes [N, K] as MatMulNBits reads them: uint8 [N, blocks, block · bits / 8]."""
    return packing.pack_matmul_nbits(_shifted(codes, kind.bits), kind.bits, kind.block).numpy()


def unpack_codes(packed: Array, bits: int, depth: int, *, is_signed: bool) -> Array:
    """The inverse of :func:`pack_codes`, int8 if ``is_signed`` else uint8."""
    codes = packing.unpack_matmul_nbits(torch.from_numpy(np.array(packed)), bits, depth)
    return (packing.signed(codes, bits) if is_signed else codes).numpy()


def pack_zeros(zero: Array, shape: Sequence[int], kind: Container, *, is_signed: bool) -> Array | None:
    """Zero points as MatMulNBits reads them: uint8 [N, bytes]; None where all are what it takes for granted."""
    middle = 1 << (kind.bits - 1)
    stored = np.rint(spread_blocks(zero, shape, kind.block)).astype(np.int32) + (middle if is_signed else 0)
    if (stored == middle).all():
        return None
    return packing.pack_matmul_nbits_zeros(torch.from_numpy(stored.astype(np.uint8)), kind.bits).numpy()


def unpack_zeros(packed: Array | None, rows: int, blocks: int, bits: int, *, is_signed: bool) -> Array:
    """Zero points [rows, blocks] of the Program's codes: the inverse of :func:`pack_zeros`."""
    middle = 1 << (bits - 1)
    if packed is None:
        stored = np.full((rows, blocks), middle, np.int32)
    else:
        flat = torch.from_numpy(np.array(packed).reshape(rows, -1))
        stored = packing.unpack_matmul_nbits_zeros(flat, bits, blocks).numpy().astype(np.int32)
    return stored - (middle if is_signed else 0)


def spread_blocks(scale: Array, shape: Sequence[int], block: int) -> Array:
    """Scales (or zero points) of a weight [N, K], one a row and block: [N, ⌈K / block⌉]."""
    return at_inputs(scale, shape, range(0, shape[1], block))


def at_inputs(scale: Array, shape: Sequence[int], inputs: Sequence[int]) -> Array:
    """The scales (or zero points) of a weight [N, K] for some of its inputs: [N, len(inputs)]."""
    grid: np.ndarray[Any, Any] = np.atleast_2d(scale)
    height, width = (int(size) for size in grid.shape)
    return grid.repeat(shape[0] // height, 0)[:, np.array(inputs) // (shape[1] // width)]


def _shifted(codes: Array, bits: int) -> torch.Tensor:
    """Unsigned codes, signed ones with half of the container's range added."""
    return packing.unsigned(torch.from_numpy(np.array(codes, order="C")), bits)
