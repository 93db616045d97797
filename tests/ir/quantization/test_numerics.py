"""The one implementation of rounding: against numpy, and against onnxruntime bit for bit."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import TensorProto, helper

from bitlower.ir import BitlowerError
from bitlower.ir.quantization import numerics

DTYPES = {
    "uint8": (TensorProto.UINT8, np.uint8),
    "int8": (TensorProto.INT8, np.int8),
    "uint16": (TensorProto.UINT16, np.uint16),
    "int16": (TensorProto.INT16, np.int16),
}


def _onnxruntime(x, scale, zero, dtype, axis, size):
    """Codes and real values by QuantizeLinear and DequantizeLinear (opset 21) on the CPU."""
    kind, numpy_type = DTYPES[dtype]
    attributes = {} if axis is None else {"axis": axis} | ({"block_size": size} if size else {})
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["codes"], **attributes),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["values"], **attributes),
    ]
    graph = helper.make_graph(
        nodes,
        "rounding",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [
            helper.make_tensor_value_info("codes", kind, x.shape),
            helper.make_tensor_value_info("values", TensorProto.FLOAT, x.shape),
        ],
        [onnx.numpy_helper.from_array(scale, "scale"), onnx.numpy_helper.from_array(zero.astype(numpy_type), "zero")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})


LAYOUTS = {
    "per-tensor": ((), None, 0),
    "per-axis-0": ((6, 1), 0, 0),
    "per-axis-1": ((1, 16), 1, 0),
    "blocks-of-4": ((6, 4), 1, 4),
    "blocks-of-16": ((6, 1), 1, 16),
    "blocks-of-rows": ((2, 16), 0, 3),
}


def _ties_and_noise(scale, info):
    """Random values, exact ties, and values beyond both ends, in the shape (6, 16)."""
    random = np.random.default_rng(0)
    spread = np.float32((info.max - info.min) / 2)
    x = (random.standard_normal((6, 16)) * spread).astype(np.float32)
    x[1] = random.integers(-100, 100, 16) + 0.5
    x[2] = random.integers(-3, 3, 16) + 0.5
    x[3, :4] = [4 * spread, -4 * spread, 0.0, -0.0]
    return (x * np.broadcast_to(scale, (6, 16))).astype(np.float32)


@pytest.mark.parametrize("power_of_two", [True, False], ids=["exact-ties", "any-scale"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_and_values_equal_onnxruntime(dtype, layout, power_of_two):
    shape, axis, size = LAYOUTS[layout]
    info = np.iinfo(DTYPES[dtype][1])
    random = np.random.default_rng(7)
    exponents = random.integers(-6, 3, shape)
    scale = np.exp2(exponents).astype(np.float32) if power_of_two else random.uniform(1e-3, 2, shape).astype(np.float32)
    zero = random.integers(max(info.min, -200), min(info.max, 200), shape).astype(np.float32)
    spread = scale if not size else np.repeat(scale, size, axis)
    x = _ties_and_noise(spread, info)

    onnx_scale, onnx_zero = (scale, zero) if size or axis is None else (scale.reshape(-1), zero.reshape(-1))
    expected_codes, expected_values = _onnxruntime(x, np.asarray(onnx_scale), np.asarray(onnx_zero), dtype, axis, size)
    s, z = torch.tensor(scale), torch.tensor(zero)
    codes = numerics.codes(torch.from_numpy(x), s, z, int(info.min), int(info.max))
    np.testing.assert_array_equal(codes.numpy(), expected_codes.astype(np.float32))
    np.testing.assert_array_equal(numerics.values(codes, s, z).numpy(), expected_values)


def test_halves_go_to_even():
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    codes = numerics.codes(x, torch.tensor(1.0), torch.tensor(0.0), -8, 7)
    assert codes.tolist() == [-2, -2, 0, 0, 2, 2]


def test_division_is_true():
    """At s · (k + 1/2) the quotient is a tie; the product with the reciprocal often lies beside it."""
    scale = torch.tensor(0.3)
    x = scale * torch.arange(0.5, 256, 1)
    divided, multiplied = torch.round(x / scale), torch.round(x * (1 / scale))
    assert not torch.equal(divided, multiplied), "the example tells the two apart"
    assert torch.equal(numerics.codes(x, scale, torch.tensor(0.0), 0, 255), divided.clamp(0, 255))


arguments = st.tuples(
    arrays(np.float32, (4, 6), elements=st.floats(-1000, 1000, width=32)),
    st.sampled_from([(), (1, 1), (4, 1), (1, 6), (4, 6), (2, 1), (1, 3), (2, 3), (4, 2)]),
    st.integers(0, 2**31),
)


def _scales(shape, seed):
    random = np.random.default_rng(seed)
    scale = random.uniform(1e-3, 10, shape).astype(np.float32)
    return scale, random.integers(0, 255, shape).astype(np.float32)


def _at(scale, index, shape):
    """The entry of ``scale`` for the element ``index`` of a tensor of ``shape``, by the definition."""
    if scale.ndim == 0:
        return scale[()]
    return scale[tuple(i * s // n for i, s, n in zip(index, scale.shape, shape, strict=True))]


@given(arguments)
def test_blocks_are_broadcast_as_explicit_loops_do(drawn):
    x, shape, seed = drawn
    scale, zero = _scales(shape, seed)
    codes, values = np.empty_like(x), np.empty_like(x)
    for index in np.ndindex(x.shape):
        s, z = _at(scale, index, x.shape), _at(zero, index, x.shape)
        codes[index] = np.clip(np.rint(x[index] / s) + z, 0, 255)
        values[index] = (codes[index] - z) * s
    tensors = torch.tensor(scale), torch.tensor(zero)
    actual = numerics.codes(torch.from_numpy(x), *tensors, 0, 255)
    np.testing.assert_array_equal(actual.numpy(), codes)
    np.testing.assert_array_equal(numerics.values(actual, *tensors).numpy(), values)


@given(arguments)
def test_fake_is_quantize_then_dequantize_bit_for_bit(drawn):
    x, shape, seed = drawn
    scale, zero = map(torch.tensor, _scales(shape, seed))
    x = torch.from_numpy(x)
    two_steps = numerics.values(numerics.codes(x, scale, zero, 0, 255), scale, zero)
    assert torch.equal(numerics.fake(x, scale, zero, 0, 255), two_steps)


@given(arguments)
def test_rounding_twice_changes_nothing(drawn):
    x, shape, seed = drawn
    scale, zero = map(torch.tensor, _scales(shape, seed))
    once = numerics.fake(torch.from_numpy(x), scale, zero, 0, 255)
    assert torch.equal(numerics.fake(once, scale, zero, 0, 255), once)


@pytest.mark.parametrize("layout", [(), (4, 1), (2, 3)])
def test_the_input_is_not_written_to(layout):
    x = torch.randn(4, 6)
    before = x.clone()
    scale, zero = torch.full(layout, 0.1), torch.zeros(layout)
    code = numerics.codes(x, scale, zero, -8, 7)
    kept = code.clone()
    numerics.fake(x, scale, zero, -8, 7)
    numerics.values(code, scale, zero)
    assert torch.equal(x, before)
    assert torch.equal(code, kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", [(), (4, 1)])
def test_half_precision_is_rounded_in_float32(dtype, layout):
    x = torch.linspace(-1, 1, 24, dtype=dtype).reshape(4, 6)
    scale, zero = torch.full(layout, 2**-12), torch.full(layout, 40000.0)
    codes = numerics.codes(x, scale, zero, 0, 65535)
    assert codes.dtype == torch.float32
    assert torch.equal(codes, numerics.codes(x.float(), scale, zero, 0, 65535))
    assert numerics.fake(x, scale, zero, 0, 65535).dtype == dtype


def test_infinities_are_clamped():
    x = torch.tensor([float("inf"), float("-inf")])
    assert numerics.codes(x, torch.tensor(0.5), torch.tensor(3.0), 0, 255).tolist() == [255, 0]


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.float32])
def test_values_takes_any_integer_dtype(dtype):
    code = torch.tensor([0, 1, 120]).to(dtype)
    values = numerics.values(code, torch.tensor(0.5), torch.tensor(100.0))
    assert values.dtype == torch.float32
    assert values.tolist() == [-50.0, -49.5, 10.0]


def test_sum_like_scale_undoes_the_broadcast():
    gradient = torch.arange(24.0).reshape(4, 6)
    assert numerics.sum_like_scale(gradient, torch.tensor(1.0)) == gradient.sum()
    assert torch.equal(numerics.sum_like_scale(gradient, torch.ones(4, 1)), gradient.sum(1, keepdim=True))
    blocks = numerics.sum_like_scale(gradient, torch.ones(2, 3))
    assert blocks[1, 2] == gradient[2:4, 4:6].sum()


def test_a_scale_of_another_shape_is_an_error():
    with pytest.raises(BitlowerError, match=r"scale of shape \[5, 1\] does not fit a tensor of shape \[4, 6\]"):
        numerics.codes(torch.zeros(4, 6), torch.ones(5, 1), torch.zeros(5, 1), 0, 255)


def test_codes_in_float32_are_left_as_they_are() -> None:
    codes, scale, zero = torch.arange(8.0).reshape(2, 4), torch.tensor([[2.0], [3.0]]), torch.tensor([[1.0], [0.0]])
    values = numerics.values(codes, scale, zero)
    assert values.tolist() == [[-2.0, 0.0, 2.0, 4.0], [12.0, 15.0, 18.0, 21.0]]
    assert codes.flatten().tolist() == list(range(8))
