"""Uncalibrated quantizers over weights, and what calibrates them: ranges from the weights themselves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import fx

from bitlower.ir.diagnostics import BitlowerError, describe
from bitlower.ir.quantization.granularity import block
from bitlower.ir.quantization.ranges import exact_loss, search_golden, search_grid
from bitlower.ir.quantizer_node import QuantizerNode, is_uncalibrated, set_range
from bitlower.ir.storage import release

WeightRanges = Literal["minmax", "mse", "mse-golden"]
_CHUNK = 1 << 20
"""Weights whose ranges are searched at a time: 4 MB in float32, which stay in the cache over all steps."""


def uncalibrated_weights(module: fx.GraphModule) -> list[fx.Node]:
    """The uncalibrated quantizers over parameters, in graph order."""
    return [n for n in module.graph.nodes if is_uncalibrated(n) and QuantizerNode(n).rounds_parameter]


def calibrate_weights(module: fx.GraphModule, nodes: Iterable[fx.Node], ranges: WeightRanges) -> None:
    """Calibrate the uncalibrated weight quantizers ``nodes``; rounding to nearest on those grids is what they then do.

    Raises:
        BitlowerError: a weight holds NaN or Inf.
    """
    for node in nodes:
        set_range(module, node, *weight_range(module, node, ranges))
        release(QuantizerNode(node).weight(module))


def weight_range(module: fx.GraphModule, node: fx.Node, ranges: WeightRanges) -> tuple[torch.Tensor, torch.Tensor]:
    """The low and high ends of a weight's range, in the shape of its scale.

    Raises:
        BitlowerError: the weight holds NaN or Inf.
    """
    view = QuantizerNode(node)
    weight, shape = view.weight(module), view.range(module)[0].shape
    granularity, extent = view.spec.granularity, weight.shape[-1]
    if granularity.kind == "group":
        weight = granularity.pad_groups(weight)
        shape = torch.Size((*shape[:-1], weight.shape[-1] // min(granularity.group_size, extent)))
    rows = scale_rows(weight, shape)
    low, high = rows.aminmax(dim=1)
    require_finite(node, low, high)
    if ranges != "minmax":
        grid = view.spec.grid
        search = search_grid if ranges == "mse" else search_golden
        step = max(1, _CHUNK // rows.shape[1])
        parts = [
            search(exact_loss(r, grid), lo, hi, two_sided=not grid.symmetric)
            for r, lo, hi in zip(*(torch.split(part, step) for part in (rows, low, high)), strict=True)
        ]
        low, high = (torch.cat(ends) for ends in zip(*parts, strict=True))
    low, high = low.reshape(shape), high.reshape(shape)
    if granularity.kind == "group":
        low, high = granularity.to_blocks(low, extent), granularity.to_blocks(high, extent)
    return low, high


def scale_rows(x: torch.Tensor, scale_shape: Sequence[int]) -> torch.Tensor:
    """``x`` as ``[scales, elements that share one]``."""
    if not scale_shape:
        return x.reshape(1, -1)
    blocked, inner = block(x, scale_shape)
    outer = [axis for axis in range(blocked.dim()) if axis not in inner]
    return blocked.permute(*outer, *inner).reshape(math.prod(scale_shape), -1)


def require_finite(node: fx.Node, low: torch.Tensor, high: torch.Tensor) -> None:
    """Raise BitlowerError if what the quantizer ``node`` rounds is not finite."""
    if not bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
        view = QuantizerNode(node)
        kind = "weight" if view.rounds_parameter else "activation"
        raise BitlowerError(f"the {kind} {view.quantizer.tensor} holds NaN or Inf: {describe(view.value)}")
