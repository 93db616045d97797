"""Output heads in few bits beside float activations: stored once with the table they share, multiplied as integers."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from bitlower.backends.onnx_qdq import export, verify
from bitlower.backends.onnx_qdq.rewrite.editor import Editor
from bitlower.backends.onnx_qdq.rewrite.heads import BASE, LARGEST, ZERO, digits
from bitlower.backends.onnx_qdq.verify.constants import check_constants
from bitlower.frontends import load
from bitlower.ir import Granularity, Grid, Program, QuantSpec, Scheme
from bitlower.passes import Context, PassManager
from bitlower.passes.lowering.lower_integer import LowerInteger
from bitlower.passes.quantizers.calibrate import Calibrate
from bitlower.passes.quantizers.quantize import Quantize

ROWS, WIDTH = 600, 48
FORMS = ("qdq", "onnxruntime")


class Tied(torch.nn.Module):
    """A table that is the output head too; one of its rows is an outlier."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = torch.nn.Embedding(ROWS, WIDTH), torch.nn.Linear(WIDTH, WIDTH)
        self.table.weight.data[7] *= 100

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.table(ids)
        return torch.nn.functional.linear(hidden + self.inner(hidden), self.table.weight)


def batch(length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    return {"ids": torch.randint(0, ROWS, (2, length), generator=torch.Generator().manual_seed(seed))}


BATCHES = [batch(5, 1), {"ids": torch.tensor([[7, 3, 7], [1, 7, 2]])}]


@cache
def tied() -> Program:
    torch.manual_seed(0)
    return load(Tied().eval(), example_inputs=batch(3))


def quantized(embeddings: QuantSpec, base: str = "W4A16-g16") -> Program:
    scheme = dataclasses.replace(Scheme.parse(base), embeddings=embeddings)
    passes = [Quantize(scheme=scheme), Calibrate(weights="minmax"), LowerInteger()]
    return PassManager(passes).run(tied(), Context(calibration=BATCHES))


def rows(bits: int, *, asymmetric: bool = False) -> QuantSpec:
    return QuantSpec(Grid(bits, signed=not asymmetric, symmetric=not asymmetric), Granularity.per_channel(0))


SPECS = [rows(8), rows(8, asymmetric=True), rows(6), rows(4), rows(4, asymmetric=True), rows(3)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_tied_table_is_stored_once_and_its_head_has_a_kernel(spec: QuantSpec, form: Any, tmp_path: Path) -> None:
    report = export(quantized(spec), tmp_path, batches=BATCHES, form=form)
    large = [t for t in onnx.load(tmp_path / "model.onnx").graph.initializer if len(t.raw_data) > ROWS * WIDTH // 4]
    assert [len(tensor.raw_data) for tensor in large] == [ROWS * WIDTH * spec.grid.bits // 8]
    kernels = report.verification.kernels
    packed = spec.grid.bits == 4 and form == "onnxruntime"
    assert (kernels.expected, kernels.found) == ((0, 0) if packed else (1, 1))
    assert kernels.low_bit_weights == {"bits=4 accuracy_level=1": 2 if packed else 1}
    assert kernels.expected_low_bit == (2 if packed else 1)
    assert report.verification.summary()["output_relative_error"] < 2e-5
    verify(tmp_path)


@pytest.mark.parametrize(
    ("base", "bits", "form"),
    [
        (base, bits, FORMS[(place + number) % 2])
        for place, base in enumerate(["W8A8", "W8A8-token", "2-2-8"])
        for number, bits in enumerate([2, 3, 4, 6, 8])
    ],
)
def test_a_tied_table_is_stored_once_beside_quantized_activations_too(
    base: str, bits: int, form: Any, tmp_path: Path
) -> None:
    report = export(quantized(rows(bits), base), tmp_path, batches=BATCHES, opset=25, form=form)
    large = [t for t in onnx.load(tmp_path / "model.onnx").graph.initializer if len(t.raw_data) > ROWS * WIDTH // 5]
    assert [len(tensor.raw_data) for tensor in large] == [ROWS * WIDTH * bits // 8]
    assert [tensor.data_type for tensor in large] == [TensorProto.INT8 if bits == 8 else TensorProto.UINT8]
    assert report.verification.kernels.found == report.verification.kernels.expected == 2
    verify(tmp_path)


@pytest.mark.parametrize(("spec", "form"), [(rows(4), "onnxruntime"), (rows(3), "qdq"), (rows(8), "qdq")], ids=str)
def test_changed_codes_of_a_tied_table_are_found(spec: QuantSpec, form: Any, tmp_path: Path) -> None:
    program = quantized(spec)
    export(program, tmp_path, batches=BATCHES, form=form)
    model = onnx.load(tmp_path / "model.onnx")
    [table] = [t for t in model.graph.initializer if len(t.raw_data) > ROWS * WIDTH // 4]
    table.raw_data = bytes([table.raw_data[0] ^ 1]) + table.raw_data[1:]
    problems = check_constants(program, ir.from_proto(model)).problems
    assert any(f"1 of the {ROWS * WIDTH} codes of table.weight_codes are not" in problem for problem in problems)


def test_a_wrong_scale_at_the_head_alone_is_found(tmp_path: Path) -> None:
    program = quantized(rows(8))
    export(program, tmp_path, batches=BATCHES, form="onnxruntime")
    model = onnx.load(tmp_path / "model.onnx")
    [head] = [node for node in model.graph.node if node.op_type == "MatMulIntegerToFloat"]
    [scale] = [tensor for tensor in model.graph.initializer if tensor.name == head.input[3]]
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * np.float32(1.01), scale.name))
    assert any("the scale of table.weight_codes" in p for p in check_constants(program, ir.from_proto(model)).problems)


@cache
def splitter() -> onnxruntime.InferenceSession:
    """x [n, 8] → its digits and what they are worth."""
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("Identity", ["x"], ["codes"]), helper.make_node("Identity", ["x"], ["worth"])], "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])],
            [helper.make_tensor_value_info("codes", TensorProto.UINT8, None),
             helper.make_tensor_value_info("worth", TensorProto.FLOAT, None)],
        ), opset_imports=[helper.make_opsetid("", 21)], ir_version=10,
    )  # fmt: skip
    graph = ir.from_proto(model)
    editor, node = Editor(graph), next(iter(graph.graph))
    last = list(graph.graph)[-1]
    for old, new in zip((node, last), digits(editor, node, graph.graph.inputs[0]), strict=True):
        editor.replace(old.outputs[0], new)
    editor.finish()
    return onnxruntime.InferenceSession(ir.to_proto(graph).SerializeToString())


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=8, max_size=8))
@settings(max_examples=200, deadline=None)
def test_three_digits_are_a_grid_of_a_millionth(values: list[float]) -> None:
    """Codes keep two products of bytes below 2^15, and the digits add up to the value but for half a step."""
    x = np.array([values], np.float32)
    codes, worth = splitter().run(None, {"x": x})
    assert codes.shape == (1, 3, 8)
    assert codes.max() <= 2 * ZERO
    found = (worth.astype(np.float64) @ (codes.astype(np.float64) - ZERO))[0, 0]
    step = max(float(np.abs(x).max()) / LARGEST, float(np.finfo(np.float32).tiny)) / BASE**2
    assert np.abs(found - x[0].astype(np.float64)).max() <= 0.6 * step
