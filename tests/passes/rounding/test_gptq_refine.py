"""Refinement never raises the damped loss, and ends where no single change of a code lowers it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitlower.ir import Granularity, Grid
from bitlower.passes.rounding._gptq_factor import Factor, factorize
from bitlower.passes.rounding._gptq_grids import Grids
from bitlower.passes.rounding._gptq_refine import descend, rescale
from bitlower.passes.rounding._gptq_solver import GptqOptions, solve

U4 = Grid(4, signed=False, symmetric=False)


def start(seed: int, grid: Grid, group: int, common: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, Grids, Factor]:
    """A layer of 10 rows and 48 columns, rounded to nearest; its inputs have a ``common`` part."""
    g = torch.Generator().manual_seed(seed)
    inputs = torch.randn(200, 48, generator=g) @ torch.randn(48, 48, generator=g)
    inputs += common * torch.randn(200, 1, generator=g)
    factor = factorize(inputs.T @ inputs / 200)
    columns = torch.randn(48, 10, generator=g)
    grids = Grids.over(columns, factor.hessian.diagonal(), grid, group, "minmax")
    return columns, grids.round(columns), grids, factor


def damped_loss(columns: torch.Tensor, centred: torch.Tensor, grids: Grids, factor: Factor) -> np.ndarray:
    error = (columns - grids.values(centred)).double()
    damped = factor.hessian.double() + factor.added * torch.eye(48)
    return torch.einsum("ir,ij,jr->r", error, damped, error).numpy()


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.sampled_from([U4, Grid(2), Grid(3, restricted=True)]), st.sampled_from([48, 8]))
def test_no_step_raises_the_loss_of_any_row(seed: int, grid: Grid, group: int) -> None:
    columns, centred, grids, factor = start(seed, grid, group)
    losses = [damped_loss(columns, centred, grids, factor)]
    for step in (descend, rescale, descend, rescale, descend):
        step(columns, centred, grids, factor)
        losses.append(damped_loss(columns, centred, grids, factor))
        assert (losses[-1] <= losses[-2] * (1 + 1e-4)).all()
        assert centred.min() >= grids.low.min()
        assert centred.max() <= grids.high.max()
        assert (grids.scale > 0).all()
    assert losses[1].sum() < 0.8 * losses[0].sum()


@pytest.mark.parametrize("step", [descend, rescale])
def test_no_step_raises_the_loss_of_any_row_where_all_inputs_are_alike(step: Callable[..., None]) -> None:
    """What one group or column gains, the next must know of."""
    columns, centred, grids, factor = start(0, Grid(2), 2, common=100.0)
    columns += 1
    before = damped_loss(columns, centred, grids, factor)
    for _ in range(3):
        step(columns, centred, grids, factor)
        after = damped_loss(columns, centred, grids, factor)
        assert (after <= before * (1 + 1e-4)).all()
        before = after


@pytest.mark.parametrize("group", [48, 8])
def test_descent_ends_where_no_single_code_is_better(group: int) -> None:
    columns, centred, grids, factor = start(0, U4, group)
    for _ in range(30):
        before = centred.clone()
        descend(columns, centred, grids, factor)
    assert torch.equal(before, centred)
    best = damped_loss(columns, centred, grids, factor)
    low, high = (part.repeat_interleave(group, 0) for part in (grids.low, grids.high))
    for column in range(48):
        for step in (-1, 1):
            other = centred.clone()
            other[column] = (other[column] + step).clamp(low[column], high[column])
            assert (damped_loss(columns, other, grids, factor) >= best * (1 - 1e-4)).all()


def test_the_scale_is_the_least_squares_one() -> None:
    """Per channel the best scale has a closed form: regress the outputs of the weights on those of the codes."""
    columns, centred, grids, factor = start(1, U4, 48)
    rescale(columns, centred, grids, factor)
    damped = factor.hessian.double() + factor.added * torch.eye(48)
    root = torch.linalg.cholesky(damped).T
    for row in range(10):
        codes, weight = root @ centred[:, row].double(), root @ columns[:, row].double()
        expected = np.linalg.lstsq(codes[:, None].numpy(), weight.numpy(), rcond=None)[0].item()
        assert grids.scale[0, row].item() == pytest.approx(expected, rel=1e-4)


def test_rows_of_zeros_keep_their_scale() -> None:
    columns, _, _, factor = start(2, U4, 8)
    columns[:, 0] = 0
    grids = Grids.over(columns, factor.hessian.diagonal(), U4, 8, "minmax")
    centred = grids.round(columns)
    rescale(columns, centred, grids, factor)
    descend(columns, centred, grids, factor)
    assert (grids.scale[:, 0] == 1).all()
    assert not centred[:, 0].any()


@pytest.mark.parametrize("order", ["none", "full", "grouped"])
def test_solve_refines(order: str) -> None:
    columns, _, _, factor = start(3, U4, 8)
    losses = [
        solve(columns.T, factor.hessian, U4, Granularity.per_group(8), options).loss.sum().item()
        for options in (
            GptqOptions(order=order),
            GptqOptions(order=order, refine=1),
            GptqOptions(order=order, refine=3),
            GptqOptions(order=order, refine=3, rescale=True),
        )
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]
