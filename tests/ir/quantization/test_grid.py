"""Grids against the formulas of the papers in float64, and properties that hold for every grid and range."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bitlower.ir import BitlowerError, Grid, ScaleConvention
from bitlower.ir.quantization import numerics

CONVENTIONS = {
    ScaleConvention.QMAX: lambda absmax, b: absmax / (2 ** (b - 1) - 1),
    ScaleConvention.HALF_RANGE: lambda absmax, b: absmax / 2 ** (b - 1),
    ScaleConvention.HALF_RANGE_EPS: lambda absmax, b: (2 * absmax + 1e-5) / 2**b,
    ScaleConvention.OFFSET: lambda absmax, b: 2 * absmax / (2**b - 1),
}


def _exists(bits, signed, symmetric, restricted, convention):
    try:
        return Grid(bits, signed, symmetric, restricted, convention)
    except BitlowerError:
        return None


_ARGUMENTS = itertools.product(range(2, 17), (True, False), (True, False), (True, False), ScaleConvention)
GRIDS = [grid for arguments in _ARGUMENTS if (grid := _exists(*arguments))]
grids = st.sampled_from(GRIDS)
finite = st.floats(-(2.0**40), 2.0**40, width=32)
vectors = arrays(np.float32, st.integers(1, 20), elements=finite)


def _qparams(grid, x):
    x = torch.as_tensor(x, dtype=torch.float32)
    return grid.qparams(x.min(), x.max())


def _round_trip(grid, x):
    x = torch.as_tensor(x, dtype=torch.float32)
    scale, zero = _qparams(grid, x)
    code = numerics.codes(x, scale, zero, grid.quant_min, grid.quant_max)
    return code.double().numpy(), numerics.values(code, scale, zero).double().numpy(), float(scale), float(zero)


def _one_sided(grid):
    return grid.symmetric and not grid.signed and grid.convention is ScaleConvention.QMAX


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
def test_code_ranges(bits):
    def ends(grid):
        return grid.quant_min, grid.quant_max

    half = 2 ** (bits - 1)
    assert ends(Grid(bits)) == (-half, half - 1)
    assert ends(Grid(bits, restricted=True)) == (1 - half, half - 1)
    assert ends(Grid(bits, signed=False)) == (0, 2 * half - 1)
    assert ends(Grid(bits, signed=False, symmetric=False)) == (0, 2 * half - 1)


def test_two_restricted_bits_are_ternary():
    grid = Grid(2, restricted=True)
    assert list(range(grid.quant_min, grid.quant_max + 1)) == [-1, 0, 1]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_dtype_holds_every_code(grid):
    info = torch.iinfo(grid.dtype)
    assert info.min <= grid.quant_min
    assert grid.quant_max <= info.max
    assert info.bits == (8 if grid.bits <= 8 else 16)


@pytest.mark.parametrize("convention", ScaleConvention)
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_scale_conventions_follow_their_formulas(convention, bits):
    grid = Grid(bits, signed=convention is not ScaleConvention.OFFSET, convention=convention)
    low = np.array([-3.0, -0.25, 0.0, -1.7], np.float32)
    high = np.array([1.0, 7.5, 0.3, 1.7], np.float32)
    scale, zero = grid.qparams(torch.from_numpy(low), torch.from_numpy(high))
    expected = CONVENTIONS[convention](np.maximum(-low, high).astype(np.float64), bits)
    np.testing.assert_allclose(scale.double().numpy(), expected, rtol=2e-7)
    assert zero.tolist() == [2 ** (bits - 1) if convention is ScaleConvention.OFFSET else 0] * 4


def test_half_range_clips_the_maximum_by_one_step():
    _, values, _, _ = _round_trip(Grid(8, convention=ScaleConvention.HALF_RANGE), [1.0, -1.0])
    assert values.tolist() == [0.9921875, -1.0]


def test_offset_grid_uses_both_signs_of_absmax():
    """GPTQ's code keeps the minimum of a positive row at 0, which clips everything above 0.47 of the maximum."""
    row = np.array([0.1, 0.4, 0.5, 0.9, 1.0])
    grid = Grid(4, signed=False, convention=ScaleConvention.OFFSET)
    codes, values, scale, zero = _round_trip(grid, row)
    assert zero == 8
    assert scale == pytest.approx(2 / 15)
    assert codes.tolist() == [9, 11, 12, 15, 15]
    assert np.abs(values - row).max() <= scale / 2 * (1 + 1e-6)


def test_one_sided_grid_spends_all_codes_on_positive_values():
    codes, values, scale, zero = _round_trip(Grid(8, signed=False), [0.0, 0.5, 2.0])
    assert (codes.tolist(), zero) == ([0, 64, 255], 0)
    assert scale == pytest.approx(2 / 255)
    assert values[-1] == pytest.approx(2.0)


def test_asymmetric_scale_and_zero_point():
    scale, zero = Grid(8, signed=False, symmetric=False).qparams(torch.tensor(-1.0), torch.tensor(3.0))
    assert float(scale) == np.float32(4 / 255)
    assert float(zero) == round(255 / 4)
    scale, zero = Grid(8, signed=True, symmetric=False).qparams(torch.tensor(-1.0), torch.tensor(3.0))
    assert float(zero) == -128 + round(255 / 4)


