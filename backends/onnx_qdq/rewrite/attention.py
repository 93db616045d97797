"""Attention that stays float: ONNX's Attention operator on [batch, sequence, width], without reshapes around it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bitlower.backends.onnx_qdq.graph.nodes import dims, is_op, only_user, source
from bitlower.backends.onnx_qdq.rewrite.editor import Editor
from bitlower.backends.onnx_qdq.rewrite.rule import APPLIED

_HEADS_OUT = [0, 2, 1, 3]


def widen_mask(editor: Editor, node: ir.Node) -> str | None:
    """Give a mask one row a query and one column a key: onnxruntime's Attention broadcasts no [batch, 1, 1, keys].

    Its kernel rejects a mask with one row for all queries; one with one column for all keys it may misread.
    """
    if not is_op(node, "Attention") or len(node.inputs) < 4 or node.inputs[3] is None:
        return None
    mask, query, key = source(node, 3), source(node), source(node, 1)
    shape = dims(mask)
    if shape is None:
        return "the rank of the mask is not known"
    if len(shape) > 1 and 1 not in shape[-2:]:
        return "the mask has a row a query already"
    axis = 1 if node.attributes.get_int("q_num_heads", 0) else 2
    lengths = [editor.emit(node, "Shape", [part], start=axis, end=axis + 1) for part in (query, key)]
    target = editor.emit(node, "Concat", lengths, axis=0)
    wide = editor.emit(node, "Expand", [mask, target], dtype=mask.dtype)
    wide.shape = ir.Shape([*shape[:-2], None, None])
    node.replace_input_with(3, wide)
    return APPLIED


def widen_rotary(editor: Editor, node: ir.Node) -> str | None:
    """Give the tables of a rotary embedding one row a sequence; in torch the batch may share [1, length, half].

    ONNX's RotaryEmbedding takes tables of the batch of its input, where it is given no positions.
    """
    if not is_op(node, "RotaryEmbedding") or any(value is not None for value in node.inputs[3:]):
        return None
    batch = (dims(source(node)) or (None,))[0]
    if batch is not None and all(_rows(source(node, position)) == batch for position in (1, 2)):
        return "the tables have the batch of the input"
    for position in (1, 2):
        node.replace_input_with(position, _batched(editor, node, source(node, position), batch))
    return APPLIED


def _rows(table: ir.Value) -> int | str | None:
    """The first dimension of a table of cosines or sines, as far as the graph says it."""
    made = table.producer()
    if table.shape is None and made is not None and made.op_type in ("Cos", "Sin"):
        table = source(made)
    return (dims(table) or (None,))[0]


def _batched(editor: Editor, node: ir.Node, table: ir.Value, batch: int | str | None) -> ir.Value:
    """``table`` [1, length, half] for each sequence of ``node``'s input; made once for all that read it."""
    for user, _ in table.uses():
        if is_op(user, "Expand") and batch is not None and _rows(user.outputs[0]) == batch:
            return user.outputs[0]
    count = editor.emit(node, "Shape", [source(node)], start=0, end=1)
    rest = editor.constant("ones", np.ones(2, np.int64))
    wide = editor.emit(node, "Expand", [table, editor.emit(node, "Concat", [count, rest], axis=0)], dtype=table.dtype)
    wide.shape = ir.Shape([batch, None, None])
    return wide


def flatten_attention(editor: Editor, node: ir.Node) -> str | None:
    """Take query, key and value as the linears give them; Attention splits and joins the heads itself."""
    if not is_op(node, "Attention"):
        return None
    operands = [_flat_operand(editor, node, source(node, position)) for position in range(3)]
    if any(operand is None for operand in operands):
        return "its operands are not reshaped and transposed linears"
    joined = _join_heads(node.outputs[0])
    if joined is None:
        return "its result is not transposed and reshaped to the full width"
    heads = [dims(source(node, position)) for position in range(2)]
    counts = [shape[1] for shape in heads if shape is not None]
    if len(counts) != 2 or not all(isinstance(count, int) for count in counts):
        return "the number of heads is not known"
    attributes = {a.name: a.value for a in node.attributes.values()}
    attributes |= {"q_num_heads": counts[0], "kv_num_heads": counts[1]}
    results = [joined, *node.outputs[1:]]
    inputs = [*operands, *node.inputs[3:]]
    for old, new in zip(results, editor.emit_all(node, "Attention", inputs, len(results), **attributes), strict=True):
        editor.replace(old, new)
    return APPLIED


def _flat_operand(editor: Editor, at: ir.Node, value: ir.Value) -> ir.Value | None:
    """[B, S, heads · size] that ``value`` [B, heads, S, size] is made of, with its rotary embedding if it has one."""
    rotary = value.producer()
    if not is_op(rotary, "RotaryEmbedding"):
        return _split_heads(value)
    assert rotary is not None
    flat, shape = _split_heads(source(rotary)), dims(value)
    if flat is None or shape is None or not isinstance(shape[1], int) or len(rotary.inputs) > 3:
        return None
    attributes = {a.name: a.value for a in rotary.attributes.values()} | {"num_heads": shape[1]}
    return editor.emit(at, "RotaryEmbedding", [flat, *rotary.inputs[1:]], like=flat, **attributes)


def _split_heads(value: ir.Value) -> ir.Value | None:
    """``x`` where ``value`` is ``Transpose(Reshape(x))`` from [B, S, heads · size] to [B, heads, S, size]."""
    transpose = value.producer()
    if not is_op(transpose, "Transpose") or _perm(transpose) != _HEADS_OUT:
        return None
    assert transpose is not None
    reshape = source(transpose).producer()
    if not is_op(reshape, "Reshape"):
        return None
    assert reshape is not None
    x = source(reshape)
    outer, inner = dims(x), dims(value)
    if outer is None or inner is None or len(outer) != 3 or len(inner) != 4:
        return None
    sizes = (outer[2], inner[1], inner[3])
    static = [size for size in sizes if isinstance(size, int)]
    return x if len(static) == 3 and static[0] == static[1] * static[2] and outer[1] == inner[2] else None


def _join_heads(value: ir.Value) -> ir.Value | None:
    """The [B, S, heads · size] that ``value`` [B, heads, S, size] becomes, if nothing else is made of it."""
    user = only_user(value)
    while user is not None and is_op(user, "Reshape") and dims(user.outputs[0]) == dims(value):
        user = only_user(user.outputs[0])
    if not is_op(user, "Transpose") or _perm(user) != _HEADS_OUT:
        return None
    assert user is not None
    reshape = only_user(user.outputs[0])
    if not is_op(reshape, "Reshape"):
        return None
    assert reshape is not None
    inner, outer = dims(value), dims(reshape.outputs[0])
    if inner is None or outer is None or len(outer) != 3:
        return None
    static = [size for size in (outer[2], inner[1], inner[3]) if isinstance(size, int)]
    joins = len(static) == 3 and static[0] == int(np.prod(static[1:])) and outer[1] == inner[2]
    return reshape.outputs[0] if joins else None


def _perm(node: ir.Node | None) -> list[int]:
    assert node is not None
    return list(node.attributes["perm"].as_ints())
