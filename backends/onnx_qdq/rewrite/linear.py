"""Linears and embeddings: integer matmuls where the runtime has a kernel for them, float ones everywhere else."""

from __future__ import annotations

from typing import Literal

import numpy as np
import onnx_ir as ir

from bitlower.backends.onnx_qdq.encoding.narrow import SIGN_BIT, offset
from bitlower.backends.onnx_qdq.graph.nodes import Array, dims, is_op, marker, source
from bitlower.backends.onnx_qdq.rewrite.codes import byte_codes, unfold_rows
from bitlower.backends.onnx_qdq.rewrite.editor import Editor
from bitlower.backends.onnx_qdq.rewrite.find_linear import Linear, Weight, find_linear
from bitlower.backends.onnx_qdq.rewrite.quantizers import per_tensor, stored
from bitlower.backends.onnx_qdq.rewrite.rule import APPLIED, Rule

Form = Literal["qdq", "onnxruntime"]
BYTES = (ir.DataType.UINT8, ir.DataType.INT8)


def linear_rules(form: Form) -> tuple[Rule, ...]:
    """The rules for linears, in the order in which they are tried; the last one takes what the others refuse."""
    static = _merge_linear if form == "onnxruntime" else _static_linear
    return (
        Rule("integer-linear", static),
        Rule("integer-linear-per-token", _per_token_linear),
        Rule("float-linear", _float_linear),
    )


def _static_reason(editor: Editor, linear: Linear) -> str:
    """Why the integer matmul with one scale for all activations does not fit; empty if it does."""
    quantized = marker(linear.x, "Dequantize")
    if quantized is None:
        return "the activation is not quantized"
    if source(quantized).dtype not in BYTES:
        return "the activation has codes of 16 bits"
    if not per_tensor(editor, quantized):
        return "the activation has more than one scale"
    return weight_reason(linear.weight)


def weight_reason(weight: Weight) -> str:
    """Why the codes of ``weight`` cannot be multiplied as integers of 8 bits; empty if they can."""
    if weight.codes.dtype.itemsize != 1:
        return "the weight has codes of 16 bits"
    return "" if weight.per_column else "the weight has scales along its input axis"


def _static_linear(editor: Editor, node: ir.Node) -> str | None:
    """``DequantizeLinear → MatMul → Add``, which onnxruntime makes one MatMulIntegerToFloat."""
    linear = find_linear(editor, node)
    if linear is None:
        return None
    reason = _static_reason(editor, linear)
    if reason:
        return reason
    weight = linear.weight
    codes, zeros = product_operands(editor, node, weight, like_scales=True)
    operands = [codes, weight_scales(editor, weight), *([zeros] if zeros is not None else [])]
    real = editor.emit(node, "DequantizeLinear", operands, axis=1)
    finish_linear(editor, linear, editor.emit(node, "MatMul", [linear.x, real], like=node.outputs[0]))
    return APPLIED


def _merge_linear(editor: Editor, node: ir.Node) -> str | None:
    """One com.microsoft.MatMulIntegerToFloat with the bias in it: no pass over the output for the bias alone."""
    linear = find_linear(editor, node)
    if linear is None:
        return None
    reason = _static_reason(editor, linear)
    if reason:
        return reason
    quantized = marker(linear.x, "Dequantize")
    assert quantized is not None
    code = source(quantized)
    assert code.dtype is not None
    scale, zero = stored(editor, quantized, code.dtype)
    weight = linear.weight
    bias = None if linear.bias is None else editor.constant(f"{weight.stem}_bias", linear.bias)
    codes, zeros = product_operands(editor, node, weight)
    operands = [code, codes, scale, weight_scales(editor, weight), zero, zeros, bias]
    while operands[-1] is None:
        operands.pop()
    merged = editor.emit(node, "MatMulIntegerToFloat", operands, domain="com.microsoft")
    editor.replace(linear.output, merged)
    return APPLIED


def _per_token_linear(editor: Editor, node: ir.Node) -> str | None:
    """MatMulInteger with one scale (and zero point) a row: ``s_row · s_column · (q·w − z_row · Σw) + bias``."""
    linear = find_linear(editor, node)
    quantized = marker(linear.x, "Dequantize") if linear is not None else None
    if linear is None or quantized is None or editor.array(source(quantized, 1)) is not None:
        return None
    shape = dims(source(quantized, 1))
    if shape is None or shape[-1] != 1:
        return "the activation has no scale a row"
    if source(quantized).dtype not in BYTES:
        return "the activation has codes of 16 bits"
    reason = weight_reason(linear.weight)
    if reason:
        return reason
    total = _integer_product(editor, linear, quantized)
    real = editor.emit(node, "Cast", [total], like=node.outputs[0], to=int(ir.DataType.FLOAT))
    real = editor.emit(node, "Mul", [real, source(quantized, 1)], like=real)
    real = editor.emit(node, "Mul", [real, weight_scales(editor, linear.weight)], like=real)
    finish_linear(editor, linear, real)
    return APPLIED


