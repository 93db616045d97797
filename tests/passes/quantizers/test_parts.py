"""The chosen partition against all partitions of a short axis, and against equal groups."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitlower.ir import Granularity, Grid
from bitlower.ir.quantization import numerics
from bitlower.passes.quantizers._parts import ChannelPartition, choose_parts

AFFINE = Grid(8, signed=False, symmetric=False)


def cost(low: np.ndarray, high: np.ndarray, ends: list[int], grid: Grid) -> float:
    """Σ over groups of length · Δ² / 12, in numpy."""
    total = 0.0
    for start, stop in itertools.pairwise(ends):
        lowest, highest = min(low[start:stop].min(), 0), max(high[start:stop].max(), 0)
        span = max(-lowest, highest) * 2 if grid.symmetric else highest - lowest
        steps = 2 * grid.quant_max if grid.symmetric else grid.quant_max - grid.quant_min
        total += (stop - start) * (span / steps) ** 2 / 12
    return total


def best(low: np.ndarray, high: np.ndarray, groups: int, grid: Grid) -> float:
    """The least cost over all contiguous partitions."""
    count = len(low)
    cuts = (c for k in range(min(groups, count)) for c in itertools.combinations(range(1, count), k))
    return min(cost(low, high, [0, *cut, count], grid) for cut in cuts)


widths = st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0, 3.0, 20.0]), min_size=1, max_size=8)


@given(widths, st.integers(0, 2**31), st.integers(1, 9), st.sampled_from([AFFINE, Grid(4)]))
def test_no_partition_is_better(sizes, seed, groups, grid):
    random = np.random.default_rng(seed)
    high = (random.random(len(sizes)) * sizes).astype(np.float32)
    low = -(random.random(len(sizes)) * sizes).astype(np.float32)
    parts = choose_parts(torch.from_numpy(low), torch.from_numpy(high), grid, groups)
    owner = parts.owner.numpy()
    assert owner[0] == 0
    assert set(np.diff(owner)) <= {0, 1}
    assert parts.count <= groups
    ends = [0, *(np.flatnonzero(np.diff(owner)) + 1), len(sizes)]
    assert cost(low, high, ends, grid) == pytest.approx(best(low, high, groups, grid), rel=1e-6, abs=1e-12)


def test_join_and_spread():
    parts = ChannelPartition(torch.tensor([0, 0, 1]))
    low, high = parts.join(torch.tensor([-1.0, -3.0, 0.0]), torch.tensor([2.0, 0.0, 5.0]))
    assert low.tolist() == [-3.0, 0.0]
    assert high.tolist() == [2.0, 5.0]
    assert parts.spread(high).tolist() == [2.0, 2.0, 5.0]


def test_an_outlier_is_alone():
    high = torch.ones(40)
    high[17] = 60.0
    assert choose_parts(-high, high, AFFINE, 3).owner.tolist() == [0] * 17 + [1] + [2] * 22


def test_equal_ranges_are_one_group():
    assert choose_parts(-torch.ones(10), torch.ones(10), AFFINE, 4).count == 1


def test_long_axes_are_cut_at_multiples():
    high = torch.ones(5000)
    high[4000:] = 9.0
    owner = choose_parts(-high, high, AFFINE, 2).owner
    cut = int((owner == 0).sum())
    assert owner.numel() == 5000
    assert 4000 - 3 < cut <= 4000
    assert cut % 3 == 0


@pytest.mark.parametrize("seed", range(5))
def test_outliers_cost_least_in_groups_of_their_own(seed: int):
    """Measured, not modelled: unequal groups ≤ equal groups ≤ one scale, dimensions in ascending order of range."""
    generator = torch.Generator().manual_seed(seed)
    widths = torch.rand(96, generator=generator) + 0.5
    widths[:5] *= 40
    x = torch.randn(2000, 96, generator=generator) * widths.sort().values

    def error(low: torch.Tensor, high: torch.Tensor) -> float:
        scale, zero = AFFINE.qparams(low, high)
        return float((numerics.fake(x, scale, zero, 0, 255) - x).square().mean())

    low, high = x.aminmax(dim=0)
    parts = choose_parts(low, high, AFFINE, 6)
    unequal = error(*(parts.spread(end)[None] for end in parts.join(low, high)))
    equal = error(*Granularity.per_embedding_group(6).range_of(x))
    assert unequal < 0.5 * equal
    assert equal < error(*torch.aminmax(x))
