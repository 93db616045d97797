"""Orders of channels: ascending ranges, and outliers set apart; the error of per-embedding groups as numpy finds it."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitlower.ir import Granularity, Grid
from bitlower.ir.quantization import numerics
from bitlower.passes.outliers._channel_statistics import ChannelStatistics
from bitlower.passes.outliers._orders import grouped_order, predicted_error, range_order

GRID = Grid(8, signed=False, symmetric=False)


def statistics(rows: torch.Tensor) -> ChannelStatistics:
    found = ChannelStatistics(rows[0], rows[0], torch.zeros(rows.shape[1], dtype=torch.float64))
    found.add(rows)
    return found


def planted(seed: int, channels: int = 768, outliers: int = 12, gain: float = 20.0) -> torch.Tensor:
    """Tokens of Gaussian channels of unlike widths; some channels are ``gain`` times as wide."""
    generator = torch.Generator().manual_seed(seed)
    widths = 0.5 + torch.rand(channels, generator=generator)
    widths[torch.randperm(channels, generator=generator)[:outliers]] *= gain
    return torch.randn(512, channels, generator=generator) * widths


def squared_error(rows: torch.Tensor, granularity: Granularity) -> float:
    scale, zero = GRID.qparams(*granularity.range_of(rows))
    rounded = numerics.fake(rows, scale, zero, GRID.quant_min, GRID.quant_max)
    return float((rounded - rows).double().square().mean())


def test_ranges_ascend() -> None:
    rows = planted(0)
    order = range_order([statistics(rows)])
    ranges = np.ptp(rows.numpy(), 0)
    np.testing.assert_array_equal(np.sort(ranges), ranges[order.numpy()])
    assert order.dtype == torch.int64


def test_tensors_of_other_sizes_count_alike() -> None:
    """A tensor that is a thousand times larger does not own the common order."""
    small, large = planted(1, 64, 2), planted(2, 64, 2)
    order = range_order([statistics(small), statistics(1000 * large)])
    assert torch.equal(order, range_order([statistics(1000 * small), statistics(large)]))
    assert set(order[-4:].tolist()) == {*small.std(0).topk(2).indices.tolist(), *large.std(0).topk(2).indices.tolist()}


def test_permuted_groups_err_less_than_groups_and_these_less_than_a_tensor() -> None:
    """Invariant of the paper's §4, as a statistic over planted outliers."""
    for seed in range(5):
        rows = planted(seed)
        order = range_order([statistics(rows)])
        errors = [
            squared_error(rows[:, order], Granularity.per_embedding_group(6)),
            squared_error(rows, Granularity.per_embedding_group(6)),
            squared_error(rows, Granularity.per_tensor()),
        ]
        assert errors == sorted(errors)
        assert errors[0] < 0.8 * errors[1] < 0.8 * errors[2]


def test_one_group_is_per_tensor_and_as_many_as_channels_is_per_embedding() -> None:
    rows = planted(0, 64, 2)
    assert squared_error(rows, Granularity.per_embedding_group(1)) == squared_error(rows, Granularity.per_tensor())
    assert squared_error(rows, Granularity.per_embedding_group(64)) == squared_error(rows, Granularity.per_embedding())


def test_outliers_that_drown_their_group_are_set_apart() -> None:
    """A channel so wide that the rest of its group rounds to zero: it is then the narrowest channels that are lost."""
    rows = planted(3, 96, 1, gain=1e4)
    seen = [statistics(rows)]
    ascending, apart = range_order(seen), grouped_order(seen, 6, 8)
    assert apart[-1] == ascending[-1]
    assert set(apart[-16:-1].tolist()) == set(ascending[:15].tolist())
    errors = []
    for order in (ascending, apart):
        scale, zero = GRID.qparams(*Granularity.per_embedding_group(6).range_of(rows[:, order]))
        rounded = numerics.fake(rows[:, order], scale, zero, GRID.quant_min, GRID.quant_max)
        errors.append(float((rounded - rows[:, order])[:, :-1].square().mean()))
    assert errors[1] < 0.7 * errors[0]


def test_mild_ranges_stay_ascending() -> None:
    seen = [statistics(planted(0, 96, 0))]
    assert torch.equal(grouped_order(seen, 6, 8), range_order(seen))


@given(st.integers(0, 100), st.sampled_from([1, 2, 3, 6]), st.sampled_from([1.0, 30.0, 1e4]))
def test_a_grouped_order_is_a_permutation_and_predicted_no_worse(seed: int, groups: int, gain: float) -> None:
    seen = [statistics(planted(seed, 24, 3, gain)), statistics(planted(seed + 1, 24, 1, gain))]
    order = grouped_order(seen, groups, 8)
    assert order.sort().values.tolist() == list(range(24))
    assert predicted_error(seen, order, groups, 8) <= predicted_error(seen, range_order(seen), groups, 8)


def test_the_predicted_error_is_what_rounding_gives() -> None:
    rows = planted(4, 96, 2, gain=100.0)
    order = range_order([statistics(rows)])
    predicted = np.exp(predicted_error([statistics(rows)], order, 6, 8)) / 96
    measured = squared_error(rows[:, order], Granularity.per_embedding_group(6))
    assert 0.8 < predicted / measured < 1.25
