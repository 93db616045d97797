import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitlower.ir import Grid
from bitlower.passes.outliers._statistics import (
    ClampCount,
    Moments,
    OutlierCounts,
    SeparatorAttention,
    Tokens,
    attention_probabilities,
    most_common,
)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40_000), min_size=1, max_size=4),
    offset=st.sampled_from([0.0, -3.0, 1e4]),
    seed=st.integers(0, 99),
)
def test_moments_of_any_split_are_those_of_the_whole(sizes, offset, seed):
    parts = [torch.randn(n, generator=generator(seed + i)) ** 3 + offset for i, n in enumerate(sizes)]
    moments = Moments()
    for part in parts:
        moments.update(part)
    whole = torch.cat(parts).numpy().astype(np.float64)
    assert moments.count == whole.size
    assert (moments.minimum, moments.maximum) == (whole.min(), whole.max())
    assert moments.mean == pytest.approx(whole.mean(), rel=1e-12, abs=1e-12)
    assert moments.std == pytest.approx(whole.std(), rel=1e-9, abs=1e-12)
    if whole.std() > 0:
        assert moments.kurtosis == pytest.approx(scipy.stats.kurtosis(whole, fisher=False), rel=1e-7)


def test_moments_of_nothing_and_of_a_constant():
    moments = Moments()
    moments.update(torch.empty(0, 4))
    assert (moments.count, moments.std, moments.kurtosis) == (0, 0.0, 0.0)
    moments.update(torch.full((5, 4), 2.0))
    assert (moments.mean, moments.std, moments.kurtosis) == (2.0, 0.0, 0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_moments_show_values_that_are_not_finite(bad):
    moments = Moments()
    moments.update(torch.tensor([1.0, bad, 2.0]))
    assert not math.isfinite(moments.m4)


def test_tokens_leave_out_padding_on_either_side():
    batch = {
        "input_ids": torch.tensor([[7, 8, 0], [0, 9, 5]]),
        "attention_mask": torch.tensor([[1, 1, 0], [0, 1, 1]]),
    }
    tokens = Tokens.of(batch, first_sequence=4)
    assert tokens is not None
    assert tokens.ids.tolist() == [7, 8, 9, 5]
    assert tokens.sequence.tolist() == [4, 4, 5, 5]
    assert tokens.position.tolist() == [0, 1, 0, 1]
    rows = torch.arange(6)[:, None]
    assert tokens.select(rows).reshape(-1).tolist() == [0, 1, 4, 5]


def test_tokens_without_a_mask_or_without_ids():
    all_of_them = Tokens.of({"input_ids": torch.ones(2, 3)}, 0)
    assert all_of_them is not None
    assert all_of_them.position.tolist() == [0, 1, 2, 0, 1, 2]
    nameless = Tokens.of({"attention_mask": torch.ones(2, 3)}, 0)
    assert nameless is not None
    assert nameless.ids.numel() == 0
    assert Tokens.of({"x": torch.ones(2, 3)}, 0) is None


def test_outliers_are_counted_where_they_are():
    rows = torch.zeros(4, 5)
    rows[0, 2], rows[1, 2], rows[3, 2], rows[3, 4] = 9.0, -9.0, 9.0, 6.0
    tokens = Tokens(
        torch.ones(2, 2, dtype=torch.bool), torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1]),
        torch.tensor([11, 12, 11, 13]),
    )  # fmt: skip
    counts = OutlierCounts(mean=1.0, distance=5.0)
    counts.update(rows, tokens.sequence, tokens)
    assert counts.total == 3  # 6.0 is exactly 5 from the mean: not further
    assert dict(counts.dimensions) == {2: 3}
    assert dict(counts.sequences) == {2: 2}
    assert dict(counts.positions) == {0: 1, 1: 2}
    assert dict(counts.tokens) == {11: 1, 12: 1, 13: 1}


def test_outliers_without_tokens_have_dimensions_only():
    counts = OutlierCounts(mean=0.0, distance=1.0)
    counts.update(torch.tensor([[0.0, 2.0], [0.0, 2.0]]), torch.tensor([0, 1]), None)
    assert dict(counts.dimensions) == dict(counts.sequences) == {1: 2}
    assert not counts.positions
    assert not counts.tokens


