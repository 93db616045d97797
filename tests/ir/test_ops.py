"""The custom operators: values, gradients against autograd through the written-out formula, shape functions."""

import pytest
import torch

from bitlower.ir import Granularity, Grid, ScaleConvention, ops
from bitlower.ir.quantization import numerics
from bitlower.ir.storage import spill

LAYOUTS = [(), (1, 1, 1), (3, 1, 1), (1, 4, 1), (1, 1, 8), (1, 1, 2), (3, 2, 4), (3, 4, 8)]
SHAPE = (3, 4, 8)
CODE_TYPES = {"int8": (-128, 127), "uint8": (0, 255), "int16": (-32768, 32767), "uint16": (0, 65535)}


def _case(layout, dtype=torch.float32, low=0, high=15):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(SHAPE, generator=generator, dtype=dtype) * 3
    scale = torch.rand(layout, generator=generator, dtype=dtype) + 0.1
    zero = torch.randint(low, high, layout, generator=generator).to(dtype)
    return x, scale, zero


def _straight_through(value):
    return value + (torch.round(value) - value).detach()


def _spread(scale):
    """A scale in the shape of the tensor, by repeating."""
    if scale.dim() == 0:
        return scale.expand(SHAPE)
    for axis, size in enumerate(SHAPE):
        scale = scale.repeat_interleave(size // scale.shape[axis], axis)
    return scale


def _written_out(x, scale, zero, quant_min, quant_max):
    s, z = _spread(scale), _spread(_straight_through(zero))
    return s * (torch.clamp(_straight_through(x / s) + z, quant_min, quant_max) - z)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_gradients_equal_autograd_through_the_formula(layout):
    arguments = [a.requires_grad_() for a in _case(layout, torch.float64)]
    weight = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    expected_value = _written_out(*arguments, 4, 11)
    expected = torch.autograd.grad((expected_value * weight).sum(), arguments)
    value = ops.fake_quantize(*arguments, 4, 11)
    actual = torch.autograd.grad((value * weight).sum(), arguments)
    assert torch.allclose(value, expected_value, rtol=1e-12)
    clipped = (expected[0] == 0).double().mean()
    assert 0.05 < clipped < 0.95, "both cases occur"
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.shape == theirs.shape
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_gradient_at_the_ends_of_the_range():
    """Values that land on the last code are inside; those that are clamped are not (the scale sees the limit)."""
    x = torch.tensor([-9.0, -8.4, 0.3, 7.4, 7.6, 30.0], requires_grad=True)
    scale = torch.tensor(1.0, requires_grad=True)
    ops.fake_quantize(x, scale, torch.tensor(0.0), -8, 7).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0, 0]
    inside = (-8 + 8.4) + (0 - 0.3) + (7 - 7.4)
    assert scale.grad.item() == pytest.approx(-8 + inside + 7 + 7, abs=1e-5)


