"""Convolutions over patches that do not overlap, against torch's own in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bitlower.frontends import load
from bitlower.ir import Program
from bitlower.ir.dataflow import linears
from bitlower.passes import Context
from bitlower.passes.canonical.clean import Clean, CleanReport


class Patches(nn.Module):
    """Patches of ``x`` [batch, 3, height, width] of one size as tokens, as vision transformers embed them."""

    def __init__(self, projection: nn.Module, *size: int) -> None:
        super().__init__()
        self.projection = projection
        self.head = nn.Linear(10, 4)
        self.size = size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[2:] != self.size:
            raise ValueError("pictures of another size")
        return self.head(self.projection(x).flatten(2).transpose(1, 2))


def clean(module: nn.Module, x: torch.Tensor) -> tuple[Program, CleanReport]:
    program = load(module.eval(), example_inputs={"x": x})
    context = Context()
    Clean().run(program, context)
    program.recompile()
    return program, context.results[CleanReport]


def convolutions(program: Program) -> list[str]:
    names = (str(node.target) for node in program.graph.nodes if node.op == "call_function")
    return [name for name in names if "conv" in name]


@pytest.mark.parametrize(
    ("projection", "size"),
    [
        (nn.Conv2d(3, 10, 4, stride=4), (8, 12)),
        (nn.Conv2d(3, 10, (2, 3), stride=(2, 3), bias=False), (4, 9)),
        (nn.Conv2d(3, 10, (2, 1), stride=(2, 1), padding="valid"), (4, 5)),
        (nn.Conv1d(3, 10, 4, stride=4), (12,)),
    ],
)
def test_patches_are_the_rows_of_a_linear_layer(projection: nn.Module, size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    module, x = Patches(projection, *size), torch.randn(2, 3, *size)
    expected_weight = projection.weight.detach().clone()
    program, report = clean(module, x)
    assert not report.misses
    assert not convolutions(program)
    patches, _ = linears(program.graph)
    assert patches.args[1].target == "projection.weight"
    assert patches.meta["path"] == "projection"
    weight = dict(program.tensors())["model/projection.weight"]
    assert isinstance(weight, nn.Parameter)
    torch.testing.assert_close(weight.detach(), expected_weight.flatten(1), rtol=0, atol=0)
    assert program.transposed == ()
    more = torch.randn(5, 3, *size)
    exact = copy.deepcopy(module).double()(more.double())
    torch.testing.assert_close(program(x=more)["output"].double(), exact, rtol=1e-5, atol=1e-5)


def test_the_batch_stays_dynamic() -> None:
    program, _ = clean(Patches(nn.Conv2d(3, 10, 4, stride=4), 8, 8), torch.randn(2, 3, 8, 8))
    assert [node.meta["type"].shape for node in linears(program.graph)] == [("batch", 2, 2, 10), ("batch", 4, 4)]


def test_whole_numbers_give_the_same_bits() -> None:
    torch.manual_seed(0)
    module = Patches(nn.Conv2d(3, 10, 4, stride=4), 8, 8)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=3)
        parameter.data.round_()
    x = torch.randn(2, 3, 8, 8).mul(5).round()
    program, _ = clean(module, x)
    torch.testing.assert_close(program(x=x)["output"], module(x), rtol=0, atol=0)


class Twice(nn.Module):
    """One kernel for two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 10, 2, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[2:] != (8, 8):
            raise ValueError("pictures of another size")
        return torch.cat([self.conv(x), self.conv(-x)], 1)


@pytest.mark.parametrize(
    ("projection", "reason"),
    [
        (nn.Conv2d(3, 10, 3, stride=3), "patches of 3 do not divide the size 8"),
        (nn.Conv2d(3, 10, 2, stride=2, padding=1), "it has a padding"),
        (nn.Conv2d(3, 10, 2, stride=2, dilation=2), "its patches have gaps"),
        (Twice(), "its weight is read elsewhere too"),
    ],
)
def test_what_stays_a_convolution_says_why(projection: nn.Module, reason: str) -> None:
    module = Patches(projection, 8, 8) if isinstance(projection, nn.Conv2d) else projection
    x = torch.randn(2, 3, 8, 8)
    program, report = clean(module, x)
    assert reason in {miss.reason for miss in report.misses if miss.rule == "patches"}
    assert convolutions(program)
    torch.testing.assert_close(program(x=x)["output"], module(x), rtol=0, atol=0)


class Sound(nn.Module):
    """Frames of a signal of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 10, 4, stride=4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x.permute(0, 2, 1))


def test_a_dynamic_length_stays_a_convolution() -> None:
    program, report = clean(Sound(), torch.randn(2, 12, 8))
    assert any("dynamic size" in miss.reason for miss in report.misses)
    assert convolutions(program)


def test_overlapping_patches_are_no_near_miss() -> None:
    _, report = clean(Patches(nn.Conv2d(3, 10, 3, stride=2), 8, 8), torch.randn(2, 3, 8, 8))
    assert {miss.rule for miss in report.misses} == {"pointwise-convolution"}
