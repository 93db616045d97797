"""Activation functions written out by hand, against torch's own."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

from bitlower.frontends import load
from bitlower.ir import Program
from bitlower.ir.rewrite import apply_rules
from bitlower.passes.canonical._gelu import RULES

aten = torch.ops.aten


class Function(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def gpt2(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def bloom(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


def by_erf(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def silu(x: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(x) * x


CASES = [
    (gpt2, aten.gelu.default, {"approximate": "tanh"}),
    (bloom, aten.gelu.default, {"approximate": "tanh"}),
    (by_erf, aten.gelu.default, {}),
    (silu, aten.silu.default, {}),
]


def fold(function: Callable, inputs: torch.Tensor) -> tuple[Program, bool, list[str]]:
    program = load(Function(function), example_inputs={"x": inputs})
    expected = program(x=inputs * 3)
    changed, misses = apply_rules(RULES, program.module)
    program.recompile()
    for name, value in program(x=inputs * 3).items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-5)
    return program, changed, [miss.reason for miss in misses]


@pytest.mark.parametrize(("function", "target", "options"), CASES)
def test_a_known_function_becomes_one_operator(function: Callable, target: object, options: dict[str, str]) -> None:
    program, changed, _ = fold(function, torch.randn(3, 4))
    assert changed
    (node,) = [n for n in program.graph.nodes if n.op == "call_function"]
    assert (node.target, node.kwargs) == (target, options)


@pytest.mark.parametrize(("function", "target", "options"), CASES)
def test_it_is_found_between_other_elementwise_steps(function: Callable, target: object, options: object) -> None:
    """Before it a sum of two values, behind it a product, as in a gated feed-forward."""
    program, _, _ = fold(lambda x: function(torch.sin(x) + 1) * x, torch.randn(3, 4))
    assert [n.target for n in program.graph.nodes if n.op == "call_function"] == [
        aten.sin.default, aten.add.Tensor, target, aten.mul.Tensor,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "function",
    [
        torch.tanh,
        torch.sigmoid,
        lambda x: x * torch.sigmoid(1.702 * x),
        lambda x: 30 * torch.tanh(x / 30),
        lambda x: 0.5 * x * (1 + torch.tanh(0.79788 * (x + 0.0447 * x**3))),
        lambda x: x * torch.sigmoid(x + x[:1]),
        lambda x: (s := torch.sigmoid(x)) * x + s,
    ],
)
def test_another_function_stays_and_says_so(function: Callable) -> None:
    inputs = torch.randn(3, 4)
    program = load(Function(function), example_inputs={"x": inputs})
    program.recompile()
    nodes = [n.target for n in program.graph.nodes]
    changed, misses = apply_rules(RULES, program.module)
    assert not changed
    assert misses
    assert {miss.reason for miss in misses} == {"the values around it are those of no known activation function"}
    assert [n.target for n in program.graph.nodes] == nodes


def test_torch_s_own_is_not_touched() -> None:
    _, changed, misses = fold(lambda x: functional.gelu(x) + functional.silu(x), torch.randn(3, 4))
    assert (changed, misses) == (False, [])
