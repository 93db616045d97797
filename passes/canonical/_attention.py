"""Attention as one operator, also where a model writes it out; keys and values of grouped queries as they are.

Grouped queries (Ainslie et al. 2023): ``enable_gqa`` on the operator, which then reads keys and values as they are in
the cache.
"""

from __future__ import annotations

import torch
from torch import fx

from bitlower.ir.dataflow import ATTENTION, MATMUL, SOFTMAX, before_repeat
from bitlower.ir.operators import AttentionNode, BinaryNode, argument, operand, swapped_axes, value_operands
from bitlower.ir.rewrite import Rule, replace, sole_user

aten = torch.ops.aten


def fold_attention(softmax: fx.Node) -> fx.Node | str:
    """Replace the explicit attention around ``softmax`` by one operator; what it is replaced by, or why it is not."""
    context = sole_user(softmax)
    if context is None or context.target not in MATMUL or BinaryNode(context).left is not softmax:
        return "its result is not used by one matmul alone"
    if argument(softmax, "dim") not in (-1, softmax.meta["type"].rank - 1) or softmax.meta["type"].rank != 4:
        return "it is not over the last of four axes"
    scores, mask = _without_mask(operand(softmax, "self"))
    scores, scale = _without_scale(scores)
    if scores.target not in MATMUL or len(scores.users) != 1:
        return "its scores are not one scaled and masked matmul"
    query, turned = BinaryNode(scores).left, BinaryNode(scores).right
    if swapped_axes(turned) != {2, 3}:
        return "the keys are not transposed on their last two axes"
    if mask is not None and mask.meta["type"].rank != 4:
        return "the mask has not four axes"
    args = (query, operand(turned, "self"), BinaryNode(context).right, *((mask,) if mask is not None else ()))
    return replace(context, aten.scaled_dot_product_attention.default, args, context.meta["type"], scale=scale)


def fold_repeated_heads(node: fx.Node) -> fx.Node | str | None:
    """Let an attention operator read grouped keys and values as they are, instead of a copy for each query head."""
    call = AttentionNode(node)
    sources = [before_repeat(part) for part in (call.key, call.value)]
    if not any(sources):
        return None
    if not all(sources):
        return "only one of keys and values is repeated"
    grouped = replace(node, node.target, node.args, node.meta["type"], **{**node.kwargs, "enable_gqa": True})
    for name, source in zip(("key", "value"), sources, strict=True):
        AttentionNode(grouped).set(name, source)
    return grouped


def _without_mask(scores: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """The scores before a mask is added, and the mask."""
    plain = scores.target is aten.add.Tensor and not scores.kwargs and len(scores.users) == 1
    added = value_operands(scores) if plain else []
    return (added[0], added[1]) if len(added) == 2 else (scores, None)


def _without_scale(scores: fx.Node) -> tuple[fx.Node, float]:
    """The scores before a number is multiplied in, and the number."""
    scaled = scores.target in (aten.mul.Tensor, aten.div.Tensor)
    factor = argument(scores, "other") if scaled else None
    if not isinstance(factor, int | float) or not factor:
        return scores, 1.0
    return operand(scores, "self"), float(factor if scores.target is aten.mul.Tensor else 1 / factor)


RULES = (
    Rule("attention", SOFTMAX, lambda module, node: fold_attention(node)),
    Rule("grouped-queries", ATTENTION, lambda module, node: fold_repeated_heads(node)),
)
