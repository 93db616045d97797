"""How large each channel of the residual stream gets, in the float program and in the quantized one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from bitlower.ir import Batch, Program
from bitlower.ir.dataflow import residual_sums
from bitlower.ir.tokens import value_mask

COLUMNS = 96
"""Stretches of neighbouring channels that a row has at most; of each the largest channel counts."""
LARGEST = 5
"""Channels of a row that are named."""


def compared_sums(reference: Program, program: Program) -> list[fx.Node]:
    """The residual sums of ``reference`` that ``program`` has too, and whose channels are counted, in order."""
    names = {node.name for node in program.graph.nodes}
    sums = (node for node in residual_sums(reference.graph) if node.name in names)
    return [node for node in sums if isinstance(node.meta["type"].shape[-1], int)]


@dataclass
class ChannelSizes:
    """The largest absolute value of each channel of some nodes, by the node's name, over all batches."""

    sizes: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, node: fx.Node, value: torch.Tensor, batch: Batch) -> None:
        """Take a value, channels last; padding does not count."""
        mask = value_mask(node.meta["type"].shape, batch)
        value = value.abs() if mask is None else value.abs() * mask
        most = value.reshape(-1, value.shape[-1]).amax(0).float()
        known = self.sizes.get(node.name)
        self.sizes[node.name] = most if known is None else torch.maximum(known, most)


def channel_rows(sums: Iterable[fx.Node], before: ChannelSizes, after: ChannelSizes) -> list[dict[str, Any]]:
    """A row for each residual sum.

    ``before`` and ``after`` hold the largest absolute values over all tokens, in the float program and in the other, of
    at most :data:`COLUMNS` stretches of channels; ``largest`` are the channels with the largest values before.
    """
    rows = []
    for node in sums:
        sizes = before.sizes[node.name], after.sizes[node.name]
        order = torch.argsort(sizes[0], descending=True, stable=True)[:LARGEST].tolist()
        rows.append(
            {
                "node": node.name,
                "path": str(node.meta.get("path", "")),
                "width": len(sizes[0]),
                "before": _stretches(sizes[0]),
                "after": _stretches(sizes[1]),
                "largest": [[index, _short(float(sizes[0][index])), _short(float(sizes[1][index]))] for index in order],
            }
        )
    return rows


def _stretches(sizes: torch.Tensor) -> list[float]:
    width = -(-len(sizes) // COLUMNS)
    return [_short(float(part.max())) for part in torch.split(sizes, width)]


def _short(value: float) -> float:
    return float(f"{value:.4g}")
