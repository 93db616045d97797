"""Slices that legalize cut come together where they are whole, and stay, with a reason, where one is read alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from bitlower.frontends import load
from bitlower.ir import Program, Scheme, get_tensor, ops
from bitlower.ir.verifier import verify
from bitlower.passes import Context
from bitlower.passes.lowering._fusion_groups import COLUMNS, regroup
from bitlower.passes.lowering.legalize import Legalize
from bitlower.passes.lowering.lower_integer import LowerInteger
from bitlower.passes.quantizers.calibrate import Calibrate
from bitlower.passes.quantizers.quantize import Quantize

aten = torch.ops.aten


class Two(nn.Module):
    """Two linears on one value."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(12, 4), nn.Linear(12, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.a(x), self.b(x)], -1)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 12, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 4, 12)


def lowered(x: torch.Tensor, scheme: str, run, *more) -> Program:
    program = load(Two(), example_inputs={"x": x})
    passes = (Quantize(Scheme.parse(scheme)), Calibrate(), *more, LowerInteger())
    return run(program, *passes, context=Context(calibration=[{"x": x}]))


def count(program: Program, target: object) -> int:
    return len(program.graph.find_nodes(op="call_function", target=target))


@pytest.mark.parametrize(("scheme", "shape"), [("W8A8-peg3", (1, 3)), ("W8A8-upeg3", (1, 12))])
def test_the_value_has_its_groups_again(x, run, scheme: str, shape: tuple[int, ...]) -> None:
    """Scale by scale those of the program that was not cut; one linear each, with the slices that it sums."""
    cut, whole = lowered(x, scheme, run, Legalize()), lowered(x, scheme, run)
    assert count(cut, ops.quantize) == 3
    [split] = cut.graph.find_nodes(op="call_function", target=aten.split_with_sizes.default)
    sizes = list(split.args[1])
    stands_for, misses = regroup(cut.module)
    assert not misses
    assert [old.target for old in stands_for.values()] == [aten.add.Tensor] * 2
    assert [new.meta[COLUMNS] for new in stands_for] == [sizes, sizes]
    cut.recompile()
    verify(cut)
    assert count(cut, ops.quantize) == count(whole, ops.quantize) == 1
    assert count(cut, aten.linear.default) == 2
    [quantize] = cut.graph.find_nodes(op="call_function", target=ops.quantize)
    scale = get_tensor(cut.module, quantize.args[1].target)
    assert scale.shape == shape
    assert np.array_equal(scale, get_tensor(whole.module, "quantizers.x.scale"))
    assert quantize.meta["quantizer"].tensor == "x"


def test_a_slice_that_something_reads_alone_stays(x, run) -> None:
    cut = lowered(x, "W8A8-peg3", run, Legalize())
    first = cut.graph.find_nodes(op="call_function", target=ops.dequantize)
    value = next(node for node in first if node.args[0].target is ops.quantize)
    output = cut.graph.output_node()
    with cut.graph.inserting_before(output):
        more = cut.graph.call_function(aten.exp.default, (value,))
    more.meta = dict(value.meta)
    del more.meta["quantizer"]
    output.args = ((*output.args[0], more),)
    before = len(cut.graph.nodes)
    stands_for, [miss] = regroup(cut.module)
    assert not stands_for
    assert (miss.rule, miss.reason) == ("groups", "something reads a slice alone")
    assert len(cut.graph.nodes) == before


def test_other_splits_are_no_groups(run) -> None:
    class Split(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first, second = x.split([4, 8], -1)
            return first.sum() * second

    program = load(Split(), example_inputs={"x": torch.randn(5, 12)})
    assert regroup(program.module) == ({}, [])
