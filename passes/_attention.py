"""Attention in its two forms: one operator while it stays float, explicit matmuls where parts of it are quantized."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from bitlower.ir import BitlowerError, TensorType, describe
from bitlower.ir.dataflow import ATTENTION, MATMUL, SOFTMAX, VIEWS, operand

aten = torch.ops.aten


def expand_attention(node: fx.Node) -> None:
    """Replace one attention operator by QKᵀ, scaling, mask, softmax and the product with V.

    Masked scores get the most negative float, so a row that is masked throughout attends evenly instead of giving NaN.

    Raises:
        BitlowerError: the attention is causal, grouped, or has dropout, or no fixed scale.
    """
    query, key, value, mask, scale = _operands(node)
    shape = query.meta["type"].shape
    scores_type = TensorType(query.meta["type"].dtype, (*shape[:-1], key.meta["type"].shape[-2]))
    with node.graph.inserting_before(node):
        key_type = key.meta["type"]
        turned = _call(node, aten.transpose.int, (key, -2, -1), _swap(key_type))
        scores = _call(node, aten.matmul.default, (query, turned), scores_type)
        scaled = _call(node, aten.mul.Tensor, (scores, scale), scores_type)
        masked = _masked(node, scaled, mask, scores_type) if mask is not None else scaled
        probs = _call(node, aten.softmax.int, (masked, -1), scores_type)
        context = _call(node, aten.matmul.default, (probs, value), node.meta["type"])
    node.replace_all_uses_with(context)
    node.graph.erase_node(node)


def fold_attention(softmax: fx.Node) -> fx.Node | str:
    """Replace the explicit attention around ``softmax`` by one operator; what it is replaced by, or why it is not."""
    context = next(iter(softmax.users), None)
    if context is None or len(softmax.users) != 1 or context.target not in MATMUL or context.args[0] is not softmax:
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
    with context.graph.inserting_before(context):
        folded = _call(context, aten.scaled_dot_product_attention.default, args, context.meta["type"])
        folded.kwargs = {"scale": scale}
    context.replace_all_uses_with(folded)
    return folded


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


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node | None, float]:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    for name in ("dropout_p", "is_causal", "enable_gqa"):
        if given.get(name):
            raise BitlowerError(f"attention with {name} cannot be quantized inside: {describe(node)}")
    width, scale = given["query"].meta["type"].shape[-1], given.get("scale")
    if scale is None and not isinstance(width, int):
        raise BitlowerError(f"attention over heads of the symbolic width {width} has no fixed scale: {describe(node)}")
    factor = float(scale) if scale is not None else 1 / math.sqrt(width)
    return given["query"], given["key"], given["value"], given.get("attn_mask"), factor


def _masked(node: fx.Node, scores: fx.Node, mask: fx.Node, kind: TensorType) -> fx.Node:
    if mask.meta["type"].dtype is not torch.bool:
        return _call(node, aten.add.Tensor, (scores, mask), kind)
    inverse = _call(node, aten.logical_not.default, (mask,), mask.meta["type"])
    return _call(node, aten.masked_fill.Scalar, (scores, inverse, torch.finfo(kind.dtype).min), kind)


def _call(like: fx.Node, target: Any, args: tuple[Any, ...], kind: TensorType) -> fx.Node:
    node = like.graph.call_function(target, args)
    node.meta = {key: like.meta[key] for key in ("path", "source") if key in like.meta}
    node.meta["type"] = kind
    return node


def _swap(kind: TensorType) -> TensorType:
    return TensorType(kind.dtype, (*kind.shape[:-2], kind.shape[-1], kind.shape[-2]))
