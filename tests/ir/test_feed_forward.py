"""Feed-forward parts of real families: named by the module paths that transformers gives them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from bitlower.frontends import load
from bitlower.ir import Program
from bitlower.ir.dataflow import LINEAR, residual_sums, value_root
from bitlower.ir.feed_forward import feed_forwards
from bitlower.ir.operators import LinearNode
from bitlower.passes import Context, PassManager, parse_pipeline

ENDS = {
    "bert": ("encoder.layer.{}.intermediate.dense", "encoder.layer.{}.output.dense"),
    "llama": ("model.layers.{}.mlp.up_proj", "model.layers.{}.mlp.down_proj"),
    "gemma": ("model.layers.{}.mlp.up_proj", "model.layers.{}.mlp.down_proj"),
    "gpt2": ("transformer.h.{}.mlp.c_fc", "transformer.h.{}.mlp.c_proj"),
    "opt": ("model.decoder.layers.{}.fc1", "model.decoder.layers.{}.fc2"),
    "opt-post-norm": ("model.decoder.layers.{}.fc1", "model.decoder.layers.{}.fc2"),
    "gpt-neox": ("gpt_neox.layers.{}.mlp.dense_h_to_4h", "gpt_neox.layers.{}.mlp.dense_4h_to_h"),
    "phi": ("model.layers.{}.mlp.fc1", "model.layers.{}.mlp.fc2"),
}
"""The first and the last linear layer of each feed-forward part."""


def check(program: Program, name: str) -> None:
    linears = {node.meta["path"]: node for node in program.graph.nodes if node.target in LINEAR}
    sums = residual_sums(program.graph)
    per_layer = len(sums) // 2
    found = feed_forwards(program.graph)
    assert len(found) == 2
    for index, part in enumerate(found):
        first, last = (linears[path.format(index)] for path in ENDS[name])
        assert part.output is last
        assert part.sum is sums[(index + 1) * per_layer - 1]
        assert part.input is not None
        assert part.input in (LinearNode(first).x, *LinearNode(first).x.all_input_nodes)
        assert part.stream in [value_root(node) for node in part.sum.all_input_nodes[:2]]


@pytest.mark.parametrize("name", ENDS)
def test_every_family(name: str, family: Callable[[str], Program]) -> None:
    check(family(name), name)


def test_with_quantizers_in_between(
    family: Callable[[str], Program], feed: Callable[..., dict[str, torch.Tensor]]
) -> None:
    program = family("bert")
    passes = parse_pipeline("quantize{scheme=W8A8-full},calibrate{activations=minmax}")
    check(PassManager(passes).run(program, Context([feed(program)])), "bert")


class TwoInputs(nn.Module):
    """A branch whose first linear layers read different values."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.one(x.relu()) * self.two(x.tanh()))


def test_a_branch_that_reads_several_values_has_no_input() -> None:
    program = load(TwoInputs(), example_inputs={"x": torch.randn(2, 5, 8)})
    [part] = feed_forwards(program.graph)
    assert part.output.meta["path"] == "down"
    assert part.input is None
    assert part.sum is program.graph.output_node().args[0][0]
