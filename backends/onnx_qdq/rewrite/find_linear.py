"""Linears as they stand in a translated graph: the product, its weight, its bias."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from bitlower.backends.onnx_qdq.encoding.narrow import PACKED, ROWS, part_name
from bitlower.backends.onnx_qdq.graph.nodes import Array, is_op, marker, only_user, source
from bitlower.backends.onnx_qdq.rewrite.editor import Editor


@dataclass(frozen=True)
class Weight:
    """A quantized weight as MatMul reads it.

    ``codes`` are [K, N]; ``scale`` and ``zero`` have the layout of the Program, transposed like the codes. ``name`` is
    that of the codes in the Program, and ``part`` tells slices of one weight apart. ``rows`` are codes that something
    else reads as they lie, [N, K] in bytes; ``packed`` are those rows in fewer bits, which an embedding gathers.
    """

    name: str
    codes: Array
    scale: Array
    zero: Array
    part: str = ""
    rows: ir.Value | None = None
    packed: ir.Value | None = None

    @property
    def per_column(self) -> bool:
        """Whether scales factor out of the product: one for all, or one a column."""
        return self.scale.size == 1 or self.scale.shape[0] == 1

    @property
    def stem(self) -> str:
        """The name of the parameter that was quantized."""
        return self.name.removesuffix("_codes")

    def columns(self, array: Array) -> Array:
        """Scales or zero points as a scalar, or one a column."""
        if array.size == 1:
            return array.reshape(())
        return np.repeat(array.reshape(-1), self.codes.shape[1] // array.size)


@dataclass(frozen=True)
class Linear:
    """``x · weight + bias``: the matmul, what it reads, and the value that it returns."""

    matmul: ir.Node
    x: ir.Value
    weight: Weight
    bias: Array | None
    output: ir.Value


def find_linear(editor: Editor, node: ir.Node) -> Linear | None:
    """The linear with a quantized weight whose matmul is ``node``."""
    if not is_op(node, "MatMul"):
        return None
    operand, turned = source(node, 1), False
    producer = operand.producer()
    if producer is not None and is_op(producer, "Transpose") and list(producer.attributes["perm"].as_ints()) == [1, 0]:
        operand, turned = source(producer), True
    ends = _slice_ends(editor, operand) if turned else None
    if ends is not None:
        operand = source(_producer(operand))
    dequantize = marker(operand, "Dequantize")
    codes = editor.array(source(dequantize)) if dequantize is not None else None
    if dequantize is None or codes is None or codes.ndim != 2:
        return None
    scale, zero = (np.asarray(editor.array(source(dequantize, position))) for position in (1, 2))
    if ends is not None and scale.size > 1 and scale.shape[1] > 1:
        return None
    start, stop = ends or (0, codes.shape[1])
    codes, scale, zero = (part.T if turned else part for part in (codes[:, start:stop], scale, zero))
    bias, output = _bias(editor, node)
    name, part = source(dequantize).name or "weight_codes", part_name(start, stop) if ends else ""
    rows, packed = (None, None) if ends or not turned else _rows(editor, dequantize)
    return Linear(node, source(node), Weight(name, codes, scale, zero, part, rows, packed), bias, output)


def _rows(editor: Editor, dequantize: ir.Node) -> tuple[ir.Value | None, ir.Value | None]:
    """The codes of a tied table as something else than this linear reads them: in bytes, or in packed rows."""
    codes = source(dequantize)
    if len(codes.uses()) > 1 or len(dequantize.outputs[0].uses()) > 1:
        return codes, None
    packed = editor.made(f"{codes.name}{PACKED}", ROWS)
    return None, packed if packed is not None and packed.uses() else None


def _slice_ends(editor: Editor, value: ir.Value) -> tuple[int, int] | None:
    """From where to where ``value`` is cut out of another along axis 1."""
    node = value.producer()
    if not is_op(node, "Slice") or node is None:
        return None
    numbers = [editor.array(part) for part in node.inputs[1:]]
    if any(array is None or array.size != 1 for array in numbers):
        return None
    start, stop, axis, step = (*(int(np.asarray(array).item()) for array in numbers), 1)[:4]
    return (start, stop) if (axis, step) == (1, 1) else None


def _producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None
    return node


def _bias(editor: Editor, matmul: ir.Node) -> tuple[Array | None, ir.Value]:
    output = matmul.outputs[0]
    user = only_user(output)
    if user is None or not is_op(user, "Add"):
        return None, output
    other = next((value for value in user.inputs if value is not output), None)
    bias = editor.array(other)
    return (bias, user.outputs[0]) if bias is not None and bias.ndim == 1 else (None, output)
