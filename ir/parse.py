"""The text form of a Program read back: what :mod:`bitlower.ir.text` prints, up to the values of tensors."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import fx, nn

from bitlower.ir.diagnostics import BitlowerError, shorten
from bitlower.ir.document import FUNCTIONS
from bitlower.ir.fit import ValueSpec
from bitlower.ir.kernels import KERNELS
from bitlower.ir.program import Program
from bitlower.ir.quantization.granularity import Granularity
from bitlower.ir.quantization.grid import Grid
from bitlower.ir.quantization.scheme import QuantSpec
from bitlower.ir.quantizer import Quantizer
from bitlower.ir.tensors import set_tensor
from bitlower.ir.text import operand_name
from bitlower.ir.types import Dim, Length, Level, TensorType

Fill = Callable[[str, TensorType], torch.Tensor]
"""The value of the tensor of this name and type."""

_HEAD = re.compile(r"program level=(\w+) task=(\S*)")
_SIZE = re.compile(r"size (.+?): (.+)")
_GRAPH = re.compile(r"graph (\w+)(?:\((.*)\) -> \((.*)\))?:")
_TENSOR = re.compile(r"@([\w.]+): (\w+\[.*\])( parameter)?")
_NODE = re.compile(r"%(\w+)(?:: (\w+\[.*?\]))? = ([\w.]+)(\(.*)")
_TYPE = re.compile(r"(\w+)\[(.*)\]")
_SPEC = r"(?P<role>[a-z-]+) (?P<grid>[su]\d+.*?) (?P<granularity>(?:per-|row-group)\S*(?: axis=\S+\))?)"
_RANGE = r"(?:dynamic|uncalibrated|\[[^\]]*\])"
_OWN = re.compile(rf"{_SPEC} {_RANGE}(?: of (?P<tensor>.+))?")
_NAMED = re.compile(rf"(?P<name>\w+): {_SPEC} of (?P<tensor>.+)")
_TOKEN = re.compile(
    r"""\s*(?:(?P<node>%\w+)|(?P<tensor>@[\w.]+)|(?P<number>-?(?:inf|nan|\d+(?:\.\d+)?(?:e[+-]?\d+)?))(?!\w)"""
    r"""|(?P<string>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")|(?P<word>[A-Za-z_]\w*)|(?P<mark>[()\[\],=]))"""
)
_LENGTH = {"at least ": "minimum", "at most ": "maximum", "a multiple of ": "multiple"}


def parse(text: str, tensors: Mapping[str, torch.Tensor] | Fill | None = None) -> Program:
    """The Program that prints as ``text``.

    Args:
        text: of :func:`~bitlower.ir.text.format_program`; empty lines and lines that begin with ``#`` are passed over.
        tensors: values of the tensors of the graph ``model`` by name, or what makes them; zeros if left out.

    Raises:
        BitlowerError: a line is not of that form; it is named with its number.
    """
    known = {} if tensors is None or callable(tensors) else tensors

    def zeros(name: str, kind: TensorType) -> torch.Tensor:
        return known[name] if name in known else torch.zeros([int(size) for size in kind.shape], dtype=kind.dtype)

    reader = _Reader(tensors if callable(tensors) else zeros)
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            try:
                reader.take(line)
            except (BitlowerError, ValueError, LookupError, AttributeError, TypeError, SyntaxError) as error:
                raise BitlowerError(f"line {number}: {shorten(line.strip())}: {error}") from error
    return reader.program()


@dataclass
class _Reader:
    """What was read so far."""

    fill: Fill
    level: Level | None = None
    task: str = ""
    lengths: dict[str, Length] = field(default_factory=dict)
    inputs: tuple[ValueSpec, ...] = ()
    outputs: tuple[ValueSpec, ...] = ()
    graphs: dict[str, _Graph] = field(default_factory=dict)

    def take(self, line: str) -> None:
        """One line."""
        if line.startswith("  "):
            list(self.graphs.values())[-1].take(line.strip())
        elif match := _HEAD.fullmatch(line):
            self.level, self.task = Level(match[1]), match[2]
        elif match := _SIZE.fullmatch(line):
            self.lengths[match[1]] = _length(match[2])
        elif match := _GRAPH.fullmatch(line):
            inputs, outputs = (tuple(map(_value, _split(part))) for part in (match[2] or "", match[3] or ""))
            if match[1] == "model":
                self.inputs, self.outputs = inputs, outputs
            self.graphs[match[1]] = _Graph(inputs, self.fill)
        else:
            raise BitlowerError("neither a program, a size, a graph, nor a line of a graph")

    def program(self) -> Program:
        """All of it.

        Raises:
            BitlowerError: the first line or the graph is missing.
        """
        if self.level is None or not self.graphs:
            raise BitlowerError("a program begins with `program level=…` and has a graph")
        modules = {name: graph.module() for name, graph in self.graphs.items()}
        return Program(modules, self.level, self.task, self.inputs, self.outputs, lengths=self.lengths)


class _Graph:
    """A graph while it is read."""

    def __init__(self, inputs: tuple[ValueSpec, ...], fill: Fill) -> None:
        self.graph, self.root, self.fill = fx.Graph(), nn.Module(), fill
        self.nodes: dict[str, fx.Node] = {}
        self.types: dict[str, TensorType] = {}
        self.stored: dict[str, fx.Node] = {}
        for spec in inputs:
            node = self.graph.placeholder(re.sub(r"\W", "_", spec.name))
            node.meta["type"] = spec.type
            self.nodes[node.name] = node

    def take(self, line: str) -> None:
        """A tensor, a node, or what the graph returns."""
        code, _, notes = line.partition("  # ")
        if match := _TENSOR.fullmatch(code):
            kind = _type(match[2])
            value = self.fill(match[1], kind)
            set_tensor(self.root, match[1], nn.Parameter(value) if match[3] else value)  # type: ignore[arg-type]
            self.types[match[1]] = kind
        elif code.startswith("return "):
            self.graph.output(_Arguments(code.removeprefix("return "), self).value())
        elif match := _NODE.fullmatch(code):
            args, kwargs = _Arguments(match[4], self).call()
            node = self.graph.create_node("call_function", _target(match[3]), args, kwargs, name=match[1])
            if node.name != match[1]:
                raise BitlowerError(f"the name {match[1]} is taken")
            self.nodes[node.name] = node
            if match[2]:
                node.meta["type"] = _type(match[2])
            _annotate(node, notes.split(" · ") if notes else [])
        else:
            raise BitlowerError("neither a tensor, a node, nor `return`")

    def tensor(self, name: str) -> fx.Node:
        """The node that reads the tensor ``name``, made where it is read first."""
        if name not in self.stored:
            node = self.graph.get_attr(name)
            node.meta["type"] = self.types[name]
            self.stored[name] = node
        return self.stored[name]

    def module(self) -> fx.GraphModule:
        """The graph with its tensors."""
        return fx.GraphModule(self.root, self.graph)


class _Arguments:
    """The arguments of a node, token by token."""

    def __init__(self, text: str, graph: _Graph) -> None:
        self.text, self.graph, self.place = text, graph, 0

    def call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``(a, b, key=c)``."""
        args, kwargs = [], {}
        self._mark("(")
        while not self._is(")"):
            word = re.compile(r"\s*([A-Za-z_]\w*)=").match(self.text, self.place)
            if word:
                self.place = word.end()
                kwargs[word[1]] = self.value()
            else:
                args.append(self.value())
            if not self._is(")"):
                self._mark(",")
        self._mark(")")
        return tuple(args), kwargs

    def value(self) -> Any:
        """One value."""
        match = _TOKEN.match(self.text, self.place)
        if not match:
            raise BitlowerError(f"no value at {shorten(self.text[self.place :])!r}")
        self.place = match.end()
        text = match[0].strip()
        match match.lastgroup:
            case "node":
                return self.graph.nodes[text[1:]]
            case "tensor":
                return self.graph.tensor(text[1:])
            case "number":
                return int(text) if re.fullmatch(r"-?\d+", text) else float(text)
            case "string":
                return ast.literal_eval(text)
            case "word":
                return self._word(text)
        if text == "(":
            return tuple(self._items(")"))
        if text == "[":
            return self._items("]")
        raise BitlowerError(f"no value begins with {text!r}")

    def _word(self, word: str) -> Any:
        if word in ("None", "True", "False"):
            return ast.literal_eval(word)
        if word == "slice":
            return slice(*self.call()[0])
        if word == "device":
            args, options = self.call()
            return torch.device(*args, *options.values())
        value = getattr(torch, word)
        if not isinstance(value, torch.dtype | torch.layout | torch.memory_format):
            raise BitlowerError(f"{word} is no constant")
        return value

    def _items(self, end: str) -> list[Any]:
        items = []
        while not self._is(end):
            items.append(self.value())
            if not self._is(end):
                self._mark(",")
        self._mark(end)
        return items

    def _is(self, mark: str) -> bool:
        return self.text[self.place :].lstrip().startswith(mark)

    def _mark(self, mark: str) -> None:
        if not self._is(mark):
            raise BitlowerError(f"{mark!r} is missing at {shorten(self.text[self.place :])!r}")
        self.place = self.text.index(mark, self.place) + 1


def _annotate(node: fx.Node, notes: list[str]) -> None:
    """What stands behind a node: its quantizer, or those of a kernel, and its module path."""
    if node.target in KERNELS:
        node.meta["quantizers"] = {}
    for note in notes:
        if match := _OWN.fullmatch(note):
            node.meta["quantizer"] = _quantizer(match, match["tensor"] or operand_name(node))
        elif match := _NAMED.fullmatch(note):
            node.meta["quantizers"][match["name"]] = _quantizer(match, match["tensor"])
        else:
            node.meta["path"] = note


def _quantizer(match: re.Match[str], tensor: str) -> Quantizer:
    return Quantizer(
        match["role"], QuantSpec(Grid.parse(match["grid"]), Granularity.parse(match["granularity"])), tensor
    )


def _target(name: str) -> Any:
    """The operator or the Python function that prints as ``name``."""
    module, _, function = name.rpartition(".")
    for prefix in ("", "_"):
        if f"{prefix}{module}:{function}" in FUNCTIONS:
            return FUNCTIONS[f"{prefix}{module}:{function}"]
    for full in (f"aten.{name}", f"aten.{name}.default", name, f"{name}.default"):
        try:
            candidate = reduce(getattr, full.split("."), torch.ops)
        except AttributeError:
            continue
        if isinstance(candidate, torch._ops.OpOverload):
            return candidate
    raise BitlowerError(f"unknown operator {name!r}", hint="load the plugin that defines it")


def _type(text: str) -> TensorType:
    match = _TYPE.fullmatch(text)
    if not match:
        raise BitlowerError(f"{text!r} is no type")
    dtype = getattr(torch, match[1])
    if not isinstance(dtype, torch.dtype):
        raise BitlowerError(f"{match[1]} is no dtype")
    return TensorType(dtype, tuple(map(_dim, filter(None, match[2].split(", ")))))


def _dim(text: str) -> Dim:
    return int(text) if re.fullmatch(r"\d+", text) else text


def _value(text: str) -> ValueSpec:
    name, _, kind = text.partition(": ")
    return ValueSpec(name, _type(kind))


def _split(text: str) -> list[str]:
    """The values of a signature: commas inside brackets separate none."""
    return [part for part in re.split(r", (?![^\[]*\])", text) if part]


def _length(text: str) -> Length:
    bounds: dict[str, int] = {}
    for part in text.split(", ") if text != "any" else ():
        key = next(key for key in _LENGTH if part.startswith(key))
        bounds[_LENGTH[key]] = int(part.removeprefix(key))
    return Length(**bounds)
