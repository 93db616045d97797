"""Attention as one operator, also where a model writes it out; keys and values of grouped queries as they are.

Grouped queries (Ainslie et al. 2023): ``enable_gqa`` on the operator, which then reads keys and values as they are in
the cache.
"""

from __future__ import annotations

import torch
from torch import fx

from bitlower.ir.dataflow import ATTENTION, MATMUL, SOFTMAX, operand
from bitlower.ir.rewrite import Rule, replace, sole_user

aten = torch.ops.aten


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


RULES = (
    Rule("attention", SOFTMAX, lambda module, node: fold_attention(node)),
    Rule("grouped-queries", ATTENTION, lambda module, node: fold_repeated_heads(node)),
)
