"""Quantizers in standard ONNX: QuantizeLinear and DequantizeLinear where they can say it, arithmetic elsewhere."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bitlower.backends.onnx_qdq.graph.code_operators import code_operator
from bitlower.backends.onnx_qdq.graph.nodes import DOMAIN, Array, dims, is_op, marker, source, spread
from bitlower.backends.onnx_qdq.rewrite.editor import Editor
from bitlower.backends.onnx_qdq.rewrite.rule import APPLIED
from bitlower.ir import Grid, ScaleConvention

_EPS = np.float32(5e-6)
TYPES = {"int8": ir.DataType.INT8, "uint8": ir.DataType.UINT8, "int16": ir.DataType.INT16, "uint16": ir.DataType.UINT16}


def per_tensor(editor: Editor, node: ir.Node) -> bool:
    """Whether a ``Quantize`` or ``Dequantize`` has one scale and zero point, known before the model runs."""
    parts = [editor.array(source(node, position)) for position in (1, 2)]
    return all(part is not None and part.size == 1 for part in parts)


def is_rounded(value: ir.Value) -> bool:
    """Whether ``value`` is an activation that a quantizer rounds, in any layout; rows of tables are not."""
    dequantize = marker(value, "Dequantize")
    node = source(dequantize).producer() if dequantize is not None else None
    while node is not None and (_commutes(node) or code_operator(node.op_type).passes_on == "join"):
        node = source(node).producer()
    return is_op(node, "Quantize", DOMAIN)


def _commutes(node: ir.Node) -> bool:
    """Whether a dequantization with one scale may come before ``node`` as well as after it."""
    return node.domain == "" and code_operator(node.op_type).commutes


def stored(editor: Editor, node: ir.Node, dtype: ir.DataType) -> tuple[ir.Value, ir.Value]:
    """Scalar scale (float32) and zero point (of the codes' type) of a per-tensor ``Quantize`` or ``Dequantize``."""
    scale, zero = (np.asarray(editor.array(source(node, position))).reshape(()) for position in (1, 2))
    base = (source(node, 1).name or "quantizer.scale").removesuffix(".scale")
    return (
        editor.constant(f"{base}.scale", scale.astype(np.float32)),
        editor.constant(f"{base}.zero_point", zero.astype(dtype.numpy())),
    )


def sink_dequantize(editor: Editor, node: ir.Node) -> str | None:
    """``view(Dequantize(q))`` → ``Dequantize(view(q))``: the runtime then finds the dequantization beside its matmul.

    A view commutes with one scale for the whole tensor; codes are also a quarter of the bytes to move.
    """
    code = marker(node.inputs[0], "Dequantize") if _commutes(node) else None
    if code is None or editor.array(source(code)) is not None:
        return None
    if not per_tensor(editor, code):
        return "its scales differ from element to element"
    inner = source(code)
    attributes = {a.name: a.value for a in node.attributes.values()}
    old = node.outputs[0]
    view = editor.emit(node, node.op_type, [inner, *node.inputs[1:]], like=old, dtype=inner.dtype, **attributes)
    real = editor.emit(node, "Dequantize", [view, *code.inputs[1:]], domain=DOMAIN)
    editor.replace(old, real)
    return APPLIED


def raise_quantize(editor: Editor, node: ir.Node) -> str | None:
    """``Quantize(view(x))`` → ``view(Quantize(x))`` where ``x`` is an output of the model as well.

    Left below the view, onnxruntime moves QuantizeLinear above it by itself, and then rounds the output too.
    """
    if not is_op(node, "Quantize", DOMAIN):
        return None
    views, root = list[ir.Node](), source(node)
    while not root.is_graph_output():
        view = root.producer()
        if view is None or not _commutes(view):
            return None
        views.append(view)
        root = source(view)
    if not views:
        return None
    if not per_tensor(editor, node):
        return "its scales differ from element to element"
    old = node.outputs[0]
    assert old.dtype is not None, "codes have a type"
    attributes = {a.name: a.value for a in node.attributes.values()}
    attributes["name"] = f"{attributes['name']}.before_{views[-1].op_type.lower()}"
    inputs = [root, *node.inputs[1:]]
    [codes] = editor.emit_all(node, "Quantize", inputs, 1, domain=DOMAIN, **attributes)
    assert old.dtype is not None
    codes.shape, codes.dtype = root.shape, old.dtype
    for view in reversed(views):
        how = {a.name: a.value for a in view.attributes.values()}
        codes = editor.emit(node, view.op_type, [codes, *view.inputs[1:]], like=view.outputs[0], dtype=old.dtype, **how)
    editor.replace(old, codes)
    editor.name(codes, str(node.attributes.get_string("name")))
    return APPLIED


def lower_qparams(editor: Editor, node: ir.Node) -> str | None:
    """Per-token scale and zero point, by the formulas of :meth:`bitlower.ir.Grid.qparams`."""
    if not is_op(node, "ChooseQparams", DOMAIN):
        return None
    grid = _grid(node)
    x = source(node)
    axes = editor.constant("last_axis", np.array([-1], np.int64))
    nothing = editor.constant("zero", np.float32(0))
    reduced = node.outputs[0]
    low = editor.emit(node, "ReduceMin", [x, axes], like=reduced, keepdims=1)
    high = editor.emit(node, "ReduceMax", [x, axes], like=reduced, keepdims=1)
    low = editor.emit(node, "Min", [low, nothing], like=reduced)
    high = editor.emit(node, "Max", [high, nothing], like=reduced)
    if grid.symmetric:
        scale = _safe(editor, node, _symmetric_scale(editor, node, grid, low, high))
        fixed = 1 << (grid.bits - 1) if grid.convention is ScaleConvention.OFFSET else 0
        zero = editor.constant(f"zero_point_{fixed}", np.float32(fixed))
    else:
        scale, zero = _asymmetric(editor, node, grid, low, high)
    editor.replace(node.outputs[0], scale)
    ir.convenience.replace_all_uses_with(node.outputs[1], zero)
    return APPLIED


def _grid(node: ir.Node) -> Grid:
    get = node.attributes.get_int
    flags = [bool(get(name)) for name in ("signed", "symmetric", "restricted")]
    convention = ScaleConvention(str(node.attributes.get_string("convention")))
    return Grid(int(get("bits") or 0), flags[0], flags[1], flags[2], convention)


def _asymmetric(editor: Editor, at: ir.Node, grid: Grid, low: ir.Value, high: ir.Value) -> tuple[ir.Value, ir.Value]:
    steps = editor.constant(f"steps_{grid.bits}", np.float32(grid.quant_max - grid.quant_min))
    bottom, top = _limits(editor, grid.quant_min, grid.quant_max)
    spanned = editor.emit(at, "Sub", [high, low], like=low)
    scale = _safe(editor, at, editor.emit(at, "Div", [spanned, steps], like=low))
    rounded = editor.emit(at, "Round", [editor.emit(at, "Div", [low, scale], like=low)], like=low)
    zero = editor.emit(at, "Sub", [bottom, rounded], like=low)
    return scale, editor.emit(at, "Clip", [zero, bottom, top], like=low)


def _symmetric_scale(editor: Editor, at: ir.Node, grid: Grid, low: ir.Value, high: ir.Value) -> ir.Value:
    half = 1 << (grid.bits - 1)

    def divide(value: ir.Value, by: int) -> ir.Value:
        return editor.emit(at, "Div", [value, editor.constant(f"divisor_{by}", np.float32(by))], like=low)

    if not grid.signed and grid.convention is ScaleConvention.QMAX:
        return divide(high, grid.quant_max)
    absmax = editor.emit(at, "Max", [editor.emit(at, "Neg", [low], like=low), high], like=low)
    match grid.convention:
        case ScaleConvention.QMAX:
            return divide(absmax, half - 1)
        case ScaleConvention.HALF_RANGE:
            return divide(absmax, half)
        case ScaleConvention.HALF_RANGE_EPS:
            some = editor.emit(at, "Greater", [absmax, editor.constant("zero", np.float32(0))])
            raised = editor.emit(at, "Add", [absmax, editor.constant("epsilon", _EPS)], like=low)
            return divide(editor.emit(at, "Where", [some, raised, absmax], like=low), half)
        case ScaleConvention.OFFSET:
            doubled = editor.emit(at, "Mul", [absmax, editor.constant("two", np.float32(2))], like=low)
            return divide(doubled, 2 * half - 1)


def _safe(editor: Editor, at: ir.Node, scale: ir.Value) -> ir.Value:
    """Never zero: an all-zero token gets 1, a subnormal scale the smallest normal float32."""
    tiny = editor.constant("smallest_normal", np.float32(np.finfo(np.float32).tiny))
    nothing, one = editor.constant("zero", np.float32(0)), editor.constant("one", np.float32(1))
    raised = editor.emit(at, "Max", [scale, tiny], like=scale)
    return editor.emit(at, "Where", [editor.emit(at, "Equal", [scale, nothing]), one, raised], like=scale)


def _limits(editor: Editor, low: int, high: int) -> tuple[ir.Value, ir.Value]:
    names = [f"limit_{'minus_' if v < 0 else ''}{abs(v)}" for v in (low, high)]
    return editor.constant(names[0], np.float32(low)), editor.constant(names[1], np.float32(high))


def lower_quantize(editor: Editor, node: ir.Node) -> str | None:
    """QuantizeLinear per tensor, else round, shift, clip and cast. The codes bear the Program's name.

    onnxruntime's QuantizeLinear with scales along the last axis takes ten times as long as the arithmetic.
    """
    if not is_op(node, "Quantize", DOMAIN):
        return None
    dtype = TYPES[str(node.attributes.get_string("dtype"))]
    low, high = (int(node.attributes.get_int(f"quant_{end}") or 0) for end in ("min", "max"))
    whole = (low, high) == (dtype.min, dtype.max)
    if not per_tensor(editor, node):
        codes = _explicit_codes(editor, node, low, high, dtype)
    elif whole:
        codes = _quantize_linear(editor, node, source(node), dtype)
    elif dtype is ir.DataType.UINT8:
        limits = [editor.constant(f"limit_uint8_{end}", np.uint8(end)) for end in (low, high)]
        codes = _quantize_linear(editor, node, source(node), dtype)
        codes = editor.emit(node, "Clip", [codes, *limits], like=codes)
    else:
        codes = _quantize_linear(editor, node, _clipped(editor, node, low, high), dtype)
    editor.replace(node.outputs[0], codes)
    editor.name(codes, str(node.attributes.get_string("name")))
    return APPLIED


def _clipped(editor: Editor, node: ir.Node, low: int, high: int) -> ir.Value:
    """``x`` in the range of a grid that is narrower than its type.

    The codes are the same as if they were clipped themselves, for ``k · s / s`` rounds to k. onnxruntime has no Clip of
    16 bits, and takes signed codes into integer matmuls only if QuantizeLinear and DequantizeLinear are neighbours;
    unsigned ones are clipped as codes, so that QuantizeLinear stays next to the matmul before it.
    """
    scale, zero = (np.asarray(editor.array(source(node, position))).reshape(()) for position in (1, 2))
    base = (source(node, 1).name or "quantizer.scale").removesuffix(".scale")
    ends = [
        editor.constant(f"{base}.{name}", np.float32((limit - zero) * scale))
        for name, limit in (("low", low), ("high", high))
    ]
    return editor.emit(node, "Clip", [source(node), *ends], like=source(node))


def _quantize_linear(editor: Editor, node: ir.Node, x: ir.Value, dtype: ir.DataType) -> ir.Value:
    scale, zero = stored(editor, node, dtype)
    return editor.emit(node, "QuantizeLinear", [x, scale, zero], like=node.outputs[0], dtype=dtype)


def _explicit_codes(editor: Editor, node: ir.Node, low: int, high: int, dtype: ir.DataType) -> ir.Value:
    x = source(node)
    scale, zero = (_operand(editor, node, position, x) for position in (1, 2))
    codes = editor.emit(node, "Round", [editor.emit(node, "Div", [x, scale], like=x)], like=x)
    if not _all_zero(editor, zero):
        codes = editor.emit(node, "Add", [codes, zero], like=x)
    codes = editor.emit(node, "Clip", [codes, *_limits(editor, low, high)], like=x)
    return editor.emit(node, "Cast", [codes], like=x, dtype=dtype, to=int(dtype))


def lower_dequantize(editor: Editor, node: ir.Node) -> str | None:
    """DequantizeLinear per tensor; ``(q − z) · s`` spelled out for scales that differ and for constants.

    onnxruntime takes a DequantizeLinear with scales along the last axis of an activation for one that its integer
    matmul can swallow, and fails when it runs. A constant behind arithmetic is folded to float once, at load; behind a
    DequantizeLinear onnxruntime would make it a MatMulNBits that quantizes its activations unasked.
    """
    if not is_op(node, "Dequantize", DOMAIN):
        return None
    code = source(node)
    if per_tensor(editor, node) and editor.array(code) is None:
        assert code.dtype is not None
        scale, zero = stored(editor, node, code.dtype)
        real = editor.emit(node, "DequantizeLinear", [code, scale, zero])
    else:
        real = arithmetic(editor, node, code, *(_operand(editor, node, position, code) for position in (1, 2)))
    editor.replace(node.outputs[0], real)
    return APPLIED


def arithmetic(editor: Editor, at: ir.Node, code: ir.Value, scale: ir.Value, zero: ir.Value) -> ir.Value:
    """``(code − zero) · scale`` in float32."""
    real = editor.emit(at, "Cast", [code], like=code, dtype=ir.DataType.FLOAT, to=int(ir.DataType.FLOAT))
    if not _all_zero(editor, zero):
        real = editor.emit(at, "Sub", [real, zero], like=real)
    return editor.emit(at, "Mul", [real, scale], like=real)


def _all_zero(editor: Editor, value: ir.Value) -> bool:
    array = editor.array(value)
    return array is not None and not array.any()


def _operand(editor: Editor, node: ir.Node, position: int, x: ir.Value) -> ir.Value:
    """A scale or zero point that broadcasts over ``x``."""
    value = source(node, position)
    if editor.array(value) is None:
        return value
    return editor.constant(value.name or "quantizer", _spread_input(editor, node, position, x))


def _spread_input(editor: Editor, node: ir.Node, position: int, x: ir.Value) -> Array:
    array = editor.array(source(node, position))
    assert array is not None
    shape = dims(x)
    return spread(array, shape if shape is not None else array.shape)
