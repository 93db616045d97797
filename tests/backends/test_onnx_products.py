"""How 8-bit codes of weights are stored for products with 8-bit activations: signed, or unsigned and exact anywhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from bitlower.backends.onnx_qdq import export, verify
from bitlower.backends.onnx_qdq.rewrite.pipeline import lower
from bitlower.backends.onnx_qdq.runtime.products import chosen_signs, clips_products
from bitlower.backends.onnx_qdq.verify.constants import check_constants
from bitlower.frontends import load
from bitlower.ir import Program, get_tensor
from bitlower.passes import Context, PassManager, parse_pipeline

FORMS = ("qdq", "onnxruntime")
SCHEMES = ("W8A8", "W8A8-token", "W8A8-asym", "W4A8")
WIDTH, ROWS = 32, 96


class Tied(torch.nn.Module):
    """Two linears, the second of which multiplies with the table that is gathered from too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = torch.nn.Embedding(ROWS, WIDTH), torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(torch.relu(self.inner(self.table(ids))), self.table.weight)


BATCHES = [{"ids": torch.arange(n * ROWS // 4).reshape(n, -1) % ROWS} for n in (1, 3)]


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    return load(Tied().eval(), example_inputs={"ids": torch.arange(6).reshape(2, 3)})


def integer(program: Program, scheme: str) -> Program:
    return PassManager(parse_pipeline(f"quantize{{scheme={scheme}}},calibrate,lower-integer")).run(
        program, Context(BATCHES)
    )


def stored(model: ir.Model) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    for name, value in model.graph.initializers.items():
        assert value.const_value is not None
        yield name, value.const_value.numpy()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_unsigned_codes_are_verified_and_give_what_the_program_gives(
    program: Program, scheme: str, form: Any, tmp_path: Path
) -> None:
    quantized = integer(program, scheme)
    report = export(quantized, tmp_path, batches=BATCHES, form=form, weight_signs="unsigned")
    assert report.verification.kernels.found == report.verification.kernels.expected == 2
    verify(tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    [spec] = quantized.outputs
    for batch in BATCHES:
        [found] = session.run(None, {"ids": batch["ids"].numpy()})
        np.testing.assert_allclose(found, quantized(**batch)[spec.name].detach().numpy(), rtol=1e-4, atol=1e-4)
    options = json.loads((tmp_path / "manifest.json").read_text())["backend_options"]
    assert options["weight_signs"] == "unsigned"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scheme", ["W8A8", "W8A8-token"])
def test_they_are_the_signed_ones_and_128(program: Program, scheme: str, form: Any) -> None:
    quantized = integer(program, scheme)
    codes = get_tensor(quantized.module, "inner.weight_codes").numpy().T
    for signs, dtype, added in (("signed", np.int8, 0), ("unsigned", np.uint8, 128)):
        model, _ = lower(quantized, opset=23, form=form, weight_signs=signs)
        tensors = dict(stored(model))
        assert tensors["inner.weight_codes"].dtype == dtype
        np.testing.assert_array_equal(tensors["inner.weight_codes"].astype(int), codes.astype(int) + added)
        assert [value.size for value in tensors.values() if value.size >= ROWS * WIDTH] == [ROWS * WIDTH], "stored once"
        assert tensors["table.weight_codes"].dtype == np.int8, "the table is gathered as it is"
        assert check_constants(quantized, model).problems == ()


def test_codes_of_fewer_bits_stay_as_they_are(program: Program) -> None:
    """Sums of two products of theirs do not leave 16 bits."""
    quantized = integer(program, "W4A8")
    models = [lower(quantized, opset=23, form="qdq", weight_signs=signs)[0] for signs in ("signed", "unsigned")]
    first, second = ({name: value.tobytes() for name, value in stored(model)} for model in models)
    assert {name for name in first | second if first.get(name) != second.get(name)} <= {
        "table.weight_zero_point",
        "sign_bit",
    }


@pytest.mark.parametrize("name", ["inner.weight_codes", "inner.weight_zero_point", "table.weight_zero_point"])
def test_what_is_not_the_programs_is_found(program: Program, name: str, tmp_path: Path) -> None:
    quantized = integer(program, "W8A8")
    model, _ = lower(quantized, opset=23, form="qdq", weight_signs="unsigned")
    ir.save(model, tmp_path / "model.onnx")
    proto = onnx.load(tmp_path / "model.onnx")
    [tensor] = [each for each in proto.graph.initializer if each.name == name]
    changed = numpy_helper.to_array(tensor).copy()
    changed.flat[0] ^= 1
    tensor.CopyFrom(numpy_helper.from_array(changed, name))
    stem = name.rpartition("_codes")[0] or name.rpartition("_zero_point")[0]
    assert any(stem in problem for problem in check_constants(quantized, ir.from_proto(proto)).problems)


def test_it_is_known_whether_signed_products_are_exact_here() -> None:
    random = np.random.default_rng(0)
    x, codes = random.choice([0, 255], (64, 64)).astype(np.uint8), random.choice([-128, 127], (64, 64)).astype(np.int8)
    node = helper.make_node("MatMulInteger", ["x", "codes"], ["y"])
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", TensorProto.UINT8, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.INT32, x.shape)], [numpy_helper.from_array(codes, "codes")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    exact = np.array_equal(session.run(None, {"x": x})[0], x.astype(np.int64) @ codes.astype(np.int64))
    assert clips_products() == (not exact)
    assert chosen_signs("auto") == ("signed" if exact else "unsigned")
    assert chosen_signs("signed") == "signed"
