"""The repeated blocks of a transformer and the points where it can be cut, from the flow of values alone.

Names of classes and modules are not asked. What a decoder keeps of a token (the ``present`` outputs) leaves a block
aside of the one value that the next block reads. Some values stand beside the stream from block to block: what an
encoder hands to every layer of a decoder, a bias of positions that a whole stack reads. They are the blocks' context.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import fx

from bitlower.ir.dataflow import ATTENTION, NORM, SOFTMAX, carriers, is_float, liveness, residual_streams, value_root


@dataclass(frozen=True)
class Block:
    """A repeated part of the model: one attention, or those of one layer of a decoder that reads an encoder too.

    ``source`` is the value that enters; ``nodes`` lead to the last of them, the one value that leaves. ``context`` are
    the values besides, made before the block, that other blocks read as well; none of them comes out changed.
    """

    source: fx.Node
    nodes: tuple[fx.Node, ...]
    context: tuple[fx.Node, ...] = ()

    @property
    def output(self) -> fx.Node:
        """The value that leaves the block."""
        return self.nodes[-1]


def cut_points(module: fx.GraphModule) -> list[fx.Node]:
    """The nodes after which no activation but their own value is computed with: the model can be cut there.

    What is only given out at the end does not count: hidden states, and the ``present`` keys and values of a decoder.
    """
    return _Flow(module).cuts(frozenset())


def blocks(module: fx.GraphModule) -> list[Block]:
    """The repeated blocks of a transformer, in order: each runs from a cut point before an attention to the next.

    Where a block would have several attentions so, values that live through attentions without being a residual stream
    are context, and may cross a cut: an encoder's output while its decoder runs, a bias of positions. Then parts with
    one attention each that come in turn (from the target to itself, and to the source) are one block.
    """
    flow = _Flow(module)
    plain = flow.chains(frozenset())
    standing = flow.standing() if flow.is_coarse(plain) else frozenset()
    split = flow.chains(standing) if standing else plain
    if sum(map(len, split)) <= sum(map(len, plain)):
        return [block for chain in plain for block in chain]
    return [block for chain in split for block in flow.in_turn(chain)]


class _Flow:
    """A graph's activations, where each is alive, and where the attentions are."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.graph = module.graph
        self.nodes = list(module.graph.nodes)
        self.position = {node: i for i, node in enumerate(self.nodes)}
        self.values = carriers(module)
        self.attentions = [self.position[n] for n in self.nodes if n.target in ATTENTION | SOFTMAX]

    def cuts(self, standing: Collection[fx.Node]) -> list[fx.Node]:
        """The floats after which no activation but their own and the ``standing`` ones is computed with."""
        living = [after & self.values for after in liveness(self.graph, outputs=False)]
        floats = [n in self.values and is_float(n) for n in self.nodes]
        pairs = zip(self.nodes, living, floats, strict=True)
        return [n for n, after, float_ in pairs if float_ and after.difference(standing) <= {n}]

    def standing(self) -> frozenset[fx.Node]:
        """The activations that live through an attention and are no residual stream."""
        streams = residual_streams(self.graph)
        return frozenset(n for n in self.values if value_root(n) not in streams and self._lives_through_attention(n))

    def _lives_through_attention(self, node: fx.Node) -> bool:
        last = max((self.position[user] for user in node.users if user.op != "output"), default=-1)
        following = bisect_right(self.attentions, self.position[node])
        return following < len(self.attentions) and self.attentions[following] < last

    def is_coarse(self, chains: Iterable[Sequence[Block]]) -> bool:
        """Whether several attentions lie in one of the blocks."""
        inside = [len(set(self.attentions) & set(map(self.position.__getitem__, b.nodes))) for c in chains for b in c]
        return max(inside, default=0) > 1

    def chains(self, standing: Collection[fx.Node]) -> list[list[Block]]:
        """Blocks of one attention each; in a chain, each begins where the one before it ends."""
        cuts = self.cuts(standing)
        places = [self.position[cut] for cut in cuts]
        before = [bisect_right(places, attention - 1) for attention in self.attentions]
        starts = list(dict.fromkeys(cuts[count - 1] for count in before if count))
        return [list(self._blocks(chain, cuts, standing, end)) for chain, end in self._chains(starts)]

    def _chains(self, starts: list[fx.Node]) -> Iterator[tuple[list[fx.Node], int]]:
        """The starts that follow from each other, and the position where the next such row of them begins."""
        first = 0
        for index, (start, following) in enumerate(pairwise(starts), 1):
            if following not in self._dependents(start):
                yield starts[first:index], self.position[following]
                first = index
        if starts:
            yield starts[first:], len(self.nodes)

    def _blocks(
        self, starts: list[fx.Node], cuts: list[fx.Node], standing: Collection[fx.Node], limit: int
    ) -> Iterator[Block]:
        cuts = [c for c in cuts if self.position[c] < limit]
        last = self._end_in_turn(starts, cuts) if standing else None
        ends = [*starts[1:], last or self._end_of_last(starts, cuts, limit)]
        for start, end in zip(starts, ends, strict=True):
            nodes = self._between(start, end)
            read = {n for node in nodes for n in node.all_input_nodes if n in standing}
            context = sorted(
                (n for n in read if self.position[n] < self.position[start]), key=self.position.__getitem__
            )
            yield Block(start, tuple(nodes), tuple(context))

    def _between(self, start: fx.Node, end: fx.Node) -> list[fx.Node]:
        return self.nodes[self.position[start] + 1 : self.position[end] + 1]

    def _end_in_turn(self, starts: list[fx.Node], cuts: list[fx.Node]) -> fx.Node | None:
        """The cut point that makes the last block compute what one of those before it does from its source."""
        before = [self._operators(first, self._between(first, second)) for first, second in pairwise(starts)]
        later = [c for c in cuts if self.position[c] > self.position[starts[-1]]]
        return next((c for c in later if self._operators(starts[-1], self._between(starts[-1], c)) in before), None)

    def _end_of_last(self, starts: list[fx.Node], cuts: list[fx.Node], limit: int) -> fx.Node:
        """The cut point that makes the last block compute what the one before it does.

        Else the last of the same type that is a normalization if the block starts after one, and none if it does not.
        """
        start = starts[-1]
        dependents = self._dependents(start)
        later = [c for c in cuts if c in dependents and c.meta.get("type") == start.meta.get("type")]
        if not later:
            end: fx.Node = self.nodes[min(limit, len(self.nodes) - 1) - 1]
            return end
        if len(starts) > 1:
            before = _floats(self._between(starts[-2], start))
            for cut in later:
                if _floats(self._between(start, cut)) == before:
                    return cut
        alike = [cut for cut in later if (cut.target in NORM) == (start.target in NORM)]
        return (alike or later)[-1]

    def in_turn(self, chain: list[Block]) -> list[Block]:
        """Parts that come in turn, put together: where each n-th computes the same, n are one block."""
        kinds = [self._operators(block.source, block.nodes) for block in chain]
        turn = next(n for n in range(1, len(kinds) + 1) if kinds[n:] == kinds[: len(kinds) - n] or n == len(kinds))
        if turn == len(kinds) or len(kinds) % turn:
            return chain
        return [_joined(chain[first : first + turn]) for first in range(0, len(chain), turn)]

    def _operators(self, source: fx.Node, nodes: Iterable[fx.Node]) -> list[str]:
        """What computes floats from ``source``; masks are made in the first block and read in all."""
        dependents = self._dependents(source)
        return _floats(node for node in nodes if node in dependents)

    def _dependents(self, source: fx.Node) -> set[fx.Node]:
        reached = {source}
        for node in self.nodes[self.position[source] + 1 :]:
            if not reached.isdisjoint(node.all_input_nodes):
                reached.add(node)
        return reached - {source}


def _floats(nodes: Iterable[fx.Node]) -> list[str]:
    """The operators that compute floats."""
    return [str(node.target) for node in nodes if node.op == "call_function" and is_float(node)]


def _joined(parts: Sequence[Block]) -> Block:
    """Blocks that follow each other, as one."""
    context = dict.fromkeys(node for part in parts for node in part.context)
    return Block(parts[0].source, tuple(node for part in parts for node in part.nodes), tuple(context))
