"""Attention written out as matmuls, where parts of it are quantized; keys and values once for each query head."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from bitlower.ir import BitlowerError, TensorType, describe
from bitlower.ir.operators import AttentionNode
from bitlower.ir.rewrite import call_like

aten = torch.ops.aten


def expand_attention(node: fx.Node) -> None:
    """Replace one attention operator by QKᵀ, scaling, mask, softmax and the product with V.

    Masked scores get −∞, and a row that is masked throughout gives 0, as in torch's operator: its softmax is
    ``_safe_softmax``. A causal mask, which hides no row throughout, is made from the lengths at run time; keys and
    values of grouped queries are repeated.

    Raises:
        BitlowerError: the attention has dropout, no fixed scale, or heads that do not divide.
    """
    call, scale = AttentionNode(node), _scale(node)
    kind, keys = call.query.meta["type"], call.key.meta["type"]
    scores_type = TensorType(kind.dtype, (*kind.shape[:-1], keys.shape[-2]))
    with node.graph.inserting_before(node):
        key, value = (_repeated(node, part, kind.shape[-3:-2]) for part in (call.key, call.value))
        turned = call_like(node, aten.transpose.int, (key, -2, -1), _swap(key.meta["type"]))
        scores = call_like(node, aten.matmul.default, (call.query, turned), scores_type)
        scaled = call_like(node, aten.mul.Tensor, (scores, scale), scores_type)
        mask = _causal_mask(node, call) if call.is_causal else call.mask
        masked = _masked(node, scaled, mask, scores_type) if mask is not None else scaled
        softmax = aten.softmax.int if call.mask is None else aten._safe_softmax.default
        probs = call_like(node, softmax, (masked, -1), scores_type)
        context = call_like(node, aten.matmul.default, (probs, value), node.meta["type"])
    node.replace_all_uses_with(context)
    node.graph.erase_node(node)


def _scale(node: fx.Node) -> float:
    """What scores are multiplied with."""
    call = AttentionNode(node)
    if call.has_dropout:
        raise BitlowerError(f"attention with dropout cannot be quantized inside: {describe(node)}")
    if call.scale is None:
        size = call.query.meta["type"].shape[-1]
        raise BitlowerError(f"attention over heads of the symbolic width {size} has no fixed scale: {describe(node)}")
    return call.scale


def _repeated(node: fx.Node, part: fx.Node, heads: tuple[Any, ...]) -> fx.Node:
    """Keys or values ``[…, kv_heads, length, head_dim]``, each as often as it has query heads."""
    kind = part.meta["type"]
    kv_heads = kind.shape[-3:-2]
    if kv_heads == heads:
        return part
    if kind.rank != 4 or not isinstance(kv_heads[0], int) or not isinstance(heads[0], int) or heads[0] % kv_heads[0]:
        raise BitlowerError(f"{kv_heads[0]} heads of keys do not fit {heads[0]} query heads: {describe(node)}")
    batch, _, length, head_dim = kind.shape
    times = heads[0] // kv_heads[0]
    shapes = [(batch, kv_heads[0], 1, length, head_dim), (batch, kv_heads[0], times, length, head_dim)]
    added = call_like(node, aten.unsqueeze.default, (part, 2), TensorType(kind.dtype, shapes[0]))
    wide = call_like(node, aten.expand.default, (added, [-1, -1, times, -1, -1]), TensorType(kind.dtype, shapes[1]))
    result = TensorType(kind.dtype, (batch, heads[0], length, head_dim))
    return call_like(node, aten.flatten.using_ints, (wide, 1, 2), result)


def _causal_mask(node: fx.Node, call: AttentionNode) -> fx.Node:
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
