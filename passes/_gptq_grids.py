"""The grids of a weight's groups, and the rounding of columns one by one, for the GPTQ solver.

Everything is transposed: weights are ``[columns, rows]``, scales ``[groups, rows]``, so that a column is contiguous.
Codes are held *centred*, less their zero point: ``weight = scale · centred``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from bitlower.ir import Grid, numerics
from bitlower.passes._ranges import Loss, exact_loss, search_golden

Ranges = Literal["minmax", "mse", "weighted-mse"]
"""How a grid is laid over weights: their extremes, the least squared error, or the least with each column's error
weighted by its entry of the diagonal of H."""


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
        for index, (values, weights) in enumerate(zip(columns.split(size), importance.split(size), strict=True)):
            grids.set(index, values, weights)
        return grids

    def set(self, index: int, values: torch.Tensor, importance: torch.Tensor) -> None:
        """Lay the grid of group ``index`` over ``values``, ``[columns of the group, rows]``.

        ``importance``, ``[columns of the group]``, is their part of the diagonal of H.
        """
        low, high = values.aminmax(dim=0)
        if self.ranges != "minmax":
            rows = values.T.contiguous()
            weighted = self.ranges == "weighted-mse"
            loss = _weighted_loss(rows, importance, self.grid) if weighted else exact_loss(rows, self.grid)
            low, high = search_golden(loss, low, high, two_sided=not self.grid.symmetric)
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
        for mine, theirs in ((self.scale, other.scale), (self.zero, other.zero)):
            mine[:, rows] = theirs[:, rows]


def _weighted_loss(rows: torch.Tensor, importance: torch.Tensor, grid: Grid) -> Loss:
    """The squared error that ``grid`` makes on ``rows``, each column counted by its importance."""
    shares = importance / importance.sum().clamp(min=torch.finfo(torch.float32).tiny)

    def squared_error(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        scale, zero = grid.qparams(low, high)
        rounded = numerics.fake(rows, scale[:, None], zero[:, None], grid.quant_min, grid.quant_max)
        return (rows - rounded).square_() @ shares

    return squared_error


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
