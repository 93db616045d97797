"""Where the parts of a recipe are written: file and line, for errors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from bitlower.ir import BitlowerError

Place = tuple[str | int, ...]
"""The keys and indices that lead to a part."""


class RecipeSource:
    """Where a recipe came from: its file, and the YAML nodes with their lines."""

    def __init__(self, path: Path, root: Node | None) -> None:
        self.path = path
        self.root = root

    def locate(self, place: Sequence[str | int]) -> str:
        """``file:line`` of the value at ``place``, or of the last part of it that exists."""
        node, line = self.root, self.root.start_mark.line if self.root else 0
        for part in place:
            step = _child(node, part)
            if step is None:
                break
            key, node = step
            line = key.start_mark.line
        return f"{self.path}:{line + 1}"


def _child(node: Node | None, part: str | int) -> tuple[Node, Node] | None:
    """The node that says where ``part`` of ``node`` is (its key, in a mapping), and its value."""
    if isinstance(node, MappingNode):
        return next(((key, value) for key, value in node.value if key.value == part), None)
    if isinstance(node, SequenceNode) and isinstance(part, int) and part < len(node.value):
        return node.value[part], node.value[part]
    return None


def with_place(source: RecipeSource | None, place: Place, function: Any, *arguments: Any) -> Any:
    """``function(*arguments)``, whose BitlowerError gets file and line in front.

    Raises:
        BitlowerError: that of the function.
    """
    try:
        return function(*arguments)
    except BitlowerError as error:
        if source is None:
            raise
        named = [key for key in _keys_below(source.root, place) if repr(key) in error.message]
        where = source.locate((*place, *named[:1]))
        raise type(error)(f"{where}: {error.message}", hint=error.hint) from error


def _keys_below(node: Node | None, place: Place) -> list[str]:
    for part in place:
        step = _child(node, part)
        if step is None:
            return []
        node = step[1]
    return [str(key.value) for key, _ in node.value] if isinstance(node, MappingNode) else []
