"""Activations in embedding groups in onnxruntime: cut into slices they run in integers, whole they run right."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import onnx
import pytest
import torch

from bitlower.backends.onnx_qdq import ExportReport, export
from bitlower.frontends import load
from bitlower.ir import Batch, Program
from bitlower.passes import Context, PassManager, parse_pipeline

LINEARS = 2 * 6


@cache
def encoder() -> Program:
    """A BERT of two layers whose embedding dimensions have ranges that differ a lot."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        max_position_embeddings=40, attn_implementation="sdpa",
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "LayerNorm" in name or name.endswith("intermediate.dense.bias"):
                parameter *= torch.logspace(-0.5, 1, parameter.numel())
            elif name.endswith(("dense.weight", "query.weight")):
                parameter += 0.1 * torch.randn(parameter.shape)
    return PassManager(parse_pipeline("clean")).run(load(model.eval()), Context())


def inputs() -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    result: list[Batch] = []
    for _ in range(2):
        ids = torch.randint(1, 100, (3, 9), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, 6:] = 0
        result.append({"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)})
    return result


@cache
def program(scheme: str, legalize: str = "") -> Program:
    steps = f"quantize{{scheme={scheme}}},calibrate{{activations=minmax}},{legalize}lower-integer"
    return PassManager(parse_pipeline(steps)).run(encoder(), Context(calibration=inputs()))


def write(folder: Path, scheme: str, legalize: str = "", form: str = "qdq") -> ExportReport:
    """The export, which compares every code and all outputs with the program's."""
    folder.mkdir(exist_ok=True)
    return export(program(scheme, legalize), folder, batches=inputs(), form=form)


@pytest.mark.parametrize(
    ("scheme", "form"), [("W8A8-upeg3", "qdq"), ("W8A8-peg4", "onnxruntime"), ("W4A8-upeg2-full", "qdq")]
)
def test_slices_run_in_integers(tmp_path: Path, scheme: str, form: str) -> None:
    report = write(tmp_path, scheme, "legalize,", form)
    kernels = report.verification.kernels
    split = sum(n.target is torch.ops.aten.linear.default for n in program(scheme, "legalize,").graph.nodes)
    assert split > LINEARS
    assert kernels.integer == {"MatMulIntegerToFloat": kernels.expected}
    assert kernels.expected == split
    assert kernels.fell_back == ()
    assert max(row.given_codes for row in report.verification.outputs) < 2e-5


def test_weights_are_cut_and_not_copied(tmp_path: Path) -> None:
    report = write(tmp_path / "parts", "W8A8-upeg3", "legalize,")
    whole = write(tmp_path / "whole", "W8A8")
    sizes = []
    for folder in ("parts", "whole"):
        model = onnx.load(tmp_path / folder / "model.onnx")
        bytes_ = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
        sizes.append(sum(len(t.raw_data) for t in model.graph.initializer if t.data_type in bytes_ and len(t.dims) > 1))
    assert sizes[0] == sizes[1]
    assert report.verification.constants["codes"] == whole.verification.constants["codes"]
    scales = [t for t in model.graph.initializer if t.name.endswith("weight_scale")]
    assert len({t.name for t in scales}) == len(scales)


def test_whole_groups_run_in_float_and_the_report_says_so(tmp_path: Path) -> None:
    """onnxruntime takes scales along the last axis for one, and fails; here they are arithmetic."""
    report = write(tmp_path, "W8A8-upeg3-full")
    kernels = report.verification.kernels
    model = onnx.load(tmp_path / "model.onnx")
    shapes = {t.name: list(t.dims) for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            assert shapes[node.input[1]] == []
    reasons = kernels.float_reasons
    assert kernels.fell_back == ()
    assert reasons["the activation is quantized per-embedding-parts(3)"] == LINEARS - 2 + 4
    assert kernels.expected == kernels.found == 2
    assert kernels.floating["MatMul"] == LINEARS - 2 + 4
    assert kernels.headline()["dequantized_products"] == LINEARS - 2 + 4
    assert report.notes[-1] == (
        f"products of quantized operands that run in float: {LINEARS + 2}, since the activation is quantized"
        " per-embedding-parts(3); the pass `legalize` makes integer products of them"
    )


def test_what_is_put_together_again_is_named(tmp_path: Path) -> None:
    kernels = write(tmp_path, "W8A8-upeg3-full", "legalize,").verification.kernels
    assert kernels.float_reasons == {"the activation is put together of slices with scales of their own": 4}
    assert kernels.found == kernels.expected > LINEARS
