"""How large each channel of the residual stream gets, in the float program and in the quantized one."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from bitlower.ir import Batch, Program
from bitlower.ir.dataflow import residual_sums
from bitlower.ir.observe import observe
from bitlower.ir.tokens import value_mask
from bitlower.passes import Context

COLUMNS = 96
"""Stretches of neighbouring channels that a row has at most; of each the largest channel counts."""
LARGEST = 5
"""Channels of a row that are named."""


def channel_maps(reference: Program, program: Program, context: Context) -> list[dict[str, Any]]:
    """A row for each residual sum that both programs have, in order; none without evaluation batches.

    ``before`` and ``after`` hold the largest absolute values over all tokens, in the float program and in ``program``,
    of at most :data:`COLUMNS` stretches of channels; ``largest`` are the channels with the largest values before.
    """
    if not context.evaluation:
        return []
    names = {node.name for node in program.graph.nodes}
    sums = [node for node in residual_sums(reference.graph) if node.name in names]
    sums = [node for node in sums if isinstance(node.meta["type"].shape[-1], int)]
    if not sums:
        return []
    before = _sizes(reference, [node.name for node in sums], context)
    after = _sizes(program, [node.name for node in sums], context)
    rows = []
    for node in sums:
        sizes = before[node.name], after[node.name]
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


def _sizes(program: Program, names: list[str], context: Context) -> dict[str, torch.Tensor]:
    """The largest absolute value of each channel over all batches, padding left out."""
    sizes: dict[str, torch.Tensor] = {}

    def look(node: fx.Node, value: torch.Tensor, batch: Batch) -> None:
        mask = value_mask(node.meta["type"].shape, batch)
        value = value.abs() if mask is None else value.abs() * mask
        most = value.reshape(-1, value.shape[-1]).amax(0).float()
        sizes[node.name] = torch.maximum(sizes[node.name], most) if node.name in sizes else most

    observe(program, names, context.evaluation, look, track=context.track, label="channels")
    return sizes


def _stretches(sizes: torch.Tensor) -> list[float]:
    width = -(-len(sizes) // COLUMNS)
    return [_short(float(part.max())) for part in torch.split(sizes, width)]


def _short(value: float) -> float:
    return float(f"{value:.4g}")
