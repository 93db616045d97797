"""Feed-forward parts of transformer layers, found from the flow of values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from bitlower.ir.dataflow import ADD, ATTENTION, LINEAR, MATMUL, SOFTMAX, activation_operand, residual_sums, value_root


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
