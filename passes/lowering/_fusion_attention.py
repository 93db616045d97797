"""Attention in its two forms as the start of a fusion: the operator, and the explicit steps with roundings between."""

from __future__ import annotations

import math

import torch
from torch import fx

from bitlower.ir import ops
from bitlower.ir.dataflow import ADD, ATTENTION, MATMUL, SOFTMAX, before_repeat
from bitlower.ir.operators import AttentionNode, BinaryNode, argument, operand, swapped_axes
from bitlower.ir.quantizer_node import QuantizerNode
from bitlower.ir.rewrite import sole_user
from bitlower.passes.lowering._fusion import Match, round_trip

aten = torch.ops.aten
ATTENTIONS = ATTENTION | SOFTMAX


def start_attention(match: Match) -> str | None:
    """Read the operands of an attention."""
    return _start_operator(match) if match.root.target in ATTENTION else _start_explicit(match)


def _start_operator(match: Match) -> str | None:
    call = AttentionNode(match.root)
    if call.has_dropout:
        return "it has dropout"
    if match.root.meta["type"].rank != 4 or call.scale is None:
        return "its queries are not [batch, heads, length, head_dim] of a known head_dim"
    for name, node in (("query", call.query), ("key", call.key), ("value", call.value)):
        match.read(name, node)
    match.arguments |= {"mask": call.mask, "factor": call.scale}
    if call.is_causal:
        match.arguments["causal"] = True
    return ""


def _start_explicit(match: Match) -> str | None:
    """Softmax(factor · QKᵀ + mask) V, written out."""
    softmax = match.root
    if argument(softmax, "dim") not in (-1, 3) or softmax.meta["type"].rank != 4:
        return "it is not over the last of four axes"
    trip = round_trip(softmax)
    probs = trip[1] if trip else softmax
    context = sole_user(probs)
    if context is None or context.target not in MATMUL or BinaryNode(context).left is not probs:
        return "its result is not used by one matmul alone"
    scores = _scores(operand(softmax, "self"))
    if isinstance(scores, str):
        return scores
    product, rounding, factor, mask, between = scores
    query, turned = BinaryNode(product).left, BinaryNode(product).right
    if swapped_axes(turned) != {2, 3}:
        return "the keys are not transposed on their last two axes"
    match.at = context
    key, value = operand(turned, "self"), BinaryNode(context).right
    operands = {"query": query, "key": before_repeat(key) or key, "value": before_repeat(value) or value}
    for name, node in operands.items():
        match.read(name, node)
    match.arguments |= {"mask": mask, "factor": factor, "explicit": True}
    match.take(product, *between)
    for name, pair in (("scores", rounding), ("probs", trip)):
        if pair:
            match.round(name, pair[0])
            match.take(*pair)
    match.take(context)
    return ""


_Scores = tuple[fx.Node, tuple[fx.Node, fx.Node] | None, float, fx.Node | None, list[fx.Node]]


def _scores(node: fx.Node) -> _Scores | str:
    """QKᵀ, its rounding, the factor and the mask behind what a softmax reads, and the operators between."""
    between, mask, factor = list[fx.Node](), None, 1.0
    filled = _fill(node)
    if filled is not None or (node.target in ADD and not node.kwargs):
        mask = filled if filled is not None else operand(node, "other")
        between.append(node)
        node = operand(node, "self")
    if node.target is aten.mul.Tensor and isinstance(argument(node, "other"), int | float):
        factor = float(argument(node, "other"))
        between.append(node)
        node = operand(node, "self")
    alone = all(len(step.users) == 1 for step in (node, *between))
    product = operand(QuantizerNode(node).value, "x") if _is_trip(node) else node
    if product.target not in MATMUL or not alone:
        return "its scores are not one scaled and masked matmul"
    trip = round_trip(product)
    if trip is None and product is not node:
        return "its scores are read by something else too, or have a scale for each token"
    return product, trip, factor, mask, between


def _is_trip(node: fx.Node) -> bool:
    return node.target is ops.dequantize and QuantizerNode(node).value.target is ops.quantize


def _fill(node: fx.Node) -> fx.Node | None:
    """The bool mask, true where a score counts, if ``node`` makes all other scores −∞."""
    if node.target is not aten.masked_fill.Scalar or argument(node, "value") != -math.inf:
        return None
    inverse = operand(node, "mask")
    return operand(inverse, "self") if inverse.target is aten.logical_not.default else None
