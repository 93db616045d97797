"""Measure ranges, outliers, separator attention and clamping of a Program on calibration data."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt
from torch import fx

from bitlower.ir import Batch, BitlowerError, Level, Program, describe, get_tensor
from bitlower.ir.charts import Topic
from bitlower.ir.feed_forward import feed_forwards
from bitlower.ir.observe import Track, observe
from bitlower.ir.tokens import token_dim, token_ids
from bitlower.passes._machinery.base import Context, Contract, Pass
from bitlower.passes.outliers._report import (
    ClampRate,
    DimensionCount,
    FeedForwardOutliers,
    HeadAttention,
    OutlierReport,
    PositionCount,
    TensorRange,
    TokenCount,
)
from bitlower.passes.outliers._sites import (
    attentions,
    calibrated,
    has_tokens,
    not_padding,
    separator,
    tensor_roles,
    token_axes,
    vocabulary,
)
from bitlower.passes.outliers._statistics import (
    ClampCount,
    Moments,
    OutlierCounts,
    SeparatorAttention,
    Tokens,
    attention_probabilities,
    most_common,
)

__all__ = ["AnalyzeOutliers", "OutlierReport", "analyze"]

_LISTED = 16
"""Rows of the lists of a report, of dimensions, tokens and positions: outliers are few (Bondarenko et al. 2021, §3)."""


@dataclass(frozen=True)
class AnalyzeOutliers(Pass):
    """Leave an :class:`OutlierReport` (Bondarenko et al. §3): which tensors are hard to quantize, where, and why.

    The calibration data is read twice, first for moments, then for outliers. Padding counts nowhere.
    """

    name: ClassVar[str] = "analyze-outliers"
    requires: ClassVar[frozenset[Level]] = frozenset({Level.FLOAT, Level.SIMULATED})
    draws: ClassVar[frozenset[Topic]] = frozenset({"outliers"})
    contract: ClassVar[Contract] = Contract.ANALYSIS
    sigma: Annotated[float, Gt(0)] = 6.0
    """From how many standard deviations on a value is an outlier."""
    batches: Annotated[int, Ge(1)] | None = None
    """How many calibration batches to look at; all if left out."""

    def data_runs(self, program: Program) -> int:
        """Ranges first, then what lies outside them."""
        return 2

    def needs_calibration(self) -> bool:
        """Always."""
        return True

    def run(self, program: Program, context: Context) -> bool:
        """Analyze and leave the report.

        Raises:
            BitlowerError: there is no calibration data, a parameter is out of range, or a tensor gets NaN or Inf.
        """
        context.put(analyze(program, context.calibration[: self.batches], sigma=self.sigma, track=context.track))
        return False


def analyze(
    program: Program, batches: Sequence[Batch], *, sigma: float = 6.0, track: Track | None = None
) -> OutlierReport:
    """Return the report on ``program`` for ``batches``.

    Raises:
        BitlowerError: there are no batches, or a tensor gets NaN or Inf.
    """
    if not batches:
        raise BitlowerError("analyze-outliers needs calibration data", hint="give a file of texts, or batches")
    analysis = _Analysis(program)
    analysis.measure(batches, track)
    analysis.locate(batches, sigma, track)
    return analysis.report(sigma)


class _Analysis:
    """The statistics of one program while batches stream by."""

    def __init__(self, program: Program) -> None:
        self.program, self.axes = program, token_axes(program)
        self.roles = tensor_roles(program.graph)
        self.moments = {node: Moments() for node in self.roles}
        self.outliers: dict[fx.Node, OutlierCounts] = {}
        self.separator = separator(program)
        self.attentions = attentions(program.graph) if self.separator is not None else []
        self.on_separator = {attention.node: SeparatorAttention() for attention in self.attentions}
        self.clamps = {node: ClampCount() for node in calibrated(program)}
        self.operand_values: dict[fx.Node, torch.Tensor] = {}
        self.batch: Batch = {}
        self.tokens: dict[str, Tokens] = {}
        self.sequences = self.token_count = 0

    def measure(self, batches: Sequence[Batch], track: Track | None) -> None:
        """Read the data for the first time: moments, attention, clamping."""
        read_by: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node in self.clamps:
            read_by[node.all_input_nodes[0]].append(node)
        attending = {attention.node: attention for attention in self.attentions}
        last_reader = {operand: a.node for a in self.attentions for operand in a.operands}

        def look(node: fx.Node, value: torch.Tensor, batch: Batch) -> None:
            if node in self.moments:
                self._add_moments(node, value)
            for quantizer in read_by.get(node, ()):
                self._count_clamped(quantizer, node, value)
            if node in last_reader:
                self.operand_values[node] = value
            if node in attending:
                self._attend(node, *(self.operand_values[n] for n in attending[node].operands))
                self.operand_values = {n: v for n, v in self.operand_values.items() if last_reader[n] is not node}

        watched = {*self.moments, *read_by, *last_reader, *attending}
        observe(self.program, watched, self._stream(batches, track, "ranges"), look)
        self.operand_values.clear()

    def locate(self, batches: Sequence[Batch], sigma: float, track: Track | None) -> None:
        """Read the data for the second time: where the outliers are."""
        self.outliers = {node: OutlierCounts(m.mean, sigma * m.std) for node, m in self.moments.items()}

        def look(node: fx.Node, value: torch.Tensor, batch: Batch) -> None:
            self.outliers[node].update(*self._rows(node, value))

        observe(self.program, self.outliers, self._stream(batches, track, "outliers"), look)

    def _stream(self, batches: Sequence[Batch], track: Track | None, label: str) -> Iterator[Batch]:
        """Yield the batches one by one and note which is under way."""
        self.sequences = self.token_count = 0
        for batch in track(batches, label) if track else batches:
            sides = {dim: Tokens.of(batch, self.sequences, dim) for dim in self.axes}
            self.batch, self.tokens = batch, {dim: tokens for dim, tokens in sides.items() if tokens is not None}
            self.sequences += self._size
            self.token_count += sum(tokens.sequence.numel() for tokens in self.tokens.values())
            yield batch

    def _dim(self, node: fx.Node) -> str:
        """Of a source and a target, which the vectors of ``node`` belong to; else the one text."""
        return (token_dim(node.meta["type"].shape) or "") if len(self.axes) > 1 else next(iter(self.axes))

    @property
    def _size(self) -> int:
        """How many sequences the batch holds."""
        return next(iter(self.batch.values())).shape[0]

    def _rows(self, node: fx.Node, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Tokens | None]:
        """Return the vectors of ``value`` that are no padding, the sequence of each, and the tokens if each is one."""
        rows = value.reshape(-1, value.shape[-1])
        dim = self._dim(node)
        tokens = self.tokens.get(dim)
        if tokens is not None and has_tokens(node, value, tokens.mask, self.axes[dim][0]):
            return tokens.select(rows), tokens.sequence, tokens
        each = max(1, len(rows) // self._size)
        sequence = torch.arange(len(rows)) // each + self.sequences - self._size
        return rows, sequence, None

    def _add_moments(self, node: fx.Node, value: torch.Tensor) -> None:
        moments = self.moments[node]
        moments.update(self._rows(node, value)[0])
        if not math.isfinite(moments.m4):
            raise BitlowerError(f"{describe(node)} gives NaN or Inf on the calibration data")

    def _count_clamped(self, quantizer: fx.Node, node: fx.Node, value: torch.Tensor) -> None:
        _, scale, zero = quantizer.all_input_nodes
        stored = (get_tensor(self.program.module, str(part.target)) for part in (scale, zero))
        dim = self._dim(node)
        keep = not_padding(node, value, self.tokens[dim].mask, self.axes[dim]) if dim in self.tokens else None
        self.clamps[quantizer].update(value, keep, quantizer.meta["quantizer"].spec.grid, *stored)

    def _attend(self, node: fx.Node, value: torch.Tensor, *others: torch.Tensor) -> None:
        """Add the attention that ``node`` computes; ``others`` are its probabilities, or query, key and mask."""
        attention = next(a for a in self.attentions if a.node is node)
        dim = self._dim(node)
        ids, tokens = token_ids(self.batch, dim), self.tokens.get(dim)
        if tokens is None or ids is None:
            return
        if attention.probs is not None:
            probs = others[0]
        else:
            query, key, *mask = others
            probs = attention_probabilities(
                query, key, mask[0] if mask else None, causal=attention.causal, scale=attention.scale
            )
        if probs.shape[2:] == (ids.shape[1], ids.shape[1]):
            self.on_separator[node].update(probs, value, tokens.mask, (ids == self.separator) & tokens.mask)

    def report(self, sigma: float) -> OutlierReport:
        """Put together all that was found.

        Raises:
            BitlowerError: all of the data is padding.
        """
        if not all(moments.count for moments in self.moments.values()):
            raise BitlowerError("the calibration data holds nothing but padding")
        texts, special = vocabulary(self.program)
        tensors = {node: self._tensor(node, texts, special) for node in self.roles}
        return OutlierReport(
            sigma,
            self.sequences,
            self.token_count,
            tuple(tensors.values()),
            tuple(
                _feed_forward(tensors[part.input], tensors[part.output], tensors[part.sum])
                for part in feed_forwards(self.program.graph)
                if part.input is not None
            ),
            tuple(
                HeadAttention(node.name, _path(node), head, share, ratio)
                for node, statistics in self.on_separator.items()
                for head, (share, ratio) in enumerate(statistics.heads())
            ),
            tuple(_clamp_rate(node, count) for node, count in self.clamps.items()),
        )

    def _tensor(self, node: fx.Node, texts: Mapping[int, str], special: frozenset[int]) -> TensorRange:
        moments, outliers = self.moments[node], self.outliers[node]
        dimensions = most_common(outliers.dimensions, _LISTED)
        tokens = most_common(outliers.tokens, _LISTED)
        return TensorRange(
            node.name,
            _path(node),
            self.roles[node],
            moments.count,
            moments.minimum,
            moments.maximum,
            moments.mean,
            moments.std,
            moments.kurtosis,
            outliers.total,
            len(outliers.dimensions),
            tuple(DimensionCount(index, n, outliers.sequences[index] / self.sequences) for index, n in dimensions),
            tuple(PositionCount(position, n) for position, n in most_common(outliers.positions, _LISTED)),
            tuple(TokenCount(token, texts.get(token, ""), token in special, n) for token, n in tokens),
        )


def _path(node: fx.Node) -> str:
    return str(node.meta.get("path", ""))


def _feed_forward(x: TensorRange, h: TensorRange, y: TensorRange) -> FeedForwardOutliers:
    ratios = [tensor.width / x.width if x.width else 0.0 for tensor in (h, y)]
    return FeedForwardOutliers(h.path, x.node, h.node, y.node, *ratios)


def _clamp_rate(node: fx.Node, count: ClampCount) -> ClampRate:
    quantizer = node.meta["quantizer"]
    return ClampRate(node.name, _path(node), quantizer.role, quantizer.tensor, count.rate)
