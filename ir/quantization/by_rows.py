"""Rounding and dequantizing of matrices that lie in files, some rows at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bitlower.ir.storage import is_mapped, release

PART = 1 << 22
"""Entries of a matrix in a file that are taken at a time: 16 MB in float32."""


def by_rows(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    function: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    dtype: torch.dtype,
) -> torch.Tensor:
    """``function(x, scale, zero_point)`` in ``dtype``; of a matrix in a file some rows at a time, which are let go of.

    So a table is not in memory as it was while what becomes of it is made.

    Args:
        x: of any shape; what is no matrix, is small or is in memory is taken whole, and so is one whose scales are
            shared by several rows.
        scale: as :class:`~bitlower.ir.quantization.granularity.Granularity` lays them out for ``x``.
        zero_point: as ``scale``.
        function: elementwise; returns the shape of its first argument.
        dtype: of the result.
    """
    shared = (part.dim() and part.shape[0] not in (1, x.shape[0]) for part in (scale, zero_point))
    if x.dim() < 2 or x.numel() <= PART or not is_mapped(x) or any(shared):
        return function(x, scale, zero_point)
    made = torch.empty(x.shape, dtype=dtype)
    step = max(1, PART * len(x) // x.numel())
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        parts = (part[rows] if part.dim() and part.shape[0] == len(x) else part for part in (scale, zero_point))
        made[rows] = function(x[rows], *parts)
        release(x[rows])
    return made
