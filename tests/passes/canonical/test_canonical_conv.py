"""Convolutions of size 1 against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bitlower.frontends import load
from bitlower.ir import Program
from bitlower.ir.dataflow import linears
from bitlower.passes import Context
from bitlower.passes.canonical.clean import Clean, CleanReport

aten = torch.ops.aten


class Convolved(nn.Module):
    """``x`` [batch, length, 8] through convolutions over [batch, 8, length (, 1)]."""

    def __init__(self, *layers: nn.Module, images: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.images = images

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.permute(0, 2, 1)
        y = self.layers(x[..., None] if self.images else x)
        return (y[..., 0] if self.images else y).permute(0, 2, 1)


def clean(module: nn.Module) -> tuple[Program, Program, CleanReport]:
    program = load(module.eval(), example_inputs={"x": torch.randn(2, 6, 8)})
    result, context = program.clone(), Context()
    Clean().run(result, context)
    result.recompile()
    return program, result, context.results[CleanReport]


def targets(program: Program) -> list[object]:
    return [node.target for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(("groups", "bias"), [(1, True), (4, True), (2, False)])
def test_a_convolution_of_size_1_is_a_linear_layer_a_group(groups: int, bias: bool) -> None:
    torch.manual_seed(0)
    module = Convolved(nn.Conv1d(8, 12, 1, groups=groups, bias=bias), nn.ReLU(), nn.Conv1d(12, 4, 1))
    program, result, _ = clean(module)
    found = linears(result.graph)
    assert len(found) == groups + 1
    assert [tuple(node.args[1].meta["type"].shape) for node in found[:-1]] == [(12 // groups, 8 // groups)] * groups
    assert found[-1].args[1].target == "layers.2.weight"
    assert result.transposed == ()
    assert not {aten.conv1d.default, aten.conv1d.padding} & set(targets(result))
    x = torch.randn(3, 5, 8)
    torch.testing.assert_close(result(x=x)["output"], program(x=x)["output"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result(x=x)["output"], module(x), rtol=1e-5, atol=1e-6)


def test_permutations_between_linear_layers_go() -> None:
    _, result, _ = clean(Convolved(nn.Conv1d(8, 12, 1), nn.Conv1d(12, 8, 1, padding="same")))
    assert targets(result) == [aten.linear.default, aten.linear.default]


def test_a_convolution_of_images_is_one_too() -> None:
    module = Convolved(nn.Conv2d(8, 6, 1), images=True)
    program, result, _ = clean(module)
    assert len(linears(result.graph)) == 1
    x = torch.randn(3, 5, 8)
    torch.testing.assert_close(result(x=x)["output"], program(x=x)["output"], rtol=1e-5, atol=1e-6)


class Shared(nn.Module):
    """One kernel for two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.conv(x.permute(0, 2, 1)))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Convolved(nn.Conv1d(8, 4, 3, padding=1)), "its kernel has the size 3"),
        (Convolved(nn.Conv1d(8, 4, 1, stride=2)), "it has a stride or a padding"),
        (Convolved(nn.Conv1d(8, 4, 1, padding=1)), "it has a stride or a padding"),
        (Convolved(nn.Conv1d(8, 8, 1, groups=8)), "its 8 groups are too many for linear layers of their own"),
        (Shared(), "its weight is read elsewhere too"),
    ],
)
def test_what_stays_a_convolution_says_why(module: nn.Module, reason: str) -> None:
    program, result, report = clean(module)
    assert reason in {miss.reason for miss in report.misses}
    assert not linears(result.graph)
    x = torch.randn(3, 5, 8)
    torch.testing.assert_close(result(x=x)["output"], program(x=x)["output"], rtol=0, atol=0)
