"""Make solved codes and scales better still, under the same Hessian: no step raises the damped loss.

Held as in :mod:`bitlower.passes.rounding._gptq_grids`, in the model's order; ``error`` is the weight less its rounded
values.
"""

from __future__ import annotations

import torch

from bitlower.passes.rounding._gptq_factor import Factor
from bitlower.passes.rounding._gptq_grids import Grids, round_columns

_BLOCK = 32
"""Columns whose codes are revisited before the products with the others are brought up to date."""


def descend(columns: torch.Tensor, centred: torch.Tensor, grids: Grids, factor: Factor) -> None:
    """Round each column anew to what is best given all others, once (QuantEase, Behdin et al. 2023); edits ``centred``.

    Column j has its least loss at ``ŵ_j + (E H)_j / H_jj``, and the loss is a parabola around it: the nearest code is
    the best one, and none is worse than the code that was there.
    """
    group = columns.shape[0] // grids.scale.shape[0]
    values = grids.values(centred)
    error = columns - values
    for start in range(0, columns.shape[0], _BLOCK):
        block = slice(start, min(start + _BLOCK, columns.shape[0]))
        hessian = factor.hessian[block]
        diagonal = hessian[:, block].diagonal() + factor.added
        diagonal = torch.where(factor.dead[block], torch.ones_like(diagonal), diagonal)[:, None]
        gradient = torch.addmm(error[block], hessian, error, beta=factor.added)
        change = torch.zeros_like(gradient)
        target = gradient.div_(diagonal).add_(values[block])
        groups = [column // group for column in range(block.start, block.stop)]
        centred[block] = round_columns(target, values[block], change, hessian[:, block] / diagonal, grids, groups)
        error[block] += change


def rescale(columns: torch.Tensor, centred: torch.Tensor, grids: Grids, factor: Factor) -> None:
    """Give each group the scale that is best for its codes, given the other groups; edits ``grids``.

    With T the centred codes of a group, the loss is a parabola in its scale s with its minimum at
    ``s + T·(E H) / (T H Tᵀ)``. A group for which that is not positive keeps its scale.
    """
    group = columns.shape[0] // grids.scale.shape[0]
    error = columns - grids.values(centred)
    for index in range(grids.scale.shape[0]):
        block = slice(index * group, (index + 1) * group)
        hessian, codes = factor.hessian[block], centred[block]
        gradient = torch.addmm(error[block], hessian, error, beta=factor.added)
        curvature = torch.addmm(codes, hessian[:, block], codes, beta=factor.added).mul_(codes).sum(0)
        scale = grids.scale[index] + gradient.mul_(codes).sum(0) / curvature
        better = torch.isfinite(scale) & (scale > torch.finfo(torch.float32).tiny)
        grids.scale[index] = torch.where(better, scale, grids.scale[index])
        error[block] = columns[block] - codes * grids.scale[index]
