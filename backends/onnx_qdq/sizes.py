"""The bytes that tensors take in an ONNX file; see :mod:`bitlower.backends.sizes`."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import fx

from bitlower.backends.artifact.stages import parts_of
from bitlower.backends.onnx_qdq.encoding.narrow import SMALL, type_bits
from bitlower.backends.onnx_qdq.encoding.nbits import FLOAT_ACTIVATIONS, SMALLEST_BLOCK, Container
from bitlower.backends.onnx_qdq.encoding.nbits import container as low_bit_container
from bitlower.backends.sizes import ENTRY_BYTES, packed_bytes, stored_tensors, stored_values
from bitlower.ir import Program, Quantizer, QuantSpec
from bitlower.ir.dataflow import EMBEDDING, LINEAR


@dataclass(frozen=True)
class OnnxSizes:
    """Sizes in a model of an ``opset`` and a ``form``.

    ``weights_only``: activations are float; ``at_states``: an encoder-decoder is two files that share no tensor.
    """

    opset: int = 23
    form: str = "qdq"
    accuracy_level: int = FLOAT_ACTIVATIONS
    weights_only: bool = False
    at_states: bool = False

    def quantized(self, quantizer: Quantizer, shape: tuple[int, ...], readers: Collection[fx.Node] = ()) -> int:
        """Bytes of codes, scales and zero points; a table that is a head too has its scales twice."""
        spec = quantizer.spec
        scales: int = math.prod(spec.granularity.scale_shape(shape))
        if self.weights_only and quantizer.role == "linear-weight" and len(shape) == 2:
            kind = low_bit_container(spec, shape, spec.granularity.scale_shape(shape), self.accuracy_level)
            if not isinstance(kind, str):
                return self._low_bit(spec, shape, kind)
        width: int = spec.grid.dtype.itemsize
        codes = self._codes(quantizer, shape) if spec.grid.bits < 8 else width * math.prod(shape)
        width_of_zeros = 0 if spec.grid.symmetric else width
        tied = any(n.target in EMBEDDING for n in readers) and any(n.target in LINEAR for n in readers)
        total: int = codes + (4 + width_of_zeros) * scales * (2 if tied else 1)
        return total

    def floats(self, tensor: torch.Tensor, readers: Collection[fx.Node] = ()) -> int:
        """Floats are float32."""
        return tensor.numel() * (4 if tensor.is_floating_point() else tensor.element_size())

    def overhead(self, program: Program) -> int:
        """Bytes of nodes, of each tensor's name, type and shape, and of what is stored in a second file."""
        parts = [*parts_of(program, at_states=True).values()] if self.at_states else [program]
        nodes: int = sum(node.op == "call_function" for part in parts for node in part.graph.nodes)
        again = sum(map(self._tensor_bytes, parts)) - self._tensor_bytes(program) if len(parts) > 1 else 0
        return ENTRY_BYTES * (sum(map(stored_tensors, parts)) + nodes) + again

    def _tensor_bytes(self, program: Program) -> int:
        """Bytes of all tensors that the graph reads."""
        total = 0
        for _, tensor, quantizers, readers in stored_values(program):
            users = [user for node in quantizers for user in node.users]
            quantizer = quantizers[0].meta["quantizer"] if quantizers else None
            whole = not quantizers or len(quantizers) < len(readers)
            total += self.quantized(quantizer, tuple(tensor.shape), users) if quantizer else 0
            total += self.floats(tensor, readers) if whole else 0
        return total

    def _codes(self, quantizer: Quantizer, shape: tuple[int, ...]) -> int:
        """Bytes of codes of fewer than 8 bits."""
        bits, count = quantizer.spec.grid.bits, math.prod(shape)
        if quantizer.role == "linear-weight":
            return packed_bytes(count, type_bits(bits, self.opset))
        if len(shape) != 2 or count < SMALL:
            return count
        granularity = quantizer.spec.granularity
        if granularity.kind == "group":  # in blocks one kernel alone reads packed rows
            block = granularity.block_size(shape[1])
            fits = bits in (2, 4) and block >= SMALLEST_BLOCK and not block & (block - 1)
            if self.form != "onnxruntime" or not fits:
                return count
        return shape[0] * packed_bytes(shape[1], bits)

    def _low_bit(self, spec: QuantSpec, shape: tuple[int, int], kind: Container) -> int:
        """Bytes of a linear's weight that MatMulNBits reads, or that DequantizeLinear unfolds in blocks."""
        (rows, columns), bits = shape, kind.bits
        blocks, filled = -(-columns // kind.block), columns
        if self.form == "onnxruntime":
            filled = blocks * kind.block
        else:
            bits = type_bits(bits, self.opset)
            blocks = blocks if spec.granularity.kind == "group" else 1
        zeros = 0 if spec.grid.symmetric else rows * packed_bytes(blocks, bits)
        return packed_bytes(rows * filled, bits) + 4 * rows * blocks + zeros
