"""Packing against a bit-by-bit reference, the layouts' own definitions and the libraries that read them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitlower.ir import BitlowerError, packing

BITS = (1, 2, 3, 4, 5, 6, 7, 8)
GPTQ_BITS = (2, 3, 4, 8)


def random_codes(rows: int, columns: int, bits: int, seed: int = 0) -> torch.Tensor:
    """Unsigned codes with both ends of the range among them."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
    codes.view(-1)[0] = (1 << bits) - 1
    codes.view(-1)[-1] = 0 if codes.numel() > 1 else codes.view(-1)[-1]
    return codes


def bit_stream(row: np.ndarray, bits: int, unit: int) -> np.ndarray:
    """One row as integers of ``unit`` bits, by Python's own big integers."""
    number = sum(int(code) << (bits * index) for index, code in enumerate(row))
    count = -(-len(row) * bits // unit)
    return np.array([(number >> (unit * i)) & ((1 << unit) - 1) for i in range(count)], np.uint64)


matrices = st.tuples(st.integers(1, 5), st.integers(1, 70), st.sampled_from(BITS), st.integers(0, 9))


@given(matrices)
def test_bytes_and_words_are_the_least_significant_bit_first(case):
    rows, columns, bits, seed = case
    codes = random_codes(rows, columns, bits, seed)
    stream, words = packing.pack(codes, bits), packing.pack_words(codes, bits)
    for row, got_bytes, got_words in zip(codes.numpy(), stream.numpy(), words.numpy(), strict=True):
        np.testing.assert_array_equal(got_bytes, bit_stream(row, bits, 8))
        np.testing.assert_array_equal(got_words.view(np.uint32), bit_stream(row, bits, 32))


@given(matrices)
def test_unpacking_is_the_inverse(case):
    rows, columns, bits, seed = case
    codes = random_codes(rows, columns, bits, seed)
    assert torch.equal(packing.unpack(packing.pack(codes, bits), bits, columns), codes)
    assert torch.equal(packing.unpack_words(packing.pack_words(codes, bits), bits, columns), codes)
    assert torch.equal(packing.unpack_compressed(packing.pack_compressed(codes, bits), bits, columns), codes)
    assert torch.equal(packing.unpack_compressed_zeros(packing.pack_compressed_zeros(codes, bits), bits, rows), codes)
    zeros = packing.pack_matmul_nbits_zeros(codes, bits)
    assert torch.equal(packing.unpack_matmul_nbits_zeros(zeros, bits, columns), codes)


@pytest.mark.parametrize("bits", BITS)
def test_only_bytes_are_unpacked(bits: int):
    stream = packing.pack(random_codes(2, 8, bits), bits)
    with pytest.raises(BitlowerError, match=rf"are {bits} bytes a row, not int8\[2, {bits}\]"):
        packing.unpack(stream.to(torch.int8), bits, 8)


@pytest.mark.parametrize("bits", BITS)
def test_more_axes_are_so_many_rows(bits: int):
    codes = random_codes(6, 11, bits)
    packed = packing.pack(codes.reshape(2, 3, 11), bits)
    assert torch.equal(packed.reshape(6, -1), packing.pack(codes, bits))
    assert torch.equal(packing.unpack(packed, bits, 11).reshape(6, 11), codes)
    words = packing.pack_words(codes.reshape(2, 3, 11), bits)
    assert torch.equal(words.reshape(6, -1), packing.pack_words(codes, bits))


def test_views_that_are_not_contiguous_pack_as_their_copies():
    codes = random_codes(48, 40, 3)
    assert torch.equal(packing.pack_words(codes.T, 3), packing.pack_words(codes.T.contiguous(), 3))
    words = packing.pack_words(codes, 3)
    assert torch.equal(packing.unpack_words(words.T.contiguous().T, 3, 40), codes)


@pytest.mark.parametrize("bits", BITS)
def test_single_rows_and_columns_have_odd_strides(bits: int):
    column = random_codes(32, 1, bits)
    for codes in (column, column.T, random_codes(5, 33, bits)[:, :1], random_codes(33, 5, bits).T[:1]):
        words = packing.pack_words(codes, bits)
        assert torch.equal(words, packing.pack_words(codes.clone(memory_format=torch.contiguous_format), bits))
        for packed in (words, words.T.contiguous().T):
            assert torch.equal(packing.unpack_words(packed, bits, codes.shape[1]), codes)


@pytest.mark.parametrize("bits", BITS)
def test_signed_codes_are_offset_by_half_the_range(bits: int):
    half = 1 << (bits - 1)
    codes = torch.arange(-half, half).to(torch.int8)
    assert packing.unsigned(codes, bits).tolist() == list(range(2 * half))
    assert torch.equal(packing.signed(packing.unsigned(codes, bits), bits), codes)
    same = torch.arange(2 * half).to(torch.uint8)
    assert packing.unsigned(same, bits) is same


@pytest.mark.parametrize("bits", BITS)
def test_compressed_tensors_packs_and_unpacks_the_same(bits: int):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes, zeros = random_codes(40, 52, bits), random_codes(40, 3, bits, 1)
    theirs = helpers.pack_to_int32(packing.signed(codes, bits), bits)
    assert torch.equal(packing.pack_compressed(codes, bits), theirs)
    assert torch.equal(packing.unsigned(helpers.unpack_from_int32(theirs, bits, codes.shape), bits), codes)
    packed = helpers.pack_to_int32(packing.signed(zeros, bits), bits, packed_dim=0)
    assert torch.equal(packing.pack_compressed_zeros(zeros, bits), packed)
    assert torch.equal(packing.unpack_compressed_zeros(packed, bits, 40), zeros)


@pytest.mark.parametrize("bits", GPTQ_BITS)
def test_gptq_holds_the_streams_down_the_input_channels(bits: int):
    codes, zeros = random_codes(64, 96, bits), random_codes(64, 3, bits, 1)
    qweight, qzeros = packing.pack_gptq(codes, bits), packing.pack_gptq_zeros(zeros, bits)
    assert (qweight.dtype, tuple(qweight.shape)) == (torch.int32, (96 * bits // 32, 64))
    assert (qzeros.dtype, tuple(qzeros.shape)) == (torch.int32, (3, 64 * bits // 32))
    for channel in (0, 63):
        stream = bit_stream(codes[channel].numpy(), bits, 32)
        np.testing.assert_array_equal(qweight[:, channel].numpy().view(np.uint32), stream)
    np.testing.assert_array_equal(qzeros[2].numpy().view(np.uint32), bit_stream(zeros[:, 2].numpy(), bits, 32))
    assert torch.equal(packing.unpack_gptq(qweight, bits), codes)
    assert torch.equal(packing.unpack_gptq_zeros(qzeros, bits), zeros)


def test_three_bits_are_the_words_of_gptqs_kernel():
    """32 codes in three words: ten, two bits of the eleventh; its third, ten, one bit of the next; its two, ten more.

    That is how ``Quant3Linear.pack`` of the official code writes them (intweight[j] << (3 * j) and so on).
    """
    codes = random_codes(1, 32, 3)[0].to(torch.int64)
    words = [0, 0, 0]
    words[0] = sum(int(codes[j]) << (3 * j) for j in range(10)) | int(codes[10]) << 30
    words[1] = int(codes[10]) >> 2 | sum(int(codes[11 + j]) << (3 * j + 1) for j in range(10)) | int(codes[21]) << 31
    words[2] = int(codes[21]) >> 1 | sum(int(codes[22 + j]) << (3 * j + 2) for j in range(10))
    packed = packing.pack_gptq(codes.to(torch.uint8)[None], 3)
    assert packed[:, 0].numpy().view(np.uint32).tolist() == [word & 0xFFFFFFFF for word in words]


@pytest.mark.parametrize("bits", GPTQ_BITS)
def test_version_1_stores_one_less_and_refuses_a_zero_point_of_0(bits: int):
    zeros = random_codes(32, 2, bits).clamp(min=1)
    first, second = (packing.pack_gptq_zeros(zeros, bits, version=version) for version in (1, 2))
    assert torch.equal(packing.unpack_gptq_zeros(first, bits, version=2), zeros - 1)
    assert torch.equal(packing.unpack_gptq_zeros(first, bits, version=1), zeros)
    np.testing.assert_array_equal(
        second.numpy().view(np.uint32) - bit_stream(np.ones(32, np.uint8), bits, 32).astype(np.uint32),
        first.numpy().view(np.uint32),
    )
    zeros[5, 1] = 0
    with pytest.raises(BitlowerError, match=r"zero point of 0.*version 2"):
        packing.pack_gptq_zeros(zeros, bits, version=1)
    assert torch.equal(packing.unpack_gptq_zeros(packing.pack_gptq_zeros(zeros, bits), bits), zeros)


def test_group_indices_are_consecutive():
    assert packing.gptq_groups(8, 4).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert packing.gptq_groups(4, 4).dtype == torch.int32


@pytest.mark.parametrize("bits", GPTQ_BITS)
@pytest.mark.parametrize("columns", [64, 70])
def test_matmul_nbits_packs_blocks(bits: int, columns: int):
    codes = random_codes(3, columns, bits)
    packed = packing.pack_matmul_nbits(codes, bits, 32)
    assert tuple(packed.shape) == (3, -(-columns // 32), 4 * bits)
    np.testing.assert_array_equal(packed[1, 1].numpy(), bit_stream(codes[1, 32:64].numpy(), bits, 8))
    assert torch.equal(packing.unpack_matmul_nbits(packed, bits, columns), codes)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [64, 80])
def test_onnxruntime_reads_the_blocks(bits: int, columns: int):
    """MatMulNBits on the identity gives the dequantized weight back."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    rows, block = 8, 32
    blocks = -(-columns // block)
    codes, zeros = random_codes(rows, columns, bits), random_codes(rows, blocks, bits, 1)
    scales = np.random.default_rng(0).uniform(0.5, 2, (rows, blocks)).astype(np.float32)
    tensors = {
        "B": packing.pack_matmul_nbits(codes, bits, block).numpy(),
        "scales": scales,
        "zeros": packing.pack_matmul_nbits_zeros(zeros, bits).numpy(),
    }
    node = helper.make_node(
        "MatMulNBits", ["x", *tensors], ["y"], domain="com.microsoft", K=columns, N=rows, bits=bits, block_size=block
    )
    graph = helper.make_graph(
        [node], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [columns, columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [columns, rows])],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (weight,) = session.run(None, {"x": np.eye(columns, dtype=np.float32)})
    spread = [np.repeat(part, block, 1)[:, :columns] for part in (scales, zeros.numpy().astype(np.float32))]
    np.testing.assert_allclose(weight.T, (codes.numpy() - spread[1]) * spread[0], rtol=1e-6)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("is_signed", [True, False])
@pytest.mark.parametrize("shape", [(3, 5), (7,), (2, 3, 4)])
def test_onnx_reads_what_is_packed_for_it(bits: int, is_signed: bool, shape: tuple[int, ...]):
    import onnx
    from onnx import numpy_helper

    codes = random_codes(1, int(np.prod(shape)), bits).reshape(shape)
    codes = packing.signed(codes, bits) if is_signed else codes
    data = packing.pack_onnx(codes, bits)
    assert torch.equal(packing.unpack_onnx(data, bits, shape, is_signed=is_signed), codes)
    kind = getattr(onnx.TensorProto, f"{'' if is_signed else 'U'}INT{bits}")
    tensor = onnx.TensorProto(data_type=kind, dims=shape, raw_data=data.numpy().tobytes())
    np.testing.assert_array_equal(numpy_helper.to_array(tensor).astype(np.int64), codes.numpy())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: packing.pack(torch.tensor([16], dtype=torch.uint8), 4), "the code 16 does not fit into 4 bits"),
        (lambda: packing.pack(torch.tensor([1]), 4), "codes are packed as uint8, not as torch.int64"),
        (lambda: packing.pack(torch.tensor([1], dtype=torch.uint8), 9), "1 to 8 bits can be packed, not of 9"),
        (lambda: packing.unsigned(torch.tensor([1]), 4), "are int8 or uint8, not torch.int64"),
        (
            lambda: packing.unpack(torch.zeros(2, dtype=torch.uint8), 4, 5),
            r"5 codes of 4 bits are 3 bytes a row, not u",
        ),
        (lambda: packing.unpack_words(torch.zeros(2, dtype=torch.int32), 4, 5), r"are 1 int32 words a row, not int32"),
        (lambda: packing.pack_gptq(random_codes(8, 12, 4), 4), "12 input channels .* needs a multiple of 8"),
        (lambda: packing.pack_gptq(random_codes(8, 40, 3), 3), "40 input channels .* needs a multiple of 32"),
        (lambda: packing.pack_gptq_zeros(random_codes(20, 2, 2), 2), "20 output channels .* needs a multiple of 16"),
        (lambda: packing.pack_gptq_zeros(random_codes(32, 2, 2), 2, version=3), "no version 3 of the GPTQ format"),
        (lambda: packing.pack_matmul_nbits(random_codes(2, 8, 3), 3, 4), "a block of 4 codes of 3 bits does not end"),
        (lambda: packing.pack_onnx(random_codes(2, 8, 3), 3), "ONNX packs codes of 2 and 4 bits, not of 3"),
        (lambda: packing.pack_onnx(torch.tensor([-9], dtype=torch.int8), 4), "does not fit into 4 bits"),
    ],
)
def test_what_does_not_fit_is_refused(call, message: str):
    with pytest.raises(BitlowerError, match=message):
        call()
