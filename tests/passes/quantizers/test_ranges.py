"""Range estimators against numpy, scipy and their own promise: never worse than min–max."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from bitlower.ir import Grid
from bitlower.ir.quantization.ranges import Histogram, cross_entropy_loss, exact_loss, search_golden, search_grid

GRIDS = [
    Grid(8),
    Grid(4),
    Grid(2, restricted=True),
    Grid(8, signed=False, symmetric=False),
    Grid(3, signed=False, symmetric=False),
]
SEARCHES = [search_grid, search_golden]


def sample(kind: str, scales: int = 3, size: int = 400, seed: int = 0) -> torch.Tensor:
    generator = np.random.default_rng(seed)
    rows = {
        "normal": lambda: generator.standard_normal((scales, size)),
        "heavy": lambda: generator.standard_t(2, (scales, size)),
        "positive": lambda: generator.gamma(1.5, 1.0, (scales, size)),
        "skewed": lambda: generator.standard_normal((scales, size)) + 2.0,
        "zero": lambda: np.zeros((scales, size)),
    }[kind]()
    return torch.tensor(rows, dtype=torch.float32)


def squared_error(rows: torch.Tensor, grid: Grid, low: torch.Tensor, high: torch.Tensor) -> np.ndarray:
    """The error of a uniform grid in numpy, a scale a row."""
    scale, zero = (part.numpy().astype(np.float64)[:, None] for part in grid.qparams(low, high))
    values = rows.numpy().astype(np.float64)
    codes = np.clip(np.rint(values / scale) + zero, grid.quant_min, grid.quant_max)
    return ((values - (codes - zero) * scale) ** 2).sum(1)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("kind", ["normal", "heavy", "positive"])
def test_the_loss_is_the_squared_error(grid: Grid, kind: str) -> None:
    rows = sample(kind)
    low, high = rows.aminmax(dim=1)
    for factor in (1.0, 0.7, 0.2):
        ends = low * factor, high * factor
        np.testing.assert_allclose(exact_loss(rows, grid)(*ends), squared_error(rows, grid, *ends), rtol=1e-4)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@settings(max_examples=15)
@given(st.sampled_from(["normal", "heavy", "positive", "skewed", "zero"]), st.integers(0, 10**6))
def test_a_searched_range_is_never_worse_than_min_max(search, grid: Grid, kind: str, seed: int) -> None:
    """For each scale by itself, and exactly: min–max is one of the candidates."""
    rows = sample(kind, scales=4, size=60, seed=seed)
    loss, (low, high) = exact_loss(rows, grid), rows.aminmax(dim=1)
    ends = search(loss, low, high, two_sided=not grid.symmetric)
    assert bool((loss(*ends) <= loss(low, high)).all())


@pytest.mark.parametrize("search", SEARCHES)
@settings(max_examples=25)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20), st.booleans())
def test_any_values_give_a_range_inside_their_own(search, values: list[float], symmetric: bool) -> None:
    rows = torch.tensor([values])
    grid = Grid(4) if symmetric else Grid(4, signed=False, symmetric=False)
    low, high = rows.aminmax(dim=1)
    found_low, found_high = search(exact_loss(rows, grid), low, high, two_sided=not symmetric)
    assert bool((found_low.abs() <= low.abs()).all())
    assert bool((found_high.abs() <= high.abs()).all())
    assert bool(torch.isfinite(torch.stack([found_low, found_high])).all())


@pytest.mark.parametrize("kind", ["normal", "heavy", "skewed"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_golden_search_is_as_good_as_scipys(kind: str, bits: int) -> None:
    """On the same loss, the shrink factor that scipy's bounded minimizer finds is at most 1 % better."""
    rows, grid = sample(kind, scales=1), Grid(bits)
    loss, (low, high) = exact_loss(rows, grid), rows.aminmax(dim=1)
    found = float(loss(*search_golden(loss, low, high, two_sided=False)))
    best = minimize_scalar(lambda c: float(loss(low * c, high * c)), bounds=(0.01, 1.0), method="bounded")
    assert found <= 1.01 * best.fun


