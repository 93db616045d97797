"""The repeated blocks of a Program, each as a function of the value that enters it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx

from bitlower.ir import Batch, Program, get_tensor
from bitlower.ir.blocks import blocks
from bitlower.ir.dataflow import constants, linears, unrounded
from bitlower.ir.storage import release
from bitlower.ir.subgraph import needed, subgraph
from bitlower.ir.trainable import identity


@dataclass(frozen=True)
class Part:
    """A block of a program: ``output`` from ``source``, from ``context`` and from ``sides``.

    ``context`` are values of other parts of the model that several blocks read (what an encoder hands to a decoder);
    ``sides`` follow from the program's inputs (masks, positions, sizes). Quantizers of the stream between two blocks
    belong to the later one, those of the context to every block that reads it.
    """

    program: Program
    source: fx.Node
    output: fx.Node
    context: tuple[fx.Node, ...]
    sides: tuple[fx.Node, ...]

    @property
    def arguments(self) -> tuple[fx.Node, ...]:
        """What :meth:`module` takes."""
        return (self.source, *self.context, *self.sides)

    @cached_property
    def nodes(self) -> frozenset[fx.Node]:
        """What computes the output, parameters included."""
        return frozenset(needed(self.arguments, [self.output]))

    @cached_property
    def path(self) -> str:
        """The model's own name of the block: what the paths of its linears have in common."""
        paths = [node.meta["path"].split(".") for node in linears(self.program.graph) if node in self.nodes]
        same = [names[0] for names in zip(*paths, strict=False) if len(set(names)) == 1]
        return ".".join(same) if same else self.output.name

    def module(self) -> fx.GraphModule:
        """The block by itself, over the program's tensors as they are now: its arguments to a tuple of one."""
        return subgraph(self.program.module, self.arguments, [self.output])

    @cached_property
    def side_module(self) -> fx.GraphModule:
        """From the program's inputs to the side values."""
        placeholders = list(self.program.graph.find_nodes(op="placeholder"))
        return subgraph(self.program.module, placeholders, self.sides)

    def side_values(self, batch: Batch) -> list[Any]:
        """Of a batch, in the order of ``sides``."""
        with torch.no_grad():
            return list(self.side_module(*self.program.arguments(batch)))

    def release(self) -> None:
        """Give back the memory of weights that lie in files."""
        for node in self.nodes:
            if node.op == "get_attr":
                release(get_tensor(self.program.module, str(node.target)))

    def shared(self) -> set[str]:
        """The names of tensors that something outside the block reads as well, under whatever name."""
        module = self.program.module
        readers = _readers(module)
        names = [str(node.target) for node in self.nodes if node.op == "get_attr"]
        return {name for name in names if readers[identity(get_tensor(module, name))] - self.nodes}


def _readers(module: fx.GraphModule) -> dict[Any, set[fx.Node]]:
    """The nodes that compute with each stored tensor, or with what is computed from stored tensors alone."""
    fixed, derived = constants(module.graph), defaultdict[fx.Node, set[Any]](set)
    readers = defaultdict[Any, set[fx.Node]](set)
    for node in module.graph.nodes:
        if node.op == "get_attr":
            derived[node] = {identity(get_tensor(module, str(node.target)))}
            continue
        keys = {key for source in node.all_input_nodes for key in derived[source]}
        if node in fixed:
            derived[node] = keys
        else:
            for key in keys:
                readers[key].add(node)
    return readers


def parts(program: Program) -> list[Part]:
    """The repeated blocks of a program, in order; in an encoder or a decoder, each begins where the last one ends."""
    block_parts = []
    for block in blocks(program.module):
        source, output, *context = map(unrounded, (block.source, block.output, *block.context))
        sides = side_values(program.module, [source, *context], output)
        block_parts.append(Part(program, source, output, tuple(dict.fromkeys(context)), tuple(sides)))
    return block_parts


def side_values(module: fx.GraphModule, entering: Sequence[fx.Node], output: fx.Node) -> list[fx.Node]:
    """What ``output`` depends on besides ``entering`` and parameters: masks, positions, rotary tables, sizes.

    Each is as near to the output as can be, so that little is computed again from it. What is computed from buffers
    alone counts too.
    """
    fixed = _parametric(module)
    fed = set(entering)
    for node in module.graph.nodes:
        if any(operand in fed for operand in node.all_input_nodes):
            fed.add(node)
    sides: dict[fx.Node, None] = {}
    seen: set[fx.Node] = set()
    frontier = [output]
    while frontier:
        node = frontier.pop()
        if node in entering or node in seen:
            continue
        seen.add(node)
        if node in fed or node in fixed or node.op == "get_attr":
            frontier += node.all_input_nodes
        else:
            sides[node] = None
    return [node for node in module.graph.nodes if node in sides]


def _parametric(module: fx.GraphModule) -> set[fx.Node]:
    """Parameters, and what is computed from them and other stored tensors alone, with its operands."""
    fixed = constants(module.graph)
    parametric_nodes: set[fx.Node] = set()
    for node in module.graph.nodes:
        stored = node.op == "get_attr" and isinstance(get_tensor(module, str(node.target)), torch.nn.Parameter)
        if stored or (node in fixed and any(operand in parametric_nodes for operand in node.all_input_nodes)):
            parametric_nodes.add(node)
    for node in reversed(module.graph.nodes):
        if node in parametric_nodes and node.op != "get_attr":
            parametric_nodes.update(node.all_input_nodes)
    return parametric_nodes
