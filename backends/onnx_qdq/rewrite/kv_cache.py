"""Attention over a KV cache: the operator itself appends the step's keys and values to those of the past."""

from __future__ import annotations

import onnx_ir as ir

from bitlower.backends.onnx_qdq.graph.nodes import dims, is_op, source
from bitlower.backends.onnx_qdq.rewrite.editor import Editor
from bitlower.backends.onnx_qdq.rewrite.rule import APPLIED
from bitlower.ir.tokens import ENCODER_PAST

_LENGTH = (2, -2)
"""The axis of [batch, heads, length, head_dim] that grows."""


def keep_cache(editor: Editor, node: ir.Node) -> str | None:
    """``Attention(q, repeat(Concat(past, k)), …)`` → ``Attention(q, k, …, past)``, which returns ``present`` as well.

    Keys and values of grouped-query attention are read by all their heads where they lie, and not copied for each.
    """
    if not is_op(node, "Attention") or len(node.inputs) > 4 or len(node.outputs) != 1:
        return None
    if node.attributes.get_int("is_causal", 0):
        return "the mask is not in its inputs"
    sides = [_cached(source(node, position)) for position in (1, 2)]
    grown = [side for side in sides if side is not None]
    if len(grown) != 2:
        return "its keys and values are not those of a cache with new ones appended"
    query, (keys, values) = source(node), grown
    if any(ENCODER_PAST in (dims(source(concat)) or ()) for concat in (keys, values)):
        return "a later step adds nothing to its keys and values, which the operator refuses"
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    attributes = {a.name: a.value for a in node.attributes.values()}
    pasts, steps = zip(*(concat.inputs for concat in (keys, values)), strict=True)
    operands = [query, *steps, mask, *pasts]
    y, *presents = editor.emit_all(node, "Attention", operands, 3, **attributes)
    for concat, present in zip((keys, values), presents, strict=True):
        editor.replace(concat.outputs[0], present)
    editor.replace(node.outputs[0], y)
    return APPLIED


def _cached(value: ir.Value) -> ir.Node | None:
    """The node that appends to a cache what ``value`` is read from: an input of the graph in, an output out."""
    present = _before_repeat(value)
    concat = present.producer()
    if not is_op(concat, "Concat") or not present.is_graph_output():
        return None
    assert concat is not None
    joined = len(concat.inputs) == 2 and concat.attributes["axis"].as_int() in _LENGTH
    past = source(concat)
    return concat if joined and past.is_graph_input() and len(present.uses()) == 1 else None


def _before_repeat(value: ir.Value) -> ir.Value:
    """``x`` where ``value`` repeats each head of x [batch, kv_heads, length, head_dim], as Hugging Face writes it."""
    reshape = value.producer()
    expand = source(reshape).producer() if reshape is not None and is_op(reshape, "Reshape") else None
    unsqueeze = source(expand).producer() if expand is not None and is_op(expand, "Expand") else None
    if expand is None or unsqueeze is None or not is_op(unsqueeze, "Unsqueeze"):
        return value
    x, outer, wide = dims(source(unsqueeze)), dims(value), dims(expand.outputs[0])
    if x is None or outer is None or wide is None or len(x) != 4 or len(outer) != 4 or len(wide) != 5:
        return value
    sizes = (x[1], wide[1], wide[2], outer[1], x[3], wide[4], outer[3])
    heads, folded, copies, all_heads, *widths = [size if isinstance(size, int) else 0 for size in sizes]
    repeats = 0 < heads == folded and heads * copies == all_heads and len({*widths}) == 1
    return source(unsqueeze) if repeats and dims(unsqueeze.outputs[0]) == (*x[:2], 1, *x[2:]) else value
