"""The bytes that a tensor takes in an artefact, as each target packs it.

=====================  ============================================================  ===================  ==============
target                 codes                                                         a scale              float
=====================  ============================================================  ===================  ==============
onnx-qdq               4 bits (or 2 from opset 25 on), one byte above, two above 8   4 bytes              as it is
.. tables              rows as dense streams of bytes, if they are not small         4 (tied: 8) bytes    as it is
.. weights only        linears: packed in 2, 4 or 8 bits as the backend chooses       4 bytes              as it is
.. onnxruntime         the same, in blocks of MatMulNBits, a scale for each block     4 bytes              as it is
compressed-tensors     rows as dense streams of 32-bit words                         as what stays float  ``dtype``
gptq-v2                columns as dense streams of 32-bit words, and an index         2 bytes              ``dtype``
.. tables              none: in float                                                                      ``dtype``
tvm-kernels            as its kernels read them; a table that is a head too, twice    4 bytes              as it is
.. cuda                the same                                                      4 bytes              matrices in 2
=====================  ============================================================  ===================  ==============

Zero points of asymmetric grids take the bits of their codes; gptq-v2 always has them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from bitlower.backends.onnx_qdq._low_bit import FLOAT_ACTIVATIONS, SMALLEST_BLOCK, Container
from bitlower.backends.onnx_qdq._low_bit import container as low_bit_container
from bitlower.backends.onnx_qdq._narrow import SMALL, type_bits
from bitlower.backends.tvm_kernels._sizes import linear_bytes, table_bytes
from bitlower.ir import Granularity, Grid, Program, Quantizer, QuantSpec
from bitlower.ir.dataflow import EMBEDDING, LINEAR
from bitlower.ir.scheme import WEIGHT_ROLES

CODE_BYTES = 300_000
"""Of a library, beside the weights."""
ENTRY_BYTES = 106
"""Of a node or a stored tensor in an ONNX file, beside its data, and of a tensor in a safetensors header."""
_DTYPES = {"float16": 2, "bfloat16": 2, "float32": 4}
_WORD = 32
OPSET = 23
"""The backend's, if nothing is said."""


@dataclass(frozen=True)
class Target:
    """Where tensors go: a backend with its options, and whether activations stay float."""

    backend: str
    options: Mapping[str, Any] = field(default_factory=dict)
    weights_only: bool = False

    @classmethod
    def of(cls, program: Program, backend: str, options: Mapping[str, Any]) -> Target:
        """The target of a program whose quantizers are placed."""
        roles = [quantizer.role for _, quantizer in program.quantizers()]
        return cls(backend, options, all(role in WEIGHT_ROLES for role in roles))

    @property
    def is_checkpoint(self) -> bool:
        """Whether weights lie in safetensors files."""
        return self.backend == "checkpoint"

    @property
    def accuracy_level(self) -> int:
        """At which MatMulNBits multiplies; see the backend's options."""
        return int(self.options.get("accuracy_level", FLOAT_ACTIVATIONS))

    @property
    def opset(self) -> int:
        """Of ONNX's operators; see the backend's options."""
        return int(self.options.get("opset", OPSET))

    @property
    def width(self) -> int:
        """Bytes of a number that stays float."""
        return _DTYPES[self.options.get("dtype", "float16")] if self.is_checkpoint else 4

    def float_bytes(self, tensor: torch.Tensor, readers: Collection[fx.Node] = ()) -> int:
        """Of ``tensor``, which is not quantized and which ``readers`` read."""
        width = self.width if tensor.is_floating_point() else tensor.element_size()
        kinds = {node.target in EMBEDDING for node in readers if node.target in LINEAR | EMBEDDING}
        if self._halves and kinds and tensor.is_floating_point() and tensor.dim() == 2:
            width = 2
        return tensor.numel() * width * (max(len(kinds), 1) if self.backend == "tvm-kernels" else 1)

    @property
    def _halves(self) -> bool:
        """Whether a library multiplies floats in half precision, and keeps weights and tables so."""
        cuda = self.backend == "tvm-kernels" and self.options.get("target") == "cuda"
        return cuda and self.options.get("activations") != "float32"

    def __str__(self) -> str:
        options = " ".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.backend}{{{options}}}" if options else self.backend


