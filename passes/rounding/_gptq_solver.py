"""Weights on an integer grid with the least error on a layer's inputs: the GPTQ solver (Frantar et al. 2022).

Columns are rounded one after another, and what rounding one costs is made up for by those that are still free. Nothing
here knows models or graphs. Everything is held transposed, ``[columns, rows]``, so that a column is contiguous; columns
stand in the positions of a :class:`~bitlower.passes.rounding._gptq_factor.Factor`, and are solved from the last to the
first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from bitlower.ir import BitlowerError, Granularity, Grid
from bitlower.passes.rounding._gptq_factor import Factor, Order, factorize
from bitlower.passes.rounding._gptq_grids import Grids, Ranges, round_columns
from bitlower.passes.rounding._gptq_refine import descend, rescale

SEARCHED: tuple[Ranges, ...] = ("minmax", "weighted-mse")
"""What ``ranges="best"`` tries."""


@dataclass(frozen=True)
class GptqOptions:
    """How to solve; the defaults are the published algorithm with a guard."""

    damping: float = 0.01
    """Share of the mean diagonal of H that is added to it."""
    order: Order = "none"
    """In which order columns are rounded; see :func:`~bitlower.passes.rounding._gptq_factor.factorize`."""
    static_groups: bool = False
    """Grids of groups from the weights as they were; else from the weights as they are when the group begins."""
    ranges: Ranges | Literal["best"] = "minmax"
    """How a grid is laid over the weights of a group; ``best`` solves each way and keeps the best for each row."""
    guard: bool = True
    """Rows that round-to-nearest on its own min–max grid does better, measured under H, are rounded to nearest."""
    refine: int = 0
    """Sweeps over all columns after solving, each of which rounds every column anew given the others."""
    rescale: bool = False
    """Before each sweep, give every group the scale that is best for its codes."""
    block: int = 32
    """Columns that are rounded one by one before their error is passed on by a matrix product."""


@dataclass(frozen=True)
class GptqSolution:
    """A solved layer.

    Args:
        weight: ``[rows, columns]`` float32, exactly ``scale · (code − zero_point)``.
        codes: ``[rows, columns]`` in the dtype of the grid.
        scale: ``[rows, groups]`` float32; ``groups`` is 1 for per-channel scales.
        zero_point: as ``scale``, whole numbers.
        loss: ``[rows]`` float64, ``(w − q) H (w − q)ᵀ`` without damping.
        rtn_loss: the same for round-to-nearest on its own min–max grid; None without guard.
        rtn_mask: ``[rows]`` bool, the rows that the guard rounded to nearest.
        damping: the share of the mean diagonal that was added; more than asked for if H was singular.
        notes: what the user should know; each names the layer.
    """

    weight: torch.Tensor
    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor
    loss: torch.Tensor
    rtn_loss: torch.Tensor | None
    rtn_mask: torch.Tensor
    damping: float
    notes: tuple[str, ...]


def solve(
    weight: torch.Tensor,
    hessian: torch.Tensor | Factor,
    grid: Grid,
    granularity: Granularity,
    options: GptqOptions | None = None,
    *,
    name: str = "a layer",
) -> GptqSolution:
    """Round ``weight``, ``[rows, columns]``, to ``grid`` with a small error under ``hessian``.

    Layers that share an input may be stacked along rows, or share a :class:`Factor` (made with the same ``order`` and
    group size; its damping counts then). Columns that no token reached become zero.

    Raises:
        BitlowerError: the granularity is not per channel (axis 0) or per group (last axis), a group size does not
            divide the columns, shapes do not fit, or the weight or H is unfit; ``name`` is in the message.
    """
    options = options or GptqOptions()
    group = _group_size(weight, granularity, name)
    if not isinstance(hessian, Factor):
        hessian = factorize(hessian, damping=options.damping, order=options.order, group=group, name=name)
    _check(weight, hessian, group, options, name)
    columns = weight.detach().float().T.contiguous()
    columns[hessian.dead] = 0
    layer = _Layer(columns, hessian, grid, group, options)
    ways = SEARCHED if options.ranges == "best" else (options.ranges,)
    best = _rounded(layer, ways[0])
    for ranges in ways[1:]:
        best.improve(_rounded(layer, ranges))
    rtn_mask, rtn_loss = torch.zeros(len(weight), dtype=torch.bool), None
    if options.guard:
        nearest = _nearest(layer)
        rtn_mask, rtn_loss = best.improve(nearest), nearest.loss
    return best.solution(rtn_loss, rtn_mask, hessian)


@dataclass(frozen=True)
class _Layer:
    """What is solved: ``columns`` is the weight transposed, in the model's order."""

    columns: torch.Tensor
    factor: Factor
    grid: Grid
    group: int
    options: GptqOptions

    def grids(self, ranges: Ranges) -> Grids:
        """Grids that are laid over the weights as they were."""
        importance = torch.empty_like(self.factor.pivots)
        importance[self.factor.positions] = self.factor.pivots
        return Grids.over(self.columns, importance, self.grid, self.group, ranges)


