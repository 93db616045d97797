"""Groups of indices that share a scale: read off a calibrated quantizer, and merged where their scales nearly agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from bitlower.ir import Grid
from bitlower.ir.quantizer_node import QuantizerNode


@dataclass(frozen=True)
class ScaleGroup:
    """Indices ``start`` to ``stop`` (excluded) of the last axis; scale and zero point are float32 of rank 0."""

    start: int
    stop: int
    scale: torch.Tensor
    zero_point: torch.Tensor


def stored_groups(module: fx.GraphModule, node: fx.Node) -> list[ScaleGroup]:
    """The runs of equal scale and zero point along the last axis of what the quantizer ``node`` rounds."""
    view = QuantizerNode(node)
    extent = view.value.meta["type"].shape[-1]
    scales, zeros = (part.reshape(-1) for part in view.range(module))
    width = extent // scales.numel()
    groups: list[ScaleGroup] = []
    for index, (scale, zero) in enumerate(zip(scales, zeros, strict=True)):
        start, stop = index * width, (index + 1) * width
        if groups and torch.equal(groups[-1].scale, scale) and torch.equal(groups[-1].zero_point, zero):
            start = groups.pop().start
        groups.append(ScaleGroup(start, stop, scale, zero))
    return groups


def merge_groups(groups: Sequence[ScaleGroup], grid: Grid, ratio: float) -> list[ScaleGroup]:
    """The fewest groups in which no index has a step of more than ``ratio`` times its own.

    A merged group covers the union of the ranges. What holds for a run of groups holds for each part of it, so joining
    from the left as long as possible gives the fewest.
    """
    if ratio <= 1:
        return list(groups)
    merged: list[ScaleGroup] = []
    least = torch.tensor(torch.inf)
    for group in groups:
        joined = _union(merged[-1], group, grid) if merged else group
        finest = torch.minimum(least, group.scale)
        if merged and bool(joined.scale <= ratio * finest):
            merged[-1], least = joined, finest
        else:
            merged.append(group)
            least = group.scale
    return merged


def _union(left: ScaleGroup, right: ScaleGroup, grid: Grid) -> ScaleGroup:
    """One group over both ranges; a range that covers the other is kept as it is, bit for bit."""
    lows, highs = (
        [(limit - group.zero_point) * group.scale for group in (left, right)]
        for limit in (grid.quant_min, grid.quant_max)
    )
    low, high = torch.minimum(*lows), torch.maximum(*highs)
    for group, own_low, own_high in zip((left, right), lows, highs, strict=True):
        if bool(own_low == low) and bool(own_high == high):
            return ScaleGroup(left.start, right.stop, group.scale, group.zero_point)
    return ScaleGroup(left.start, right.stop, *grid.qparams(low, high))
