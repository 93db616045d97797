"""Rewrites of float arithmetic that keep onnxruntime from fusing into kernels that are slower than the parts."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bitlower.backends.onnx_qdq.graph.nodes import dims, is_op, only_user, source
from bitlower.backends.onnx_qdq.rewrite.editor import Editor
from bitlower.backends.onnx_qdq.rewrite.rule import APPLIED


def widen_bias(editor: Editor, node: ir.Node) -> str | None:
    """The bias of a linear as [1, …, N]: with a vector onnxruntime fuses it with a Gelu to BiasGelu.

    That kernel takes longer than Gelu and Add together, in float models too.
    """
    if not is_op(node, "Add"):
        return None
    for position in (0, 1):
        product, bias = source(node, position), editor.array(source(node, 1 - position))
        if is_op(product.producer(), "MatMul") and bias is not None and bias.ndim == 1:
            break
    else:
        return None
    shape = dims(node.outputs[0])
    if shape is None:
        return "the rank of the result is not known"
    value = source(node, 1 - position)
    wide = bias.reshape([1] * (len(shape) - 1) + [bias.size])
    node.replace_input_with(1 - position, editor.constant(value.name or "bias", np.asarray(wide)))
    return APPLIED


def residual_sum(editor: Editor, node: ir.Node) -> str | None:
    """A residual Add before LayerNormalization as Sum, which onnxruntime does not fuse to SkipLayerNormalization.

    Measured on encoders, that fused kernel takes several times as long as Sum and LayerNormalization one by one.
    """
    if not is_op(node, "Add"):
        return None
    if not any(is_op(user, "LayerNormalization") and i == 0 for user, i in node.outputs[0].uses()):
        return None
    if any(editor.array(value) is not None for value in node.inputs):
        return "one operand is a constant"
    editor.replace(node.outputs[0], editor.emit(node, "Sum", list(node.inputs), like=node.outputs[0]))
    return APPLIED


def matrix_sum(editor: Editor, node: ir.Node) -> str | None:
    """The sum of integer products of matrices (slices of one linear) as Sum.

    Of MatMul and Add of rank 2 onnxruntime makes a Gemm, which it then runs in float.
    """
    shape = dims(node.outputs[0]) if is_op(node, "Add") else None
    if shape is None or len(shape) != 2:
        return None
    products = [value.producer() for value in node.inputs if value is not None]
    if not any(is_op(product, "MatMul") and product is not None and _is_rounded(product) for product in products):
        return None
    editor.replace(node.outputs[0], editor.emit(node, "Sum", list(node.inputs), like=node.outputs[0]))
    return APPLIED


def _is_rounded(product: ir.Node) -> bool:
    return is_op(source(product).producer(), "DequantizeLinear")


_BEFORE_ROUNDING = frozenset({
    "Clip", "Relu", "Reshape", "Transpose", "Slice", "Gather", "Unsqueeze", "Squeeze", "Flatten", "Expand", "Identity",
})  # fmt: skip
"""Operators that onnxruntime moves or drops in front of a QuantizeLinear."""


def keep_apart(editor: Editor, node: ir.Node) -> str | None:
    """Put a Sum of one operand, which copies, where onnxruntime would fuse quantizers into something with other codes.

    It makes a QLinearSoftmax, which computes in fixed point, of a Softmax between DequantizeLinear and QuantizeLinear,
    and one pair with other parameters of two pairs that follow one another.
    """
    if not is_op(node, "Softmax") and not is_op(node, "QuantizeLinear"):
        return None
    value = source(node)
    above = value.producer()
    while is_op(node, "QuantizeLinear") and above is not None and above.op_type in _BEFORE_ROUNDING:
        above = source(above).producer()
    if not is_op(above, "DequantizeLinear"):
        return "what it reads is computed in float"
    if is_op(node, "Softmax") and not _is_rounded_after(node.outputs[0]):
        return "what it gives is not rounded"
    node.replace_input_with(0, editor.emit(node, "Sum", [value], like=value))
    return APPLIED


def _is_rounded_after(value: ir.Value) -> bool:
    users = [user for user, _ in value.uses()]
    views = [user for user in users if user.op_type in _BEFORE_ROUNDING]
    return any(is_op(u, "QuantizeLinear") for u in users) or any(_is_rounded_after(v.outputs[0]) for v in views)


def free_product(editor: Editor, node: ir.Node) -> str | None:
    """A Relu or Clip of an integer product in a form that onnxruntime does not look at.

    It takes a product in front of one of them only together with a QuantizeLinear behind, and in float without.
    """
    if not is_op(node, "Relu") and not is_op(node, "Clip"):
        return None
    value = source(node)
    product = value.producer()
    if not is_op(product, "MatMul") or product is None or not _is_rounded(product):
        return "it is not that of an integer product"
    user = only_user(node.outputs[0])
    if is_op(user, "QuantizeLinear"):
        return "a quantizer follows"
    if is_op(node, "Clip"):
        node.replace_input_with(0, editor.emit(node, "Sum", [value], like=value))
    else:
        nothing = editor.constant("zero", np.float32(0))
        editor.replace(node.outputs[0], editor.emit(node, "Max", [value, nothing], like=value))
    return APPLIED


def strip(model: ir.Model) -> None:
    """Remove what the exporters noted: source lines with paths of this machine, and types of inner values."""
    fixed = {*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()}
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.doc_string = model.graph.doc_string = None
    model.functions.clear()
    for value in fixed:
        value.metadata_props.clear()
        value.doc_string = None
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        node.version = None
        for value in node.outputs:
            value.metadata_props.clear()
            value.doc_string = None
            if value not in fixed:
                value.shape = value.type = None
    domains = {node.domain for node in model.graph} | {""}
    for domain in list(model.opset_imports):
        if domain not in domains:
            del model.opset_imports[domain]
    if "com.microsoft" in domains:
        model.opset_imports["com.microsoft"] = 1
