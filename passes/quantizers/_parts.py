"""Where the groups of a tensor's last axis end: the contiguous partition with the least quantization error.

An extension of per-embedding-group quantization (Bondarenko et al. §4), whose groups are equal: unequal ones can hold
an outlier dimension alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bitlower.ir import Grid

_MOST = 2048
"""Indices that ends of groups may fall on: the search takes the square of it."""
_EPS = 1e-9
"""A gain below this share is rounding, and no reason for one group more."""


@dataclass(frozen=True)
class ChannelPartition:
    """A partition of the indices of an axis: ``owner`` is the group of each, int64 ``[indices]``, ascending."""

    owner: torch.Tensor

    @property
    def count(self) -> int:
        """How many groups there are."""
        return int(self.owner[-1]) + 1

    def join(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The range of each group, ``[groups]``, from those of its indices; zero belongs to every range."""
        nothing = torch.zeros(self.count)
        return nothing.scatter_reduce(0, self.owner, low, "amin"), nothing.scatter_reduce(0, self.owner, high, "amax")

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the groups as values of their indices."""
        return values[self.owner]


def choose_parts(low: torch.Tensor, high: torch.Tensor, grid: Grid, groups: int) -> ChannelPartition:
    """The partition into at most ``groups`` groups that has the least error, of all that are contiguous.

    Found by dynamic programming over the costs of all runs. Where fewer groups do as well, there are fewer. On an axis
    of more than 2,048 indices, groups end at multiples of a whole number of them.

    Args:
        low: the smallest value of each index, ``[indices]``; at most 0.
        high: the largest, at least 0.
        grid: of the quantizer.
        groups: how many at most.
    """
    if groups >= low.numel():
        return ChannelPartition(torch.arange(low.numel()))
    width = -(-low.numel() // _MOST)
    blocks = ChannelPartition(torch.arange(low.numel()) // width)
    cost = run_costs(*blocks.join(low, high), grid)
    best, starts = cost[0], list[torch.Tensor]()
    for _ in range(min(groups, blocks.count) - 1):
        total, at = (best[:-1, None] + cost[1:]).min(0)
        better = total < (1 - _EPS) * best
        starts.append(torch.where(better, at + 1, 0))
        best = torch.where(better, total, best)
    first = torch.zeros(blocks.count, dtype=torch.int64)
    end = blocks.count - 1
    for start in reversed(starts):
        begin = int(start[end])
        if begin:
            first[begin], end = 1, begin - 1
    return ChannelPartition(blocks.spread(first.cumsum(0)))


def run_costs(low: torch.Tensor, high: torch.Tensor, grid: Grid) -> torch.Tensor:
    """What one scale for all indices from i to j costs, float64 ``[i, j]``; infinite for j < i.

    The model is rounding noise: every value of an index is off by Δ²/12 on average, with the step Δ of the grid over
    the union of the ranges, so a run costs its length times that. It holds for values that spread over many steps and
    bounds the error of those that do not.
    """
    count = low.numel()
    union_high = high.expand(count, count).triu().cummax(1).values
    union_low = -(-low).expand(count, count).triu().cummax(1).values
    step = grid.qparams(union_low, union_high)[0].double()
    step = torch.where(union_high == union_low, 0.0, step)
    index = torch.arange(count)
    length = index[None, :] - index[:, None] + 1
    return torch.where(length > 0, step.square() * length / 12, torch.inf)
