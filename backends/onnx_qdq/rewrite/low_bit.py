"""Linears with low-bit weights and float activations: MatMulNBits, or what onnxruntime makes one of."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from bitlower.backends.onnx_qdq.encoding.narrow import type_bits
from bitlower.backends.onnx_qdq.encoding.nbits import (
    SMALLEST_BLOCK,
    Container,
    container,
    pack_codes,
    pack_zeros,
    spread_blocks,
)
from bitlower.backends.onnx_qdq.graph.nodes import Array, is_op, only_user, source
from bitlower.backends.onnx_qdq.rewrite.codes import typed_codes
from bitlower.backends.onnx_qdq.rewrite.editor import Editor
from bitlower.backends.onnx_qdq.rewrite.find_linear import Linear, Weight, find_linear
from bitlower.backends.onnx_qdq.rewrite.linear import Form, finish_linear
from bitlower.backends.onnx_qdq.rewrite.quantizers import is_rounded
from bitlower.backends.onnx_qdq.rewrite.rule import APPLIED, Rule

LOW_BIT = "low-bit-linear"
"""The rule's name."""


def low_bit_rules(form: Form, accuracy_level: int) -> tuple[Rule, ...]:
    """The rules for linears with low-bit weights, before those for other linears."""

    def with_level(
        write: Callable[[Editor, Linear, Container, int], None],
    ) -> Callable[[Editor, ir.Node], str | None]:
        return lambda editor, node: _low_bit_linear(editor, node, accuracy_level, write)

    if form == "onnxruntime":
        return (Rule(LOW_BIT, with_level(_nbits)), Rule("tied-linear", tied_linear))
    return (Rule(LOW_BIT, with_level(_dequantized)),)


def _low_bit_linear(
    editor: Editor, node: ir.Node, level: int, write: Callable[[Editor, Linear, Container, int], None]
) -> str | None:
    linear = find_linear(editor, node)
    if linear is None:
        return None
    if is_rounded(linear.x):
        return "the activation is quantized"
    weight = linear.weight
    spec = editor.specs.get(weight.name)
    if spec is None:
        return "the spec of the weight is not known"
    kind = container(spec, weight.codes.T.shape, weight.scale.T.shape, level)
    if isinstance(kind, str):
        return kind
    write(editor, linear, kind, level)
    return APPLIED


