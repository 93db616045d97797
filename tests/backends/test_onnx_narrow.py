"""Codes of 2 to 7 bits beside quantized activations, and tables of them: small in the file, right in onnxruntime."""

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
from onnx import TensorProto, helper, numpy_helper

from bitlower.backends.onnx_qdq import export, verify
from bitlower.backends.onnx_qdq.encoding.narrow import SMALL, is_packable, pack_rows, type_bits, unpack_rows
from bitlower.backends.onnx_qdq.rewrite.codes import unfold_rows
from bitlower.backends.onnx_qdq.rewrite.editor import Editor
from bitlower.backends.onnx_qdq.sizes import OnnxSizes
from bitlower.backends.onnx_qdq.verify.constants import check_constants
from bitlower.frontends import load
from bitlower.ir import CheckError, Granularity, Grid, Program, QuantSpec, Scheme
from bitlower.passes import Context, PassManager
from bitlower.passes.lowering.lower_integer import LowerInteger
from bitlower.passes.quantizers.calibrate import Calibrate
from bitlower.passes.quantizers.quantize import Quantize

ROWS, WIDTH = 600, 64
FORMS = ("qdq", "onnxruntime")
UNSIGNED = Grid(3, signed=False, symmetric=False)


class Reader(torch.nn.Module):
    """A table, a small one, and a feed-forward network."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.kinds = torch.nn.Embedding(ROWS, WIDTH), torch.nn.Embedding(4, WIDTH)
        self.norm, self.up, self.down = (
            torch.nn.LayerNorm(WIDTH),
            torch.nn.Linear(WIDTH, 96),
            torch.nn.Linear(96, WIDTH),
        )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.table(ids) + self.kinds(ids % 4))
        return hidden + self.down(torch.nn.functional.gelu(self.up(hidden)))


def batch(length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    return {"ids": torch.randint(0, ROWS, (2, length), generator=torch.Generator().manual_seed(seed))}


BATCHES = [batch(5, 1), batch(1, 2), batch(19, 3)]


@cache
def reader() -> Program:
    torch.manual_seed(0)
    return load(Reader().eval(), example_inputs=batch(3))


def quantized(scheme: Scheme) -> Program:
    passes = [Quantize(scheme=scheme), Calibrate(), LowerInteger()]
    return PassManager(passes).run(reader(), Context(calibration=BATCHES))


def initializers(folder: Path) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in onnx.load(folder / "model.onnx").graph.initializer}


@pytest.mark.parametrize("count", [1, 8, 13, 64])
@pytest.mark.parametrize("bits", range(2, 8))
def test_rows_are_unfolded_by_the_runtime(bits: int, count: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (2, 5, count)).astype(np.uint8)
    rows = pack_rows(codes, bits)
    np.testing.assert_array_equal(unpack_rows(rows, bits, count, is_signed=False), codes)
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("Identity", ["rows"], ["codes"])], "g",
            [helper.make_tensor_value_info("rows", TensorProto.UINT8, rows.shape)],
            [helper.make_tensor_value_info("codes", TensorProto.UINT8, None)],
        ), opset_imports=[helper.make_opsetid("", 21)], ir_version=10,
    )  # fmt: skip
    graph = ir.from_proto(model)
    editor, node = Editor(graph), next(iter(graph.graph))
    editor.replace(node.outputs[0], unfold_rows(editor, node, graph.graph.inputs[0], bits, count))
    editor.finish()
    session = onnxruntime.InferenceSession(ir.to_proto(graph).SerializeToString())
    np.testing.assert_array_equal(session.run(None, {"rows": rows})[0], codes)


@pytest.mark.parametrize("bits", [2, 4, 7])
def test_signed_codes_survive_packing(bits: int) -> None:
    half = 1 << (bits - 1)
    codes = np.random.default_rng(0).integers(-half, half, (7, 12)).astype(np.int8)
    np.testing.assert_array_equal(unpack_rows(pack_rows(codes, bits), bits, 12, is_signed=True), codes)


CASES = [("W4A8-e4", 23), ("W4A8-e3", 21), ("W4A8-e2", 23), ("W2A8-e2", 25), ("W2A8-e2", 24), ("W4A8-token-e4", 23)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("name", "opset"), CASES)
def test_files_are_as_small_as_the_scheme_says_and_run_in_integers(
    name: str, opset: int, form: Any, tmp_path: Path
) -> None:
    program, scheme = quantized(Scheme.parse(name)), Scheme.parse(name)
    report = export(program, tmp_path, batches=BATCHES, form=form, opset=opset)
    assert report.verification.kernels.found == report.verification.kernels.expected == 2
    stored = initializers(tmp_path)
    bits = scheme.embeddings.grid.bits
    rows = stored["table.weight_codes_packed"]
    assert (rows.data_type, list(rows.dims)) == (TensorProto.UINT8, [ROWS, WIDTH * bits // 8])
    assert stored["kinds.weight_codes"].data_type == TensorProto.INT8
    two = scheme.weights.grid.bits == 2 and opset >= 25
    assert stored["up.weight_codes"].data_type == (TensorProto.INT2 if two else TensorProto.INT4)
    target = OnnxSizes(opset, form)
    planned = target.overhead(program) + sum(
        target.quantized(quantizer, shape)
        for node, quantizer in program.quantizers()
        if (shape := node.meta["type"].shape) and quantizer.role in ("linear-weight", "embedding-table")
    )
    assert (tmp_path / "model.onnx").stat().st_size == pytest.approx(planned, rel=0.2)
    verify(tmp_path)


@pytest.mark.parametrize("bits", [2, 4])
def test_the_form_onnxruntime_gathers_floats_in_one_step(bits: int, tmp_path: Path) -> None:
    for name, spec in {
        "row": QuantSpec(Grid(bits), Granularity.per_channel(0)),
        "blocks": QuantSpec(Grid(bits), Granularity.per_group(32)),
        "points": QuantSpec(Grid(bits, signed=False, symmetric=False), Granularity.per_group(16)),
    }.items():
        program = quantized(dataclasses.replace(Scheme.parse("W8A8"), embeddings=spec))
        (tmp_path / name).mkdir()
        report = export(program, tmp_path / name, batches=BATCHES, form="onnxruntime")
        assert report.operators["com.microsoft.GatherBlockQuantized"] == 1
        assert report.rules["gather-blocks"]["applied"] == 1


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(UNSIGNED, Granularity.per_channel(0)),
        QuantSpec(Grid(4), Granularity.per_tensor()),
        QuantSpec(Grid(6), Granularity.row_group(2)),
        QuantSpec(Grid(5, signed=False, symmetric=False), Granularity.per_tensor()),
    ],
    ids=str,
)
@pytest.mark.parametrize("form", FORMS)
def test_tables_of_every_grid_are_the_program_s(spec: QuantSpec, form: Any, tmp_path: Path) -> None:
    program = quantized(dataclasses.replace(Scheme.parse("W8A8"), embeddings=spec))
    report = export(program, tmp_path, batches=BATCHES, form=form)
    assert report.operators.get("com.microsoft.GatherBlockQuantized") is None
    rows = initializers(tmp_path)["table.weight_codes_packed"]
    assert list(rows.dims) == [ROWS, WIDTH * spec.grid.bits // 8]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("bits", "group"), [(3, 32), (4, 32), (4, 8)])
def test_tables_in_groups_take_the_bytes_that_are_planned(form: Any, bits: int, group: int, tmp_path: Path) -> None:
    spec = QuantSpec(Grid(bits), Granularity.per_group(group))
    program = quantized(dataclasses.replace(Scheme.parse("W8A8"), embeddings=spec))
    export(program, tmp_path, batches=BATCHES, form=form)
    [rows] = [tensor for name, tensor in initializers(tmp_path).items() if name.startswith("table.weight_codes")]
    quantizer = next(q for _, q in program.quantizers() if q.tensor == "table.weight")
    planned = OnnxSizes(form=form).quantized(quantizer, (ROWS, WIDTH))
    assert len(rows.raw_data) + 4 * ROWS * WIDTH // group == planned
    assert list(rows.dims) == [ROWS, WIDTH // 2 if (form, bits, group) == ("onnxruntime", 4, 32) else WIDTH]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("tensor", "problem"),
    [
        ("table.weight_codes_packed", "1 of the 38400 codes of table.weight_codes are not the program's"),
        ("table.weight_scale", "the scale of table.weight_codes is not the program's"),
        ("up.weight_codes", "1 of the 6144 codes of up.weight_codes are not the program's"),
    ],
)
def test_a_changed_constant_is_found(form: Any, tensor: str, problem: str, tmp_path: Path) -> None:
    program = quantized(Scheme.parse("W4A8-e4"))
    export(program, tmp_path, batches=BATCHES, form=form)
    path = tmp_path / "model.onnx"
    assert check_constants(program, ir.load(path)).problems == ()
    model = onnx.load(path)
    [stored] = [each for each in model.graph.initializer if each.name == tensor]
    if tensor.endswith("scale"):
        array = numpy_helper.to_array(stored).copy()
        array.flat[7] *= 2
        stored.CopyFrom(numpy_helper.from_array(array, tensor))
    else:
        data = bytearray(stored.raw_data)
        data[100] ^= 1
        stored.raw_data = bytes(data)
    onnx.save(model, path)
    assert any(problem in each for each in check_constants(program, ir.load(path)).problems)
    with pytest.raises(CheckError):
        verify(tmp_path)


def test_small_tables_and_codes_of_8_bits_are_not_packed() -> None:
    codes = np.zeros(SMALL, np.uint8)
    assert [is_packable(codes[: SMALL - less], bits) for less, bits in ((0, 4), (0, 7), (1, 4), (0, 8))] == [
        *(True, True),
        *(False, False),
    ]


def test_types_by_opset() -> None:
    assert [type_bits(bits, 23) for bits in range(2, 9)] == [4, 4, 4, 8, 8, 8, 8]
    assert type_bits(2, 25) == 2
