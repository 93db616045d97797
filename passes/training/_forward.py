"""A model as training runs it: the values that losses look at, and the output head apart, in chunks of rows.

The logits of a large vocabulary are the peak of memory: 512 tokens of 50,000 words are 100 MB, and softmax, loss and
gradients are several times that. So the model runs up to the input of its head, and the head on some rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from bitlower.ir import Batch, Program
from bitlower.ir.blocks import blocks
from bitlower.ir.dataflow import ADD, ATTENTION, LINEAR, ancestors, is_scores, value_root
from bitlower.ir.operators import AttentionNode, BinaryNode, LinearNode, graph_results, value_operands
from bitlower.ir.stages import is_encoder_decoder
from bitlower.ir.subgraph import subgraph
from bitlower.ir.tokens import SEQUENCE, SOUND, TOTAL, token_ids, token_mask
from bitlower.passes._machinery.loss import Values

LOGITS = "logits"
_CHUNK = 1 << 24
"""Entries of the logits that are computed at once."""


@dataclass(frozen=True)
class AttentionTap:
    """What the scores of an attention are computed from: ``query`` and ``key``, or the ``scores`` before scaling."""

    query: str
    key: str = ""
    scores: str = ""


@dataclass(frozen=True)
class Taps:
    """The nodes of a Program whose values losses look at, by name.

    Args:
        hidden: what leaves each block; of an encoder-decoder, what leaves the decoder.
        attention: query, and key of an operator (``key``) or product of an explicit attention (``scores``).
        head: what the linear layer that returns the logits reads; empty where the logits are those of whole texts.
    """

    hidden: tuple[str, ...] = ()
    attention: tuple[AttentionTap, ...] = ()
    head: str = ""

    @classmethod
    def of(cls, program: Program, needs: frozenset[str]) -> Taps:
        """What the needs of losses ask for."""
        hidden = tuple(node.name for node in hidden_nodes(program)) if "hidden" in needs else ()
        attention = tuple(_attention(program)) if "attention" in needs else ()
        return cls(hidden, attention, _head_input(program))

    @property
    def names(self) -> tuple[str, ...]:
        """All of them, each once."""
        attention = (name for tap in self.attention for name in (tap.query, tap.key, tap.scores))
        names = (*self.hidden, *attention, self.head)
        return tuple(dict.fromkeys(name for name in names if name))


def hidden_nodes(program: Program) -> list[fx.Node]:
    """The hidden states that losses compare, ``[batch, sequence, channels]`` each: what leaves each block.

    Of an encoder-decoder it is what the head of the decoder reads: the blocks of its encoder have tokens of their own.
    """
    if not is_encoder_decoder(program):
        return [block.output for block in blocks(program.module)]
    frontier = [graph_results(program.graph)[[spec.name for spec in program.outputs].index(LOGITS)]]
    for node in frontier:
        root = value_root(node)
        if root.target in LINEAR:
            return [LinearNode(root).x]
        frontier += value_operands(root) if root.target in ADD else []
    return []


def _attention(program: Program) -> Iterator[AttentionTap]:
    """Every attention; of an encoder-decoder those from the target to itself, whose masks are the target's."""
    mixed = is_encoder_decoder(program)
    for node in program.graph.nodes:
        if mixed and not _is_of_target(node):
            continue
        if node.target in ATTENTION:
            yield AttentionTap(AttentionNode(node).query.name, key=AttentionNode(node).key.name)
        elif is_scores(node):
            yield AttentionTap(BinaryNode(node).left.name, scores=node.name)


def _is_of_target(node: fx.Node) -> bool:
    """Whether ``node`` is an attention from tokens of a target to these and to those before."""
    if node.target in ATTENTION:
        call = AttentionNode(node)
        sizes = [side.meta["type"].shape[2] for side in (call.query, call.key)]
    elif is_scores(node):
        sizes = list(node.meta["type"].shape[2:])
    else:
        return False
    return sizes[0] == SEQUENCE and sizes[1] in (SEQUENCE, TOTAL)


def _head_input(program: Program) -> str:
    """The node that the linear layer behind token-wise logits reads."""
    place = [spec.name for spec in program.outputs].index(LOGITS) if _gives_logits(program) else None
    if place is None or program.outputs[place].type.rank != 3:
        return ""
    head = value_root(graph_results(program.graph)[place])
    return LinearNode(head).x.name if head.target in LINEAR else ""


def _gives_logits(program: Program) -> bool:
    return any(spec.name == LOGITS for spec in program.outputs)


