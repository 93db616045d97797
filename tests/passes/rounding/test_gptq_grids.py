"""Grids over groups, and the rounding of columns one by one, against numpy and the one implementation of quantize."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitlower.ir import Granularity, Grid, ScaleConvention
from bitlower.ir.quantization import numerics
from bitlower.passes.rounding._gptq_grids import AROUND, SHRINK, Grids, round_columns

GRIDS = [
    Grid(4, signed=False, symmetric=False),
    Grid(3),
    Grid(8),
    Grid(2, signed=False, symmetric=False),
    Grid(2, restricted=True),
    Grid(4, convention=ScaleConvention.HALF_RANGE),
    Grid(4, signed=False, convention=ScaleConvention.OFFSET),
]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@settings(max_examples=20)
@given(st.integers(0, 10**6), st.sampled_from([1, 4, 12]), st.booleans())
def test_rounding_is_that_of_numerics_bit_for_bit(grid: Grid, seed: int, group: int, ties: bool) -> None:
    columns = normal(12, 5, seed=seed)
    if ties:
        columns = torch.round(columns * 8) / 8
    grids = Grids.over(columns, torch.ones(12), grid, group, "minmax")
    centred = grids.round(columns)
    scale, zero = grid.qparams(*Granularity.per_group(group).range_of(columns.T))
    assert torch.equal(grids.scale.T, scale)
    codes = numerics.codes(columns.T, scale, zero, grid.quant_min, grid.quant_max)
    assert torch.equal(grids.codes(centred).T.float(), codes)
    assert torch.equal(grids.values(centred).T, numerics.values(codes, scale, zero))
    free = round_columns(
        columns.clone(), columns, torch.zeros(12, 5), torch.zeros(12, 12), grids, [j // group for j in range(12)]
    )
    assert torch.equal(free, centred)


def test_columns_are_rounded_one_after_another_the_last_first() -> None:
    grid, target, reference, coupling = Grid(4), normal(6, 3), normal(6, 3, seed=1), normal(6, 6, seed=2)
    grids = Grids.over(target, torch.ones(6), grid, 3, "minmax")
    scales = grids.scale.repeat_interleave(3, 0).double().numpy()
    change = np.zeros((6, 3))
    expected = np.zeros((6, 3))
    for k in range(5, -1, -1):
        value = target[k].double().numpy() + coupling[k].double().numpy() @ change
        expected[k] = np.clip(np.rint(value / scales[k]), -8, 7)
        change[k] = reference[k].double().numpy() - expected[k] * scales[k]
    made = torch.zeros(6, 3)
    centred = round_columns(target.clone(), reference, made, coupling, grids, [0, 0, 0, 1, 1, 1])
    assert np.array_equal(centred, expected)
    np.testing.assert_allclose(made, change, atol=1e-5)


@pytest.mark.parametrize("grid", [grid for grid in GRIDS if grid.bits <= 4], ids=str)
def test_a_searched_range_has_the_least_weighted_error(grid: Grid) -> None:
    """Against a fine sweep of one factor, and never worse than min–max."""
    columns = normal(64, 32)
    importance = torch.logspace(-2, 2, 64)[torch.randperm(64, generator=torch.Generator().manual_seed(0))]

    def error(scale: torch.Tensor, zero: torch.Tensor) -> np.ndarray:
        rounded = numerics.fake(columns, scale[None], zero[None], grid.quant_min, grid.quant_max)
        return ((columns - rounded).double().square() * importance[:, None]).sum(0).numpy()

    low, high = columns.aminmax(dim=0)
    found, plain, even = (
        error(grids.scale[0], grids.zero[0])
        for grids in (Grids.over(columns, importance, grid, 64, r) for r in ("weighted-mse", "minmax", "mse"))
    )
    swept = np.min([error(*grid.qparams(low * f, high * f)) for f in np.linspace(0.4, 1, 121)], axis=0)
    assert (found <= plain * (1 + 1e-5)).all()
    assert found.sum() <= 1.1 * swept.sum()
    assert found.sum() < even.sum()


def test_each_end_of_an_asymmetric_range_is_searched() -> None:
    """With one value far above all others, only the high end is worth moving."""
    grid = GRIDS[0]
    columns = normal(64, 32).clamp(-1, 0.3)
    columns[5] = 2
    grids = Grids.over(columns, torch.ones(64) - 0.99 * (torch.arange(64) == 5), grid, 64, "weighted-mse")
    low, high = (torch.full((32,), end) for end in (-1.0, 2.0))
    reach = ((grid.quant_min - grids.zero) * grids.scale, (grid.quant_max - grids.zero) * grids.scale)
    assert (reach[1] / high).mean() < 0.85 * (reach[0] / low).mean()


@pytest.mark.parametrize("ranges", ["minmax", "mse", "weighted-mse"])
def test_a_group_of_zeros_has_the_scale_one(ranges: str) -> None:
    columns = torch.zeros(8, 3)
    for importance in (torch.ones(8), torch.zeros(8)):
        grids = Grids.over(columns, importance, Grid(4, signed=False, symmetric=False), 4, ranges)
        assert (grids.scale == 1).all()
        assert not grids.values(grids.round(columns)).any()


def test_rows_may_be_taken_from_other_grids() -> None:
    one, other = (Grids.over(normal(8, 3, seed=s), torch.ones(8), GRIDS[0], 4, "minmax") for s in (0, 1))
    scale = one.scale.clone()
    one.take(torch.tensor([False, True, False]), other)
    assert torch.equal(one.scale[:, 1], other.scale[:, 1])
    assert torch.equal(one.zero[:, 1], other.zero[:, 1])
    assert torch.equal(one.scale[:, ::2], scale[:, ::2])


def test_a_symmetric_range_is_shrunk_at_both_ends_and_once_more_around_the_best() -> None:
    grid, columns = Grid(3, restricted=True), normal(64, 40, seed=3) ** 3
    values = columns.double().numpy()
    largest = np.abs(values).max(0)

    def losses(factors: np.ndarray) -> np.ndarray:
        scale = factors * largest / 3
        return ((values - np.clip(np.round(values / scale), -3, 3) * scale) ** 2).sum(0)

    best = np.ones(40)
    for tried in (SHRINK, AROUND):
        start = best
        for factor in tried:
            best = np.where(losses(start * factor) < losses(best), start * factor, best)
    grids = Grids.over(columns, torch.ones(64), grid, 64, "mse")
    np.testing.assert_allclose(grids.scale[0].numpy(), best * largest / 3, rtol=1e-5)
    assert len({round(float(f), 4) for f in best}) > 3