def stored_bytes(
    quantizer: Quantizer, shape: tuple[int, ...], target: Target, readers: Collection[fx.Node] = ()
) -> int:
    """Codes, scales and zero points of a weight of ``shape``, which ``readers`` read."""
    spec = quantizer.spec
    if target.backend == "tvm-kernels":
        return _library_bytes(spec, shape, target, readers)
    scales = math.prod(spec.granularity.scale_shape(shape))
    embedded = any(node.target in EMBEDDING for node in readers)
    if target.is_checkpoint and embedded:
        return target.width * math.prod(shape)
    if target.is_checkpoint and len(shape) == 2:
        return _checkpoint_bytes(spec, (shape[0], shape[1]), scales, target)
    if target.weights_only and quantizer.role == "linear-weight" and len(shape) == 2:
        kind = low_bit_container(spec, shape, spec.granularity.scale_shape(shape), target.accuracy_level)
        if not isinstance(kind, str):
            return _low_bit_bytes(spec, shape, kind, target)
    width: int = spec.grid.dtype.itemsize
    codes = _onnx_code_bytes(quantizer, shape, target) if spec.grid.bits < 8 else width * math.prod(shape)
    forms = 2 if embedded and any(node.target in LINEAR for node in readers) else 1
    return codes + (4 if spec.grid.symmetric else 4 + width) * scales * forms


def _library_bytes(spec: QuantSpec, shape: tuple[int, ...], target: Target, readers: Collection[fx.Node]) -> int:
    """For linears, for look-ups, or for both; what is read otherwise is stored in float32."""
    if len(shape) != 2:
        return 4 * math.prod(shape)
    activation = None if target.weights_only else QuantSpec(Grid(8), Granularity.per_tensor())
    linear = any(node.target in LINEAR for node in readers)
    table = any(node.target in EMBEDDING for node in readers)
    pair = (shape[0], shape[1])
    return (linear_bytes(pair, spec, activation) if linear else 0) + (table_bytes(pair, spec) if table else 0)


def _onnx_code_bytes(quantizer: Quantizer, shape: tuple[int, ...], target: Target) -> int:
    """Of codes of fewer than 8 bits."""
    bits, count = quantizer.spec.grid.bits, math.prod(shape)
    if quantizer.role == "linear-weight":
        return _bytes(count, type_bits(bits, target.opset))
    if len(shape) != 2 or count < SMALL:
        return count
    granularity = quantizer.spec.granularity
    if granularity.kind == "group":  # in blocks one kernel alone reads packed rows
        block = granularity.block_size(shape[1])
        fits = bits in (2, 4) and block >= SMALLEST_BLOCK and not block & (block - 1)
        if target.options.get("form") != "onnxruntime" or not fits:
            return count
    return shape[0] * _bytes(shape[1], bits)


def _low_bit_bytes(spec: QuantSpec, shape: tuple[int, int], kind: Container, target: Target) -> int:
    """Of a linear's weight that MatMulNBits reads, or that DequantizeLinear unfolds in blocks."""
    (rows, columns), bits = shape, kind.bits
    blocks, filled = -(-columns // kind.block), columns
    if target.options.get("form") == "onnxruntime":
        filled = blocks * kind.block
    else:
        bits = type_bits(bits, target.opset)
        blocks = blocks if spec.granularity.kind == "group" else 1
    zeros = 0 if spec.grid.symmetric else rows * _bytes(blocks, bits)
    return _bytes(rows * filled, bits) + 4 * rows * blocks + zeros


def overhead_bytes(program: Program, target: Target) -> int:
    """What a model file holds besides tensors: the nodes of the graph, and each tensor's name, type and shape."""
    stored = len({node.target for node in program.graph.nodes if node.op == "get_attr"})
    if target.backend == "tvm-kernels":
        return CODE_BYTES
    if target.is_checkpoint:
        return ENTRY_BYTES * stored
    return ENTRY_BYTES * (stored + len([node for node in program.graph.nodes if node.op == "call_function"]))


def _checkpoint_bytes(spec: QuantSpec, shape: tuple[int, int], scales: int, target: Target) -> int:
    rows, columns = shape
    groups, bits = max(1, scales // rows), spec.grid.bits
    if target.options.get("format") == "gptq-v2":
        return 4 * rows * _words(columns, bits) + 4 * groups * _words(rows, bits) + 2 * scales + 4 * columns
    zeros = 0 if spec.grid.symmetric else 4 * groups * _words(rows, bits)
    return 4 * rows * _words(columns, bits) + target.width * scales + zeros + 16


def _words(count: int, bits: int) -> int:
    return -(-count * bits // _WORD)


def _bytes(count: int, bits: int) -> int:
    return -(-count * bits // 8)
