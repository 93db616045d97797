"""Clean-up of a traced graph: no-ops go, equal computations are done once, everything is brought to one form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from bitlower.ir import Level, Program, get_tensor
from bitlower.ir.operators import argument
from bitlower.ir.rewrite import Miss, apply_rules
from bitlower.passes._machinery.base import Context, Contract, Pass
from bitlower.passes._machinery.report import Record, counted, few
from bitlower.passes.canonical._rules import RULES

aten = torch.ops.aten
_NO_OPS_OF_ONE_TYPE = frozenset({
    aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.type_as.default, aten.alias.default, aten.clone.default,
    aten.slice.Tensor, aten.view.default, aten.reshape.default, aten.expand.default,
})  # fmt: skip
"""Operators that give their operand if its type stays: a slice of the same length is the whole."""
_NEUTRAL = {aten.add.Tensor: 0, aten.sub.Tensor: 0, aten.mul.Tensor: 1, aten.div.Tensor: 1}
"""The number that makes an operator a no-op."""


@dataclass(frozen=True)
class CleanReport(Record):
    """Where a rewrite rule started and did not match, and why."""

    misses: tuple[Miss, ...]

    def summary(self) -> str:
        """How many places stay as the model has them."""
        return f"{counted(len(self.misses), 'place')} that began like a known pattern: left as the model has it"

    def details(self) -> Iterable[str]:
        """Which, and why."""
        return few(str(miss) for miss in self.misses)


@dataclass(frozen=True)
class Clean(Pass):
    """Remove what computes nothing and bring models to one form, so that later passes see one shape of graph.

    What models write by hand becomes one operator: attention (also with repeated keys and values, for grouped
    queries), RMSNorm, GELU. Every linear layer is a ``linear`` with the weight ``[out, in]`` over ``[batch, sequence,
    channels]``; a weight that the model holds the other way round (GPT-2) is transposed, and ``Program.transposed``
    says so. A convolution of size 1 is such a layer too, one with groups is a layer a group; and so is a convolution
    over patches that do not overlap.
    """

    name: ClassVar[str] = "clean"
    requires: ClassVar[frozenset[Level]] = frozenset({Level.FLOAT})
    contract: ClassVar[Contract] = Contract.EXACT

    def runs_in_plan(self) -> bool:
        """Always: quantizers are placed in the form that it makes."""
        return True

    def run(self, program: Program, context: Context) -> bool:
        """Rewrite every graph until nothing changes, and leave a :class:`CleanReport`."""
        changed, misses = False, []
        for name, module in program.graphs.items():
            before = _tensors(module)
            while True:
                shorter = _drop_no_ops(module.graph) | _merge_equal(module.graph)
                rewritten, missed = apply_rules(RULES, module)
                if not (shorter or rewritten):
                    break
                changed = True
            misses += missed
            turned = {
                f"{name}/{target}" for target, tensor in _tensors(module).items() if _is_turned(before, target, tensor)
            }
            program.transposed = tuple(sorted({*program.transposed, *turned}))
        context.put(CleanReport(tuple(misses)))
        return changed


def _tensors(module: fx.GraphModule) -> dict[str, torch.Tensor]:
    """What the graph reads, by name."""
    names = {str(node.target) for node in module.graph.find_nodes(op="get_attr")}
    return {name: get_tensor(module, name) for name in names}


def _is_turned(before: Mapping[str, torch.Tensor], target: str, tensor: torch.Tensor) -> bool:
    """Whether a rule has transposed a matrix, and not made a kernel one."""
    old = before.get(target)
    return old is not None and old is not tensor and old.dim() == tensor.dim()


def _drop_no_ops(graph: fx.Graph) -> bool:
    changed = False
    for node in list(graph.nodes):
        if node.op == "call_function" and "type" in node.meta and _is_no_op(node):
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.erase_node(node)
            changed = True
    return changed


def _is_no_op(node: fx.Node) -> bool:
    source = next(iter(node.args), None)
    if not isinstance(source, fx.Node) or source.meta.get("type") != node.meta["type"]:
        return False
    if node.target in _NO_OPS_OF_ONE_TYPE:
        return True
    return node.target in _NEUTRAL and bool(argument(node, "other") == _NEUTRAL[node.target])


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
