"""Groups of equal scale: how they are read, and which of them are merged."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitlower.ir import Grid
from bitlower.passes.lowering._groups import ScaleGroup, merge_groups

GRID = Grid(8, signed=False, symmetric=False)
ends = st.tuples(st.floats(-9, -0.01), st.floats(0.01, 9))


def groups(ranges: list[tuple[float, float]]) -> list[ScaleGroup]:
    return [
        ScaleGroup(2 * i, 2 * i + 2, *GRID.qparams(torch.tensor(low), torch.tensor(high)))
        for i, (low, high) in enumerate(ranges)
    ]


def joined(run: list[ScaleGroup]) -> float:
    """The step of a grid over all ranges of ``run``."""
    low = min(float((0 - g.zero_point) * g.scale) for g in run)
    high = max(float((255 - g.zero_point) * g.scale) for g in run)
    return (high - low) / 255


@given(st.lists(ends, min_size=1, max_size=7), st.sampled_from([1.2, 2.0, 4.0]))
def test_the_fewest_groups_within_the_ratio(ranges, ratio):
    before = groups(ranges)
    after = merge_groups(before, GRID, ratio)
    assert [g.start for g in after] == [0, *(g.stop for g in after[:-1])]
    assert after[-1].stop == before[-1].stop
    for group in after:
        run = [g for g in before if group.start <= g.start < group.stop]
        assert float(group.scale) == pytest.approx(joined(run), rel=1e-2)
        assert float(group.scale) <= ratio * min(float(g.scale) for g in run) * (1 + 1e-6)

    def admissible(cut: tuple[int, ...], slack: float) -> bool:
        runs = [before[a:b] for a, b in itertools.pairwise([0, *cut, len(before)])]
        return all(joined(run) <= slack * ratio * min(float(g.scale) for g in run) for run in runs if len(run) > 1)

    cuts = (c for k in range(len(before)) for c in itertools.combinations(range(1, len(before)), k))
    fewest = min(len(cut) + 1 for cut in cuts if admissible(cut, 0.98))  # zero points move the ends by half a step
    assert len(after) <= fewest


def test_a_ratio_of_one_merges_nothing():
    before = groups([(-1, 1), (-1, 1.01)])
    assert merge_groups(before, GRID, 1.0) == before


def test_a_range_that_covers_the_other_is_kept_bit_for_bit():
    wide, narrow = groups([(-2.0, 3.0), (-1.0, 2.0)])
    [merged] = merge_groups([wide, narrow], GRID, 2.0)
    assert torch.equal(merged.scale, wide.scale)
    assert torch.equal(merged.zero_point, wide.zero_point)
    assert (merged.start, merged.stop) == (0, 4)
