from __future__ import annotations

import dataclasses
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from bitlower.backends.onnx_qdq import OnnxQdq, export, verify, verify_export
from bitlower.backends.onnx_qdq.encoding.nbits import (
    Container,
    container,
    pack_codes,
    pack_zeros,
    spread_blocks,
    unpack_codes,
)
from bitlower.backends.onnx_qdq.rewrite.pipeline import lower
from bitlower.backends.onnx_qdq.verify.runtime_kernels import LEVEL_ENTRY
from bitlower.backends.onnx_qdq.write.files import write_model
from bitlower.frontends import load
from bitlower.ir import BitlowerError, CheckError, Granularity, Grid, Program, QuantSpec, ScaleConvention, Scheme
from bitlower.passes import Context, PassManager
from bitlower.passes.lowering.lower_integer import LowerInteger
from bitlower.passes.quantizers.calibrate import Calibrate
from bitlower.passes.quantizers.quantize import Quantize

WIDTH, INNER, LINEARS = 64, 96, 3


class Perceptron(torch.nn.Module):
    """Two linears with a bias and one without; the inner width is no power of two."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(WIDTH, INNER)
        self.gate = torch.nn.Linear(WIDTH, INNER, bias=False)
        self.down = torch.nn.Linear(INNER, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)) * self.gate(x))


def rows(count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(2, count, WIDTH, generator=torch.Generator().manual_seed(seed))}


BATCHES = [rows(5, 1), rows(1, 2), rows(19, 3)]


@cache
def perceptron() -> Program:
    torch.manual_seed(0)
    return load(Perceptron().eval(), example_inputs=rows(3))


def quantized(spec: QuantSpec) -> Program:
    scheme = dataclasses.replace(Scheme.parse("W4A16-g32"), weights=spec)
    passes = [Quantize(scheme=scheme), Calibrate(weights="minmax"), LowerInteger()]
    return PassManager(passes).run(perceptron(), Context(calibration=BATCHES[:1]))


def write(program: Program, folder: Path, **options: Any) -> Path:
    model, _ = lower(program, **({"opset": 23, "form": "onnxruntime"} | options))
    write_model(model, folder, threshold=10**9)
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
    return folder / "model.onnx"


def open_session(path: Path, level: int | None = None, optimized: Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if level is not None:
        options.add_session_config_entry(LEVEL_ENTRY, str(level))
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def worst_error(program: Program, session: onnxruntime.InferenceSession) -> float:
    """The largest error of the output, in standard deviations."""
    errors = []
    for batch in BATCHES:
        with torch.no_grad():
            [expected] = program(**batch).values()
        [found] = session.run(None, {"x": batch["x"].numpy()})
        errors.append(float(np.abs(found - expected.numpy()).max() / expected.std()))
    return max(errors)


def asymmetric(bits: int) -> Grid:
    return Grid(bits, signed=False, symmetric=False)


SPECS = [
    QuantSpec(Grid(4), Granularity.per_group(32)),
    QuantSpec(asymmetric(4), Granularity.per_group(32)),
    QuantSpec(asymmetric(4), Granularity.per_channel(0)),
    QuantSpec(Grid(4, signed=False, convention=ScaleConvention.OFFSET), Granularity.per_group(16)),
    QuantSpec(Grid(4, signed=True, symmetric=False), Granularity.per_tensor()),
    QuantSpec(Grid(3), Granularity.per_group(32)),
    QuantSpec(asymmetric(3), Granularity.row_group(4)),
    QuantSpec(asymmetric(2), Granularity.per_group(32)),
    QuantSpec(Grid(8), Granularity.per_channel(0)),
    QuantSpec(asymmetric(8), Granularity.per_group(32)),
    QuantSpec(asymmetric(5), Granularity.per_group(32)),
]


@pytest.mark.parametrize("form", ["onnxruntime", "qdq"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_low_bit_linears_compute_what_the_program_does_in_float_activations(
    spec: QuantSpec, form: str, tmp_path: Path
) -> None:
    program = quantized(spec)
    path = write(program, tmp_path, form=form, accuracy_level=1)
    optimized = tmp_path / "optimized.onnx"
    assert worst_error(program, open_session(path, 1, optimized)) < 1e-5
    kernels = Counter(node.op_type for node in onnx.load(optimized).graph.node)
    unfolded = spec.grid.bits > 4  # no fast kernel, so the runtime unfolds the codes when it loads them
    assert kernels["MatMulNBits"] == (0 if unfolded else LINEARS)
    assert kernels["DequantizeLinear"] == 0
    used = Counter(node.op_type for node in onnx.load(path).graph.node)
    assert used["MatMulNBits" if form == "onnxruntime" else "DequantizeLinear"] == (0 if unfolded else LINEARS)


@pytest.mark.parametrize(
    ("spec", "form", "opset"),
    [
        (SPECS[1], "qdq", 21),
        (SPECS[2], "qdq", 23),
        (SPECS[3], "onnxruntime", 21),
        (SPECS[7], "onnxruntime", 23),
        (SPECS[7], "qdq", 21),
        (SPECS[7], "qdq", 25),
        (SPECS[8], "onnxruntime", 23),
        (SPECS[8], "qdq", 23),
        (SPECS[9], "qdq", 23),
        (SPECS[10], "onnxruntime", 23),
    ],
    ids=str,
)
def test_level_4_rounds_activations_and_has_a_kernel_for_every_width(
    spec: QuantSpec, form: str, opset: int, tmp_path: Path
) -> None:
    program = quantized(spec)
    path = write(program, tmp_path, form=form, opset=opset, accuracy_level=4)
    optimized = tmp_path / "optimized.onnx"
    assert 1e-4 < worst_error(program, open_session(path, 4, optimized)) < 0.1
    nodes = [node for node in onnx.load(optimized).graph.node if node.op_type == "MatMulNBits"]
    bits = {a.i for node in nodes for a in node.attribute if a.name == "bits"}
    narrow = 2 if form == "onnxruntime" or opset >= 25 else 4
    assert len(nodes) == LINEARS
    assert bits == {8 if spec.grid.bits > 4 else narrow if spec.grid.bits == 2 else 4}


def test_codes_take_their_bits_in_the_file(tmp_path: Path) -> None:
    sizes = {}
    for bits in (2, 4, 8):
        spec = QuantSpec(asymmetric(bits), Granularity.per_channel(0))
        for form in ("onnxruntime", "qdq"):
            folder = tmp_path / f"{bits}{form}"
            folder.mkdir()
            model = onnx.load(write(quantized(spec), folder, form=form, opset=25, accuracy_level=4))
            codes = {t.name: len(t.raw_data) for t in model.graph.initializer if t.name.endswith("_codes")}
            sizes[bits, form] = codes["gate.weight_codes"]
    count = INNER * WIDTH
    assert {key: size for key, size in sizes.items() if key[1] == "qdq"} == {
        (bits, "qdq"): count * bits // 8 for bits in (2, 4, 8)
    }
    assert sizes[4, "onnxruntime"] == count // 2


@pytest.mark.parametrize(
    ("bits", "depth", "granularity", "level", "expected"),
    [
        (4, 256, Granularity.per_group(128), 1, Container(4, 128)),
        (3, 256, Granularity.per_group(128), 1, Container(4, 128)),
        (2, 256, Granularity.per_group(128), 1, Container(4, 128)),
        (2, 256, Granularity.per_group(128), 4, Container(2, 128)),
        (2, 256, Granularity.per_group(16), 4, Container(4, 16)),
        (2, 1024, Granularity.per_group(512), 4, Container(2, 128)),
        (4, 1024, Granularity.per_group(512), 1, Container(4, 256)),
        (4, 576, Granularity.per_group(96), 1, Container(4, 32)),
        (4, 576, Granularity.per_channel(0), 1, Container(4, 128)),
        (4, 48, Granularity.per_tensor(), 1, Container(4, 32)),
        (6, 64, Granularity.row_group(4), 4, Container(8, 64)),
        (8, 64, Granularity.per_channel(0), 1, "8-bit codes have no fast kernel at accuracy level 1"),
        (4, 48, Granularity.per_group(24), 1, "groups of 24 inputs are no multiple of 16"),
        (4, 8, Granularity.per_channel(0), 1, "groups of 8 inputs are no multiple of 16"),
        (4, 64, Granularity.per_channel(1), 1, "groups of 1 inputs are no multiple of 16"),
        (12, 64, Granularity.per_channel(0), 4, "the weight has 12 bits"),
    ],
    ids=str,
)
def test_the_container_of_a_weight(
    bits: int, depth: int, granularity: Granularity, level: int, expected: Container | str
) -> None:
    scale = granularity.scale_shape((8, depth))
    assert container(QuantSpec(Grid(bits), granularity), (8, depth), scale, level) == expected


@pytest.mark.parametrize("form", ["onnxruntime", "qdq"])
def test_a_last_group_may_be_shorter(form: str, tmp_path: Path) -> None:
    spec = QuantSpec(asymmetric(4), Granularity.per_group(64))
    program = quantized(spec)  # the inner width is one group and a half
    report = export(program, tmp_path, batches=BATCHES, form=form)
    assert report.verification.kernels.low_bit_weights == {"bits=4 accuracy_level=1": LINEARS}
    if form == "onnxruntime":
        model = onnx.load(tmp_path / "model.onnx")
        [scale] = [t for t in model.graph.initializer if t.name == "down.weight_scale"]
        assert list(scale.dims) == [WIDTH, 2]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_codes_lie_as_the_runtime_documents_it(bits: int, dtype: type) -> None:
    """A block's codes follow each other from the lowest bits of its first byte; signed ones are shifted."""
    low = -(1 << (bits - 1)) if dtype is np.int8 else 0
    codes = np.random.default_rng(0).integers(low, low + (1 << bits), (3, 40)).astype(dtype)
    packed = pack_codes(codes, Container(bits, 16))
    per_byte = 8 // bits
    assert packed.shape == (3, 3, 16 // per_byte)
    for row, column in [(0, 0), (1, 17), (2, 39), (0, 5)]:
        byte = int(packed[row, column // 16, column % 16 // per_byte])
        stored = byte >> (column % per_byte * bits) & ((1 << bits) - 1)
        assert stored + low == codes[row, column]
    np.testing.assert_array_equal(unpack_codes(packed, bits, 40, is_signed=dtype is np.int8), codes)


def test_zero_points_that_the_runtime_takes_for_granted_are_left_out() -> None:
    kind = Container(4, 32)
    assert pack_zeros(np.zeros((4, 2), np.float32), (4, 64), kind, is_signed=True) is None
    assert pack_zeros(np.full((4, 2), 8, np.float32), (4, 64), kind, is_signed=False) is None
    given = np.array([[8, 8], [3, 8]], np.float32)  # one that is not takes them all
    np.testing.assert_array_equal(pack_zeros(given, (2, 64), kind, is_signed=False), [[0x88], [0x83]])
    zeros = np.array([[1, 2], [3, 15]], np.float32)
    np.testing.assert_array_equal(pack_zeros(zeros, (2, 64), kind, is_signed=False), [[0x21], [0xF3]])
    np.testing.assert_array_equal(spread_blocks(zeros, (4, 128), 32)[1], [1, 1, 2, 2])


@pytest.mark.parametrize("form", ["onnxruntime", "qdq"])
def test_an_export_verifies_codes_and_kernels(form: str, tmp_path: Path) -> None:
    program = quantized(SPECS[1])
    report = export(program, tmp_path, batches=BATCHES, form=form)
    kernels = report.verification.kernels
    assert kernels.expected_low_bit == LINEARS
    assert kernels.low_bit_weights == {"bits=4 accuracy_level=1": LINEARS}
    assert kernels.fell_back == ()
    assert report.verification.constants == {"tensors": LINEARS, "codes": 3 * WIDTH * INNER}
    assert report.verification.session_config == ({LEVEL_ENTRY: "1"} if form == "qdq" else {})
    assert report.rules["low-bit-linear"]["applied"] == LINEARS
    assert verify(tmp_path).kernels.low_bit_weights == kernels.low_bit_weights


def test_an_export_at_level_4_is_held_to_its_cosine(tmp_path: Path) -> None:
    report = export(quantized(SPECS[9]), tmp_path, batches=BATCHES, form="onnxruntime", accuracy_level=4)
    assert report.verification.kernels.rounds_activations
    assert 0.999 < report.verification.outputs[0].cosine < 1
    assert report.accuracy_level == 4


TAMPERED = {"codes": "1 of the 6144 codes of gate.weight_codes", "scale": "the scale of gate.weight_codes"} | {
    "zero_point": "the zero point of gate.weight_codes"
}


@pytest.mark.parametrize("part", TAMPERED)
@pytest.mark.parametrize("form", ["onnxruntime", "qdq"])
def test_one_wrong_entry_is_found(part: str, form: str, tmp_path: Path) -> None:
    program = quantized(SPECS[1])
    model = ir.load(write(program, tmp_path, form=form))
    value = model.graph.initializers[f"gate.weight_{part}"]
    data = bytearray(value.const_value.tobytes())
    data[5] ^= 1
    proto = ir.to_proto(value.const_value)
    proto.raw_data = bytes(data)
    value.const_value = ir.from_proto(proto)
    ir.save(model, tmp_path / "model.onnx")
    with pytest.raises(CheckError, match=TAMPERED[part]):
        verify_export(program, tmp_path, BATCHES, session_config={LEVEL_ENTRY: "1"})


def test_a_runtime_that_would_round_activations_unasked_is_refused(tmp_path: Path) -> None:
    program = quantized(SPECS[0])
    write(program, tmp_path, form="qdq")
    with pytest.raises(CheckError, match="rounds its float activations to 8 bits"):
        verify_export(program, tmp_path, BATCHES)


def test_accuracy_levels_out_of_range_are_refused() -> None:
    with pytest.raises(BitlowerError, match="accuracy-level is 5; it takes int from 0 to 4"):
        OnnxQdq(accuracy_level=5)
