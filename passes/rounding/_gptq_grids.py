"""The grids of a weight's groups, and the rounding of columns one by one, for the GPTQ solver.

Everything is transposed: weights are ``[columns, rows]``, scales ``[groups, rows]``, so that a column is contiguous.
Codes are held *centred*, less their zero point: ``weight = scale · centred``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from bitlower.ir import Grid

Ranges = Literal["minmax", "mse", "weighted-mse"]
"""How a grid is laid over weights: their extremes, the least squared error, or the least squared error with each column
weighted by what an error in it costs once the columns after it have made up for it (the pivots of H)."""
SHRINK = (0.9, 0.8, 0.7, 0.6, 0.5)
"""Shares of the min–max range that a search for the least error tries."""
AROUND = (0.85, 0.92, 1.06)
"""By what a search for the least error moves the ends of the range: both, and then around what was best."""


class Grids:
    """Scale and zero point of every group, ``[groups, rows]``, and the ends of the centred codes."""

    def __init__(self, grid: Grid, groups: int, rows: int, ranges: Ranges) -> None:
        self.grid = grid
        self.ranges = ranges
        self.scale, self.zero, self.low, self.high = (torch.zeros(groups, rows) for _ in range(4))

    @classmethod
    def over(cls, columns: torch.Tensor, importance: torch.Tensor, grid: Grid, size: int, ranges: Ranges) -> Grids:
        """Grids of groups of ``size`` laid over ``columns``, of the given ``importance``, in the model's order."""
        grids = cls(grid, columns.shape[0] // size, columns.shape[1], ranges)
        for index, (values, weights) in enumerate(
            zip(torch.split(columns, size), torch.split(importance, size), strict=True)
        ):
            grids.set(index, values, weights)
        return grids

    def set(self, index: int, values: torch.Tensor, importance: torch.Tensor) -> None:
        """Lay the grid of group ``index`` over ``values``, ``[columns of the group, rows]``.

        ``importance``, ``[columns of the group]``, are their pivots.
        """
        low, high = values.aminmax(dim=0)
        if self.ranges != "minmax":
            weights = importance / importance.max() if self.ranges == "weighted-mse" else torch.ones_like(importance)
            low, high = _search(values, weights, self.grid, low, high)
        scale, zero = self.grid.qparams(low, high)
        self.scale[index], self.zero[index] = scale, zero
        self.low[index], self.high[index] = self.grid.quant_min - zero, self.grid.quant_max - zero

    def round(self, columns: torch.Tensor) -> torch.Tensor:
        """The centred codes nearest to ``columns``, which are in the model's order."""
        parts = columns.reshape(self.scale.shape[0], -1, columns.shape[1])
        centred = torch.round(parts / self.scale[:, None])
        return torch.clamp(centred, self.low[:, None], self.high[:, None], out=centred).reshape(columns.shape)

    def values(self, centred: torch.Tensor) -> torch.Tensor:
        """The weights of centred codes, which are in the model's order."""
        parts = centred.reshape(self.scale.shape[0], -1, centred.shape[1])
        return (parts * self.scale[:, None]).reshape(centred.shape)

    def codes(self, centred: torch.Tensor) -> torch.Tensor:
        """Centred codes with their zero points, in the dtype of the grid."""
        parts = centred.reshape(self.scale.shape[0], -1, centred.shape[1])
        return (parts + self.zero[:, None]).reshape(centred.shape).to(self.grid.dtype)

    def take(self, rows: torch.Tensor, other: Grids) -> None:
        """The grids of ``rows``, ``[rows]`` bool, from ``other``."""
        for part in ("scale", "zero", "low", "high"):
            getattr(self, part)[:, rows] = getattr(other, part)[:, rows]


def _search(
    values: torch.Tensor, importance: torch.Tensor, grid: Grid, low: torch.Tensor, high: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ends, ``[rows]``, of the range with the least weighted squared error: near ``low`` and ``high`` shrunk.

    First both ends by the same factor, then around that; each end by itself if the grid is asymmetric. The ends as they
    were are among the candidates.
    """

    def loss(ends: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        scale, zero = grid.qparams(*ends)
        error = torch.round(values / scale)
        torch.clamp(error, grid.quant_min - zero, grid.quant_max - zero, out=error)
        return importance @ torch.addcmul(values, error, scale, value=-1, out=error).square_()

    sides = ((0, 1),) if grid.symmetric else ((0,), (1,))
    ends = low, high
    least = loss(ends)
    for scaled_sides, factors in (((0, 1), SHRINK), *((side, AROUND) for side in sides)):
        start = ends
        for factor in factors:
            tried = tuple(end * factor if side in scaled_sides else end for side, end in enumerate(start))
            candidate_loss = loss((tried[0], tried[1]))
            better = candidate_loss < least
            least = torch.where(better, candidate_loss, least)
            ends = torch.where(better, tried[0], ends[0]), torch.where(better, tried[1], ends[1])
    return ends


def round_columns(
    target: torch.Tensor,
    reference: torch.Tensor,
    change: torch.Tensor,
    coupling: torch.Tensor,
    grids: Grids,
    groups: Sequence[int],
) -> torch.Tensor:
    """Round a few columns one after another, the last first; the centred codes.

    Column k is rounded from ``target_k + Σ_j coupling_kj · change_j``, over the columns j that are done, and then
    ``change_k`` is ``reference_k`` less what it was rounded to. As few operations a column as there can be.

    Args:
        target: ``[columns, rows]``; overwritten with what each column was rounded from.
        reference: ``[columns, rows]``.
        change: ``[columns, rows]``, zeros; overwritten.
        coupling: ``[columns, columns]``.
        grids: the grids to round to.
        groups: the group of each column.
    """
    scales, lows, highs = (part.unbind(0) for part in (grids.scale, grids.low, grids.high))
    targets, references, changes, couplings = (part.unbind(0) for part in (target, reference, change, coupling))
    centred = torch.empty_like(target)
    by_row = change.T
    for k in range(len(groups) - 1, -1, -1):
        group, code = groups[k], centred[k]
        torch.addmv(targets[k], by_row, couplings[k], out=targets[k])  # changes not yet made are zero
        torch.div(targets[k], scales[group], out=code).round_()
        torch.clamp(code, lows[group], highs[group], out=code)
        torch.addcmul(references[k], code, scales[group], value=-1, out=changes[k])
    return centred
