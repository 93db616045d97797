"""Give uncalibrated quantizers their ranges: weights from their values, activations from calibration batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Interval
from torch import fx

from bitlower.ir import Batch, BitlowerError, Level, Program, describe
from bitlower.ir.observe import observe
from bitlower.ir.quantization.ranges import Histogram, cross_entropy_loss, search_golden, search_grid
from bitlower.ir.quantizer_node import QuantizerNode, is_uncalibrated, set_range
from bitlower.ir.tokens import BATCH, ENCODER_SEQUENCE, SEQUENCE, value_mask
from bitlower.ir.weight_ranges import WeightRanges, calibrate_weights, require_finite, scale_rows, uncalibrated_weights
from bitlower.passes._machinery.base import Context, Contract, Pass
from bitlower.passes.quantizers._parts import ChannelPartition, choose_parts

Estimator = Literal["minmax", "running-minmax", "percentile", "mse", "mse-golden", "mse-token"]
_FROM_HISTOGRAM = ("percentile", "mse", "mse-golden", "mse-token")
_LOGIT_ROWS = 4096
"""Rows of logits that the range of a head is searched on."""


@dataclass(frozen=True)
class Calibrate(Pass):
    """Set scale and zero point of every uncalibrated static quantizer (Bondarenko et al. §2.1).

    Batches are streamed: memory does not grow with their number. Padded positions never widen a range. Embedding groups
    that are to be chosen are chosen by the extremes of each index; each group then gets its range as all others do.
    """

    name: ClassVar[str] = "calibrate"
    requires: ClassVar[frozenset[Level]] = frozenset({Level.SIMULATED})
    contract: ClassVar[Contract] = Contract.LOSSY
    keeps_sizes: ClassVar[bool] = True
    weights: WeightRanges = "mse-golden"
    """How weights get their ranges."""
    activations: Estimator = "mse-token"
    """How activations get theirs.

    ``running-minmax`` is an exponential average of the extremes of batches. ``mse-token`` searches as ``mse-golden``
    but takes each token's error relative to the token's own energy: the few tokens of huge norm that a transformer has
    would else own the range, although a normalization follows that makes all tokens equal.
    """
    logits: Literal["same", "cross-entropy"] = "same"
    """``cross-entropy`` chooses the range of classification logits by what it does to the softmax."""
    percentile: Annotated[float, Interval(gt=50, le=100)] = 99.99
    """For ``percentile``: the share of the values below the upper end, and above the lower one."""
    momentum: Annotated[float, Interval(ge=0, lt=1)] = 0.9
    """Weight of the old range in ``running-minmax``."""
    bins: Annotated[int, Interval(ge=2, le=1 << 20)] = 4096
    """Histogram bins for ``percentile`` and ``mse``."""

    def data_runs(self, program: Program) -> int:
        """For extremes, then for histograms; none without activation quantizers."""
        return (2 if self.activations in _FROM_HISTOGRAM else 1) if _uncalibrated_activations(program) else 0

    def run(self, program: Program, context: Context) -> bool:
        """Estimate and store all uncalibrated ranges.

        Raises:
            BitlowerError: no calibration batches, or a value that is not finite (the tensor is named).
        """
        weights, activations = uncalibrated_weights(program.module), _uncalibrated_activations(program)
        calibrate_weights(program.module, context.track(weights, "weight ranges"), self.weights)
        if activations:
            _calibrate_activations(program, activations, self, context)
        return bool(weights or activations)


def _uncalibrated_activations(program: Program) -> list[fx.Node]:
    weights = set(uncalibrated_weights(program.module))
    return [node for node in program.graph.nodes if is_uncalibrated(node) and node not in weights]


def _calibrate_activations(program: Program, nodes: list[fx.Node], options: Calibrate, context: Context) -> None:
    if not context.calibration:
        raise BitlowerError(
            f"{len(nodes)} activation quantizers need calibration data", hint="give calibration batches"
        )
    module = program.module
    momentum = options.momentum if options.activations == "running-minmax" else None
    ranges = _extremes(program, nodes, context, momentum)
    searched = [n for n in nodes if options.logits == "cross-entropy" and n.meta["quantizer"].role == "logits"]
    if searched:
        ranges |= _search_logits(program, searched, ranges, context)
    rest = [node for node in nodes if node not in searched]
    parts = {node: partition for node in rest if (partition := _parts(node, *ranges[node]))}
    if momentum is not None and parts:
        ranges |= _extremes(program, list(parts), context, momentum, parts)
    else:
        ranges |= {node: partition.join(*ranges[node]) for node, partition in parts.items()}
    if options.activations in _FROM_HISTOGRAM:
        histograms = _histograms(program, rest, ranges, parts, context, options)
        ranges |= {node: _from_histogram(node, histograms[node], options) for node in rest}
    for node in nodes:
        shape = _scale(module, node).shape
        ends = (parts[node].spread(end) if node in parts else end for end in ranges[node])
        set_range(module, node, *(end.reshape(shape) for end in ends))


Ranges = dict[fx.Node, tuple[torch.Tensor, torch.Tensor]]


def _parts(node: fx.Node, low: torch.Tensor, high: torch.Tensor) -> ChannelPartition | None:
    """The groups of ``node`` if it leaves them to be chosen; ``low`` and ``high`` are the extremes of each index."""
    spec = node.meta["quantizer"].spec
    return choose_parts(low, high, spec.grid, spec.granularity.num_groups) if spec.granularity.chosen else None


def _extremes(
    program: Program,
    nodes: Sequence[fx.Node],
    context: Context,
    momentum: float | None,
    parts: Mapping[fx.Node, ChannelPartition] | None = None,
) -> Ranges:
    """Smallest and largest values over all batches, or their exponential average; ``[scales]`` each.

    Of nodes in ``parts`` the groups' extremes, else those of what shares a stored scale. Zero belongs to every
    range, so padding that was set to zero changes none.
    """
    readers = _readers(nodes)
    ranges: Ranges = {}

    def update(value_node: fx.Node, value: torch.Tensor, batch: Batch) -> None:
        masked, _ = _without_padding(value_node, value, batch)
        for node in readers[value_node]:
            low, high = scale_rows(masked, _scale(program.module, node).shape).aminmax(dim=1)
            require_finite(node, low, high)
            low, high = low.clamp(max=0.0), high.clamp(min=0.0)
            if parts:
                low, high = parts[node].join(low, high)
            if node in ranges and momentum is None:
                low, high = torch.minimum(low, ranges[node][0]), torch.maximum(high, ranges[node][1])
            elif node in ranges and momentum is not None:
                low, high = (momentum * o + (1 - momentum) * n for o, n in zip(ranges[node], (low, high), strict=True))
            ranges[node] = low, high

    observe(program, list(readers), context.calibration, update, track=context.track, label="activation ranges")
    return ranges


def _histograms(
    program: Program,
    nodes: Sequence[fx.Node],
    ranges: Ranges,
    parts: Mapping[fx.Node, ChannelPartition],
    context: Context,
    options: Calibrate,
) -> dict[fx.Node, Histogram]:
    readers = _readers(nodes)
    histograms = {node: Histogram.empty(*ranges[node], options.bins) for node in nodes}

    def update(value_node: fx.Node, value: torch.Tensor, batch: Batch) -> None:
        masked, padding = _without_padding(value_node, value, batch)
        for node in readers[value_node]:
            shape = _scale(program.module, node).shape
            rows, owner = scale_rows(masked, shape), parts[node].owner if node in parts else None
            if options.activations == "mse-token" and _holds_tokens(value_node):
                weights = scale_rows(_token_weights(masked), shape)
                histograms[node] = histograms[node].add(rows, weights=weights, owner=owner)
            else:
                histograms[node] = histograms[node].add(rows, zeros=padding // rows.shape[0], owner=owner)

    observe(program, list(readers), context.calibration, update, track=context.track, label="activation histograms")
    return histograms


def _holds_tokens(node: fx.Node) -> bool:
    """Whether the values are ``[batch, tokens, channels]``."""
    shape = node.meta["type"].shape
    return len(shape) == 3 and shape[0] == BATCH and shape[1] in (SEQUENCE, ENCODER_SEQUENCE)


def _token_weights(value: torch.Tensor) -> torch.Tensor:
    """One over each token's energy, for each of its elements; 0 for padding."""
    energy = value.square().sum(-1, keepdim=True)
    return torch.where(energy > 0, 1 / energy, 0.0).expand_as(value)


