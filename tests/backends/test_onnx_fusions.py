"""Operators between quantizers, which onnxruntime fuses into ones on codes: their codes are those of the Program."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import onnx
import pytest
import torch
from torch import fx, nn
from torch.nn import functional

from bitlower.backends.onnx_qdq.rewrite.pipeline import lower
from bitlower.backends.onnx_qdq.verify.compare import verify_export
from bitlower.backends.onnx_qdq.write.files import write_model
from bitlower.frontends import load
from bitlower.ir import CheckError, Granularity, Grid, Level, Program, QuantSpec
from bitlower.ir.dataflow import QUANTIZER
from bitlower.ir.quantizer_node import QuantizerNode
from bitlower.passes import Context
from bitlower.passes.lowering.lower_integer import LowerInteger
from bitlower.passes.quantizers._placement import QuantizationSite, insert_quantizer

UNSIGNED = QuantSpec(Grid(8, signed=False, symmetric=False), Granularity.per_tensor())
SIGNED = QuantSpec(Grid(8, symmetric=False), Granularity.per_tensor())
SPREAD = {"softmax": 0.0007, "mean": 0.004}
"""Steps of results that are small; others have 0.0171."""


class Between(nn.Module):
    """What may stand between two quantizers, each an output."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (
            torch.softmax(x, -1),
            torch.softmax(x.transpose(1, 2), -1),
            torch.softmax(x, 1).transpose(1, 2),
            torch.sigmoid(x),
            functional.leaky_relu(x, 0.1),
            torch.relu(x),
            functional.gelu(x),
            x * y,
            x + y,
            torch.cat((x, y), -1),
            x.mean(1),
            x.amax(-1),
            x.clamp(-1, 1),
            torch.where(y > 0, x, y),
            functional.avg_pool1d(x, 3),
            x @ y.transpose(1, 2),
            x.transpose(1, 2),
        )


class Attending(nn.Module):
    """A softmax between two quantizers that is no output."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x, -1) @ y.transpose(1, 2)


def quantized(spec: QuantSpec) -> Program:
    """Both inputs rounded, and then each result, with other scales."""
    program = traced().clone()
    return rounded(program, spec, [*program.graph.find_nodes(op="placeholder"), *program.graph.output_node().args[0]])


def rounded(program: Program, spec: QuantSpec, values: list[fx.Node]) -> Program:
    """The integer program that rounds two inputs and what is made of them."""
    for place, value in enumerate(values):
        insert_quantizer(program, QuantizationSite("activation", value), spec)
        (node,) = (user for user in value.users if user.target in QUANTIZER)
        kind = next((step for name, step in SPREAD.items() if name in value.name), 0.0171)
        scale = (0.0312345, 0.0271828)[place] if place < 2 else kind
        zero_point = 7.0 + spec.grid.quant_min + 110 * (place < 2)
        QuantizerNode(node).set_range(program.module, torch.tensor(scale), torch.tensor(zero_point))
    program.level = Level.SIMULATED
    program.recompile()
    LowerInteger().run(program, Context())
    program.level = Level.INTEGER
    program.recompile()
    return program


@cache
def traced() -> Program:
    return load(Between(), example_inputs=batch(2, 6))


def batch(rows: int, length: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    return {name: 1.5 * torch.randn(rows, length, 24, generator=generator) for name in "xy"}


@pytest.mark.parametrize("spec", [UNSIGNED, SIGNED], ids=["uint8", "int8"])
def test_codes_are_the_programs_whatever_the_runtime_fuses(spec: QuantSpec, tmp_path: Path) -> None:
    program = quantized(spec)
    model, log = lower(program, opset=23, form="qdq")
    assert log.applied["keep-apart"] == 6
    write_model(model, tmp_path, threshold=0)
    verification = verify_export(program, tmp_path, [batch(7, 40)])
    assert len(verification.quantized) == 19
    assert verification.exposing == 0
    assert {row.name: row.worst for row in verification.quantized if row.equal < 0.999} == {}
    undo(tmp_path / "model.onnx")
    with pytest.raises(CheckError, match="is not its program"):
        verify_export(program, tmp_path, [batch(7, 40)])


def undo(path: Path) -> None:
    """Let every reader of a Sum of one operand read that operand."""
    model = onnx.load(path)
    same = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Sum"}
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = same.get(name, name)
    onnx.save(model, path)


def test_a_fused_softmax_that_no_output_shows_is_found(tmp_path: Path) -> None:
    program = load(Attending(), example_inputs=batch(2, 6))
    softmax = next(node for node in program.graph.nodes if "softmax" in node.name)
    program = rounded(program, UNSIGNED, [*program.graph.find_nodes(op="placeholder"), softmax])
    model, _ = lower(program, opset=23, form="qdq")
    write_model(model, tmp_path, threshold=0)
    assert verify_export(program, tmp_path, [batch(7, 40)]).quantized[-1].worst <= 1
    undo(tmp_path / "model.onnx")
    with pytest.raises(CheckError, match="softmax"):
        verify_export(program, tmp_path, [batch(7, 40)])
