"""The bytes that tensors take in an artifact, as each backend packs them.

=====================  ============================================================  ===================  ==============
target                 codes                                                         a scale              float
=====================  ============================================================  ===================  ==============
onnx-qdq               4 bits (or 2 from opset 25 on), one byte above, two above 8   4 bytes              as it is
.. tables              rows as dense streams of bytes, if they are not small         4 (tied: 8) bytes    as it is
.. weights only        linears: packed in 2, 4 or 8 bits as the backend chooses      4 bytes              as it is
.. onnxruntime         the same, in blocks of MatMulNBits, a scale for each block    4 bytes              as it is
compressed-tensors     rows as dense streams of 32-bit words                         as what stays float  ``dtype``
gptq-v2                columns as dense streams of 32-bit words, and an index        2 bytes              ``dtype``
.. tables              none: in float                                                                     ``dtype``
tvm-kernels            as its kernels read them; a table that is a head too, twice   4 bytes              as it is
.. cuda                the same                                                      4 bytes              matrices in 2
=====================  ============================================================  ===================  ==============

Zero points of asymmetric grids take the bits of their codes; gptq-v2 always has them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Protocol

import torch
from torch import fx

from bitlower.ir import Program, Quantizer, get_tensor
from bitlower.ir.quantization.scheme import WEIGHT_ROLES
from bitlower.ir.quantizer_node import QuantizerNode

ENTRY_BYTES = 106
"""Bytes of a node or a stored tensor in an ONNX file beside its data, and of a tensor in a safetensors header."""


class Sizes(Protocol):
    """The sizes of one artifact."""

    def quantized(self, quantizer: Quantizer, shape: tuple[int, ...], readers: Collection[fx.Node] = ()) -> int:
        """Bytes of codes, scales and zero points of a weight of ``shape``, which ``readers`` read."""
        ...

    def floats(self, tensor: torch.Tensor, readers: Collection[fx.Node] = ()) -> int:
        """Bytes of ``tensor``, which is not quantized and which ``readers`` read."""
        ...

    def overhead(self, program: Program) -> int:
        """Bytes of the model file beside its tensors."""
        ...


def weights_only(placed: Program) -> bool:
    """Whether no activation has a quantizer."""
    return all(quantizer.role in WEIGHT_ROLES for _, quantizer in placed.quantizers())


def stored_tensors(program: Program) -> int:
    """How many tensors the graph reads."""
    return len({node.target for node in program.graph.nodes if node.op == "get_attr"})


def stored_values(program: Program) -> Iterator[tuple[str, torch.Tensor, list[fx.Node], list[fx.Node]]]:
    """Every parameter and constant that is no scale or zero point, each storage once: its name and itself.

    With the quantizers among its readers, and all readers.
    """
    users: dict[str, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.op == "get_attr":
            users.setdefault(str(node.target), []).extend(node.users)
    seen = set[int]()
    for name, readers in users.items():
        tensor = get_tensor(program.module, name)
        quantizers = [node for node in readers if "quantizer" in node.meta]
        if any(QuantizerNode(node).value.target != name for node in quantizers) or tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        yield name, tensor, quantizers, readers


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of ``count`` codes in a dense stream."""
    return -(-count * bits // 8)
