"""Triangular factors of a Hessian, and the order in which a solver takes its columns (Frantar et al. 2022, §3.3).

The published algorithm factors the inverse: ``H⁻¹ = UᵀU``. With ``H = R Rᵀ``, R upper triangular, ``U = R⁻¹``, and what
column j has to make up for is ``Σ_{i<j} (w_i − q_i) R_ij / R_jj``, w being the weights as they were. So R is all one
needs: one factorization and no inverse. R is the Cholesky factor of H with rows and columns in reverse, which is why
*positions* run backwards here: position 0 is the column solved last, and the factor is held as the unit upper triangle
``L_jjⁱ Lᵀ`` of ``P H Pᵀ = L Lᵀ`` with its pivots ``L_jj²``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from bitlower.ir import BitlowerError

Order = Literal["none", "full", "grouped"]

_PANEL = 128
"""Columns of a blocked Cholesky step: one product of matrices does the rest."""
_LARGEST_DAMPING = 1.0
"""The share of the mean diagonal at which the Hessian counts for no more than the damping."""
_SMALLEST_DAMPING = 1e-4
"""Where damping that failed is none: the first that is tried; each further is ten times it."""
# Least share of a diagonal entry that a pivot may be; below it, it is rounding error of the precision or of H itself.
_LEAST_PIVOT = {torch.float32: 1e-5, torch.float64: 1e-8}


@dataclass(frozen=True)
class Factor:
    """A damped Hessian, factored; layers that share an input share it.

    Args:
        hessian: ``[columns, columns]`` float32, as given: not damped, in the model's order.
        order: in which columns are solved.
        group: the group size that ``order`` respects.
        positions: the column at each position, last solved first.
        upper: unit upper triangle, rows and columns in positions.
        pivots: ``[columns]``; the loss of an error E is ``Σ_j pivots_j · (upper_j · E)²``.
        dead: ``[columns]`` bool, columns that no token reached.
        damping: the share of the mean diagonal that was added to it.
        added: what was added to the diagonal.
        note: says that the damping had to be raised; else empty.
    """

    hessian: torch.Tensor
    order: Order
    group: int
    positions: torch.Tensor
    upper: torch.Tensor
    pivots: torch.Tensor
    dead: torch.Tensor
    damping: float
    added: float
    note: str

    @property
    def columns(self) -> int:
        """How many columns there are."""
        return self.pivots.numel()

    def loss(self, error: torch.Tensor, *, block: int = 512) -> torch.Tensor:
        """``diag(E H Eᵀ)`` of errors held as ``[columns, rows]`` in the model's order, without damping; ``[rows]``.

        float64. By the triangle: half the work of a product with H.
        """
        ordered_error = error[self.positions]
        total = torch.zeros(error.shape[1], dtype=torch.float64)
        for start in range(0, self.columns, block):
            stop = start + block
            part = self.upper[start:stop, start:] @ ordered_error[start:]
            total += part.square_().mul_(self.pivots[start:stop, None]).sum(0, dtype=torch.float64)
        total -= self.added * error.square().sum(0, dtype=torch.float64)
        return total.clamp_(min=0)


def factorize(
    hessian: torch.Tensor, *, damping: float = 0.01, order: Order = "none", group: int = 0, name: str = "a layer"
) -> Factor:
    """Damp and factor ``hessian`` for :func:`~bitlower.passes.rounding._gptq_solver.solve`.

    ``damping`` times the mean of the diagonal is added to it; where that does not make the matrix positive definite,
    ten times as much, and so on up to the mean itself. In float32, or in float64 where pivots come near rounding.
    ``order``: ``none``, as the columns are; ``full``, by falling diagonal (act-order); ``grouped``, by falling diagonal
    inside each ``group``, and groups by their largest entry, so that groups stay together.

    Raises:
        BitlowerError: the matrix is not square or finite, is zero, or cannot be factored; ``name`` is in the message.
    """
    _check(hessian, damping, name)
    columns = hessian.shape[0]
    group = group or columns
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    mean = float(diagonal[~dead].double().mean())
    positions = _sequence(diagonal, order, group).flip(0)
    tried = damping
    while True:
        added = tried * mean
        factored = _factor(hessian, positions, dead, added, mean)
        if factored is not None:
            break
        if tried >= _LARGEST_DAMPING:
            raise BitlowerError(
                f"{name}: its Hessian could not be factored, even with damping {tried:g}",
                hint="calibrate on more text, or exclude the layer",
            )
        tried = min(_LARGEST_DAMPING, max(10 * tried, _SMALLEST_DAMPING))
    note = f"{name}: damping raised from {damping:g} to {tried:g}, its Hessian is singular" if tried != damping else ""
    return Factor(hessian, order, group, positions, *factored, dead, tried, added, note)


def _check(hessian: torch.Tensor, damping: float, name: str) -> None:
    if hessian.dim() != 2 or hessian.shape[0] != hessian.shape[1]:
        raise BitlowerError(f"{name}: a Hessian is square, not {list(hessian.shape)}")
    if not 0 <= damping <= _LARGEST_DAMPING:
        raise BitlowerError(f"{name}: damping is a share from 0 to {_LARGEST_DAMPING:g}, not {damping}")
    if not bool(torch.isfinite(torch.stack(hessian.aminmax())).all()):
        raise BitlowerError(
            f"{name}: its Hessian holds NaN or Inf", hint="run the float model on the calibration data by itself"
        )
    if not bool((hessian.diagonal() > 0).any()):
        raise BitlowerError(
            f"{name} was never reached by calibration data: its Hessian is zero",
            hint="calibrate on texts that reach it, or exclude the layer",
        )


def _sequence(diagonal: torch.Tensor, order: Order, group: int) -> torch.Tensor:
    """Columns in the order in which they are solved."""
    if order == "none":
        return torch.arange(diagonal.numel())
    if order == "full":
        return torch.argsort(diagonal, descending=True, stable=True)
    blocks = diagonal.reshape(-1, group)
    inside = torch.argsort(blocks, dim=1, descending=True, stable=True)
    groups = torch.argsort(blocks.amax(1), descending=True, stable=True)
    return (inside + group * torch.arange(blocks.shape[0])[:, None])[groups].reshape(-1)


def _factor(
    hessian: torch.Tensor, positions: torch.Tensor, dead: torch.Tensor, added: float, mean: float
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Unit upper triangle and pivots, float32; None if the damped matrix is not positive definite."""
    for dtype in (torch.float32, torch.float64):
        matrix = _arrange(hessian, positions).to(dtype)
        diagonal = matrix.diagonal()
        diagonal[dead[positions]] = mean
        diagonal += added
        least = _LEAST_PIVOT[dtype] * diagonal.clone()
        if cholesky_(matrix):
            roots = matrix.diagonal().clone()
            if bool((roots.square() > least).all()):
                matrix /= roots[:, None]
                return matrix.triu_().float(), roots.square().float()
    return None


