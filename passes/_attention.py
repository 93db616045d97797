"""Attention in its two forms: one operator while it stays float, explicit matmuls where parts of it are quantized.

Grouped queries (Ainslie et al. 2023): ``enable_gqa`` on the operator, which then reads keys and values as they are in
the cache; in the explicit form keys and values are repeated, one copy a query head.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import fx

from bitlower.ir import BitlowerError, TensorType, describe
from bitlower.ir.dataflow import ATTENTION, MATMUL, SOFTMAX, VIEWS, operand
from bitlower.passes._rewrite import Rule, call_like, replace, sole_user

aten = torch.ops.aten


class _Call(NamedTuple):
    """What an attention operator is called with."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None
    scale: float
    is_causal: bool


def expand_attention(node: fx.Node) -> None:
    """Replace one attention operator by QKᵀ, scaling, mask, softmax and the product with V.

    Masked scores get −∞, and a row that is masked throughout gives 0, as in torch's operator: its softmax is
    ``_safe_softmax``. A causal mask, which hides no row throughout, is made from the lengths at run time; keys and
    values of grouped queries are repeated.

    Raises:
        BitlowerError: the attention has dropout, no fixed scale, or heads that do not divide.
    """
    call = _call(node)
    kind, keys = call.query.meta["type"], call.key.meta["type"]
    scores_type = TensorType(kind.dtype, (*kind.shape[:-1], keys.shape[-2]))
    with node.graph.inserting_before(node):
        key, value = (_repeated(node, part, kind.shape[-3:-2]) for part in (call.key, call.value))
        turned = call_like(node, aten.transpose.int, (key, -2, -1), _swap(key.meta["type"]))
        scores = call_like(node, aten.matmul.default, (call.query, turned), scores_type)
        scaled = call_like(node, aten.mul.Tensor, (scores, call.scale), scores_type)
        mask = _causal_mask(node, call) if call.is_causal else call.mask
        masked = _masked(node, scaled, mask, scores_type) if mask is not None else scaled
        softmax = aten.softmax.int if call.mask is None else aten._safe_softmax.default
        probs = call_like(node, softmax, (masked, -1), scores_type)
        context = call_like(node, aten.matmul.default, (probs, value), node.meta["type"])
    node.replace_all_uses_with(context)
    node.graph.erase_node(node)


def fold_attention(softmax: fx.Node) -> fx.Node | str:
    """Replace the explicit attention around ``softmax`` by one operator; what it is replaced by, or why it is not."""
    context = sole_user(softmax)
    if context is None or context.target not in MATMUL or context.args[0] is not softmax:
        return "its result is not used by one matmul alone"
    if softmax.args[1] not in (-1, softmax.meta["type"].rank - 1) or softmax.meta["type"].rank != 4:
        return "it is not over the last of four axes"
    scores, mask = _without_mask(operand(softmax, 0))
    scores, scale = _without_scale(scores)
    if scores.target not in MATMUL or len(scores.users) != 1:
        return "its scores are not one scaled and masked matmul"
    query, turned = operand(scores, 0), operand(scores, 1)
    if turned.target is not aten.transpose.int or {a % 4 for a in turned.args[1:] if isinstance(a, int)} != {2, 3}:
        return "the keys are not transposed on their last two axes"
    if mask is not None and mask.meta["type"].rank != 4:
        return "the mask has not four axes"
    args = (query, operand(turned, 0), operand(context, 1), *((mask,) if mask is not None else ()))
    return replace(context, aten.scaled_dot_product_attention.default, args, context.meta["type"], scale=scale)


def fold_repeated_heads(node: fx.Node) -> fx.Node | str | None:
    """Let an attention operator read grouped keys and values as they are, instead of a copy for each query head."""
    key, value = operand(node, 1), operand(node, 2)
    sources = [_unrepeated(part) for part in (key, value)]
    if not any(sources):
        return None
    if not all(sources):
        return "only one of keys and values is repeated"
    args = (node.args[0], *sources, *node.args[3:])
    return replace(node, node.target, args, node.meta["type"], **{**node.kwargs, "enable_gqa": True})


def _unrepeated(node: fx.Node) -> fx.Node | None:
    """What ``node`` repeats, each head several times in a row, ``[batch, groups, length, width]``; else None."""
    if node.target is aten.repeat_interleave.self_int and node.args[2:] in ((1,), (-3,)) and not node.kwargs:
        return operand(node, 0)
    if node.target not in (aten.reshape.default, aten.view.default):
        return None
    expanded = operand(node, 0)
    if expanded.target is not aten.expand.default:
        return None
    added = operand(expanded, 0)
    if added.target is not aten.unsqueeze.default or added.args[1] not in (2, -3):
        return None
    source, wide, result = (n.meta["type"].shape for n in (operand(added, 0), expanded, node))
    fits = len(source) == len(result) == 4 and len(wide) == 5
    same = fits and (source[0], source[2:]) == (result[0], result[2:]) and wide[:2] == source[:2]
    return operand(added, 0) if same and wide[1] * wide[2] == result[1] and wide[3:] == source[2:] else None


