"""Output heads with codes of at most 8 bits and float activations: exact enough for floats, multiplied as integers.

A head is a large matrix that a decoder reads once a token; in float it takes four times the time that its bytes take.
Each token's activation is rounded to ``DIGITS`` digits of base ``BASE``, a grid of a millionth of its largest value::

    x ≈ s · (d₀ + d₁ / BASE + d₂ / BASE²),   s = max |x| / LARGEST,   dᵢ whole, |dᵢ| ≤ LARGEST + 1

The digits are the rows of one matrix of codes, so a single integer product reads the weight once; its three rows are
then added with the weights s, s / BASE, s / BASE². Digits of 7 bits keep the sums of two products of bytes within 16
bits, beyond which processors without VNNI clip them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import onnx_ir as ir

from bitlower.backends.onnx_qdq.rewrite.editor import Editor
from bitlower.backends.onnx_qdq.rewrite.find_linear import Linear, find_linear
from bitlower.backends.onnx_qdq.rewrite.linear import Form, byte_operands, finish_linear, weight_reason, weight_scales
from bitlower.backends.onnx_qdq.rewrite.quantizers import is_rounded
from bitlower.backends.onnx_qdq.rewrite.rule import APPLIED, Rule

SPLIT_HEAD = "split-head"
"""The rule's name."""
DIGITS, BASE, LARGEST = 3, 127, 63
ZERO = 64
"""What is added to a digit for an unsigned code."""
_NARROW = 4
"""Codes of so many bits and fewer have a kernel that multiplies them as they lie, with float activations."""


def split_head_rule(form: Form, heads: Collection[str]) -> Rule:
    """The rule for the weights whose codes are called as ``heads`` says.

    It comes before the rule for low-bit linears, which takes the heads that this one leaves: those of at most 4 bits,
    unless they would be stored twice.
    """
    return Rule(SPLIT_HEAD, _split(form, heads))


def _split(form: Form, heads: Collection[str]) -> Callable[[Editor, ir.Node], str | None]:
    def apply(editor: Editor, node: ir.Node) -> str | None:
        linear = find_linear(editor, node)
        if linear is None or linear.weight.name not in heads or linear.weight.name not in editor.specs:
            return None
        weight, bits = linear.weight, editor.specs[linear.weight.name].grid.bits
        if is_rounded(linear.x):
            return "the activation is quantized"
        if weight_reason(weight):
            return weight_reason(weight)
        if bits <= _NARROW and (weight.packed is None or (form == "onnxruntime" and bits == _NARROW)):
            return f"codes of {bits} bits have a kernel of their own"
        _write(editor, linear, form)
        editor.split.add(weight.name)
        return APPLIED

    return apply


def _write(editor: Editor, linear: Linear, form: Form) -> None:
    node = linear.matmul
    codes, factors = digits(editor, node, linear.x)
    weight, zeros = byte_operands(editor, node, linear.weight)
    one, point = editor.constant("one", np.float32(1)), editor.constant("digit_zero", np.uint8(ZERO))
    scales = weight_scales(editor, linear.weight)
    if form == "onnxruntime":
        operands = [codes, weight, one, scales, point, *([zeros] if zeros is not None else [])]
        product = editor.emit(node, "MatMulIntegerToFloat", operands, domain="com.microsoft")
    else:
        left = editor.emit(node, "DequantizeLinear", [codes, one, point])
        right = editor.emit(node, "DequantizeLinear", [weight, scales, *([zeros] if zeros is not None else [])], axis=1)
        product = editor.emit(node, "MatMul", [left, right])
    row = editor.emit(node, "MatMul", [factors, product])
    axes = editor.constant("digit_axis", np.array([-2], np.int64))
    finish_linear(editor, linear, editor.emit(node, "Squeeze", [row, axes], like=node.outputs[0]))


def digits(editor: Editor, at: ir.Node, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The digits of ``x`` [..., K] as codes, uint8 [..., 3, K], and what they are worth, float32 [..., 1, 3].

    Digit i is ``round(y BASEⁱ) − BASE round(y BASEⁱ⁻¹)`` for y = x / s.
    """
    worth = np.float32(BASE) ** np.arange(DIGITS, dtype=np.float32)
    before = np.concatenate([[0], worth[:-1]]).astype(np.float32)
    last, axes = (
        editor.constant(f"{name}_axis", np.array([axis], np.int64)) for name, axis in (("last", -1), ("digit", -2))
    )
    largest = editor.emit(at, "ReduceMax", [editor.emit(at, "Abs", [x], like=x), last], keepdims=1)
    scale = editor.emit(at, "Div", [largest, editor.constant("largest_digit", np.float32(LARGEST))])
    tiny = editor.constant("smallest_normal", np.float32(np.finfo(np.float32).tiny))
    scale = editor.emit(at, "Unsqueeze", [editor.emit(at, "Max", [scale, tiny]), axes])
    y = editor.emit(at, "Div", [editor.emit(at, "Unsqueeze", [x, axes]), scale])
    rounded = [
        editor.emit(at, "Round", [editor.emit(at, "Mul", [y, editor.constant(name, part[:, None])])])
        for name, part in (("digit_worth", worth), ("digit_worth_before", before))
    ]
    carried = editor.emit(at, "Mul", [rounded[1], editor.constant("digit_base", np.float32(BASE))])
    digits = editor.emit(at, "Sub", [rounded[0], carried])
    shifted = editor.emit(at, "Add", [digits, editor.constant("digit_offset", np.float32(ZERO))])
    codes = editor.emit(at, "Cast", [shifted], dtype=ir.DataType.UINT8, to=int(ir.DataType.UINT8))
    return codes, editor.emit(at, "Mul", [scale, editor.constant("digit_factors", (1 / worth)[None])])