def _integer_product(editor: Editor, linear: Linear, quantized: ir.Node) -> ir.Value:
    """``Σ (q − z)(w − z_w)`` in int32, exact."""
    node, weight = linear.matmul, linear.weight
    code, zero = source(quantized), source(quantized, 2)
    fixed = editor.array(zero)
    if code.dtype is ir.DataType.INT8:
        code = _unsigned(editor, node, code)
        fixed = fixed + 128 if fixed is not None else None
    codes, zeros = product_operands(editor, node, weight)
    point = None if fixed is None else editor.constant("row_zero_point", np.uint8(fixed.reshape(())))
    operands = [code, codes, point, zeros]
    while operands[-1] is None:
        operands.pop()
    total = editor.emit(node, "MatMulInteger", operands, like=node.outputs[0], dtype=ir.DataType.INT32)
    if fixed is not None:
        return total
    sums = (weight.codes.astype(np.int32) - np.rint(weight.zero).astype(np.int32)).sum(0, dtype=np.int32)
    row = editor.emit(node, "Cast", [zero], like=zero, dtype=ir.DataType.INT32, to=int(ir.DataType.INT32))
    if source(quantized).dtype is ir.DataType.INT8:
        row = editor.emit(node, "Add", [row, editor.constant("offset_128", np.int32(128))], like=row)
    share = editor.emit(node, "Mul", [row, editor.constant(f"{weight.stem}_sums", sums)], like=total)
    return editor.emit(node, "Sub", [total, share], like=total)


def _unsigned(editor: Editor, at: ir.Node, code: ir.Value) -> ir.Value:
    """Signed codes shifted to unsigned ones: onnxruntime's MatMulInteger is several times slower on signed rows."""
    wide = editor.emit(at, "Cast", [code], like=code, dtype=ir.DataType.FLOAT, to=int(ir.DataType.FLOAT))
    wide = editor.emit(at, "Add", [wide, editor.constant("shift_128", np.float32(128))], like=wide)
    return editor.emit(at, "Cast", [wide], like=code, dtype=ir.DataType.UINT8, to=int(ir.DataType.UINT8))


def transpose_weight(editor: Editor, node: ir.Node) -> str | None:
    """A float weight as MatMul reads it, [K, N]; one that has another reader (a tied table) is stored once."""
    weight = node.inputs[0] if is_op(node, "Transpose") else None
    array = editor.array(weight)
    if weight is None or array is None:
        return None
    if len(weight.uses()) > 1:
        return "the weight has another reader"
    dtype = ir.DataType.from_numpy(array.dtype)
    axes = node.attributes["perm"].as_ints()
    shape = [array.shape[axis] for axis in axes]
    turned = editor.lazy(weight.name or "weight", "input first", dtype, shape, lambda: array.transpose(axes))
    ir.convenience.replace_all_uses_with(node.outputs[0], turned)
    return APPLIED


