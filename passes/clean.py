"""Clean-up of a traced graph: no-ops go, explicit attention is folded, equal computations are done once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from bitlower.ir import Level, Program
from bitlower.ir.dataflow import SOFTMAX
from bitlower.passes._attention import fold_attention
from bitlower.passes._base import Context, Contract, Pass

aten = torch.ops.aten
_NO_OPS_OF_ONE_TYPE = frozenset({
    aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.alias.default, aten.clone.default, aten.slice.Tensor,
})  # fmt: skip
"""Operators that give their operand if its type stays: a slice of the same length is the whole."""


@dataclass(frozen=True)
class Clean(Pass):
    """Remove what computes nothing and bring attention to one form, so that later passes see one shape of graph."""

    name: ClassVar[str] = "clean"
    requires: ClassVar[frozenset[Level]] = frozenset({Level.FLOAT})
    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, program: Program, context: Context) -> bool:
        """Rewrite every graph until nothing changes."""
        changed = False
        for module in program.graphs.values():
            while _drop_no_ops(module.graph) | _merge_equal(module.graph) | _fold(module.graph):
                changed = True
        return changed


def _drop_no_ops(graph: fx.Graph) -> bool:
    changed = False
    for node in list(graph.nodes):
        if node.op == "call_function" and "type" in node.meta and _is_no_op(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            changed = True
    return changed


def _is_no_op(node: fx.Node) -> bool:
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or source.meta.get("type") != node.meta["type"]:
        return False
    if node.target in _NO_OPS_OF_ONE_TYPE:
        return True
    if node.target is aten.add.Tensor:
        return bool(node.args[1] == 0)
    return node.target in (aten.expand.default, aten.reshape.default, aten.view.default) and all(
        size == -1 for size in _sizes(node)
    )


def _sizes(node: fx.Node) -> list[Any]:
    sizes = node.args[1]
    return list(sizes) if isinstance(sizes, list | tuple) else [sizes]


def _merge_equal(graph: fx.Graph) -> bool:
    """Common subexpressions; operators that write or draw random numbers are left alone."""
    seen: dict[Any, fx.Node] = {}
    changed = False
    for node in list(graph.nodes):
        if node.op not in ("call_function", "get_attr") or not _is_pure(node.target):
            continue
        key = (node.op, node.target, _freeze(node.args), _freeze(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
            changed = True
    return changed


def _is_pure(target: Any) -> bool:
    if not isinstance(target, torch._ops.OpOverload):
        return True
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags


def _freeze(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_freeze(v) for v in value)
    if isinstance(value, dict):
        return tuple(sorted((k, _freeze(v)) for k, v in value.items()))
    return (type(value).__name__, value) if isinstance(value, bool | int | float) else value


def _fold(graph: fx.Graph) -> bool:
    folded = [fold_attention(node) for node in list(graph.nodes) if node.target in SOFTMAX]
    graph.eliminate_dead_code()
    return any(isinstance(result, fx.Node) for result in folded)
