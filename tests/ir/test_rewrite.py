"""Rules as data: where they are tried, what is told of a miss, what new nodes inherit."""

from __future__ import annotations

import torch
from torch import fx, nn

from bitlower.frontends import load
from bitlower.ir import Program, TensorType
from bitlower.ir.rewrite import Miss, Rule, apply_rules, replace, sole_user

aten = torch.ops.aten


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(self.inner(x)) + torch.cos(x)


def trace() -> Program:
    return load(Chain(), example_inputs={"x": torch.randn(3, 4)})


def test_a_rule_is_tried_at_its_roots_and_a_miss_is_told() -> None:
    program = trace()
    tried: list[object] = []

    def refuse(module: fx.GraphModule, node: fx.Node) -> str | None:
        tried.append(node.target)
        return "too small" if node.target is aten.relu.default else None

    rule = Rule("refuse", frozenset({aten.relu.default, aten.sin.default}), refuse)
    assert apply_rules([rule], program.module) == (False, [Miss("refuse", "relu", "inner", "too small")])
    assert tried == [aten.relu.default, aten.sin.default]


def test_a_replacement_takes_the_place_and_the_origin() -> None:
    program = trace()
    (old,) = program.graph.find_nodes(op="call_function", target=aten.relu.default)
    path, kind = old.meta["path"], TensorType(torch.float32, ("batch", "sequence"))

    def gelu(module: fx.GraphModule, node: fx.Node) -> fx.Node:
        return replace(node, aten.gelu.default, (node.args[0],), kind, approximate="tanh")

    assert apply_rules([Rule("gelu", frozenset({aten.relu.default}), gelu)], program.module) == (True, [])
    program.recompile()
    (new,) = program.graph.find_nodes(op="call_function", target=aten.gelu.default)
    assert (new.meta["path"], new.meta["type"], new.kwargs) == (path, kind, {"approximate": "tanh"})
    assert not program.graph.find_nodes(op="call_function", target=aten.relu.default)
    x = torch.randn(5, 4)
    expected = torch.sin(nn.functional.gelu(x, approximate="tanh")) + torch.cos(x)
    torch.testing.assert_close(program(x=x)["output"], expected)


def test_sole_user() -> None:
    program = trace()
    (x,) = program.graph.find_nodes(op="placeholder")
    (relu,) = program.graph.find_nodes(op="call_function", target=aten.relu.default)
    assert sole_user(x) is None
    assert sole_user(relu).target is aten.sin.default