@pytest.mark.parametrize("kind", ["normal", "heavy"])
@pytest.mark.parametrize("bits", [3, 4])
def test_the_grid_search_is_near_the_best_of_a_fine_scan(kind: str, bits: int) -> None:
    rows, grid = sample(kind, scales=1, size=2000), Grid(bits)
    loss, (low, high) = exact_loss(rows, grid), rows.aminmax(dim=1)
    found = float(loss(*search_grid(loss, low, high, two_sided=False)))
    finest = min(float(squared_error(rows, grid, low * c, high * c)[0]) for c in np.linspace(0.01, 1, 1000))
    assert found <= 1.05 * finest


def test_searching_helps_where_there_are_outliers() -> None:
    rows = torch.cat([sample("normal", size=2000), torch.tensor([[-9.0, 9.0]]).expand(3, -1)], 1)
    for grid in (Grid(4), Grid(4, signed=False, symmetric=False)):
        loss, (low, high) = exact_loss(rows, grid), rows.aminmax(dim=1)
        for search in SEARCHES:
            assert bool((loss(*search(loss, low, high, two_sided=not grid.symmetric)) < 0.7 * loss(low, high)).all())


def test_each_end_is_searched_by_itself_where_the_grid_has_a_zero_point() -> None:
    """One outlier on one side: only that end moves in."""
    rows = torch.cat([torch.linspace(-1, 1, 500), torch.tensor([30.0])])[None]
    grid = Grid(4, signed=False, symmetric=False)
    loss, (low, high) = exact_loss(rows, grid), rows.aminmax(dim=1)
    shared = search_grid(loss, low, high, two_sided=False)
    found = search_grid(loss, low, high, two_sided=True)
    assert float(loss(*found)) < float(loss(*shared))
    assert float(found[0]) < -0.5
    assert float(found[1]) < 30.0


@pytest.mark.parametrize("search", SEARCHES)
def test_a_one_sided_range_stays_one_sided(search) -> None:
    rows = sample("positive").abs()
    grid = Grid(4, signed=False, symmetric=False)
    low, high = search(exact_loss(rows, grid), torch.zeros(3), rows.amax(1), two_sided=True)
    assert torch.equal(low, torch.zeros(3))
    assert bool((high > 0).all())


def test_scales_are_searched_independently() -> None:
    rows = torch.cat([sample("normal", 1), sample("heavy", 1), sample("positive", 1)])
    grid = Grid(4)
    low, high = rows.aminmax(dim=1)
    together = search_golden(exact_loss(rows, grid), low, high, two_sided=False)
    for i in range(3):
        one = slice(i, i + 1)
        alone = search_golden(exact_loss(rows[one], grid), low[one], high[one], two_sided=False)
        torch.testing.assert_close(torch.stack(alone), torch.stack([end[one] for end in together]), atol=0, rtol=1e-4)


def test_histogram_counts_are_numpys() -> None:
    """Away from bin edges the counts agree; in all, every value is counted once."""
    rows = sample("normal", scales=2, size=5000)
    low, high = rows.aminmax(dim=1)
    histogram = Histogram.empty(low, high, 32)
    for part in rows.split(1300, dim=1):
        histogram = histogram.add(part)
    for i in range(2):
        expected, _ = np.histogram(rows[i].double().numpy(), bins=32, range=(float(low[i]), float(high[i])))
        assert np.abs(histogram.counts[i].numpy() - expected).sum() <= 4
    assert torch.equal(histogram.counts.sum(1), torch.full((2,), 5000.0, dtype=torch.float64))


@settings(max_examples=30)
@given(st.integers(0, 30), st.integers(2, 64), st.integers(0, 10**6))
def test_padding_zeros_are_not_counted(padding: int, bins: int, seed: int) -> None:
    rows = sample("skewed", scales=2, size=50, seed=seed)
    low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    padded = torch.cat([rows, torch.zeros(2, padding)], 1)
    plain = Histogram.empty(low, high, bins).add(rows)
    assert torch.equal(Histogram.empty(low, high, bins).add(padded, zeros=padding).counts, plain.counts)