@dataclass(frozen=True)
class _Rounding:
    """One way to round a layer: grids, centred codes ``[columns, rows]`` in the model's order, and loss ``[rows]``."""

    grids: Grids
    centred: torch.Tensor
    loss: torch.Tensor

    def improve(self, other: _Rounding) -> torch.Tensor:
        """Take the rows that ``other`` rounds better, and say which those are."""
        rows = other.loss < self.loss
        self.centred[:, rows], self.loss[rows] = other.centred[:, rows], other.loss[rows]
        self.grids.take(rows, other.grids)
        return rows

    def solution(self, rtn_loss: torch.Tensor | None, rtn_mask: torch.Tensor, factor: Factor) -> GptqSolution:
        """As the caller wants it: rows first."""
        weight, codes = self.grids.values(self.centred), self.grids.codes(self.centred)
        parts = [part.T.contiguous() for part in (weight, codes, self.grids.scale, self.grids.zero)]
        notes = (factor.note,) if factor.note else ()
        return GptqSolution(
            parts[0], parts[1], parts[2], parts[3], self.loss, rtn_loss, rtn_mask, factor.damping, notes
        )


def _nearest(layer: _Layer) -> _Rounding:
    """Round-to-nearest, on grids over the extremes of the weights as they were."""
    grids = layer.grids("minmax")
    centred = grids.round(layer.columns)
    return _Rounding(grids, centred, layer.factor.loss(layer.columns - grids.values(centred)))


def _rounded(layer: _Layer, ranges: Ranges) -> _Rounding:
    """Solve with error feedback, then refine."""
    factor, options, columns = layer.factor, layer.options, layer.columns
    work = _Work(layer, ranges)
    _solve(work, 0, factor.columns)
    centred = torch.empty_like(columns)
    centred[factor.positions] = work.target
    grids, loss = work.grids, work.undamped_loss()
    del work  # what refining needs besides is as large again
    for _ in range(options.refine):
        if options.rescale:
            rescale(columns, centred, grids, factor)
        descend(columns, centred, grids, factor)
    if options.refine:
        loss = factor.loss(columns - grids.values(centred))
    return _Rounding(grids, centred, loss)


