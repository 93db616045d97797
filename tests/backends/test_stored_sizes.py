"""The bytes of a tensor in each artifact, against what the packing functions make of real codes."""

from __future__ import annotations

import pytest
import torch

from bitlower.backends.checkpoint.format import find_format
from bitlower.backends.checkpoint.sizes import CheckpointSizes
from bitlower.backends.onnx_qdq.sizes import OnnxSizes
from bitlower.ir import Granularity, Grid, Quantizer, QuantSpec, packing


def quantizer(bits: int, granularity: Granularity, *, symmetric: bool = True, role: str = "linear-weight") -> Quantizer:
    return Quantizer(role, QuantSpec(Grid(bits, signed=symmetric, symmetric=symmetric), granularity), "w")


def sizeof(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def test_codes_beside_quantized_activations_take_the_smallest_type() -> None:
    target = OnnxSizes(form="onnxruntime")
    assert target.quantized(quantizer(4, Granularity.per_channel(0)), (6, 10)) == 30 + 6 * 4
    assert target.quantized(quantizer(2, Granularity.per_channel(0)), (6, 10)) == 30 + 6 * 4
    latest = OnnxSizes(25)
    assert latest.quantized(quantizer(2, Granularity.per_channel(0)), (6, 10)) == 15 + 6 * 4
    assert target.quantized(quantizer(5, Granularity.per_channel(0)), (6, 10)) == 60 + 6 * 4
    assert target.quantized(quantizer(8, Granularity.per_tensor(), symmetric=False), (6, 10)) == 60 + 4 + 1
    assert target.quantized(quantizer(12, Granularity.per_tensor()), (6, 10)) == 120 + 4


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_rows_of_a_table_are_packed_unless_it_is_small(bits: int) -> None:
    table = quantizer(bits, Granularity.per_channel(0), role="embedding-table")
    codes = torch.zeros(800, 30, dtype=torch.uint8)
    expected = sizeof(packing.pack(codes, bits)) + 800 * 4
    assert OnnxSizes().quantized(table, (800, 30)) == expected
    assert OnnxSizes().quantized(table, (8, 30)) == 8 * (30 + 4)


@pytest.mark.parametrize(("bits", "stored"), [(3, 4), (4, 4), (2, 4)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_matmul_nbits(bits: int, stored: int, symmetric: bool) -> None:
    target = OnnxSizes(form="onnxruntime", weights_only=True)
    rows, columns, size = 24, 96, 32
    codes = torch.zeros(rows, columns, dtype=torch.uint8)
    expected = sizeof(packing.pack_matmul_nbits(codes, stored, size)) + rows * 3 * 4
    if not symmetric:
        expected += sizeof(packing.pack_matmul_nbits_zeros(torch.zeros(rows, 3, dtype=torch.uint8), stored))
    found = target.quantized(quantizer(bits, Granularity.per_group(size), symmetric=symmetric), (rows, columns))
    assert found == expected


def test_matmul_nbits_fills_rows_of_one_scale_up_to_blocks() -> None:
    target = OnnxSizes(form="onnxruntime", weights_only=True)
    assert target.quantized(quantizer(4, Granularity.per_channel(0)), (6, 200)) == 6 * (2 * 64 + 2 * 4)
    assert target.quantized(quantizer(4, Granularity.per_group(20)), (6, 200)) == 6 * (100 + 10 * 4)


def test_blocked_dequantize_linear() -> None:
    target = OnnxSizes(23, "qdq", weights_only=True)
    assert target.quantized(quantizer(4, Granularity.per_group(32)), (6, 64)) == 6 * (32 + 2 * 4)
    assert target.quantized(quantizer(4, Granularity.per_channel(0)), (6, 64)) == 6 * (32 + 4)
    table = quantizer(4, Granularity.per_channel(0), role="embedding-table")
    assert target.quantized(table, (6, 64)) == 6 * (64 + 4)
    eight = quantizer(8, Granularity.per_group(32), symmetric=False)
    assert target.quantized(eight, (6, 64)) == 6 * (64 + 2 * 5)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors(bits: int, symmetric: bool) -> None:
    target = CheckpointSizes(find_format("compressed-tensors"))
    rows, columns, size = 24, 96, 32
    expected = sizeof(packing.pack_compressed(torch.zeros(rows, columns, dtype=torch.uint8), bits)) + rows * 3 * 2 + 16
    if not symmetric:
        expected += sizeof(packing.pack_compressed_zeros(torch.zeros(rows, 3, dtype=torch.uint8), bits))
    found = target.quantized(quantizer(bits, Granularity.per_group(size), symmetric=symmetric), (rows, columns))
    assert found == expected


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_v2(bits: int) -> None:
    target = CheckpointSizes(find_format("gptq-v2"))
    rows, columns, size = 64, 96, 32
    weight = packing.pack_gptq(torch.zeros(rows, columns, dtype=torch.uint8), bits)
    zeros = packing.pack_gptq_zeros(torch.zeros(rows, 3, dtype=torch.uint8), bits)
    expected = sizeof(weight) + sizeof(zeros) + rows * 3 * 2 + columns * 4
    assert target.quantized(quantizer(bits, Granularity.per_group(size)), (rows, columns)) == expected


def test_what_stays_float() -> None:
    tensor, ids = torch.zeros(3, 5), torch.zeros(4, dtype=torch.int64)
    assert OnnxSizes().floats(tensor) == 60
    assert CheckpointSizes(find_format("compressed-tensors")).floats(tensor) == 30
    assert CheckpointSizes(find_format("compressed-tensors"), width=4).floats(tensor) == 60
    assert CheckpointSizes(find_format("compressed-tensors")).floats(ids) == 32
