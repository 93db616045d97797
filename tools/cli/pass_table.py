"""What own passes say of themselves, read from their source: importing them all takes seconds, for torch."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "bitlower.passes"
_MARKUP = re.compile(r":\w+:`~?([^`]+)`|``")


class UnreadableError(Exception):
    """A pass says something in a way that only running it shows."""


@dataclass(frozen=True)
class PassRow:
    """One pass: its name, contract, levels and what it does, as ``passes list`` shows them."""

    name: str
    contract: str
    requires: str
    ensures: str
    summary: str


@dataclass
class _Class:
    """A class in a source file: its bases by name, and the class variables that it sets itself."""

    path: Path
    doc: str
    bases: tuple[str, ...]
    values: dict[str, ast.expr] = field(default_factory=dict)


def own_passes() -> list[PassRow]:
    """A row for each own pass, by name; nothing of ``bitlower.passes`` is imported.

    Raises:
        UnreadableError: one of them says its contract or its levels in another way than by constants.
    """
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UnreadableError(f"{PACKAGE} has no source")
    folder = Path(spec.submodule_search_locations[0])
    files = [
        path for path in folder.glob("*/*.py") if not any(p.startswith("_") for p in path.relative_to(folder).parts)
    ]
    rows = [_row(folder, cls) for path in files for cls in _classes(path).values() if "name" in cls.values]
    return sorted(rows, key=lambda row: row.name)


def _row(folder: Path, cls: _Class) -> PassRow:
    values: dict[str, ast.expr] = {}
    for ancestor in reversed([cls, *_ancestors(folder, cls)]):
        values |= ancestor.values
    levels = _names(values["requires"])
    summary = _MARKUP.sub(lambda match: match[1] or "", cls.doc.partition("\n")[0])
    ensures = _names(values["ensures"])
    return PassRow(
        name=ast.literal_eval(values["name"]),
        contract=_only(_names(values["contract"])),
        requires="|".join(sorted(levels)) if levels else "any",
        ensures=ensures[0] if ensures else "same",
        summary=summary,
    )


def _ancestors(folder: Path, cls: _Class) -> Iterator[_Class]:
    """The classes that ``cls`` derives from, the nearest first, as far as they lie among the passes."""
    for name in cls.bases:
        path = _imported_from(folder, cls.path).get(name, cls.path)
        ancestor = _classes(path).get(name)
        if ancestor is not None:
            yield ancestor
            yield from _ancestors(folder, ancestor)


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def _imported_from(folder: Path, path: Path) -> dict[str, Path]:
    """Where names come from that ``path`` imports from other files of the passes."""
    places = dict[str, Path]()
    for node in _tree(path).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{PACKAGE}."):
            file = folder.joinpath(*(node.module or "").split(".")[2:]).with_suffix(".py")
            places |= {alias.asname or alias.name: file for alias in node.names if file.is_file()}
    return places


@cache
def _classes(path: Path) -> dict[str, _Class]:
    classes = dict[str, _Class]()
    for node in _tree(path).body:
        if isinstance(node, ast.ClassDef):
            bases = tuple(base.id for base in node.bases if isinstance(base, ast.Name))
            cls = _Class(path, inspect.cleandoc(ast.get_docstring(node) or ""), bases)
            for line in node.body:
                match line:
                    case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                        cls.values[name] = value
                    case ast.Assign(targets=[ast.Name(id=name)], value=value):
                        cls.values[name] = value
            classes[node.name] = cls
    return classes


def _names(value: ast.expr) -> list[str]:
    """The members that an expression names: ``Level.FLOAT``, or a frozenset of such; none for None and all levels."""
    match value:
        case ast.Constant(value=None):
            return []
        case ast.Attribute(value=ast.Name(), attr=name):
            return [name.lower()]
        case ast.Call(func=ast.Name(id="frozenset"), args=[ast.Set(elts=members)]):
            return [name for member in members for name in _names(member)]
        case ast.Call(func=ast.Name(id="frozenset"), args=[ast.Name(id="Level")]):
            return []
    raise UnreadableError(ast.unparse(value))


def _only(names: list[str]) -> str:
    if len(names) != 1:
        raise UnreadableError(", ".join(names))
    return names[0]
