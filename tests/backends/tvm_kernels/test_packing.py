"""Packed weights: an exact inverse, for any grid, shape and layout, and the words that a kernel expects."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitlower.backends.tvm_kernels import Layout, LinearSpec, arguments, pack_linear, pack_vector, unpack_linear
from bitlower.backends.tvm_kernels.spec.packing import pack_float
from bitlower.ir import BitlowerError, Granularity, Grid, QuantSpec, ScaleConvention, packing

ACTIVATION = QuantSpec(Grid(8, signed=False, symmetric=False), Granularity.per_tensor())


@st.composite
def specs(draw):
    bits, signed, symmetric = draw(st.integers(2, 8)), draw(st.booleans()), draw(st.booleans())
    convention = ScaleConvention.QMAX if signed or not symmetric else ScaleConvention.OFFSET
    grid = Grid(bits, signed, symmetric, signed and symmetric and draw(st.booleans()), convention)
    layout = draw(st.sampled_from(Layout))
    block = draw(st.sampled_from([32, 64] if layout is Layout.PANELS else [8, 24, 32]))
    inputs = block * draw(st.integers(1, 4))
    kinds = [Granularity.per_tensor(), Granularity.per_channel(0), Granularity.per_group(block)]
    integer = draw(st.booleans()) and (symmetric or bits in (2, 3, 4))
    return LinearSpec(
        k=inputs, n=draw(st.integers(1, 130)), weight=QuantSpec(grid, draw(st.sampled_from(kinds))),
        layout=layout, x_quant=ACTIVATION if integer else None,
    )  # fmt: skip


@given(specs(), st.integers(0, 2**32))
def test_what_is_packed_is_unpacked(make_weight, spec, seed):
    weight = make_weight(spec, np.random.default_rng(seed))
    packed = pack_linear(spec, weight.codes, weight.scale, weight.zero_point)
    codes, scale, zero = unpack_linear(spec, packed)
    assert (codes == weight.codes).all()
    assert (scale == weight.scale).all()
    assert (zero == weight.zero_point).all()
    for argument in arguments(spec):
        if argument.name in packed:
            assert (packed[argument.name].dtype, packed[argument.name].shape) == (argument.dtype, argument.shape)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rows_are_the_stream_of_the_ir(make_weight, bits):
    grid = Grid(bits, signed=False, symmetric=False)
    spec = LinearSpec(k=40, n=5, weight=QuantSpec(grid, Granularity.per_channel(0)))
    weight = make_weight(spec, np.random.default_rng(0))
    words = packing.pack_words(torch.from_numpy(weight.codes), bits).numpy()
    assert (pack_linear(spec, weight.codes, weight.scale, weight.zero_point)["weight"] == words).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_panels_hold_each_code_once_where_the_layout_says(bits):
    """One code is not zero: the one bit pattern that is set says where it lies."""
    grid = Grid(bits, signed=bits == 8, symmetric=bits == 8)
    spec = LinearSpec(k=64, n=70, weight=QuantSpec(grid, Granularity.per_channel(0)), layout=Layout.PANELS)
    code, row = (1 << (bits - 1)) - 1, 66
    for column in (0, 5, 13, 31, 63):
        codes = np.zeros((70, 64), np.int8 if bits == 8 else np.uint8)
        codes[row, column] = code
        words = pack_linear(spec, codes, np.ones((70, 1), np.float32), np.zeros((70, 1), np.float32))["weight"]
        [(panel, step, word, lane)] = np.argwhere(words)
        assert (panel, lane, step) == (1, 2, column // spec.step)
        turn, byte = column % spec.step // 4, column % 4
        value = int(words[panel, step, word, lane]) & 0xFFFFFFFF
        plane = {3: 2}.get(bits, bits)
        assert word == turn // (8 // plane)
        assert value == code << (8 * byte + turn % (8 // plane) * plane)


def test_scales_of_coarser_shapes_are_spread():
    spec = LinearSpec(k=64, n=6, weight=QuantSpec(Grid(8), Granularity.row_group(3)))
    scale = np.array([[1.0], [2.0], [3.0]], np.float32)
    packed = pack_linear(spec, np.zeros((6, 64), np.int8), scale, np.zeros((3, 1), np.float32))
    assert packed["weight_scale"][:, 0].tolist() == [1, 1, 2, 2, 3, 3]
    single = LinearSpec(k=64, n=6, weight=QuantSpec(Grid(8), Granularity.per_tensor()))
    packed = pack_linear(single, np.zeros((6, 64), np.int8), np.float32(0.5), np.float32(0))
    assert packed["weight_scale"][:, 0].tolist() == [0.5] * 6


def test_vectors_are_filled_up_to_the_last_panel():
    spec = LinearSpec(k=8, n=5, weight=QuantSpec(Grid(8), Granularity.per_channel(0)), layout=Layout.PANELS)
    packed = pack_vector(spec, np.arange(5, dtype=np.float32))
    assert packed.tolist() == [0, 1, 2, 3, 4] + [0] * 59


def test_float_weights_lie_in_panels_of_outputs():
    spec = LinearSpec(k=3, n=66, weight=None, layout=Layout.PANELS)
    weight = np.arange(66 * 3, dtype=np.float32).reshape(66, 3)
    packed = pack_float(spec, weight)["weight"]
    assert packed.shape == (2, 3, 1, 64)
    assert (weight[:64] == packed[0, :, 0, :].T).all()
    assert (weight[64:] == packed[1, :, 0, :2].T).all()
    assert not packed[1, :, 0, 2:].any()
    with pytest.raises(BitlowerError, match=r"of a weight \[66, 3\], not \[3, 66\]"):
        pack_float(spec, weight.T)


def test_what_does_not_fit_is_refused():
    spec = LinearSpec(k=32, n=4, weight=QuantSpec(Grid(4), Granularity.per_channel(0)))
    ones, zeros = np.ones((4, 1), np.float32), np.zeros((4, 1), np.float32)
    with pytest.raises(BitlowerError, match=r"of a weight \[4, 32\], not \[4, 31\]"):
        pack_linear(spec, np.zeros((4, 31), np.int8), ones, zeros)
    with pytest.raises(BitlowerError, match="codes from 0 to 8 do not fit"):
        pack_linear(spec, np.full((4, 32), 8, np.int8) * (np.arange(32) > 3), ones, zeros)
    with pytest.raises(BitlowerError, match=r"scales of shape \[3, 1\]"):
        pack_linear(spec, np.zeros((4, 32), np.int8), np.ones((3, 1), np.float32), np.zeros((3, 1), np.float32))
