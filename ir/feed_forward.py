"""Feed-forward parts of transformer layers, found from the flow of values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from bitlower.ir.dataflow import (
    ADD,
    ATTENTION,
    LINEAR,
    MATMUL,
    SOFTMAX,
    activation_operand,
    residual_sums,
    unrounded,
    value_root,
)


@dataclass(frozen=True)
class FeedForward:
    """A branch beside a residual stream that has no attention in it.

    Args:
        stream: the value that enters the residual sum beside the branch.
        output: the linear layer that the branch ends with.
    """

    stream: fx.Node
    output: fx.Node


def feed_forwards(graph: fx.Graph) -> list[FeedForward]:
    """The feed-forward part of every layer, in order; also where attention runs side by side with it (GPT-NeoX)."""
    position = {node: i for i, node in enumerate(graph.nodes)}
    found = []
    for total in residual_sums(graph):
        stream, branch = sorted(map(value_root, total.all_input_nodes[:2]), key=position.__getitem__)
        plain = [node for node in _writers(branch, stream) if not _attends(node, stream, position)]
        found += [FeedForward(stream, plain[-1])] if plain else []
    return found


def _writers(branch: fx.Node, stream: fx.Node) -> Iterator[fx.Node]:
    """The linear layers whose outputs ``branch`` is a sum of."""
    if branch.target in LINEAR:
        yield branch
    elif branch.target in ADD and branch is not stream:
        for operand in branch.all_input_nodes:
            yield from _writers(value_root(operand), stream)


def _attends(linear: fx.Node, stream: fx.Node, position: dict[fx.Node, int]) -> bool:
    """Whether an attention lies between ``stream`` and ``linear``."""
    frontier, seen = [activation_operand(linear)], set[fx.Node]()
    while frontier:
        node = frontier.pop()
        if node in seen or position[node] <= position[stream]:
            continue
        seen.add(node)
        if node.target in ATTENTION | SOFTMAX | MATMUL:
            return True
        frontier += node.all_input_nodes
    return False


def feed_forward_values(graph: fx.Graph) -> Iterator[tuple[fx.Node, fx.Node, fx.Node]]:
    """Input, output and residual sum of every feed-forward network: linears in a row without attention between them."""
    sums = sums_of_one_shape(graph)
    for node in sums:
        for operand in node.all_input_nodes:
            output = value_root(operand)
            entry = _entry(output, set(sums)) if output.target in LINEAR else None
            if entry is not None:
                yield entry, output, node


def _entry(output: fx.Node, barrier: set[fx.Node]) -> fx.Node | None:
    """The value that the first linears of the branch ending in ``output`` read, if it is one and no attention comes."""
    entries, stack = set(), [activation_operand(output)]
    while stack:
        node = stack.pop()
        if node.target in LINEAR:
            entries.add(unrounded(activation_operand(node)))
        elif node.target in ATTENTION | SOFTMAX | MATMUL or node in barrier:
            return None
        elif node.op == "call_function":
            stack += node.all_input_nodes
    return entries.pop() if len(entries) == 1 else None


def sums_of_one_shape(graph: fx.Graph) -> list[fx.Node]:
    """The residual sums; a mask is added by broadcasting, a residual never is."""
    return [n for n in residual_sums(graph) if all(_shape(a) == _shape(n) for a in n.all_input_nodes)]


def _shape(node: fx.Node) -> object:
    return node.meta["type"].shape