@pytest.mark.parametrize("kind", ["normal", "heavy", "positive"])
@pytest.mark.parametrize("percent", [99.0, 99.9, 100.0])
def test_percentiles_agree_with_numpy_within_a_bin(kind: str, percent: float) -> None:
    rows = sample(kind, scales=2, size=20_000)
    low, high = rows.aminmax(dim=1)
    histogram = Histogram.empty(low, high, 4096).add(rows)
    found = torch.stack(histogram.percentile(percent), 1).numpy()
    expected = np.percentile(rows.double().numpy(), [100 - percent, percent], axis=1, method="inverted_cdf").T
    width = ((high - low) / 4096).numpy()[:, None]
    assert (np.abs(found - expected) <= 1.01 * width).all()


def test_all_equal_values_make_a_histogram_too() -> None:
    rows = torch.full((1, 10), 3.0)
    histogram = Histogram.empty(rows[:, 0], rows[:, 0], 16).add(rows)
    assert float(histogram.counts.sum()) == 10
    assert [float(end) for end in histogram.percentile(99.0)] == [3.0, 3.0]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_loss_of_a_histogram_comes_near_the_exact_one(grid: Grid) -> None:
    rows = sample("normal", size=4000)
    low, high = rows.amin(1), rows.amax(1)
    histogram = Histogram.empty(low, high, 4096).add(rows)
    for factor in (1.0, 0.6):
        ends = low * factor, high * factor
        np.testing.assert_allclose(histogram.loss(grid)(*ends), exact_loss(rows, grid)(*ends), rtol=0.05)


def test_the_cross_entropy_is_that_of_the_softmaxes() -> None:
    logits = torch.tensor(np.random.default_rng(0).normal(0, 3, (20, 4)), dtype=torch.float32)
    grid = Grid(4, signed=False, symmetric=False)
    low, high = logits.min().reshape(1), logits.max().reshape(1)
    scale, zero = (float(part) for part in grid.qparams(low, high))
    values = logits.double().numpy()
    rounded = (np.clip(np.rint(values / scale) + zero, 0, 15) - zero) * scale
    target = np.exp(values) / np.exp(values).sum(1, keepdims=True)
    expected = -(target * (rounded - np.log(np.exp(rounded).sum(1, keepdims=True)))).sum()
    assert float(cross_entropy_loss(logits, grid)(low, high)) == pytest.approx(expected, rel=1e-5)


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.sampled_from([2, 3, 4, 8]), st.integers(1, 5))
def test_cross_entropy_ranges_are_never_worse_than_min_max(seed: int, bits: int, classes: int) -> None:
    logits = torch.tensor(np.random.default_rng(seed).standard_t(2, (12, classes)), dtype=torch.float32)
    loss = cross_entropy_loss(logits, Grid(bits, signed=False, symmetric=False))
    low, high = logits.min().reshape(1), logits.max().reshape(1)
    assert bool(loss(*search_grid(loss, low, high, two_sided=True)) <= loss(low, high))


@pytest.mark.parametrize("at", [0.38, 0.62])
def test_the_first_two_points_of_a_golden_section_may_be_the_best(at: float) -> None:
    """Losses of rounding are jagged: a dip at a point that was tried counts, whatever lies around it."""
    golden = (math.sqrt(5) - 1) / 2
    left, right = torch.full((1,), 0.01), torch.ones(1)
    first, second = right - golden * (right - left), left + golden * (right - left)
    dip = min((first, second), key=lambda point: abs(float(point) - at))

    def loss(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        return torch.where(high == dip, 0.0, 1 + high)

    low, high = search_golden(loss, -right, right, two_sided=False)
    assert (float(low), float(high)) == (-float(dip), float(dip))
