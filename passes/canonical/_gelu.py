"""GELU and SiLU written out in elementary operators become one operator; they are known by their values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from bitlower.ir.activations import ACTIVATIONS
from bitlower.ir.dataflow import is_float
from bitlower.ir.rewrite import Rule, call_like, sole_user

aten = torch.ops.aten
_POINTWISE = frozenset({
    aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor, aten.neg.default,
    aten.pow.Tensor_Scalar, aten.square.default, aten.tanh.default, aten.erf.default, aten.sigmoid.default,
})  # fmt: skip
_POINTS = torch.linspace(-8, 8, 257, dtype=torch.float64)
_TOLERANCE = 1e-7
"""Between what eight written digits of a constant change (1e-8) and how far known functions lie apart (above 1e-4)."""
_DEPTH = 12
"""Operators of the longest form of GELU that libraries have, with room."""


def fold_activation(module: fx.GraphModule, root: fx.Node) -> fx.Node | str:
    """Fold the elementwise function around ``root`` (tanh, erf or sigmoid) if it equals a known one at 257 points.

    The function may be written in any order of products and sums (Hendrycks and Gimpel 2016 give two forms of GELU,
    libraries have five); constants that are rounded to eight digits are let pass.
    """
    for result in _results(root):
        for x in _sources(result):
            values = _evaluate(result, x)
            if values is None:
                continue
            for row in ACTIVATIONS:
                known = row.function(_POINTS) if row.folded and row.function else None
                if known is not None and torch.allclose(values, known, rtol=0, atol=_TOLERANCE):
                    with result.graph.inserting_before(result):
                        folded = call_like(result, row.target, (x,), result.meta["type"], **row.options)
                    result.replace_all_uses_with(folded)
                    return folded
    return "the values around it are those of no known activation function"


def _results(root: fx.Node) -> Iterator[fx.Node]:
    """The nodes that the function may end at: ``root`` and what follows, each the only reader of the one before."""
    node: fx.Node | None = root
    for _ in range(_DEPTH):
        node = sole_user(node) if node is not None else None
        if node is None or node.target not in _POINTWISE:
            return
        yield node


def _sources(result: fx.Node) -> list[fx.Node]:
    """The values that the function may start from: read more than once, of the result's type; the nearest first."""
    candidates: dict[fx.Node, None] = {}
    frontier = [(result, 0)]
    while frontier:
        node, depth = frontier.pop(0)
        for source in node.all_input_nodes:
            if len(source.users) > 1 and is_float(source) and source.meta["type"] == result.meta["type"]:
                candidates.setdefault(source)
            if source.target in _POINTWISE and depth < _DEPTH:
                frontier.append((source, depth + 1))
    return list(candidates)


def _evaluate(result: fx.Node, x: fx.Node) -> torch.Tensor | None:
    """The values of ``result`` over those of ``x``; None if it depends on anything else."""
    values: dict[fx.Node, torch.Tensor | None] = {x: _POINTS}

    def value(node: fx.Node) -> torch.Tensor | None:
        if node not in values:
            values[node] = compute(node) if node.target in _POINTWISE else None
        return values[node]

    def compute(node: fx.Node) -> torch.Tensor | None:
        operands = {source: value(source) for source in node.all_input_nodes}
        if any(v is None for v in operands.values()):
            return None
        args: Any = fx.node.map_arg(node.args, operands.__getitem__)
        options: Any = fx.node.map_arg(node.kwargs, operands.__getitem__)
        computed = node.target(*args, **options)  # type: ignore[operator]
        return computed if isinstance(computed, torch.Tensor) else None

    return value(result)


RULES = (Rule("activation", frozenset({aten.tanh.default, aten.erf.default, aten.sigmoid.default}), fold_activation),)