def _arrange(hessian: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """A copy with rows and columns in ``positions``; the plain reversal is several times cheaper as such."""
    if torch.equal(positions, torch.arange(positions.numel()).flip(0)):
        return hessian.flip(0, 1)
    return hessian.index_select(0, positions).index_select(1, positions)


def cholesky_(matrix: torch.Tensor) -> bool:
    """Overwrite the upper triangle of ``matrix`` with U, ``matrix = UᵀU``; False if it is not positive definite.

    By panels of rows, which leaves nearly all work to products of matrices: faster than the library's. What is below
    the diagonal blocks is left as it was.
    """
    for start in range(0, matrix.shape[0], _PANEL):
        stop = min(start + _PANEL, matrix.shape[0])
        panel = matrix[start:stop, start:]
        if start:
            panel.addmm_(matrix[:start, start:stop].T, matrix[:start, start:], alpha=-1)
        corner, info = torch.linalg.cholesky_ex(panel[:, : stop - start], upper=True)
        if int(info):
            return False
        panel[:, : stop - start] = corner
        if stop < matrix.shape[0]:
            eye = torch.eye(stop - start, dtype=matrix.dtype)
            inverse = torch.linalg.solve_triangular(corner.T, eye, upper=False)
            panel[:, stop - start :] = inverse @ panel[:, stop - start :]
    return True