class _Work:
    """What one solve holds; ``[columns, rows]``, in positions."""

    def __init__(self, layer: _Layer, ranges: Ranges) -> None:
        count, rows = layer.columns.shape
        self.layer, self.factor, self.group = layer, layer.factor, layer.group
        self.block = layer.options.block
        self.refresh = not (layer.options.static_groups or self.factor.order == "full")
        self.weight = layer.columns[self.factor.positions]
        # What each column is rounded from; once it is rounded, its centred code.
        self.target = self.weight.clone()
        self.error = torch.zeros(count, rows)
        self.loss = torch.zeros(rows, dtype=torch.float64)
        self.grids = Grids(layer.grid, count // self.group, rows, ranges) if self.refresh else layer.grids(ranges)
        self.groups = (self.factor.positions // self.group).tolist()

    def undamped_loss(self) -> torch.Tensor:
        """``[rows]``, once all is rounded: what the damping added to the loss is taken off; spends ``error``."""
        damped = self.error.square_().sum(0, dtype=torch.float64) * self.factor.added
        return (self.loss - damped).clamp_(min=0)


def _solve(work: _Work, low: int, high: int) -> None:
    """Round the positions from ``high`` down to ``low``, by halves: a product passes on what the first half costs."""
    size = high - low
    if work.refresh and size == work.group:
        work.grids.set(work.groups[low], _current(work, low, high), work.factor.pivots[low:high])
    whole_groups = work.refresh and size > work.group
    if size <= work.block and not whole_groups:
        _round_block(work, low, high)
        return
    step = work.group if whole_groups else work.block
    middle = low + max(1, size // step // 2) * step
    _solve(work, middle, high)
    work.target[low:middle].addmm_(work.factor.upper[low:middle, middle:high], work.error[middle:high])
    _solve(work, low, middle)


def _current(work: _Work, low: int, high: int) -> torch.Tensor:
    """The best weights for ``low`` to ``high`` given all that is rounded so far, were they and the rest left free."""
    weight = work.weight[low:high]
    if high == work.factor.columns:
        return weight
    corner = work.factor.upper[low:high, low:high]
    inverse = torch.linalg.solve_triangular(corner, torch.eye(high - low), upper=True, unitriangular=True)
    return torch.addmm(weight, inverse, work.target[low:high] - weight)


def _round_block(work: _Work, low: int, high: int) -> None:
    """Round a few columns, add up their loss, and leave their codes in the place of their targets."""
    block = slice(low, high)
    target, weight, error = work.target[block], work.weight[block], work.error[block]
    centred = round_columns(target, weight, error, work.factor.upper[block, block], work.grids, work.groups[block])
    rounding = (target - weight).add_(error)
    work.loss += rounding.square_().mul_(work.factor.pivots[block, None]).sum(0, dtype=torch.float64)
    target.copy_(centred)


def _group_size(weight: torch.Tensor, granularity: Granularity, name: str) -> int:
    if weight.dim() != 2:
        raise BitlowerError(f"{name}: a weight has rows and columns, not the shape {list(weight.shape)}")
    rows_alone = granularity.kind == "channel" and granularity.axis % 2 == 0
    if not rows_alone and not (granularity.kind == "group" and granularity.axis % 2 == 1):
        raise BitlowerError(
            f"{name}: error feedback needs a scale of its own for every row, not {granularity}",
            hint="use a per-channel or per-group scheme, or round to nearest",
        )
    group = weight.shape[1] if rows_alone else granularity.group_size
    if weight.shape[1] % group:
        raise BitlowerError(
            f"{name}: groups of {group} do not divide its {weight.shape[1]} columns",
            hint="choose a divisor, or exclude the layer",
        )
    return group


def _check(weight: torch.Tensor, factor: Factor, group: int, options: GptqOptions, name: str) -> None:
    if weight.shape[1] != factor.columns:
        raise BitlowerError(f"{name}: {weight.shape[1]} columns do not fit a Hessian of {factor.columns}")
    if factor.order != options.order or (factor.order == "grouped" and factor.group != group):
        raise BitlowerError(
            f"{name}: its Hessian was factored for order {factor.order} and groups of {factor.group}, "
            f"not for order {options.order} and groups of {group}"
        )
    if options.block < 1:
        raise BitlowerError(f"{name}: a block has at least one column, not {options.block}")
    if not bool(torch.isfinite(torch.stack(weight.aminmax())).all()):
        raise BitlowerError(f"{name}: its weight holds NaN or Inf", hint="check the checkpoint")