def _without_mask(scores: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """The scores before a mask is added, and the mask."""
    plain = scores.target is aten.add.Tensor and not scores.kwargs and len(scores.users) == 1
    if not plain or not all(isinstance(value, fx.Node) for value in scores.args):
        return scores, None
    return operand(scores, 0), operand(scores, 1)


def _without_scale(scores: fx.Node) -> tuple[fx.Node, float]:
    """The scores before a number is multiplied in, and the number."""
    factor = scores.args[1] if len(scores.args) > 1 else None
    if scores.target not in (aten.mul.Tensor, aten.div.Tensor) or not isinstance(factor, int | float) or not factor:
        return scores, 1.0
    return operand(scores, 0), float(factor if scores.target is aten.mul.Tensor else 1 / factor)


def is_scores(node: fx.Node) -> bool:
    """Whether ``node`` is the product QKᵀ of an explicit attention: a matmul that reaches a softmax elementwise."""
    if node.target not in MATMUL:
        return False
    elementwise = {aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.where.self, aten.masked_fill.Scalar} | VIEWS
    frontier = list(node.users)
    while frontier:
        user = frontier.pop()
        if user.target in SOFTMAX:
            return True
        if user.target in elementwise or "quantizer" in user.meta:
            frontier += user.users
    return False


def is_context(node: fx.Node) -> bool:
    """Whether ``node`` is the product of attention probabilities and values."""
    if node.target in ATTENTION:
        return True
    first = node.args[0] if node.target in MATMUL else None
    while isinstance(first, fx.Node) and (first.target in VIEWS or "quantizer" in first.meta):
        first = first.all_input_nodes[0]
    return isinstance(first, fx.Node) and first.target in SOFTMAX


def _call(node: fx.Node) -> _Call:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    if given.get("dropout_p"):
        raise BitlowerError(f"attention with dropout cannot be quantized inside: {describe(node)}")
    width, scale = given["query"].meta["type"].shape[-1], given.get("scale")
    if scale is None and not isinstance(width, int):
        raise BitlowerError(f"attention over heads of the symbolic width {width} has no fixed scale: {describe(node)}")
    factor = float(scale) if scale is not None else 1 / math.sqrt(width)
    query, key, value, mask = given["query"], given["key"], given["value"], given.get("attn_mask")
    return _Call(query, key, value, mask, factor, bool(given.get("is_causal")))


def _repeated(node: fx.Node, part: fx.Node, heads: tuple[Any, ...]) -> fx.Node:
    """Keys or values ``[…, groups, length, width]``, each group as often as it has query heads."""
    kind = part.meta["type"]
    groups = kind.shape[-3:-2]
    if groups == heads:
        return part
    if kind.rank != 4 or not isinstance(groups[0], int) or not isinstance(heads[0], int) or heads[0] % groups[0]:
        raise BitlowerError(f"{groups[0]} groups of keys do not fit {heads[0]} query heads: {describe(node)}")
    batch, _, length, width = kind.shape
    times = heads[0] // groups[0]
    shapes = [(batch, groups[0], 1, length, width), (batch, groups[0], times, length, width)]
    added = call_like(node, aten.unsqueeze.default, (part, 2), TensorType(kind.dtype, shapes[0]))
    wide = call_like(node, aten.expand.default, (added, [-1, -1, times, -1, -1]), TensorType(kind.dtype, shapes[1]))
    result = TensorType(kind.dtype, (batch, heads[0], length, width))
    return call_like(node, aten.flatten.using_ints, (wide, 1, 2), result)


def _causal_mask(node: fx.Node, call: _Call) -> fx.Node:
    """``[queries, keys]``, true where the key is not later than the query, both counted from the start."""
    lengths = [call.query.meta["type"].shape[-2], call.key.meta["type"].shape[-2]]
    queries, keys = (
        call_like(node, aten.arange.default, (_length(node, part, size),), TensorType(torch.int64, (size,)))
        for part, size in zip((call.query, call.key), lengths, strict=True)
    )
    rows = call_like(node, aten.unsqueeze.default, (queries, 1), TensorType(torch.int64, (lengths[0], 1)))
    return call_like(node, aten.le.Tensor, (keys, rows), TensorType(torch.bool, tuple(lengths)))


def _length(node: fx.Node, part: fx.Node, size: int | str) -> int | fx.Node:
    if isinstance(size, int):
        return size
    return call_like(node, aten.sym_size.int, (part, part.meta["type"].rank - 2), None)


def _masked(node: fx.Node, scores: fx.Node, mask: fx.Node, kind: TensorType) -> fx.Node:
    if mask.meta["type"].dtype is not torch.bool:
        return call_like(node, aten.add.Tensor, (scores, mask), kind)
    inverse = call_like(node, aten.logical_not.default, (mask,), mask.meta["type"])
    return call_like(node, aten.masked_fill.Scalar, (scores, inverse, -math.inf), kind)


def _swap(kind: TensorType) -> TensorType:
    return TensorType(kind.dtype, (*kind.shape[:-2], kind.shape[-1], kind.shape[-2]))


RULES = (
    Rule("attention", SOFTMAX, lambda module, node: fold_attention(node)),
    Rule("grouped-queries", ATTENTION, lambda module, node: fold_repeated_heads(node)),
)