def test_most_common_breaks_ties_by_key():
    counts = OutlierCounts(0.0, 1.0)
    counts.dimensions.update({5: 2, 3: 2, 9: 7, 1: 1})
    assert most_common(counts.dimensions, 3) == [(9, 7), (3, 2), (5, 2)]


@pytest.mark.parametrize("kind", ["none", "bool", "float", "causal", "grouped", "scaled"])
def test_probabilities_are_those_of_the_operator(kind):
    query, value = torch.randn(2, 4, 5, 8, generator=generator(0)), torch.randn(2, 4, 5, 8, generator=generator(1))
    key = torch.randn(2, 4, 5, 8, generator=generator(2))
    keep = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()[:, None, None, :]
    masks = {"bool": keep, "float": torch.where(keep, torch.randn(5, 5, generator=generator(3)), -1e9)}
    mask, causal, scale = masks.get(kind), kind == "causal", 0.3 if kind == "scaled" else None
    grouped = kind == "grouped"
    if grouped:
        key, value = key[:, :2], value[:, :2]
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )
    probs = attention_probabilities(query, key, mask, causal=causal, scale=scale)
    torch.testing.assert_close(probs @ value.repeat_interleave(2 if grouped else 1, 1), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(probs.sum(-1), torch.ones(2, 4, 5))


def test_separator_attention_by_hand():
    probs = torch.tensor([[[[0.2, 0.8], [0.6, 0.4]], [[1.0, 0.0], [0.5, 0.5]]]])  # 1 sequence, 2 heads
    value = torch.tensor([[[[3.0, 4.0], [0.0, 1.0]], [[0.0, 2.0], [0.0, 8.0]]]])
    statistics = SeparatorAttention()
    mask, separator = torch.tensor([[True, True]]), torch.tensor([[False, True]])
    statistics.update(probs, value, mask, separator)
    statistics.update(probs, value, torch.tensor([[True, False]]), torch.tensor([[False, False]]))
    (first, first_ratio), (second, second_ratio) = statistics.heads()
    assert (first, second) == pytest.approx(((0.8 + 0.4) / 3, 0.5 / 3))
    assert first_ratio == pytest.approx(1 / 5)  # norms 5, 1, 5
    assert second_ratio == pytest.approx(8 / 2)  # norms 2, 8, 2


def test_separator_attention_without_a_separator_or_data():
    assert SeparatorAttention().heads() == []
    statistics = SeparatorAttention()
    flags = torch.tensor([[True, True]])
    statistics.update(torch.full((1, 1, 2, 2), 0.5), torch.ones(1, 1, 2, 3), flags, ~flags)
    assert statistics.heads() == [(0.0, 0.0)]


def test_masked_queries_that_are_nan_do_not_count():
    probs = torch.tensor([[[[0.5, 0.5], [math.nan, math.nan]]]])
    statistics = SeparatorAttention()
    flags = torch.tensor([[True, False]])
    statistics.update(probs, torch.ones(1, 1, 2, 3), flags, flags)
    assert statistics.heads() == [(0.5, 1.0)]


@pytest.mark.parametrize("grid", [Grid(4), Grid(4, signed=False, symmetric=False)])
def test_clamped_values_are_counted(grid):
    x = torch.randn(3, 5, 8, generator=generator(5)) * 3
    keep = torch.rand(3, 5, 1, generator=generator(6)) > 0.4
    scale, zero = torch.tensor(0.37), torch.tensor(0.0 if grid.signed else 6.0)
    count = ClampCount()
    count.update(x[:1], keep[:1], grid, scale, zero)
    count.update(x[1:], keep[1:], grid, scale, zero)
    codes = np.round(x.numpy() / np.float32(0.37)) + zero.numpy()
    outside = ((codes < grid.quant_min) | (codes > grid.quant_max))[keep.squeeze(-1).numpy()]
    assert 0 < count.rate < 1
    assert count.rate == pytest.approx(outside.mean())


def test_every_value_counts_without_a_mask():
    count = ClampCount()
    assert count.rate == 0.0
    count.update(torch.tensor([1.0, 1000.0]), None, Grid(8), torch.tensor(1.0), torch.tensor(0.0))
    assert count.rate == 0.5
