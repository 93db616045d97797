"""Mutants of a source text by Cosmic Ray's operators, and a sample of them that edits elsewhere do not change."""

from __future__ import annotations

import ast
import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmic_ray.ast import Visitor, ast_nodes, get_ast
from cosmic_ray.operators.provider import OperatorProvider

# All of Cosmic Ray's operators but those for decorators, exceptions and names.
_FAMILIES = (
    *("ReplaceBinary", "ReplaceComparison", "ReplaceUnary", "ReplaceTrue", "ReplaceFalse", "ReplaceAnd", "ReplaceOr"),
    *("ReplaceBreak", "ReplaceContinue", "AddNot", "NumberReplacer", "ZeroIteration"),
)
_NODES = {
    *("operator", "keyword", "number", "comparison", "not_test", "factor", "test"),
    *("if_stmt", "while_stmt", "for_stmt", "assert_stmt"),
}
_PROVIDER = OperatorProvider()
# On what has one instance these change nothing.
_SAME = ("_Is_Eq", "_Eq_Is", "_IsNot_NotEq", "_NotEq_IsNot")
_OPERATORS = {name: _PROVIDER[name]() for name in _PROVIDER if name.startswith(_FAMILIES) and not name.endswith(_SAME)}
_TRIES = 4

Key = tuple[str, str, str, str]
"""File, line, what the line became, operator."""


@dataclass(frozen=True)
class Site:
    """A place that can be changed: its line from 1, column, the line's text, and each ``(operator, occurrence)``."""

    file: str
    line: int
    column: int
    text: str
    choices: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Mutant:
    """One change at a site: the operator, what the line became, and the whole source with it."""

    site: Site
    operator: str
    after: str
    source: str

    @property
    def key(self) -> Key:
        """What it is called in results, wherever its line has moved."""
        return self.site.file, self.site.text, self.after, self.operator


def sample(
    root: Path, files: Sequence[str], count: int, seed: int, only: Collection[Key] | None = None
) -> list[Mutant]:
    """``count`` mutants of the files below ``root``, at most one a site, each site as likely as any other.

    Args:
        root: the sources.
        files: their paths below it.
        count: the largest number of mutants.
        seed: of the order.
        only: those of an earlier sample with the same seed; those whose line is no more are left out.
    """
    sites = [site for file in files for site in _sites(file, (root / file).read_text())]
    lines = None if only is None else {key[:2] for key in only}
    chosen: list[Mutant] = []
    for site, rank in sorted(_ranks(sites, seed), key=lambda pair: pair[1]):
        if len(chosen) == count:
            break
        if lines is None or (site.file, site.text) in lines:
            mutant = _mutate(site, (root / site.file).read_text(), rank)
            chosen += [mutant] if mutant and (only is None or mutant.key in only) else []
    return chosen


def _mutate(site: Site, source: str, rank: str) -> Mutant | None:
    """One of the site's changes, by ``rank``, of ``source``; None if none of those tried compiles."""
    order = sorted(site.choices, key=lambda choice: hashlib.sha256(f"{rank} {choice[0]}".encode()).digest())
    for operator, occurrence in order[:_TRIES]:
        changed = _Change(operator, occurrence).walk(get_ast(source)).get_code()
        try:
            ast.parse(changed)
        except SyntaxError:
            continue
        return Mutant(site, operator, changed.splitlines()[site.line - 1].strip(), changed)
    return None


def _sites(file: str, source: str) -> Iterator[Site]:
    """All sites of a file but those in annotations, decorators, names of types and the stars of a signature."""
    choices: dict[tuple[int, int], list[tuple[str, int]]] = defaultdict(list)
    counts: dict[str, int] = defaultdict(int)
    for node in ast_nodes(get_ast(source)):
        fits = node.type in _NODES and (node.parent is None or node.parent.type != "parameters")
        for name, operator in _OPERATORS.items() if fits else ():
            for start, _ in operator.mutation_positions(node):
                choices[start].append((name, counts[name]))
                counts[name] += 1
    lines, silent = source.splitlines(), _silent(source)
    for (line, column), found in sorted(choices.items()):
        if not any(first <= (line, column) < last for first, last in silent):
            yield Site(file, line, column, lines[line - 1].strip(), tuple(found))


def _silent(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """The spans of annotations, decorators and names of types."""
    tree = ast.parse(source)
    nodes: list[ast.AST | None] = [node for node in tree.body if isinstance(node, ast.Assign) and _is_union(node.value)]
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            nodes += node.decorator_list
        if isinstance(node, ast.FunctionDef):
            nodes += [
                node.returns,
                *(a.annotation for a in [*node.args.args, *node.args.kwonlyargs, *node.args.posonlyargs]),
            ]
        if isinstance(node, ast.AnnAssign):
            nodes.append(node.annotation)
    return [_span(node) for node in nodes if node]


def _is_union(value: ast.expr) -> bool:
    return isinstance(value, ast.BinOp) and isinstance(value.op, ast.BitOr)


def _span(node: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    return (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)


def _ranks(sites: Sequence[Site], seed: int) -> Iterator[tuple[Site, str]]:
    """Each site with a hash of seed, file, text of the line, column in it and how often this came before."""
    seen: dict[str, int] = defaultdict(int)
    for site in sites:
        key = f"{seed} {site.file} {site.text} {site.choices[0][0]} {site.column}"
        seen[key] += 1
        yield site, hashlib.sha256(f"{key} {seen[key]}".encode()).hexdigest()


class _Change(Visitor):
    """Applies one occurrence of an operator on a walk."""

    def __init__(self, operator: str, occurrence: int) -> None:
        self.operator, self.left = _OPERATORS[operator], occurrence

    def visit(self, node: Any) -> Any:
        """Return the node, changed if it is the one."""
        for index, _ in enumerate(self.operator.mutation_positions(node)):
            if self.left == 0:
                node = self.operator.mutate(node, index)
            self.left -= 1
        return node
