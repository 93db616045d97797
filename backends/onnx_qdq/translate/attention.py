"""torch's attention as ONNX: the Attention operator where the operands fit it, products and a softmax where not.

torch broadcasts queries, keys and values over the batch and over the heads (multi-query attention, Shazeer 2019) and
takes any number of axes before the last two; ONNX's operator, which came with opset 23, takes four axes of one batch.
A query that may look at no key gives 0 in torch, and here too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
from onnxscript import BOOL, FLOAT, opset18, opset23

ATTENTION_OPSET = 23
"""The first opset with an Attention operator."""


def for_opset(opset: int) -> Callable[..., Any]:
    """What translates ``aten.scaled_dot_product_attention`` to operators that are there at ``opset``."""
    return operator_if_it_fits if opset >= ATTENTION_OPSET else written_out


def operator_if_it_fits(
    query: FLOAT,
    key: FLOAT,
    value: FLOAT,
    attn_mask: FLOAT | BOOL | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> FLOAT:
    """``aten.scaled_dot_product_attention``, by ONNX's operator if its operands fit."""
    _refuse_dropout(dropout_p)
    if not _fits(query, key, value, enable_gqa):
        return written_out(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    return opset23.Attention(query, key, value, attn_mask, scale=scale, is_causal=is_causal)[0]


def written_out(
    query: FLOAT,
    key: FLOAT,
    value: FLOAT,
    attn_mask: FLOAT | BOOL | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> FLOAT:
    """``aten.scaled_dot_product_attention`` in operators of opset 18."""
    _refuse_dropout(dropout_p)
    if enable_gqa:
        key, value = (_repeated(part, query) for part in (key, value))
    rank = len(query.shape)
    turned = opset18.Transpose(key, perm=[*range(rank - 2), rank - 1, rank - 2])
    factor = scale if scale is not None else 1 / math.sqrt(query.shape[-1])
    scores = opset18.Mul(opset18.MatMul(query, turned), opset18.Constant(value_float=factor))
    if is_causal:
        scores = _hidden(scores, _not_later(query, key))
    elif attn_mask is not None:
        boolean = attn_mask.dtype is ir.DataType.BOOL
        scores = _hidden(scores, attn_mask) if boolean else opset18.Add(scores, attn_mask)
    masked = attn_mask is not None
    return opset18.MatMul(safe_softmax(scores, -1) if masked else opset18.Softmax(scores, axis=-1), value)


def safe_softmax(self: FLOAT, dim: int, dtype: int = 1) -> FLOAT:
    """``aten._safe_softmax``: a row of −∞ gives zeros, and no NaN."""
    probs = opset18.Softmax(self, axis=dim)
    return opset18.Where(opset18.IsNaN(probs), opset18.Constant(value_float=0.0), probs)


def _refuse_dropout(dropout_p: float) -> None:
    if dropout_p:
        raise ValueError(f"attention with dropout ({dropout_p}) has no form in ONNX")


def _fits(query: Any, key: Any, value: Any, groups: bool) -> bool:
    """Whether they are ``[batch, heads, length, head_dim]`` of one batch, with key and value heads of one number.

    That number divides the query heads where ``groups`` are asked for, and is theirs or 1 where not.
    """
    shapes = [part.shape for part in (query, key, value)]
    if any(len(shape) != 4 for shape in shapes) or not all(shape[0] == shapes[0][0] for shape in shapes):
        return False
    heads, keys, values = (shape[1] for shape in shapes)
    if keys != values:
        return False
    if heads == keys or not isinstance(keys, int) or not isinstance(heads, int):
        return bool(heads == keys)
    return keys > 0 and heads % keys == 0 if groups else keys == 1


def _repeated(part: Any, query: Any) -> Any:
    """``[…, groups, length, width]``, each group as often in a row as it has query heads; as it is if that is once."""
    axis = len(part.shape) - 3
    groups, heads = part.shape[axis], query.shape[axis]
    if groups in (1, heads):
        return part
    repeats, heads_and_rest = [1] * axis + [1, heads // groups, 1, 1], [0] * axis + [heads, -1, part.shape[-1]]
    added = opset18.Unsqueeze(part, opset18.Constant(value_ints=[axis + 1]))
    wide = opset18.Expand(added, opset18.Constant(value_ints=repeats))
    return opset18.Reshape(wide, opset18.Constant(value_ints=heads_and_rest))


def _hidden(scores: Any, mask: Any) -> Any:
    """``scores`` where ``mask`` is true, else −∞."""
    return opset18.Where(mask, scores, opset18.Constant(value_float=-math.inf))


def _not_later(query: Any, key: Any) -> Any:
    """``[queries, keys]``, true where the key is not later than the query, both counted from the start."""
    zero, one = (opset18.Constant(value_int=number) for number in (0, 1))
    lengths = [opset18.Squeeze(opset18.Shape(part, start=-2, end=-1)) for part in (query, key)]
    rows, columns = (opset18.Range(zero, length, one) for length in lengths)
    return opset18.LessOrEqual(columns, opset18.Unsqueeze(rows, opset18.Constant(value_ints=[1])))
