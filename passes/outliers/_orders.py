"""Orders of channels for per-embedding-group quantization, from the channels' ranges (Bondarenko et al. 2021, §4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bitlower.passes.outliers._channel_statistics import ChannelStatistics


def range_order(values: Sequence[ChannelStatistics]) -> torch.Tensor:
    """Channels by ascending range, int64: entry ``i`` of the new order is the old channel ``order[i]``.

    Several tensors that share one order each say how wide a channel is relative to their own mean range, and the mean
    over tensors counts. On residual streams this gives per-embedding groups smaller errors than ranges relative to the
    tensor's widest channel, which an outlier would own, and than the maximum over tensors, which one tensor would own.
    """
    ranges = torch.stack([value.ranges for value in values]).double()
    return torch.argsort((ranges / ranges.mean(1, keepdim=True)).mean(0), stable=True)


def grouped_order(values: Sequence[ChannelStatistics], groups: int, bits: int) -> torch.Tensor:
    """The order for ``groups`` equal groups of consecutive channels: :func:`range_order`, or outliers set apart.

    Equal groups have a weakness: the last one is larger than the outliers are many, and the widest of the ordinary
    channels, which have the most to lose, are rounded with the outliers' scale. So the last group may take the
    narrowest channels in their place. How many outliers it holds is what gives the smallest predicted error.
    """
    ascending = range_order(values)
    channels = ascending.numel()
    size = channels // groups
    candidates = [
        torch.cat(
            [ascending[size - outliers : channels - outliers], ascending[: size - outliers], ascending[-outliers:]]
        )
        for outliers in range(size, 0, -1)
    ]
    return min(candidates, key=lambda order: predicted_error(values, order, groups, bits))


def predicted_error(values: Sequence[ChannelStatistics], order: torch.Tensor, groups: int, bits: int) -> float:
    """The mean over tensors of the logarithm of the squared error that groups of consecutive channels make.

    Rounding with the scale s costs a channel s²/12, but not more than its energy, which is lost when all its values
    become zero.
    """
    spans = torch.stack([value.high.clamp(min=0) - value.low.clamp(max=0) for value in values]).double()[:, order]
    energy = torch.stack([value.energy for value in values])[:, order]
    blocks = spans.reshape(len(values), groups, -1)
    scales = (blocks.amax(2, keepdim=True) / (2**bits - 1)).expand_as(blocks).flatten(1)
    error = torch.minimum(scales.square() / 12, energy).sum(1)
    return float(error.clamp(min=torch.finfo(torch.float64).tiny).log().mean())