def _nbits(editor: Editor, linear: Linear, kind: Container, level: int) -> None:
    """One com.microsoft.MatMulNBits with the bias in it."""
    kind = _tied_container(editor, linear.weight, kind)
    weight, node = linear.weight, linear.matmul
    codes, scale, zero = weight.codes.T, weight.scale.T, weight.zero.T
    rows, depth = codes.shape
    blocks = -(-depth // kind.block)
    operands: list[ir.Value | None] = [
        linear.x,
        _packed_codes(editor, linear, kind),
        editor.lazy(
            f"{weight.stem}_scale",
            f"{kind.bits} bits, blocks of {kind.block}",
            ir.DataType.FLOAT,
            (rows, blocks),
            lambda: spread_blocks(scale, codes.shape, kind.block).astype(np.float32),
        ),
    ]
    zeros = pack_zeros(zero, codes.shape, kind, is_signed=codes.dtype == np.int8)
    operands.append(editor.constant(f"{weight.stem}_zero_point", zeros) if zeros is not None else None)
    operands += [None, editor.constant(f"{weight.stem}_bias", linear.bias) if linear.bias is not None else None]
    while operands[-1] is None:
        operands.pop()
    attributes = {"K": depth, "N": rows, "bits": kind.bits, "block_size": kind.block, "accuracy_level": level}
    result = editor.emit(node, "MatMulNBits", operands, domain="com.microsoft", **attributes)
    editor.replace(linear.output, result)


def _tied_container(editor: Editor, weight: Weight, kind: Container) -> Container:
    """``kind``, with smaller blocks where rows that are packed for an embedding then are blocks one after the other."""
    depth, bits = weight.codes.shape[0], editor.specs[weight.name].grid.bits
    block = math.gcd(kind.block, depth)
    fits = weight.packed is not None and bits == kind.bits and block >= SMALLEST_BLOCK
    return replace(kind, block=block) if fits else kind


def _packed_codes(editor: Editor, linear: Linear, kind: Container) -> ir.Value:
    """The codes in blocks; those of a tied table are stored once, as the rows that the embedding gathers."""
    weight = linear.weight
    codes, size = weight.codes.T, kind.block * kind.bits // 8
    rows, depth = codes.shape
    if weight.packed is not None and editor.specs[weight.name].grid.bits == kind.bits and depth % kind.block == 0:
        shape = editor.constant(f"{weight.stem}_blocks", np.array([rows, depth // kind.block, size], np.int64))
        return editor.emit(linear.matmul, "Reshape", [weight.packed, shape], dtype=ir.DataType.UINT8)
    layout = f"{kind.bits} bits, blocks of {kind.block}"
    size_of = (rows, -(-depth // kind.block), size)
    return editor.lazy(weight.name, layout, ir.DataType.UINT8, size_of, lambda: pack_codes(codes, kind))


def _dequantized(editor: Editor, linear: Linear, kind: Container, level: int) -> None:
    """DequantizeLinear (in blocks) and MatMul, of which onnxruntime makes a MatMulNBits when it loads the model."""
    weight, node = linear.weight, linear.matmul
    if weight.scale.size > 1 and weight.scale.shape[0] > 1:  # a short last group takes blocks that divide the inputs
        kind = replace(kind, block=math.gcd(kind.block, weight.codes.shape[0] // weight.scale.shape[0]))
    bits = type_bits(kind.bits, editor.opset)
    codes = typed_codes(editor, weight.name, weight.codes, bits)
    parts = [_blocks(weight.scale, weight.codes.shape, kind), _blocks(weight.zero, weight.codes.shape, kind)]
    operands = [codes, editor.constant(f"{weight.stem}_scale", parts[0].astype(np.float32))]
    if parts[1].any():
        zeros = np.rint(parts[1]).astype(weight.codes.dtype)
        operands.append(typed_codes(editor, f"{weight.stem}_zero_point", zeros, bits))
    blocked = parts[0].ndim == 2
    attributes: dict[str, Any] = {"axis": 0, "block_size": kind.block} if blocked else {"axis": 1}
    [real] = editor.emit_all(node, "DequantizeLinear", operands, 1, **attributes)
    finish_linear(editor, linear, editor.emit(node, "MatMul", [linear.x, real], like=node.outputs[0]))


def _blocks(scale: Array, shape: tuple[int, ...], kind: Container) -> Array:
    """Scales of a weight [K, N] by block and column, or by column where a column has one."""
    if scale.size > 1 and scale.shape[0] > 1:
        return spread_blocks(scale.T, shape[::-1], kind.block).T
    return np.repeat(scale.reshape(-1), shape[1] // scale.size)


def tied_linear(editor: Editor, node: ir.Node) -> str | None:
    """A float weight that has another reader, as it lies: a copy for MatMul would double a large embedding table."""
    transpose = source(node, 1).producer() if is_op(node, "MatMul") else None
    weight = transpose.inputs[0] if is_op(transpose, "Transpose") and transpose is not None else None
    if transpose is None or weight is None or editor.array(weight) is None:
        return None
    if len(weight.uses()) == 1 or only_user(transpose.outputs[0]) is not node:
        return "the weight has one reader"
    if list(transpose.attributes["perm"].as_ints()) != [1, 0]:
        return "the weight is not a transposed matrix"
    operands = [source(node), weight]
    product = editor.emit(node, "FusedMatMul", operands, domain="com.microsoft", like=node.outputs[0], transB=1)
    editor.replace(node.outputs[0], product)
    return APPLIED
