"""The bytes of a tensor in each target, against what the packing functions make of real codes."""

from __future__ import annotations

import pytest
import torch

from bitlower.ir import Granularity, Grid, Quantizer, QuantSpec, packing
from bitlower.tools.planning.sizes import Target, stored_bytes


def quantizer(bits: int, granularity: Granularity, *, symmetric: bool = True, role: str = "linear-weight") -> Quantizer:
    return Quantizer(role, QuantSpec(Grid(bits, signed=symmetric, symmetric=symmetric), granularity), "w")


def sizeof(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def test_codes_beside_quantized_activations_take_the_smallest_type() -> None:
    target = Target("onnx-qdq", {"form": "onnxruntime"})
    assert stored_bytes(quantizer(4, Granularity.per_channel(0)), (6, 10), target) == 30 + 6 * 4
    assert stored_bytes(quantizer(2, Granularity.per_channel(0)), (6, 10), target) == 30 + 6 * 4
    latest = Target("onnx-qdq", {"opset": 25})
    assert stored_bytes(quantizer(2, Granularity.per_channel(0)), (6, 10), latest) == 15 + 6 * 4
    assert stored_bytes(quantizer(5, Granularity.per_channel(0)), (6, 10), target) == 60 + 6 * 4
    assert stored_bytes(quantizer(8, Granularity.per_tensor(), symmetric=False), (6, 10), target) == 60 + 4 + 1
    assert stored_bytes(quantizer(12, Granularity.per_tensor()), (6, 10), target) == 120 + 4


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_rows_of_a_table_are_packed_unless_it_is_small(bits: int) -> None:
    table = quantizer(bits, Granularity.per_channel(0), role="embedding-table")
    codes = torch.zeros(800, 30, dtype=torch.uint8)
    expected = sizeof(packing.pack(codes, bits)) + 800 * 4
    assert stored_bytes(table, (800, 30), Target("onnx-qdq")) == expected
    assert stored_bytes(table, (8, 30), Target("onnx-qdq")) == 8 * (30 + 4)


@pytest.mark.parametrize(("bits", "stored"), [(3, 4), (4, 4), (2, 4)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_matmul_nbits(bits: int, stored: int, symmetric: bool) -> None:
    target = Target("onnx-qdq", {"form": "onnxruntime"}, weights_only=True)
    rows, columns, size = 24, 96, 32
    codes = torch.zeros(rows, columns, dtype=torch.uint8)
    expected = sizeof(packing.pack_matmul_nbits(codes, stored, size)) + rows * 3 * 4
    if not symmetric:
        expected += sizeof(packing.pack_matmul_nbits_zeros(torch.zeros(rows, 3, dtype=torch.uint8), stored))
    found = stored_bytes(quantizer(bits, Granularity.per_group(size), symmetric=symmetric), (rows, columns), target)
    assert found == expected


def test_matmul_nbits_fills_rows_of_one_scale_up_to_blocks() -> None:
    target = Target("onnx-qdq", {"form": "onnxruntime"}, weights_only=True)
    assert stored_bytes(quantizer(4, Granularity.per_channel(0)), (6, 200), target) == 6 * (2 * 64 + 2 * 4)
    assert stored_bytes(quantizer(4, Granularity.per_group(20)), (6, 200), target) == 6 * (100 + 10 * 4)


def test_blocked_dequantize_linear() -> None:
    target = Target("onnx-qdq", {"form": "qdq", "opset": 23}, weights_only=True)
    assert stored_bytes(quantizer(4, Granularity.per_group(32)), (6, 64), target) == 6 * (32 + 2 * 4)
    assert stored_bytes(quantizer(4, Granularity.per_channel(0)), (6, 64), target) == 6 * (32 + 4)
    table = quantizer(4, Granularity.per_channel(0), role="embedding-table")
    assert stored_bytes(table, (6, 64), target) == 6 * (64 + 4)
    eight = quantizer(8, Granularity.per_group(32), symmetric=False)
    assert stored_bytes(eight, (6, 64), target) == 6 * (64 + 2 * 5)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors(bits: int, symmetric: bool) -> None:
    target = Target("checkpoint", {"dtype": "bfloat16"}, weights_only=True)
    rows, columns, size = 24, 96, 32
    expected = sizeof(packing.pack_compressed(torch.zeros(rows, columns, dtype=torch.uint8), bits)) + rows * 3 * 2 + 16
    if not symmetric:
        expected += sizeof(packing.pack_compressed_zeros(torch.zeros(rows, 3, dtype=torch.uint8), bits))
    found = stored_bytes(quantizer(bits, Granularity.per_group(size), symmetric=symmetric), (rows, columns), target)
    assert found == expected


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_v2(bits: int) -> None:
    target = Target("checkpoint", {"format": "gptq-v2"}, weights_only=True)
    rows, columns, size = 64, 96, 32
    weight = packing.pack_gptq(torch.zeros(rows, columns, dtype=torch.uint8), bits)
    zeros = packing.pack_gptq_zeros(torch.zeros(rows, 3, dtype=torch.uint8), bits)
    expected = sizeof(weight) + sizeof(zeros) + rows * 3 * 2 + columns * 4
    assert stored_bytes(quantizer(bits, Granularity.per_group(size)), (rows, columns), target) == expected


def test_what_stays_float() -> None:
    tensor, ids = torch.zeros(3, 5), torch.zeros(4, dtype=torch.int64)
    assert Target("onnx-qdq").float_bytes(tensor) == 60
    assert Target("checkpoint").float_bytes(tensor) == 30
    assert Target("checkpoint", {"dtype": "float32"}).float_bytes(tensor) == 60
    assert Target("checkpoint").float_bytes(ids) == 32
