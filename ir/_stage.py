"""A part of a Program's graph as a Program of its own: from some of its values to others."""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import fx

from bitlower.ir.diagnostics import BitlowerError, describe
from bitlower.ir.fit import ValueSpec
from bitlower.ir.operators import argument, operand
from bitlower.ir.program import Program
from bitlower.ir.tensors import UncompiledModule
from bitlower.ir.tokens import ENCODER_REST
from bitlower.ir.types import TensorType

aten = torch.ops.aten
_POSITIONS = 2
"""The axis of positions in keys and values."""
_SHAPED = frozenset({aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.expand.default})
"""Operators that are told the sizes of their result."""
_OTHER_LAYOUT = "let the encoder return keys and values: leave out `layout`"


class StageGraph:
    """A graph that takes the values of some nodes of ``program``, and computes others from them."""

    def __init__(self, program: Program, inputs: Mapping[fx.Node, ValueSpec]) -> None:
        self.source, self.specs = program, tuple(inputs.values())
        self.graph = fx.Graph()
        self.copies: dict[fx.Node, fx.Node] = {}
        self.sizes: dict[int | str, tuple[fx.Node, int]] = {}
        for node, spec in inputs.items():
            copy = self.copies[node] = self.graph.placeholder(spec.name.replace(".", "_"))
            copy.meta = {**node.meta, "type": spec.type}
            for axis, size in enumerate(spec.type.shape):
                self.sizes.setdefault(size, (copy, axis))

    def let_all_count(self, mask: fx.Node) -> None:
        """Put ones for ``mask`` ``[batch, past + sequence]``: a target ends with padding, which no token looks at."""
        batch, past, sequence = (self._size(name) for name in ("batch", "past", "sequence"))
        total = self.graph.call_function(operator.add, (past, sequence))
        ones = self.graph.call_function(aten.ones.default, ([batch, total],), {"dtype": mask.meta["type"].dtype})
        ones.meta = {"type": mask.meta["type"]}
        self.copies[mask] = ones

    def compute_rest(self, states: fx.Node, values: Mapping[fx.Node, fx.Node]) -> None:
        """Compute ``values`` from those positions of ``states`` that they lack, and put these behind what they have.

        Args:
            states: ``[batch, positions, width]``; an input of the stage.
            values: results ``[batch, heads, positions, width]`` by nodes of ``program``, and the placeholders of their
                first ``encoder_past`` positions.

        Raises:
            BitlowerError: they depend on an input that the stage does not have, or the axis of positions is not clear.
        """
        size = states.meta["type"].shape[1]
        count = self.graph.call_function(aten.sym_size.int, (next(iter(values.values())), _POSITIONS))
        rest = self.graph.call_function(aten.slice.Tensor, (self.copies[states], 1, count, sys.maxsize))
        rest.meta = {**self.copies[states].meta, "type": _resized(states, size)}
        part = _Part(self, states, rest)
        part.copy(values)
        for node, past in values.items():
            whole = self.graph.call_function(aten.cat.default, ([past, part.copies[node]], _POSITIONS))
            whole.meta = {key: value for key, value in node.meta.items() if key in ("type", "path", "source")}
            self.copies[node] = whole

    def copy(self, results: Iterable[fx.Node]) -> None:
        """Compute ``results`` in the stage.

        Raises:
            BitlowerError: they depend on an input that the stage does not have.
        """
        needed = self._needed(results)
        for node in self.source.graph.nodes:
            if node in needed:
                self._copy(node)

    def reads(self, results: Iterable[fx.Node]) -> bool:
        """Whether the inputs that the stage has are enough for ``results``."""
        return all(node.op != "placeholder" for node in self._needed(results))

    def program(self, results: Mapping[ValueSpec, fx.Node]) -> Program:
        """The stage with these outputs.

        Raises:
            BitlowerError: they depend on an input that the stage does not have.
        """
        self.copy(results.values())
        self.graph.output(tuple(self.copies[node] for node in results.values()))
        source = self.source
        module = UncompiledModule(source.module, self.graph)
        stage = replace(source.clone(), graphs={"model": module}, inputs=self.specs, outputs=tuple(results))
        stage.recompile()
        return stage

    def _copy(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            raise BitlowerError(
                f"{self.source.source or 'the model'} cannot be cut into an encoder and a decoder: one of them reads "
                f"{describe(node)}, which is the other's"
            )
        self.copies[node] = self._read_size(node) or self.graph.node_copy(node, self.copies.__getitem__)

    def _needed(self, results: Iterable[fx.Node]) -> set[fx.Node]:
        """What must be copied for ``results``."""
        needed, frontier = set[fx.Node](), [node for node in results if node not in self.copies]
        while frontier:
            node = frontier.pop()
            if node not in needed:
                needed.add(node)
                read = [] if self._named_size(node) in self.sizes else node.all_input_nodes
                frontier += [source for source in read if source not in self.copies]
        return needed

    def _read_size(self, node: fx.Node) -> fx.Node | None:
        """The size that ``node`` asks for, asked of an input of the stage; None if it asks for none that they have."""
        size = self._named_size(node)
        return self._size(size) if size in self.sizes else None

    def _named_size(self, node: fx.Node) -> str | None:
        if node.target is not aten.sym_size.int:
            return None
        size = operand(node, "self").meta["type"].shape[argument(node, "dim")]
        return size if isinstance(size, str) else None

    def _size(self, name: int | str) -> fx.Node:
        return self.graph.call_function(aten.sym_size.int, self.sizes[name])


class _Part(StageGraph):
    """Nodes of a stage that are computed for some positions of ``states`` alone.

    Args:
        stage: of which it is a part; nodes are put into its graph.
        states: a node of the whole.
        rest: its value at those positions.
    """

    def __init__(self, stage: StageGraph, states: fx.Node, rest: fx.Node) -> None:
        self.source, self.specs, self.graph = stage.source, stage.specs, stage.graph
        self.size = states.meta["type"].shape[1]
        self.copies = {**stage.copies, states: rest}
        self.sizes = {**stage.sizes, self.size: (rest, 1)}
        self._carried = {states}

    def _copy(self, node: fx.Node) -> None:
        super()._copy(node)
        if self._carried.isdisjoint(node.all_input_nodes):
            return
        self._carried.add(node)
        copy = self.copies[node]
        if "type" not in node.meta:
            return
        kind = _resized(node, self.size)
        copy.meta = {**copy.meta, "type": kind}
        if node.target in _SHAPED:  # without positions no size follows from the others, so that all are named
            value, sizes, *others = copy.args
            assert isinstance(sizes, list | tuple)
            with self.graph.inserting_before(copy):
                rest = self._size(self.size)
            named = [
                rest if dim == ENCODER_REST else dim if isinstance(dim, int) else size
                for dim, size in zip(kind.shape, sizes, strict=True)
            ]
            copy.args = value, named, *others


def _resized(node: fx.Node, size: int | str) -> TensorType:
    """The type of ``node`` where the axis of positions, which has this ``size``, has those of the rest alone."""
    kind: TensorType = node.meta["type"]
    if isinstance(size, int) and kind.shape.count(size) != 1:
        raise BitlowerError(f"{describe(node)} has not one axis of {size} positions", hint=_OTHER_LAYOUT)
    return TensorType(kind.dtype, tuple(_renamed(dim, size) for dim in kind.shape))


def _renamed(dim: int | str, size: int | str) -> int | str:
    """A dimension, or a product of several, of which those called ``size`` are the rest."""
    if dim == size:
        return ENCODER_REST
    return dim if isinstance(dim, int) else "*".join(ENCODER_REST if part == size else part for part in dim.split("*"))