def test_a_zero_point_between_codes_is_rounded():
    x, scale = torch.linspace(-1, 1, 9), torch.tensor(0.25)
    assert torch.equal(
        ops.fake_quantize(x, scale, torch.tensor(7.3), 0, 15), ops.fake_quantize(x, scale, torch.tensor(7.0), 0, 15)
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_dequantize_gradients(layout):
    _, scale, zero = _case(layout, torch.float64)
    code = torch.randint(0, 255, SHAPE, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    scale, zero = scale.float().requires_grad_(), zero.float().requires_grad_()
    expected = torch.autograd.grad((_spread(scale) * (code - _spread(zero)) * weight).sum(), (scale, zero))
    actual = torch.autograd.grad((ops.dequantize(code, scale, zero) * weight).sum(), (scale, zero))
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("layout", [(), (3, 1, 1)], ids=str)
@pytest.mark.parametrize("fill", [0.0, 0.1])
def test_an_uncalibrated_quantizer_lets_values_and_gradients_through(layout, fill):
    x = torch.randn(SHAPE, requires_grad=True)
    y = ops.fake_quantize(x, torch.full(layout, fill), torch.zeros(layout), 0, 255, calibrated=False)
    assert torch.equal(y, x)
    assert y.data_ptr() != x.data_ptr()
    y.backward(torch.full(SHAPE, 2.0))
    assert torch.equal(x.grad, torch.full(SHAPE, 2.0))


def test_a_scale_of_nan_gives_nan():
    nan = torch.tensor(float("nan"))
    assert ops.fake_quantize(torch.ones(2), nan, torch.tensor(0.0), 0, 255).isnan().all()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", CODE_TYPES)
def test_quantize_then_dequantize_is_fake_quantize(dtype, layout):
    low, high = CODE_TYPES[dtype]
    x, scale, zero = _case(layout, low=max(low, -20), high=20)
    code = ops.quantize(x, scale, zero, low, high, dtype)
    assert code.dtype == ops.DTYPES[dtype]
    assert torch.equal(ops.dequantize(code, scale, zero), ops.fake_quantize(x, scale, zero, low, high))


@pytest.mark.parametrize("dtype", CODE_TYPES)
def test_both_ends_of_every_dtype(dtype):
    low, high = CODE_TYPES[dtype]
    code = ops.quantize(torch.tensor([-1e9, 0.0, 1e9]), torch.tensor(1.0), torch.tensor(0.0), low, high, dtype)
    assert code.tolist() == [low, 0, high]
    assert ops.dequantize(code, torch.tensor(1.0), torch.tensor(0.0)).tolist() == [low, 0, high]


GRIDS = [
    Grid(8),
    Grid(4, signed=False, symmetric=False),
    Grid(8, restricted=True),
    Grid(8, convention=ScaleConvention.HALF_RANGE),
    Grid(4, signed=False, convention=ScaleConvention.OFFSET),
]


def _per_token(x, grid):
    return ops.choose_qparams(x, grid.bits, grid.signed, grid.symmetric, grid.restricted, str(grid.convention))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_choose_qparams_looks_at_one_token_at_a_time(grid):
    x = _case(())[0]
    x[1, 2] = 0.0
    scale, zero = _per_token(x, grid)
    assert scale.shape == zero.shape == (3, 4, 1)
    for index in [(0, 0), (1, 2), (2, 3)]:
        token = x[index]
        expected = grid.qparams(token.min(), token.max())
        assert (scale[index].item(), zero[index].item()) == (expected[0].item(), expected[1].item())


def test_a_dynamic_quantizer_is_differentiable():
    x = torch.randn(SHAPE, requires_grad=True, generator=torch.Generator().manual_seed(0))
    scale, zero = _per_token(x, Grid(8, signed=False, symmetric=False))
    ops.fake_quantize(x, scale, zero, 0, 255).sum().backward()
    assert torch.equal(x.grad, torch.ones(SHAPE))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("layout", [(), (3, 1, 1), (1, 1, 2)], ids=str)
def test_operators_are_well_formed(layout, transposed):
    """torch's own check: schema, autograd registration, FakeTensor against real results, tracing with any shape."""
    x, scale, zero = _case(layout)
    x = x.transpose(0, 1).contiguous().transpose(0, 1) if transposed else x
    torch.library.opcheck(ops.fake_quantize, (x.requires_grad_(), scale.requires_grad_(), zero, 0, 15))
    torch.library.opcheck(ops.quantize, (x.detach(), scale.detach(), zero, 0, 15, "uint8"))
    code = ops.quantize(x.detach(), scale.detach(), zero, 0, 15, "uint8")
    torch.library.opcheck(ops.dequantize, (code, scale, zero))
    torch.library.opcheck(ops.choose_qparams, (x, 8, False, False, False, "qmax"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", [(), (3, 1, 1)], ids=str)
def test_shape_functions_know_the_dtype(dtype, layout):
    x, scale, zero = _case(layout)
    torch.library.opcheck(ops.fake_quantize, (x.to(dtype), scale, zero, 0, 15), test_utils="test_faketensor")


def test_operators_survive_export():
    class Quantized(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scale, zero = ops.choose_qparams(x, 8, False, False, False, "qmax")
            code = ops.quantize(x, scale, zero, 0, 255, "uint8")
            return ops.dequantize(code, scale, zero) + ops.fake_quantize(x, torch.tensor(0.1), torch.tensor(0.0), -8, 7)

    x = _case(())[0]
    exported = torch.export.export(
        Quantized(), (x,), dynamic_shapes=({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},), strict=False
    )
    other = torch.randn(5, 7, 8)
    assert torch.equal(exported.module()(other), Quantized()(other))
    names = {str(n.target) for n in exported.graph.nodes if n.op == "call_function"}
    assert {f"bitlower.{n}.default" for n in ("choose_qparams", "quantize", "dequantize", "fake_quantize")} <= names


def test_row_groups_factor_out_of_an_integer_matmul():
    """Y = diag(s_token) · (X_q · W_qᵀ) · diag(s_row) with int32 sums equals the fake-quantized product."""
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(5, 64, generator=generator), torch.randn(12, 64, generator=generator)
    grid = Grid(8, restricted=True)
    x_scale, x_zero = grid.qparams(*Granularity.per_token().range_of(x))
    w_scale, w_zero = grid.qparams(*Granularity.row_group(4).range_of(w))
    x_code = numerics.codes(x, x_scale, x_zero, -127, 127).int()
    w_code = numerics.codes(w, w_scale, w_zero, -127, 127).int()
    rows = w_scale.repeat_interleave(3, 0).double().T
    integer = x_scale.double() * (x_code @ w_code.T).double() * rows
    simulated = (
        numerics.fake(x, x_scale, x_zero, -127, 127).double() @ numerics.fake(w, w_scale, w_zero, -127, 127).double().T
    )
    torch.testing.assert_close(integer, simulated, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_matrix_in_a_file_is_rounded_in_parts_to_the_same_bits(layout, monkeypatch):
    monkeypatch.setattr("bitlower.ir.quantization.by_rows.PART", 40)  # two of three rows hold more
    taken = []
    fake = numerics.fake
    monkeypatch.setattr(numerics, "fake", lambda x, *args: taken.append(len(x)) or fake(x, *args))
    x, scale, zero = _case(layout)
    rounded = ops.fake_quantize(x, scale, zero, 0, 15)
    taken.clear()
    assert torch.equal(ops.fake_quantize(spill(x), scale, zero, 0, 15), rounded)
    assert taken == [1, 1, 1]
    assert torch.equal(
        ops.quantize(spill(x), scale, zero, 0, 15, "uint8"), ops.quantize(x, scale, zero, 0, 15, "uint8")
    )
    codes = torch.randint(0, 15, SHAPE, dtype=torch.uint8)
    assert torch.equal(ops.dequantize(spill(codes), scale, zero), ops.dequantize(codes, scale, zero))


def test_scales_of_several_rows_are_not_cut(monkeypatch):
    monkeypatch.setattr("bitlower.ir.quantization.by_rows.PART", 16)
    x, scale, zero = torch.randn(4, 8), torch.rand(2, 1) + 0.1, torch.zeros(2, 1)
    assert torch.equal(ops.fake_quantize(spill(x), scale, zero, -8, 7), ops.fake_quantize(x, scale, zero, -8, 7))