class Forward:
    """Runs a graph on a batch.

    Args:
        program: whose inputs and outputs the graph has.
        module: its graph, with the values of ``taps`` after its outputs.
        taps: the nodes.
        logits: whether they are needed.
    """

    def __init__(self, program: Program, module: fx.GraphModule, taps: Taps, *, logits: bool) -> None:
        self.program, self.taps = program, taps
        names = [*(spec.name for spec in program.outputs), *taps.names]
        nodes = dict(zip(names, graph_results(module.graph), strict=True))
        wanted = [name for name in taps.names if name != taps.head]
        self.head: LogitsHead | None = None
        if logits and taps.head:
            self.head = LogitsHead.of(module, nodes[taps.head], nodes[LOGITS])
        if logits:
            wanted.append(taps.head if self.head else LOGITS)
        self._names, self._causal = wanted, program.task == "text-generation"
        self.by_token = any(spec.name == LOGITS and spec.type.rank == 3 for spec in program.outputs)
        """Whether a row of logits is that of a token."""
        placeholders = module.graph.find_nodes(op="placeholder")
        self.body = subgraph(module, placeholders, [nodes[name] for name in wanted])
        self._last = logits

    def __call__(self, batch: Batch) -> tuple[Values, torch.Tensor | None]:
        """What the losses look at, and the rows that the head reads (or the logits, where it is not apart).

        Rows are those of tokens that are no padding, or of all frames of sound, ``[rows, channels]``; of whole texts,
        ``[batch, classes]``.
        """
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        device = next(iter(inputs.values())).device
        arguments = (value.to(device) for value in self.program.arguments(inputs))
        tensors = dict(zip(self._names, self.body(*arguments), strict=True))
        values = Values(
            tuple(tensors[name] for name in self.taps.hidden),
            tuple(_scores(tap, tensors, causal=self._causal) for tap in self.taps.attention),
        )
        if not self._last:
            return values, None
        rows = tensors[self._names[-1]]
        if rows.dim() == 3:
            rows = rows.flatten(0, 1) if SOUND in batch else rows[real_tokens(batch)]
        return values, rows


def real_tokens(batch: Batch) -> torch.Tensor:
    """Which tokens are no padding, ``[batch, sequence]``, bool."""
    mask, ids = token_mask(batch), token_ids(batch)
    like = ids if ids is not None else next(iter(batch.values()))
    return mask if mask is not None else torch.ones(like.shape[:2], dtype=torch.bool)


def _scores(tap: AttentionTap, tensors: dict[str, torch.Tensor], *, causal: bool) -> torch.Tensor:
    """``QKᵀ/√width``; the keys of grouped queries are repeated, and what a causal model hides is −∞."""
    query = tensors[tap.query]
    if tap.scores:
        scores = tensors[tap.scores]
    else:
        key = tensors[tap.key].repeat_interleave(query.shape[1] // tensors[tap.key].shape[1], 1)
        scores = query @ key.transpose(-2, -1)
    scores = scores / math.sqrt(query.shape[-1])
    if not causal:
        return scores
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(later, -math.inf)


class LogitsHead:
    """The part of a model that makes logits of rows, and the values that it needs besides, computed once a step.

    Args:
        weights: returns what depends on parameters alone, the quantized table above all.
        logits: from ``[1, rows, channels]`` and the values of ``weights`` to ``[1, rows, classes]``.
    """

    def __init__(self, weights: fx.GraphModule, logits: fx.GraphModule) -> None:
        self.weights, self.logits = weights, logits

    @classmethod
    def of(cls, module: fx.GraphModule, source: fx.Node, logits: fx.Node) -> LogitsHead | None:
        """The head between two nodes; None if it reads anything else of the model."""
        after = _after(source, logits)
        fixed = _fixed(module.graph)
        outside = {n for node in after for n in node.all_input_nodes if n not in after and n is not source}
        if not outside <= fixed:
            return None
        constants = sorted(outside, key=list(module.graph.nodes).index)
        return cls(subgraph(module, (), constants), subgraph(module, [source, *constants], [logits]))

    def chunks(self, rows: torch.Tensor, weights: Sequence[Any]) -> Iterator[tuple[slice, torch.Tensor]]:
        """The logits of ``rows``, ``[rows, channels]``, some at a time, and which rows those are."""
        width, start = 0, 0
        while start < len(rows):
            part = slice(start, start + max(1, _CHUNK // width if width else 64))
            [logits] = self.logits(rows[None, part], *weights)
            width, start = logits.shape[-1], part.stop
            yield part, logits[0].float()


def _after(source: fx.Node, end: fx.Node) -> set[fx.Node]:
    """The nodes on the ways from ``source`` to ``end``; ``end`` is among them, ``source`` is not."""
    reached, frontier = set[fx.Node](), [source]
    while frontier:
        for user in frontier.pop().users:
            if user.op != "output" and user not in reached:
                reached.add(user)
                frontier.append(user)
    return reached & {end, *ancestors(end.graph, [end])}


def _fixed(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that depend on parameters alone, quantizer modules among them."""
    fixed = set[fx.Node]()
    for node in graph.nodes:
        computed = node.op in ("call_function", "call_module")
        if node.op == "get_attr" or (computed and node.all_input_nodes and fixed.issuperset(node.all_input_nodes)):
            fixed.add(node)
    return fixed
