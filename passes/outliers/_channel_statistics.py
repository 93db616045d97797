"""What the channels of activations do on calibration batches: their extremes and their energy, padding left out."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import fx

from bitlower.ir import Batch, Program
from bitlower.ir.observe import observe
from bitlower.ir.tokens import value_mask
from bitlower.passes._machinery.base import Context


@dataclass
class ChannelStatistics:
    """The last axis of a value over all tokens seen: extremes, and sums of squares in float64, all ``[channels]``."""

    low: torch.Tensor
    high: torch.Tensor
    squares: torch.Tensor
    tokens: int = 0

    @property
    def ranges(self) -> torch.Tensor:
        """How far each channel reaches: max − min."""
        return self.high - self.low

    @property
    def energy(self) -> torch.Tensor:
        """The mean square of each channel."""
        return self.squares / max(1, self.tokens)

    def add(self, rows: torch.Tensor) -> None:
        """Count the tokens ``[tokens, channels]`` in."""
        self.low = torch.minimum(self.low, rows.amin(0))
        self.high = torch.maximum(self.high, rows.amax(0))
        self.squares += rows.double().square().sum(0)
        self.tokens += rows.shape[0]


def channel_statistics(
    program: Program, nodes: Collection[fx.Node], context: Context, label: str
) -> dict[fx.Node, ChannelStatistics]:
    """Run the calibration batches once; nodes of which no token was seen are left out.

    Args:
        program: is run.
        nodes: values whose last axis has a fixed size.
        context: its calibration batches and its progress display are used.
        label: what the display says.
    """
    statistics: dict[fx.Node, ChannelStatistics] = {}

    def update(node: fx.Node, value: torch.Tensor, batch: Batch) -> None:
        mask = value_mask(node.meta["type"].shape, batch)
        rows = value[mask[..., 0].expand(value.shape[:-1])] if mask is not None else value.flatten(0, -2)
        if not rows.shape[0]:
            return
        if node not in statistics:
            statistics[node] = ChannelStatistics(rows[0], rows[0], torch.zeros(rows.shape[1], dtype=torch.float64))
        statistics[node].add(rows)

    observe(program, list(nodes), context.calibration, update, track=context.track, label=label)
    return statistics
