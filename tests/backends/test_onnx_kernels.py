"""Kernel counts against models whose kernels are known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import fx

from bitlower.backends.artifact.schema import parsed
from bitlower.backends.onnx_qdq.rewrite.pipeline import lower
from bitlower.backends.onnx_qdq.runtime.session import read_model
from bitlower.backends.onnx_qdq.verify.runtime_kernels import (
    KernelReport,
    count_kernels,
    expected_kernels,
    expected_low_bit,
    float_reason,
    inspect_kernels,
    optimized_model,
)
from bitlower.backends.onnx_qdq.write.files import write_model
from bitlower.frontends import load
from bitlower.ir import CheckError, Granularity, Grid, Program, Quantizer, QuantSpec, ops
from bitlower.passes import Context, PassManager, parse_pipeline
from bitlower.passes.quantizers.quantize import Quantize

LEVEL = "session.qdq_matmulnbits_accuracy_level"


def inspect(program: Program, path: Path, config: dict[str, str] | None = None) -> KernelReport:
    with optimized_model(path, config or {}) as optimized:
        return inspect_kernels(program, path, read_model(optimized.path).graph, session_config=config)


def test_integer_kernels_are_found(handmade, tmp_path: Path):
    report = inspect(handmade.program, handmade.write(tmp_path) / "model.onnx")
    assert report.integer == {"MatMulIntegerToFloat": 2}
    assert (report.expected, report.found, report.floating, report.fell_back) == (2, 2, {}, ())
    assert parsed(KernelReport, report.to_dict(), "kernels") == report


def test_what_fell_back_is_named(handmade, tmp_path: Path):
    """With an Add of a bias onnxruntime makes a Gemm of a matrix product, which runs in float."""

    def edit(model: onnx.ModelProto) -> None:
        next(n for n in model.graph.node if n.name == "Bias_up").op_type = "Add"

    path = handmade.write(tmp_path, edit) / "model.onnx"
    report = inspect(handmade.program, path, {LEVEL: "0"})
    assert (report.expected, report.found) == (2, 1)
    assert report.floating.get("Gemm", 0) + report.floating.get("MatMul", 0) == 1
    assert len(report.fell_back) == 1
    assert "MatMul_up" in report.fell_back[0]
    assert report.fell_back[0].endswith("is computed in float, read by Gelu")


class Gated(torch.nn.Module):
    """Linears without a bias, and what is computed between them."""

    def __init__(self, between: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(16, 32, bias=False), torch.nn.Linear(32, 16, bias=False)
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.between(self.up(x)))


@pytest.mark.parametrize(
    "between",
    [lambda x: x.relu().square(), lambda x: x.clamp(-1, 1).square(), torch.relu, lambda x: x.relu() + 1],
    ids=["squared-relu", "squared-clip", "relu", "shifted-relu"],
)
def test_a_product_before_a_relu_or_a_clip_is_an_integer_one(between, tmp_path: Path):
    batches = [{"x": torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(0))}]
    passes = PassManager(parse_pipeline("clean,quantize{scheme=W8A8},calibrate,lower-integer"))
    program = passes.run(load(Gated(between).eval(), example_inputs=batches[0]), Context(calibration=batches))
    model, _ = lower(program, opset=23, form="qdq")
    write_model(model, tmp_path, threshold=0)
    report = inspect(program, tmp_path / "model.onnx")
    assert (report.found, report.expected, report.fell_back) == (2, 2, ())


def weight_only(folder: Path, *, explicit: bool = False) -> Path:
    """``x · dequantize(codes)`` with float x, which onnxruntime turns into MatMulNBits; or that operator itself."""
    codes = np.random.default_rng(0).integers(-127, 127, (32, 16), dtype=np.int8)
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["real"], axis=1),
        helper.make_node("MatMul", ["x", "real"], ["y"], name="linear"),
    ]
    stored = {"w": codes, "s": np.full(16, 0.01, np.float32)}
    if explicit:
        attributes = {"K": 32, "N": 16, "bits": 8, "block_size": 32, "accuracy_level": 4, "domain": "com.microsoft"}
        nodes = [helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], name="linear", **attributes)]
        stored["w"] = (codes.T.astype(np.int16) + 128).astype(np.uint8).reshape(16, 1, 32)
    graph = helper.make_graph(
        nodes,
        "weight_only",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 16])],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), folder / "model.onnx")
    return folder / "model.onnx"


def test_a_silent_downgrade_is_refused_and_its_remedy_works(tiny_program: Program, tmp_path: Path):
    path = weight_only(tmp_path)
    with pytest.raises(CheckError, match=f"rounds its float activations to 8 bits; set the session entry {LEVEL}"):
        inspect(tiny_program, path)
    report = inspect(tiny_program, path, {LEVEL: "0"})
    assert list(report.low_bit_weights.values()) == [1]
    assert "accuracy_level=0" in next(iter(report.low_bit_weights))


def test_what_the_model_asks_for_is_no_downgrade(tiny_program: Program, tmp_path: Path):
    report = inspect(tiny_program, weight_only(tmp_path, explicit=True))
    assert report.low_bit_weights == {"bits=8 accuracy_level=4": 1}


def test_a_model_that_does_not_load_is_refused(tiny_program: Program, tmp_path: Path):
    graph = helper.make_graph([helper.make_node("NoSuchOperator", [], ["y"])], "g", [], [])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(CheckError, match=r"onnxruntime does not load model\.onnx: .*NoSuchOperator"):
        inspect(tiny_program, tmp_path / "model.onnx")


def test_a_float_program_expects_nothing(tiny_program: Program):
    expected, reasons = expected_kernels(tiny_program)
    assert expected == 0
    assert reasons.total() == 3


def test_low_bit_kernels_are_expected_of_float_activations_only(handmade, lowered):
    assert expected_kernels(handmade.program)[0] == 2
    assert list(expected_low_bit(handmade.program, 0)) == []
    assert list(expected_low_bit(lowered("llama", "W4A16-g32"), 0)) == [True] * 14


def test_open_quantizers_are_no_integers(tiny_program: Program):
    Quantize().run(tiny_program, Context())
    assert expected_kernels(tiny_program)[0] == 0


@pytest.mark.parametrize(
    ("bits", "granularity", "weight_bits", "weight_granularity", "reason"),
    [
        (8, Granularity.per_tensor(), 8, Granularity.per_channel(0), ""),
        (4, Granularity.per_token(), 2, Granularity.per_tensor(), ""),
        (12, Granularity.per_tensor(), 8, Granularity.per_tensor(), "the activation has 12 bits"),
        (8, Granularity.per_tensor(), 9, Granularity.per_tensor(), "the weight has 9 bits"),
        (8, Granularity.per_embedding(), 8, Granularity.per_tensor(), "the activation is quantized per-embedding"),
        (8, Granularity.per_tensor(), 4, Granularity.per_group(8), r"the weight is quantized per-group(8)"),
    ],
)
def test_reasons(bits, granularity, weight_bits, weight_granularity, reason):
    graph = fx.Graph()
    x, codes, parameter = graph.placeholder("x"), graph.get_attr("w_codes"), graph.get_attr("s")

    def real(code: fx.Node, spec: QuantSpec) -> fx.Node:
        node = graph.call_function(ops.dequantize, (code, parameter, parameter))
        node.meta["quantizer"] = Quantizer("linear-input", spec, "t")
        return node

    code = graph.call_function(ops.quantize, (x, parameter, parameter, 0, 255, "uint8"))
    left = graph.call_function(torch.ops.aten.view.default, (real(code, QuantSpec(Grid(bits), granularity)), [-1, 4]))
    right = real(codes, QuantSpec(Grid(weight_bits), weight_granularity))
    assert float_reason(left, right) == reason
    assert float_reason(x, right) == "an operand is float"
    assert float_reason(left, parameter) == "the weight is float"


def test_attention_and_bits_are_counted():
    import onnx_ir as ir

    nodes = [
        ir.node("MatMulNBits", [], {"bits": 4, "accuracy_level": 0}, domain="com.microsoft"),
        ir.node("Attention", []),
        ir.node("QLinearMatMul", []),
        ir.node("MatMul", [], name="float one"),
    ]
    report = count_kernels(ir.Graph([], [], nodes=nodes, opset_imports={"": 23}), expected=2)
    assert report.integer == {"QLinearMatMul": 1}
    assert report.floating == {"Attention": 1, "MatMul": 1}
    assert report.low_bit_weights == {"bits=4 accuracy_level=0": 1}
    assert report.fell_back == ("float one is computed in float, read by an output",)