def _from_histogram(node: fx.Node, histogram: Histogram, options: Calibrate) -> tuple[torch.Tensor, torch.Tensor]:
    if options.activations == "percentile":
        return histogram.percentile(options.percentile)
    grid = node.meta["quantizer"].spec.grid
    search = search_grid if options.activations == "mse" else search_golden
    low, high = search(histogram.loss(grid), histogram.low, histogram.high, two_sided=not grid.symmetric)
    return low, high


def _search_logits(program: Program, nodes: Sequence[fx.Node], ranges: Ranges, context: Context) -> Ranges:
    logits: dict[fx.Node, list[torch.Tensor]] = {_source(node): [] for node in nodes}

    def keep(value_node: fx.Node, value: torch.Tensor, batch: Batch) -> None:
        if sum(part.shape[0] for part in logits[value_node]) < _LOGIT_ROWS:
            logits[value_node].append(value.reshape(-1, value.shape[-1])[:_LOGIT_ROWS].clone())

    observe(program, list(logits), context.calibration, keep, track=context.track, label="logits")
    best_ranges: Ranges = {}
    for node in nodes:
        if node.meta["quantizer"].spec.granularity.kind != "tensor":
            raise BitlowerError(f"cross-entropy ranges are per tensor: {describe(node)}")
        loss = cross_entropy_loss(torch.cat(logits[_source(node)]), node.meta["quantizer"].spec.grid)
        low, high = search_grid(loss, *ranges[node], two_sided=True)
        best_ranges[node] = low, high
    return best_ranges


def _readers(nodes: Sequence[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        readers.setdefault(_source(node), []).append(node)
    return readers


def _without_padding(node: fx.Node, value: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, int]:
    """``value`` with padded positions set to zero, which is in every range, and how many elements that were."""
    keep = value_mask(node.meta["type"].shape, batch)
    if keep is None:
        return value, 0
    count = int(keep.sum()) * (value.numel() // keep.numel())
    return value.masked_fill(~keep, 0.0), value.numel() - count


def _source(node: fx.Node) -> fx.Node:
    return QuantizerNode(node).value


def _scale(module: fx.GraphModule, node: fx.Node) -> torch.Tensor:
    return QuantizerNode(node).range(module)[0]