def test_a_range_without_zero_is_widened_to_zero():
    grid = Grid(8, signed=False, symmetric=False)
    assert torch.equal(
        torch.stack(grid.qparams(torch.tensor(2.0), torch.tensor(5.0))),
        torch.stack(grid.qparams(torch.tensor(0.0), torch.tensor(5.0))),
    )
    scale, zero = grid.qparams(torch.tensor(-5.0), torch.tensor(-2.0))
    assert (float(scale), float(zero)) == (np.float32(5 / 255), 255)


@given(grids, vectors)
def test_zero_is_exact(grid, x):
    scale, zero = _qparams(grid, x)
    code = numerics.codes(torch.zeros(1), scale, zero, grid.quant_min, grid.quant_max)
    assert float(numerics.values(code, scale, zero)) == 0.0
    assert grid.quant_min <= float(zero) <= grid.quant_max
    assert float(zero) == round(float(zero))


@given(grids, vectors)
def test_codes_are_whole_numbers_in_range(grid, x):
    codes, _, scale, _ = _round_trip(grid, x)
    assert scale > 0
    assert np.isfinite(scale)
    assert (codes == np.round(codes)).all()
    assert codes.min() >= grid.quant_min
    assert codes.max() <= grid.quant_max


@given(grids, vectors)
def test_the_error_inside_the_range_is_at_most_half_a_step(grid, x):
    _, values, scale, zero = _round_trip(grid, np.abs(x) if _one_sided(grid) else x)
    x = np.abs(x.astype(np.float64)) if _one_sided(grid) else x.astype(np.float64)
    low, high = (grid.quant_min - zero - 0.5) * scale, (grid.quant_max - zero + 0.5) * scale
    inside = (x >= low) & (x <= high)
    slack = scale / 2 + 4 * np.finfo(np.float32).eps * np.abs(x)
    assert (np.abs(values - x)[inside] <= slack[inside]).all()
    if grid.convention is ScaleConvention.QMAX:
        assert ((x >= low * (1 + 1e-6)) & (x <= high * (1 + 1e-6))).all(), "no value of the range is clipped"


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_an_all_zero_range_is_safe(grid):
    codes, values, scale, zero = _round_trip(grid, [0.0, 0.0])
    assert scale == 1.0
    assert values.tolist() == [0.0, 0.0]
    assert codes.tolist() == [zero, zero]


@pytest.mark.parametrize("absmax", [1e-45, 1e-40, 1e-38, 1e-30])
@pytest.mark.parametrize("grid", [Grid(8), Grid(8, signed=False, symmetric=False), Grid(16)], ids=str)
def test_tiny_ranges_give_finite_codes(grid, absmax):
    codes, values, scale, _ = _round_trip(grid, [absmax, -absmax])
    assert scale >= np.finfo(np.float32).tiny
    assert np.isfinite(codes).all()
    assert np.abs(values - [absmax, -absmax]).max() <= scale / 2 * (1 + 1e-4)


@pytest.mark.parametrize("grid", [Grid(8), Grid(8, signed=False, symmetric=False)], ids=str)
def test_nan_is_not_hidden(grid):
    scale, _ = grid.qparams(torch.tensor([-1.0, float("nan")]), torch.tensor([1.0, 1.0]))
    assert scale.isnan().tolist() == [False, True]


def test_qparams_are_elementwise_float32():
    low, high = torch.tensor([[-1.0], [-2.0]], dtype=torch.float64), torch.tensor([[3.0], [0.5]], dtype=torch.float64)
    for grid in (Grid(8), Grid(8, signed=False), Grid(4, signed=False, symmetric=False)):
        scale, zero = grid.qparams(low, high)
        assert scale.shape == zero.shape == (2, 1)
        assert scale.dtype == zero.dtype == torch.float32
        single, _ = grid.qparams(low[1], high[1])
        assert torch.equal(scale[1], single)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"bits": 1}, "2 to 16 bits, not 1"),
        ({"bits": 17}, "2 to 16 bits, not 17"),
        ({"restricted": True, "signed": False}, "restricted"),
        ({"restricted": True, "symmetric": False}, "restricted"),
        ({"convention": ScaleConvention.OFFSET}, "unsigned codes"),
        ({"convention": ScaleConvention.OFFSET, "signed": False, "symmetric": False}, "unsigned codes"),
        ({"convention": ScaleConvention.HALF_RANGE, "symmetric": False}, "symmetric grids"),
        ({"convention": ScaleConvention.HALF_RANGE, "signed": False}, "signed codes"),
    ],
)
def test_grids_that_do_not_exist(arguments, words):
    with pytest.raises(BitlowerError, match=words):
        Grid(**arguments)


def test_grids_print_what_sets_them_apart():
    assert str(Grid(8)) == "s8"
    assert str(Grid(4, signed=False, symmetric=False)) == "u4 asymmetric"
    assert str(Grid(2, restricted=True)) == "s2 restricted"
    assert str(Grid(4, signed=False, convention=ScaleConvention.OFFSET)) == "u4 offset"
    assert len({str(grid) for grid in GRIDS}) == len(GRIDS)


@given(grids)
def test_the_text_of_a_grid_is_read_back(grid):
    assert Grid.parse(str(grid)) == grid


@pytest.mark.parametrize(
    "text", ["", "8", "s", "i8", "s8 qmax", "s8  asymmetric", "u8 restricted", "s99", "s8 offset", "x s8"]
)
def test_what_is_no_grid_is_refused(text):
    with pytest.raises(BitlowerError):
        Grid.parse(text)
