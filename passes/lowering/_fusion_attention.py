"""Attention in its two forms as the start of a fusion: the operator, and the explicit steps with roundings between."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from bitlower.ir import ops
from bitlower.ir.dataflow import ADD, ATTENTION, MATMUL, SOFTMAX, operand
from bitlower.ir.rewrite import sole_user
from bitlower.passes.lowering._fusion import Match, round_trip

aten = torch.ops.aten
ATTENTIONS = ATTENTION | SOFTMAX


def start_attention(match: Match) -> str | None:
    """Read the operands of an attention."""
    return _start_operator(match) if match.root.target in ATTENTION else _start_explicit(match)


def _start_operator(match: Match) -> str | None:
    names = ("query", "key", "value", "mask", "dropout_p", "is_causal")
    given: dict[str, Any] = {**dict(zip(names, match.root.args, strict=False)), **match.root.kwargs}
    width = given["query"].meta["type"].shape[-1]
    if given.get("dropout_p"):
        return "it has dropout"
    if match.root.meta["type"].rank != 4 or (given.get("scale") is None and not isinstance(width, int)):
        return "its queries are not [batch, heads, length, width] of a known width"
    scale = given.get("scale")
    for name in ("query", "key", "value"):
        match.read(name, given[name])
    match.arguments |= {"mask": given.get("mask", given.get("attn_mask"))}
    match.arguments["factor"] = float(scale) if scale is not None else 1 / math.sqrt(width)
    if given.get("is_causal"):
        match.arguments["causal"] = True
    return ""


def _start_explicit(match: Match) -> str | None:
    """Softmax(factor · QKᵀ + mask) V, written out."""
    softmax = match.root
    if softmax.args[1] not in (-1, 3) or softmax.meta["type"].rank != 4:
        return "it is not over the last of four axes"
    trip = round_trip(softmax)
    probs = trip[1] if trip else softmax
    context = sole_user(probs)
    if context is None or context.target not in MATMUL or context.args[0] is not probs:
        return "its result is not used by one matmul alone"
    found = _scores(operand(softmax, 0))
    if isinstance(found, str):
        return found
    product, rounding, factor, mask, between = found
    query, turned = operand(product, 0), operand(product, 1)
    if turned.target is not aten.transpose.int or {a % 4 for a in turned.args[1:] if isinstance(a, int)} != {2, 3}:
        return "the keys are not transposed on their last two axes"
    match.at = context
    operands = {"query": query, "key": ungrouped(operand(turned, 0)), "value": ungrouped(operand(context, 1))}
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
        mask = filled if filled is not None else operand(node, 1)
        between.append(node)
        node = operand(node, 0)
    if node.target is aten.mul.Tensor and isinstance(node.args[1], int | float):
        factor = float(node.args[1])
        between.append(node)
        node = operand(node, 0)
    alone = all(len(step.users) == 1 for step in (node, *between))
    product = node if node.target in MATMUL else operand(operand(node, 0), 0) if _is_trip(node) else None
    if product is None or product.target not in MATMUL or not alone:
        return "its scores are not one scaled and masked matmul"
    trip = round_trip(product)
    if trip is None and product is not node:
        return "its scores are read by something else too, or have a scale for each token"
    return product, trip, factor, mask, between


def _is_trip(node: fx.Node) -> bool:
    return node.target is ops.dequantize and operand(node, 0).target is ops.quantize


def _fill(node: fx.Node) -> fx.Node | None:
    """The bool mask, true where a score counts, if ``node`` makes all other scores −∞."""
    if node.target is not aten.masked_fill.Scalar or node.args[2] != -math.inf:
        return None
    inverse = operand(node, 1)
    return operand(inverse, 0) if inverse.target is aten.logical_not.default else None


def ungrouped(node: fx.Node) -> fx.Node:
    """Keys or values before each group is repeated for its query heads; ``node`` itself if they are not."""
    if node.target not in (aten.flatten.using_ints, aten.reshape.default, aten.view.default):
        return node
    expanded = operand(node, 0)
    if expanded.target is not aten.expand.default:
        return node
    added = operand(expanded, 0)
    if added.target is not aten.unsqueeze.default or added.args[1] not in (2, -3):
        return node
    source = operand(added, 0)
    before, wide, after = (n.meta["type"].shape for n in (source, expanded, node))
    fits = len(before) == len(after) == 4 and len(wide) == 5
    same = fits and (before[0], *before[2:]) == (after[0], *after[2:]) and wide[:2] == before[:2]
    return source if same and wide[1] * wide[2] == after[1] and wide[3:] == before[2:] else node