def _float_linear(editor: Editor, node: ir.Node) -> str | None:
    """A float matmul with ``(codes − zero) · scale``, which the runtime computes once at load.

    A DequantizeLinear here would become a MatMulNBits of accuracy level 4 in onnxruntime, which rounds the
    activations to 8 bits although the Program does not.
    """
    linear = find_linear(editor, node)
    if linear is None:
        return None
    weight = linear.weight
    depth, width = weight.codes.shape
    codes = weight_codes(editor, node, weight)
    real = editor.emit(node, "Cast", [codes], like=codes, dtype=ir.DataType.FLOAT, to=int(ir.DataType.FLOAT))
    blocks = [(s, n // s) for s, n in zip(weight.scale.shape, weight.codes.shape, strict=False)]
    blocked = weight.scale.size > 1 and any(s > 1 and inner > 1 for s, inner in blocks)
    parts = [weight.scale, weight.zero]
    if blocked:
        split = [size for block in blocks for size in block]
        real = editor.emit(node, "Reshape", [real, editor.constant(f"{weight.stem}_blocks", np.array(split))])
        parts = [part.reshape([size for s in part.shape for size in (s, 1)]) for part in parts]
    if parts[1].any():
        real = editor.emit(node, "Sub", [real, editor.constant(f"{weight.stem}_zero_point", _flat(parts[1]))])
    real = editor.emit(node, "Mul", [real, editor.constant(f"{weight.stem}_scale", _flat(parts[0]))])
    if blocked:
        real = editor.emit(node, "Reshape", [real, editor.constant(f"{weight.stem}_shape", np.array([depth, width]))])
    finish_linear(editor, linear, editor.emit(node, "MatMul", [linear.x, real], like=node.outputs[0]))
    return APPLIED


def finish_linear(editor: Editor, linear: Linear, product: ir.Value) -> None:
    """Add the bias, as [1, …, N] (see ``widen_bias``).

    To a matrix it is added by Sum: onnxruntime makes MatMul and Add of a matrix a Gemm, which it then runs in float
    whatever feeds it.
    """
    if linear.bias is not None:
        shape = dims(linear.output)
        rank = len(shape) if shape is not None else 1
        wide = linear.bias.reshape([1] * (rank - 1) + [-1])
        bias = editor.constant(f"{linear.weight.stem}_bias", wide)
        product = editor.emit(linear.matmul, "Sum" if rank == 2 else "Add", [product, bias])
    editor.replace(linear.output, product)


def _flat(array: Array) -> Array:
    return array.reshape(()) if array.size == 1 else array


def weight_codes(editor: Editor, at: ir.Node, weight: Weight) -> ir.Value:
    """The codes as the kernel reads them; in the file they take 2 or 4 bits where they have no more.

    Those of a tied table are stored once, [N, K]; the runtime turns them when it loads the model.
    """
    if weight.rows is not None:
        return transposed(editor, at, weight.rows)
    name = f"{weight.name}{weight.part}"
    spec = editor.specs.get(weight.name)
    if weight.codes.dtype.itemsize > 1 or spec is None:
        dtype = ir.DataType.from_numpy(weight.codes.dtype)
        return editor.lazy(name, "input first", dtype, weight.codes.shape, lambda: weight.codes)
    return byte_codes(editor, at, name, weight.codes, spec.grid.bits)


def byte_operands(editor: Editor, at: ir.Node, weight: Weight) -> tuple[ir.Value, ir.Value | None]:
    """Codes [K, N] of a byte each and their zero points; packed rows are unfolded once, when the model is loaded."""
    if weight.packed is None:
        return weight_codes(editor, at, weight), weight_zeros(editor, weight)
    bits, (depth, _) = editor.specs[weight.name].grid.bits, weight.codes.shape
    rows = unfold_rows(editor, at, weight.packed, bits, depth)
    zeros = weight.columns(weight.zero) + offset(weight.codes, bits)
    point = np.uint8(zeros.flat[0]) if (zeros == zeros.flat[0]).all() else zeros.astype(np.uint8)
    return transposed(editor, at, rows), editor.constant(f"{weight.stem}_zero_point", np.asarray(point))


def product_operands(
    editor: Editor, at: ir.Node, weight: Weight, *, like_scales: bool = False
) -> tuple[ir.Value, ir.Value | None]:
    """Codes [K, N] and zero points for a product with codes of 8 bits; signed ones become unsigned if it is asked for.

    With ``like_scales`` there is a zero point for each scale, else one where all are equal.
    """
    spec = editor.specs.get(weight.name)
    narrow = weight.codes.dtype != np.int8 or (spec is not None and spec.grid.bits < 8)
    if not editor.unsigned or weight.packed is not None or narrow:
        return byte_operands(editor, at, weight)
    if weight.rows is not None:
        rows = editor.emit(at, "Cast", [weight.rows], dtype=ir.DataType.UINT8, to=int(ir.DataType.UINT8))
        mask = editor.constant("sign_bit", np.uint8(SIGN_BIT))
        codes = transposed(editor, at, editor.emit(at, "BitwiseXor", [rows, mask], like=rows))
    else:
        codes = editor.lazy(
            f"{weight.name}{weight.part}", "input first, unsigned", ir.DataType.UINT8, weight.codes.shape,
            lambda: np.ascontiguousarray(weight.codes).view(np.uint8) ^ np.uint8(SIGN_BIT),
        )  # fmt: skip
    zeros = (weight.columns(weight.zero) + SIGN_BIT).astype(np.uint8)
    if not like_scales and (zeros == zeros.flat[0]).all():
        zeros = zeros.reshape(-1)[0]
    return codes, editor.constant(f"{weight.stem}_zero_point", np.asarray(zeros))


def transposed(editor: Editor, at: ir.Node, rows: ir.Value) -> ir.Value:
    """A matrix [N, K] as [K, N]."""
    shape = ir.Shape(list(dims(rows) or (None, None))[::-1])
    value = editor.emit(at, "Transpose", [rows], dtype=rows.dtype, perm=[1, 0])
    value.shape = shape
    return value


def weight_scales(editor: Editor, weight: Weight) -> ir.Value:
    """The scales: one, or one a column."""
    return editor.constant(f"{weight.stem}_scale", weight.columns(weight.scale).astype(np.float32))


def weight_zeros(editor: Editor, weight: Weight) -> ir.Value | None:
    """The zero points in the codes' type; none for symmetric signed weights."""
    if not weight.zero.any():
        return None
    return editor.constant(f"{weight.stem}_zero_point", weight.columns(weight.zero).astype(weight.codes.dtype))
