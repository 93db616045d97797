"""The one way to read YAML that others wrote: plain values, bounded in size, depth and what aliases make of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from bitlower.ir import BitlowerError, shorten
from bitlower.ir.files import read_bytes, reason

LIMIT = 100_000
"""Bytes of a file."""
DEPTH = 30
"""Lists and mappings inside each other."""
VALUES = 20_000
"""Values in all, those behind an alias counted each time."""
DIGITS = 100
"""Of a number."""
_TAG = "tag:yaml.org,2002:"
_TAGS = frozenset(
    f"{_TAG}{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null", "merge", "timestamp")
)


class _YamlProblem(ValueError):
    """What is wrong, and with which value."""

    def __init__(self, problem: str, node: Node) -> None:
        super().__init__(problem)
        self.line = node.start_mark.line + 1


def read_yaml(path: Path) -> tuple[Node | None, Any]:
    """The nodes of a YAML file, with their lines, and the plain data that they stand for; nothing for an empty file.

    Raises:
        BitlowerError: the file cannot be read, is not YAML, or breaks a bound; names the line where there is one.
    """
    try:
        text = read_bytes(path, LIMIT).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BitlowerError(f"{path} is not a text file (byte {error.start} is not UTF-8)") from None
    except (OSError, ValueError) as error:
        raise BitlowerError(f"cannot read the recipe {path} ({reason(error)})") from None
    try:
        node = YAML(typ="safe", pure=True).compose(text)
        if node is None:
            return None, None
        _count(node, {}, ())
        return node, _construct(node)
    except _YamlProblem as error:
        raise BitlowerError(f"{path}:{error.line}: {error}") from None
    except MarkedYAMLError as error:
        raise BitlowerError(_problem(path, error)) from None
    except RecursionError:
        raise BitlowerError(f"{path} is nested deeper than {DEPTH} levels") from None
    except (YAMLError, ValueError) as error:
        raise BitlowerError(f"{path} is not YAML ({next(iter(str(error).splitlines()), '')})") from None


def _construct(node: Node) -> Any:
    try:
        return YAML(typ="safe", pure=True).constructor.construct_document(node)
    except (LookupError, ValueError) as error:  # of the library, which trusts a tag
        raise _YamlProblem(f"a value is not of the kind that it looks like ({error})", node) from None


def _count(node: Node, counts: dict[int, int], above: tuple[int, ...]) -> int:
    """How many values ``node`` stands for, itself among them; each node is looked at once.

    Raises:
        _YamlProblem: a bound is broken, or a value is not plain.
    """
    if id(node) in above:
        raise _YamlProblem("a value holds itself by an alias", node)
    if len(above) > DEPTH:
        raise _YamlProblem(f"values are nested deeper than {DEPTH} levels", node)
    if id(node) not in counts:
        _check_plain(node)
        counts[id(node)] = 1 + sum(_count(child, counts, (*above, id(node))) for child in _children(node))
    if counts[id(node)] > VALUES:
        raise _YamlProblem(f"aliases make more than {VALUES} values of it", node)
    return counts[id(node)]


def _children(node: Node) -> Iterator[Node]:
    if isinstance(node, MappingNode):
        for pair in node.value:
            yield from pair
    elif isinstance(node, SequenceNode):
        yield from node.value


def _check_plain(node: Node) -> None:
    kind = str(node.tag).removeprefix(_TAG)
    if node.tag not in _TAGS:
        raise _YamlProblem(f"a value has the tag {shorten(repr(kind))}, and a recipe holds plain values", node)
    if not isinstance(node.value, str):
        return
    if any("\ud800" <= character <= "\udfff" for character in node.value):
        raise _YamlProblem(f"the text {shorten(ascii(node.value))} holds half of a surrogate pair", node)
    if kind in ("int", "float") and len(node.value) > DIGITS:
        raise _YamlProblem(f"a number has {len(node.value)} digits", node)


def _problem(path: Path, error: MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    problem = str(error.problem or error.context or "not YAML").splitlines()[0]
    if "found duplicate key" in problem:
        problem = f"the key {problem.split(' with value')[0].removeprefix('found duplicate key ')} is given twice"
    return f"{path}:{mark.line + 1 if mark else 1}: {problem}"
