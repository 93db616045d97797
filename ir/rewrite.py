"""Rewrite rules as data: a name, the operators that a rule starts at, and what it does there or why it does not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx

from bitlower.ir.operators import further_arguments
from bitlower.ir.types import TensorType


@dataclass(frozen=True)
class Rule:
    """One rewrite.

    Args:
        name: kebab-case.
        roots: the operators whose nodes it is tried on.
        apply: rewrites around a node and returns what took its place, or says why it does not match; None where the
            node is of another kind altogether.
    """

    name: str
    roots: frozenset[Any]
    apply: Callable[[fx.GraphModule, fx.Node], fx.Node | str | None]


@dataclass(frozen=True)
class Miss:
    """A place where a rule started and did not match, and why."""

    rule: str
    node: str
    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path or self.node}: no {self.rule}: {self.reason}"


def apply_rules(rules: Iterable[Rule], module: fx.GraphModule) -> tuple[bool, list[Miss]]:
    """Try each rule once at each of its roots, in graph order; whether anything changed, and what did not match."""
    _drop_unread(module.graph)
    changed, misses = False, []
    for rule in rules:
        fired = False
        for node in [n for n in module.graph.nodes if n.op == "call_function" and n.target in rule.roots]:
            outcome = rule.apply(module, node)
            if isinstance(outcome, str):
                misses.append(Miss(rule.name, node.name, str(node.meta.get("path", "")), outcome))
            fired |= isinstance(outcome, fx.Node)
        if fired:
            _drop_unread(module.graph)
            changed = True
    return changed, misses


def _drop_unread(graph: fx.Graph) -> None:
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))


def call_like(like: fx.Node, target: Any, args: tuple[Any, ...], kind: TensorType | None, **options: Any) -> fx.Node:
    """A new call at the insertion point, with the module path and source line of ``like``; ``kind`` is its type."""
    node = like.graph.call_function(target, args, options)
    node.meta = {key: like.meta[key] for key in ("path", "source") if key in like.meta}
    if kind is not None:
        node.meta["type"] = kind
    return node


def call_again(node: fx.Node, source: fx.Node, kind: TensorType) -> fx.Node:
    """The call ``node`` once more, on ``source`` in place of its first argument; ``kind`` is the result's type."""
    return call_like(node, node.target, (source, *further_arguments(node)), kind, **node.kwargs)


def replace(node: fx.Node, target: Any, args: tuple[Any, ...], kind: TensorType, **options: Any) -> fx.Node:
    """Put a new call in the place of ``node``, which stays behind without users."""
    with node.graph.inserting_before(node):
        new = call_like(node, target, args, kind, **options)
    node.replace_all_uses_with(new)
    return new


def sole_user(node: fx.Node) -> fx.Node | None:
    """The one node that reads ``node``; None if there are several."""
    return next(iter(node.users)) if len(node.users) == 1 else None
