"""Attention in its two forms: one operator while it stays float, explicit matmuls where parts of it are quantized."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from bitlower.ir import BitlowerError, TensorType, describe
from bitlower.ir.dataflow import ATTENTION, MATMUL, SOFTMAX, VIEWS

aten = torch.ops.aten


def expand_attention(node: fx.Node) -> None:
    """Replace one attention operator by QKᵀ, scaling, mask, softmax and the product with V.

    Masked scores get the most negative float, so a row that is masked throughout attends evenly instead of giving NaN.

    Raises:
        BitlowerError: the attention is causal, grouped, or has dropout.
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
    users = [user for user in softmax.users if user.target in MATMUL]
    if len(users) != 1 or len(softmax.users) != 1 or users[0].args[0] is not softmax:
        return "its result is not used by one matmul alone"
    if softmax.args[1] not in (-1, softmax.meta["type"].rank - 1) or softmax.meta["type"].rank != 4:
        return "it is not over the last of four axes"
    context, mask, scale = users[0], None, 1.0
    scores = softmax.args[0]
    if _is(scores, aten.add.Tensor) and len(scores.users) == 1:
        scores, mask = scores.args
    if _is(scores, aten.mul.Tensor, aten.div.Tensor) and isinstance(scores.args[1], int | float):
        scale = scores.args[1] if scores.target is aten.mul.Tensor else 1 / scores.args[1]
        scores = scores.args[0]
    if not (isinstance(scores, fx.Node) and scores.target in MATMUL and len(scores.users) == 1):
        return "its scores are not one scaled and masked matmul"
    query, turned = scores.args
    if not (_is(turned, aten.transpose.int) and {a % 4 for a in turned.args[1:]} == {2, 3}):
        return "the keys are not transposed on their last two axes"
    if mask is not None and not (isinstance(mask, fx.Node) and mask.meta["type"].rank == 4):
        return "the mask has not four axes"
    with context.graph.inserting_before(context):
        args = (query, turned.args[0], context.args[1], *((mask,) if mask is not None else ()))
        folded = _call(context, aten.scaled_dot_product_attention.default, args, context.meta["type"])
        folded.kwargs = {"scale": float(scale)}
    context.replace_all_uses_with(folded)
    return folded


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
    width = given["query"].meta["type"].shape[-1]
    scale = given.get("scale")
    return (
        given["query"],
        given["key"],
        given["value"],
        given.get("attn_mask"),
        float(scale) if scale is not None else 1 / math.sqrt(width),
    )


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


def _is(value: Any, *targets: Any) -> bool:
    return isinstance(value, fx.Node) and value.target in targets
