"""Rotary embeddings as the start of a fusion: ``x · cos + [−x₂, x₁] · sin``, written out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import fx

from bitlower.ir.dataflow import ADD
from bitlower.ir.operators import argument, operand, value_operands
from bitlower.ir.rewrite import sole_user
from bitlower.passes.lowering._fusion import Match
from bitlower.passes.lowering._fusion_stages import MULTIPLY

aten = torch.ops.aten


class _Turn(NamedTuple):
    """The steps of ``[−x₂, x₁] · sin``."""

    product: fx.Node
    sin: fx.Node
    whole: fx.Node
    minus: fx.Node


def start_rotary(match: Match) -> str | None:
    """The product with the cosine, if the rest follows; nothing is said where it does not, for products are many."""
    product, total = match.root, sole_user(match.root)
    if total is None or total.target not in ADD or total.kwargs:
        return None
    factors, summands = value_operands(product), value_operands(total)
    if len(factors) != 2 or len(summands) != 2 or summands[0] is not product:
        return None
    x, cos = factors
    turn = _turn(summands[1], x)
    if turn is None or total.meta["type"] != x.meta["type"]:
        return None
    match.at = total
    match.read("x", x)
    match.arguments |= {"cos": cos, "sin": turn.sin}
    match.take(turn.minus, turn.whole, turn.product, total)
    return ""


def _turn(product: fx.Node, x: fx.Node) -> _Turn | None:
    """The steps that lead from ``x`` to ``product``, if they turn its halves and nothing else reads them."""
    factors = value_operands(product) if product.target in MULTIPLY else []
    if len(factors) != 2:
        return None
    whole, sin = factors
    if whole.target is not aten.cat.default or argument(whole, "dim") not in (-1, x.meta["type"].rank - 1):
        return None
    parts = argument(whole, "tensors")
    if len(parts) != 2 or parts[0].target is not aten.neg.default:
        return None
    minus, width = parts[0], x.meta["type"].shape[-1]
    halves = isinstance(width, int) and width % 2 == 0 and all(
        _is_half(half, x, start, width // 2) for half, start in ((parts[1], 0), (operand(minus, "self"), width // 2))
    )  # fmt: skip
    alone = all(len(node.users) == 1 for node in (product, whole, minus))
    return _Turn(product, sin, whole, minus) if halves and alone else None


def _is_half(node: fx.Node, x: fx.Node, start: int, size: int) -> bool:
    """Whether ``node`` is the half of the last axis of ``x`` from ``start`` on."""
    if node.target is not aten.slice.Tensor or operand(node, "self") is not x or argument(node, "step") != 1:
        return False
    last = argument(node, "dim") in (-1, x.meta["type"].rank - 1)
    return bool(last and argument(node, "start") == start and node.meta["type"].shape[-1] == size)
