"""Feed-forward parts of transformer layers, found from the flow of values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from bitlower.ir.dataflow import ADD, ATTENTION, LINEAR, MATMUL, SOFTMAX, residual_sums, unrounded, value_root
from bitlower.ir.operators import LinearNode


@dataclass(frozen=True)
class FeedForward:
    """A branch beside a residual stream that has no attention in it.

    Args:
        stream: the value that enters the residual sum beside the branch.
        input: the value x that the first linear layers of the branch read; None where they read several.
        output: the linear layer that the branch ends with; its value is h.
        sum: the residual sum y.
    """

    stream: fx.Node
    input: fx.Node | None
    output: fx.Node
    sum: fx.Node


def feed_forwards(graph: fx.Graph) -> list[FeedForward]:
    """The feed-forward part of every layer, in order; also where attention runs side by side with it (GPT-NeoX)."""
    position = {node: i for i, node in enumerate(graph.nodes)}
    parts = []
    for total in residual_sums(graph):
        stream, branch = sorted(map(value_root, total.all_input_nodes[:2]), key=position.__getitem__)
        plain = [node for node in _writers(branch, stream) if not _attends(node, stream, position)]
        if plain:
            parts.append(FeedForward(stream, _input(plain[-1], stream, position), plain[-1], total))
    return parts


def _writers(branch: fx.Node, stream: fx.Node) -> Iterator[fx.Node]:
    """The linear layers whose outputs ``branch`` is a sum of."""
    if branch.target in LINEAR:
        yield branch
    elif branch.target in ADD and branch is not stream:
        for operand in branch.all_input_nodes:
            yield from _writers(value_root(operand), stream)


def _attends(linear: fx.Node, stream: fx.Node, position: dict[fx.Node, int]) -> bool:
    """Whether an attention is between ``stream`` and ``linear``."""
    return any(node.target in ATTENTION | SOFTMAX | MATMUL for node in _behind(linear, stream, position))


def _input(output: fx.Node, stream: fx.Node, position: dict[fx.Node, int]) -> fx.Node | None:
    """The value that the first linear layers of the branch read, if it is one for all of them."""
    linears = [node for node in _behind(output, stream, position) if node.target in LINEAR]
    first = [node for node in linears if not any(other in linears for other in _behind(node, stream, position))]
    entries = {unrounded(LinearNode(node).x) for node in first}
    return entries.pop() if len(entries) == 1 else None


def _behind(linear: fx.Node, stream: fx.Node, position: dict[fx.Node, int]) -> list[fx.Node]:
    """What the input of ``linear`` is computed from, back to ``stream``."""
    frontier, seen = [LinearNode(linear).x], dict[fx.Node, None]()
    while frontier:
        node = frontier.pop()
        if node not in seen and position[node] > position[stream]:
            seen[node] = None
            frontier += node.all_input_nodes
    return list(seen)
