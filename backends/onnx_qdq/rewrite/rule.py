"""Rules that rewrite a graph, and say why they do not match."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import onnx_ir as ir

from bitlower.backends.onnx_qdq.graph.code_operators import CodeOperator
from bitlower.backends.onnx_qdq.rewrite.editor import Editor

APPLIED = "applied"


@dataclass(frozen=True)
class Rule:
    """A rewrite with a name.

    ``apply(editor, node)`` gives :data:`APPLIED`; or, for a node that it could be meant for, the reason why it does not
    match; or None for other nodes.

    Args:
        name: in reports.
        apply: see above.
        operators: those that it writes and that the table of
            :mod:`~bitlower.backends.onnx_qdq.graph.code_operators` has not.
    """

    name: str
    apply: Callable[[Editor, ir.Node], str | None]
    operators: tuple[CodeOperator, ...] = ()


@dataclass
class RuleLog:
    """How often each rule matched, the reasons where one did not, and :attr:`Editor.split`."""

    split: set[str] = field(default_factory=set)
    applied: Counter[str] = field(default_factory=Counter)
    refused: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, other: RuleLog) -> None:
        """Count what was done to another model too."""
        self.split |= other.split
        self.applied += other.applied
        self.refused += other.refused

    def to_dict(self) -> dict[str, dict[str, object]]:
        """By rule: how often it was applied, and each reason against with its count."""
        names = sorted({*self.applied, *(name for name, _ in self.refused)})
        return {
            name: {
                "applied": self.applied[name],
                "refused": {reason: n for (rule, reason), n in sorted(self.refused.items()) if rule == name},
            }
            for name in names
        }


def apply_rules(editor: Editor, rules: Iterable[Rule]) -> RuleLog:
    """Offer every node to each rule in turn, in the order of the graph."""
    log = RuleLog(editor.split)
    for rule in rules:
        for node in list(editor.graph):
            if node.graph is None or not any(v.uses() or v.is_graph_output() for v in node.outputs):
                continue
            outcome = rule.apply(editor, node)
            if outcome == APPLIED:
                log.applied[rule.name] += 1
            elif outcome is not None:
                log.refused[rule.name, outcome] += 1
        editor.sweep()
    return log
